"""Topologies of chips that need not be here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxrl_post.errors import InputError, nearest, one_line
from jaxrl_post.sharding.chips import CHIPS, Chip

_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as the user gave it.
      chip: what each is.
      devices: jax's descriptions of them.
      fast_within: `mesh.fast_within` in place of "slice": jax does not say which of
        GPUs that are not here share a node, but each node is a process.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    fast_within: str = "slice"


def open_topology(name: str) -> Topology:
    """The devices that a name such as ``v5p:4x4x4`` or ``h100:2x8`` stands for.

    Args:
      name: ``chip:shape``. For TPUs the slice; for GPUs nodes x GPUs of each; ``cpu:8``
        for so many devices of this machine.

    Raises:
      InputError: no such chip or shape, or the compiler for it is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in (*CHIPS, "cpu"):
        hint = nearest(kind, (*CHIPS, "cpu"))
        raise InputError(
            f"--topology {name}: there is no chip {kind!r}; {hint} A topology is one "
            f"of {', '.join((*CHIPS, 'cpu'))}, a colon and a shape: v5p:4x4x4, "
            "v6e:8x8, h100:2x8 (nodes x GPUs), cpu:8."
        )
    dimensions = {"cpu": "1", "h100": "2", "v5e": "2", "v6e": "2"}.get(kind, "3")
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{int(dimensions) - 1}}}", shape):
        example = {"1": "8", "2": "2x4", "3": "4x4x4"}[dimensions]
        raise InputError(
            f"--topology {name}: the shape {shape!r} is not {dimensions} number(s), as "
            f"in {kind}:{example}."
        )
    if kind == "cpu":
        return Topology(name, *_cpu(int(shape)))
    describe = _gpu if kind == "h100" else _tpu
    try:
        devices = describe(kind, shape)
    except InputError:
        raise
    except Exception as error:  # jax's own kinds, by platform and version
        raise InputError(f"--topology {name}: {one_line(error)}") from error
    within = "process" if kind == "h100" else "slice"
    return Topology(name, CHIPS[kind], devices, within)


def _cpu(count: int) -> tuple[Chip, Sequence[Any]]:
    if jax.device_count("cpu") < count:
        raise InputError(
            f"--topology cpu:{count}: jax was started with {jax.device_count('cpu')} "
            f"CPU device(s); set JAX_NUM_CPU_DEVICES={count}."
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chip = Chip("cpu", memory // count, None, None, None, "this machine's, shared out")
    return chip, jax.devices("cpu")[:count]


def _tpu(kind: str, shape: str) -> Sequence[Any]:
    _need("libtpu", "tpu", f"{kind}:{shape}")
    topology = _describe("tpu", f"{kind}:{shape}")
    return topology.devices


def _gpu(kind: str, shape: str) -> Sequence[Any]:
    names = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    _need(names, "cuda12", f"{kind}:{shape}")
    topology = _describe("cuda", kind, topology=f"1x{shape}", target_config=_H100)
    return topology.devices


def _describe(platform: str, name: str, **options: Any) -> Any:
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform=platform, topology_name=name, **options
    )


def _need(modules: str | Sequence[str], extra: str, topology: str) -> None:
    from importlib.util import find_spec

    modules = [modules] if isinstance(modules, str) else modules
    if not any(map(find_spec, modules)):
        raise InputError(
            f"--topology {topology}: its compiler is not installed "
            f"({' or '.join(modules)}); pip install 'jaxrl_post[{extra}]'. No such "
            "device is needed."
        )


def prepare_process(name: str) -> None:
    """Sets up jax for a topology; to be called before jax looks for devices."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one to be locked
    jax.config.update("jax_platforms", "cpu")
    kind, _, count = name.partition(":")
    if kind == "cpu" and count.isdigit():
        jax.config.update("jax_num_cpu_devices", int(count))
