"""Chips and their published figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chip:
    """One device of jax's, by the maker's figures.

    Attributes:
      name: in a topology.
      memory: bytes.
      flops: per second, dense products of bfloat16; None where it is not published.
      bandwidth: bytes per second from and to that memory.
      interconnect: bytes per second that all its fast links carry one way.
      source: of the figures.
    """

    name: str
    memory: int
    flops: float | None
    bandwidth: float | None
    interconnect: float | None
    source: str


_GIB = 2**30
_TPU = "https://cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * _GIB, 275e12, 1.2e12, 300e9, f"{_TPU}v4"),
        Chip("v5e", 16 * _GIB, 197e12, 819e9, 200e9, f"{_TPU}v5e"),
        Chip("v5p", 95 * _GIB, 459e12, 2.765e12, 600e9, f"{_TPU}v5p"),
        Chip("v6e", 32 * _GIB, 918e12, 1.64e12, 448e9, f"{_TPU}v6e"),
        # A chip is two devices.
        Chip("tpu7x", 96 * _GIB, 1153.5e12, 3.69e12, 600e9, f"{_TPU}tpu7x"),
        Chip(
            "h100",
            84_942_979_072,
            989e12,
            3.35e12,
            450e9,
            "https://www.nvidia.com/en-us/data-center/h100/ (SXM, 80 GB)",
        ),
    )
}

_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
}
"""What jax calls them."""


def peak_flops(device: Any) -> float | None:
    """`Chip.flops` of one of jax's devices; None: they are not known.

    >>> import jax
    >>> peak_flops(jax.devices("cpu")[0]) is None
    True
    """
    name = _KINDS.get(device.device_kind)
    return None if name is None else CHIPS[name].flops
