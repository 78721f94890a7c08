"""The least time that a step takes, from the chip's published figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxrl_post.preflight.programs import Program
from jaxrl_post.sharding.chips import Chip


def lower_bound(
    programs: Sequence[Program], chip: Chip, chips: int
) -> dict[str, Any] | None:
    """Seconds that a step cannot fall below, and what binds each program.

    A program takes at least as long as its matrix products at the chip's peak, as one
    reading of its arguments and writing of its results, and as its collectives' results
    over all the fast links at once; the greatest of these binds it. Between nodes or
    slices links are slower than that.

    Args:
      programs: of a step, each with how often it runs.
      chip: where.
      chips: how many.

    Returns:
      ``seconds`` of the step, and of every program by ``compute``, ``memory`` and
      ``interconnect``; None where the chip's figures are not published.
    """
    if chip.flops is None or chip.bandwidth is None or chip.interconnect is None:
        return None
    rows: dict[str, Any] = {}
    for program in programs:
        if program.error:
            continue
        moved = program.bytes["arguments"] + program.bytes["outputs"]
        moved -= program.bytes["aliases"]
        sent = sum(row["bytes"] for row in program.collectives.values())
        seconds = {
            "compute": program.flops["compiled"] / chips / chip.flops,
            "memory": moved / chip.bandwidth,
            "interconnect": sent / chip.interconnect,
        }
        seconds = {name: program.times * value for name, value in seconds.items()}
        bound_by = max(seconds, key=lambda name: seconds[name])
        rows[program.name] = {**seconds, "bound_by": bound_by}
    total = sum(row[row["bound_by"]] for row in rows.values())
    return {"seconds": total, "programs": rows}
