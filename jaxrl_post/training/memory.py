"""How much of the devices' memory a run has needed."""

from __future__ import annotations

import jax


def peak_memory() -> dict[str, float]:
    """The most that one of this process's devices has used so far, in GiB.

    Empty where devices don't tell, as those of a CPU. It is named like a speed, for two
    runs of one config may differ in it.

    >>> peak_memory()  # of a CPU
    {}
    """
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [x["peak_bytes_in_use"] for x in told if "peak_bytes_in_use" in x]
    return {"throughput/peak_memory_gib": max(peaks) / 2**30} if peaks else {}
