"""The tables of docs/performance.md, from the rows that the benchmarks have written."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import bench_work

Row = Mapping[str, Any]
EVIDENCE = bench_work.ROOT / "docs" / "evidence"
VOCABULARY = EVIDENCE / "vocabulary.jsonl"
OVERLAP = EVIDENCE / "overlap.jsonl"
SAMPLER = EVIDENCE / "sampler.jsonl"


def tables() -> dict[str, str]:
    """Each by its marker; nothing for what has not been measured."""
    others = (VOCABULARY, SAMPLER)
    rows = [
        *bench_work.read_rows(),
        *(r for f in others for r in bench_work.read_rows(f)),
    ]
    return {
        "figures": figures(rows),
        "runs": runs(rows),
        "limits": limits(rows),
        "peaks": peaks(rows),
        "overlap": overlap([*bench_work.read_rows(OVERLAP)]),
    }


def last(rows: Iterable[Row], **keys: Any) -> Row | None:
    """The row that was written last of those that have these values."""
    return next(iter(every(rows, **keys)[::-1]), None)


def every(rows: Iterable[Row], **keys: Any) -> list[Row]:
    return [row for row in rows if all(row.get(k) == v for k, v in keys.items())]


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; nothing where it has no lines."""
    body = [f"| {' | '.join(line)} |" for line in lines]
    if not body:
        return ""
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *body])


class Figure:
    """One line of the first table: what it says, its bound, and where the number is.

    Args:
      name: in the table.
      must: the bound.
      keys: that its rows have.
      value: where the row has the number.
      least: whether the bound is one from below.
    """

    def __init__(
        self, name: str, must: float, keys: Row, value: str, least: bool = False
    ) -> None:
        self.name, self.must, self.keys = name, must, keys
        self.value, self.least = value, least

    def line(self, rows: Iterable[Row]) -> Sequence[str] | None:
        """Its line, from the last row; None where there is none."""
        row = last(rows, **self.keys)
        if row is None:
            return None
        bound = f"{'≥' if self.least else '≤'} {self.must:g}"
        if "refused" in row:
            return self.name, bound, f"refused: {'; '.join(row['refused'])}", ""
        value = row[self.value]
        holds: Callable = operator.ge if self.least else operator.le
        met = "yes" if holds(value, self.must) else "**no**"
        return self.name, bound, f"{value:.3g}", met


def _peer(row: str, figure: str, over: str) -> Row:
    return {"bench": "peers", "row": row, "figure": figure, "over": over}


def _step(row: str, figure: str) -> Row:
    return {"bench": "steps", "row": row, "figure": figure}


FIGURES = (
    Figure("GRPO step, ours / TRL", 0.5, _peer("grpo", "step", "trl"), "median"),
    Figure("GRPO step, ours / Tunix", 0.55, _peer("grpo", "step", "tunix"), "median"),
    Figure("SDPO step, ours / TRL", 0.5, _peer("sdpo", "step", "trl"), "median"),
    Figure(
        "GRPO step, SmolLM2-135M, ours / TRL",
        0.65,
        _peer("smollm2", "step", "trl"),
        "median",
    ),
    Figure(
        "peak memory of the GRPO run, ours / TRL",
        0.7,
        _peer("grpo", "peak_rss", "trl"),
        "median",
    ),
    Figure(
        "peak memory of the GRPO run, ours / Tunix",
        0.7,
        _peer("grpo", "peak_rss", "tunix"),
        "median",
    ),
    Figure(
        "decoding, batch 8, 64 + 64, ours / transformers",
        3.0,
        {"what": "decode", "model": "qwen2-5m", "batch": 8, "new": 64},
        "ratio",
        least=True,
    ),
    Figure(
        "decoding, SmolLM2-135M, batch 8, 32 new, ours / transformers",
        1.8,
        {
            "what": "decode",
            "model": "smollm2-135m",
            "batch": 8,
            "new": 32,
        },
        "ratio",
        least=True,
    ),
    Figure(
        "decoding, SmolLM2-135M, batch 8, 32 new, share of the bound",
        0.5,
        {"bench": "limit", "row": "smollm2", "phase": "decode"},
        "share",
        least=True,
    ),
    Figure(
        "update, SmolLM2-135M, 2 x 256, share of the bound",
        0.6,
        {"bench": "limit", "row": "smollm2-update", "phase": "update"},
        "share",
        least=True,
    ),
    Figure("PGPO step / SDPO step", 1.01, {"bench": "steps", "row": "pgpo"}, "value"),
    Figure(
        "(SDPO step - GRPO step) / teacher's forward pass",
        1.25,
        {"bench": "steps", "row": "teacher"},
        "value",
    ),
    Figure(
        "continuous batching / static waves, 256 sequences in 32 slots",
        0.4,
        {"what": "continuous", "model": "qwen2-5m"},
        "ratio",
    ),
    Figure(
        "update behind a shared prompt of 512, G = 8 / a copy for each",
        0.35,
        {"bench": "steps", "row": "prompt"},
        "value",
    ),
    Figure(
        "first metric line, embedded model, warm cache, s",
        12,
        _step("startup", "first metric line, warm cache, s"),
        "value",
    ),
    Figure(
        "vocabulary pass, memory, plain / ours, N = 2,048",
        10,
        {"measure": "memory", "pass": "sum", "tokens": 2048},
        "dense_over_this",
        least=True,
    ),
    Figure(
        "vocabulary pass, memory, plain / ours, N = 32,768",
        30,
        {"measure": "memory", "pass": "sum", "tokens": 32_768},
        "dense_over_this",
        least=True,
    ),
    Figure(
        "vocabulary pass, time, ours / plain, N = 1,024",
        1.15,
        {"measure": "time", "pass": "sum", "tokens": 1024},
        "over_dense",
    ),
    Figure(
        "vocabulary pass, time, ours / plain, N = 2,048",
        1.15,
        {"measure": "time", "pass": "sum", "tokens": 2048},
        "over_dense",
    ),
)


