"""What the command does with freed memory."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource

from jaxrl_post.cli.memory import keep_freed_memory

keep_freed_memory()

import jax
import jax.numpy as jnp

@jax.jit
def work(x):  # 64 MiB of temporary memory; the loop is what makes jax use a thread
    def again(_, x):
        wide = jax.lax.optimization_barrier(jnp.outer(x, x))
        product = wide @ jnp.outer(x, x[:128])
        return 0 * (wide.sum(axis=0) + product.sum(axis=1)) + x

    return jax.lax.fori_loop(0, 1, again, x)

x = jnp.ones(4096)
for _ in range(3):
    x = jax.block_until_ready(work(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
jax.block_until_ready(work(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> int:
    """Page faults of a program that has run three times before."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    kept.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**kept, **environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_temporary_memory_is_kept_unless_the_environment_says_otherwise():
    pages = (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert faults() < pages // 10
    # glibc was told something else, and is left alone.
    assert faults(MALLOC_TOP_PAD_="131072") > pages // 10
