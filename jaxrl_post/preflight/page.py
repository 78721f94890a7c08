"""A report of `check` as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_BYTES = ("arguments", "outputs", "aliases", "temp", "resident", "peak")


def page(report: Mapping[str, Any]) -> str:
    """Tables of programs, what lies there between them, the bound, the verdict."""
    chip = report["chip"]
    memory, margin = chip["memory"], chip["margin"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    resident = ", ".join(f"{k} {_gib(v)}" for k, v in report["resident"].items())
    lines = [
        f"{report['model']['path']} ({report['model']['sizes']}) on "
        f"{report['topology']}: {report['chips']} chips of {_gib(memory)} GiB, {mesh}",
        f"GiB a chip between programs: {resident}",
    ]
    if report["programs"]:
        lines += _programs(report["programs"], memory, report["step"])
    remedy = report["remedy"]
    if report["problem"]:
        lines.append(f"As it is: {report['problem']}")
    if remedy is not None:
        lines += ["", f"With {' '.join(remedy['overrides'])}"]
        lines += _programs(remedy["programs"], memory, remedy["step"])
    lines += ["", f"Verdict: {report['verdict']}, with {margin:.0%} left free."]
    if report["verdict"] != "fits":
        if remedy is not None and remedy["fits"]:
            lines.append(f"It fits with: {' '.join(remedy['overrides'])}")
        else:
            lines.append("Nothing that was tried makes it fit.")
    return "\n".join(lines)


def _programs(
    programs: Mapping[str, Any], memory: int, step: Mapping[str, Any] | None
) -> list[str]:
    heads = ("GiB a chip", *_BYTES, "of the chip", "TFLOP", "x model", "collectives")
    rows: list[Sequence[str]] = [heads]
    for name, program in programs.items():
        sizes = program["bytes"]
        cells = [_gib(sizes[key]) if key in sizes else "?" for key in _BYTES]
        share = f"{sizes['peak'] / memory:.0%}" if "peak" in sizes else "too much"
        flops = program["flops"]
        sent = sum(row["bytes"] for row in program["collectives"].values())
        ratio = "" if not flops or not flops["model"] else f"{flops['ratio']:.2f}"
        total = f"{flops['compiled'] / 1e12:.4g}" if flops else ""
        rows.append((name, *cells, share, total, ratio, f"{_gib(sent)} GiB"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows
    ]
    lines += [f"{n}: {p['error']}" for n, p in programs.items() if p["error"]]
    if step is not None:
        bounds = ", ".join(
            f"{name} by {row['bound_by']} ({row[row['bound_by']]:.3g} s)"
            for name, row in step["programs"].items()
        )
        lines.append(f"A step takes at least {step['seconds']:.3g} s: {bounds}")
    return lines


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
