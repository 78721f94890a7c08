"""The machine that tests see: eight CPU devices, no network, strict shapes.

Set in the environment, before jax is imported, so that programs started by tests find
the same; only the eight devices are this process's own.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Compiled programs are kept between runs, for each user apart.
_CACHE = Path(tempfile.gettempdir(), f"jaxrl_post-tests-{os.getuid()}")

# XLA runs the devices' programs in a pool of as many threads as there are cores, and a
# device that waits for the others holds one: with fewer threads than devices they can
# wait for each other for ever, which aborts the process after 40 seconds.
_THREADS = "32"

# Half the time to compile; the HLO, hence figures of memory and FLOPs, stays the same.
_XLA_FLAGS = "--xla_backend_optimization_level=0"

os.environ.update(
    JAX_PLATFORMS="cpu",
    NPROC=_THREADS,
    XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {_XLA_FLAGS}".strip(),
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_COMPILATION_CACHE_DIR=str(_CACHE),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    MPLBACKEND="agg",
)

import jax  # noqa: E402  (reads the environment set above)

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data that may lie beside the checkout."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"the reference data is not at {path}")
    return path