def figures(rows: Sequence[Row]) -> str:
    """What was aimed at, beside what was measured."""
    lines = [figure.line(rows) for figure in FIGURES]
    heads = ("figure", "must", "measured", "met")
    return markdown(heads, [line for line in lines if line])


def runs(rows: Sequence[Row]) -> str:
    """The last turn of every library in every setting, in seconds and GiB."""
    turns = [row for row in every(rows, bench="peers") if "who" in row]
    found = dict.fromkeys((row["row"], row["who"]) for row in turns)
    lines = []
    for setting, who in found:
        row = last(turns, row=setting, who=who)
        assert row is not None
        first = {
            cache: last(turns, row=setting, who=who, cache=cache) or {}
            for cache in ("cold", "warm")
        }
        lines.append(
            (
                setting,
                f"{who} {row['version']}",
                _span(row["step"]),
                f"{row['generate']['median']:.2f}",
                f"{row['update']['median']:.2f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['peak_rss'] / 2**30:.2f}",
                *(
                    f"{of['first_step']:.1f}" if of else ""
                    for of in (first["cold"], first["warm"])
                ),
            )
        )
    heads = ("setting", "library", "step", "generation", "update", "tokens/s", "memory")
    heads += ("first step, cold cache", "warm")
    return markdown(heads, lines)


def limits(rows: Sequence[Row]) -> str:
    """Every phase beside its bound."""
    phases = [row for row in every(rows, bench="limit") if "phase" in row]
    found = dict.fromkeys((row["row"], row["phase"]) for row in phases)
    lines = []
    for setting, phase in found:
        row = last(phases, row=setting, phase=phase)
        assert row is not None
        lines.append(
            (
                setting,
                phase,
                f"{row['seconds']:.3g}",
                f"{row['bound']:.3g}",
                f"{row['share']:.0%}",
                f"{row['gflops_per_second']:.0f}",
                f"{row['machine_gflops_per_second']:.0f}",
                f"{row['machine_gbytes_per_second']:.0f}",
            )
        )
    heads = ("setting", "phase", "seconds", "bound", "share", "GFLOP/s")
    return markdown((*heads, "of the machine's", "GB/s"), lines)


def peaks(rows: Sequence[Row]) -> str:
    """Bounds on accelerators."""
    lines = []
    for chip in dict.fromkeys(row["chip"] for row in rows if "chip" in row):
        row = last(rows, chip=chip)
        assert row is not None
        chips, bounds = row["chips"], row["bound"].values()
        lines.append((f"{chips} x {chip}", *(f"{x:.3g}" for x in bounds)))
    heads = ("chips", "prefill", "decode", "forward", "update", "step")
    return markdown(heads, lines)


def overlap(rows: Sequence[Row]) -> str:
    """Steps with a slow judge, by when it works."""
    names = {
        "end": "when all is decoded",
        "decoding": "while others are decoded",
        "update": "and during the update before",
    }
    lines = []
    for name, text in names.items():
        if (row := last(rows, judged=name)) is not None:
            times = [row[part] for part in ("step", "generate", "judge", "update")]
            lines.append((text, *map(_span, times)))
    heads = ("judged", "step", "generation", "waiting for the judge", "update")
    return markdown(heads, lines)


def _span(of: Row) -> str:
    return f"{of['median']:.2f} ({of['min']:.2f} to {of['max']:.2f})"
