"""What the C library does with memory that is free."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

_ALL = -1
# Parameters of glibc's mallopt, from its malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, where programs' temporary arrays are its memory.

    XLA for CPU asks for all temporary memory of a program at once, at each call. Left
    to itself glibc gives that back to the kernel each time, which then has to find and
    clear it again, 4 KiB at a time: an eighth of the update of a model of SmolLM2's
    size (docs/performance.md). Most memory in use at a time is as it was.

    To be called before jax starts its threads, of which each would get an arena of its
    own, that is: before jax knows its devices. Does nothing where there may be an
    accelerator, without glibc, or where the environment tells glibc what to do
    (``GLIBC_TUNABLES``, ``MALLOC_*_``).
    """
    told = any(x == "GLIBC_TUNABLES" or x.startswith("MALLOC_") for x in os.environ)
    if told or sys.platform != "linux" or not _on_cpu():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Of several arenas only the first can grow to such sizes.
    for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _ALL)):
        mallopt(parameter, value)


def _on_cpu() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not entry_points(group="jax_plugins") and find_spec("libtpu") is None
