"""The papers' settings against pods, by `jaxrl-post preflight`, a row for each.

Nothing but compilers is needed, ``pip install 'jaxrl_post[tpu]'`` and
``'jaxrl_post[cuda12]'``, in one environment or in two:

  python scripts/preflight_papers.py                    # all
  python scripts/preflight_papers.py --only v5p,h100    # topologies that begin so
  python scripts/preflight_papers.py --only weak        # weak scaling
  python scripts/preflight_papers.py --part sampling    # the sampler's programs alone
  python scripts/preflight_papers.py --plot             # draws what is there

A row of docs/evidence/preflight.jsonl holds the command, the time that it took and
what it printed. A row that is there already is made anew; others stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "preflight.jsonl"
PLOT = ROOT / "docs" / "evidence" / "preflight_weak.svg"

PGPO = "configs/pgpo_qwen3_8b_sciknoweval.yaml"
HAPO = "configs/hapo_qwen25_math_7b_openr1.yaml"
PARTS = ("training", "sampling")


@dataclass(frozen=True)
class Setting:
    """What is compiled: a config with overrides, for a topology."""

    name: str
    config: str
    topology: str
    overrides: tuple[str, ...] = ()
    margin: float = 0.15
    parts: tuple[str, ...] = PARTS

    def command(self, part: str) -> list[str]:
        """Arguments of the `jaxrl-post` command, for the programs of a part."""
        return [
            *("preflight", self.config, *self.overrides),
            *("--topology", self.topology, "--margin", str(self.margin)),
            *("--only", part, "--tries", "0", "--json"),
        ]


def settings() -> Iterator[Setting]:
    """The papers' own, by their configs alone; then larger models."""
    for name, config in (("pgpo", PGPO), ("hapo", HAPO)):
        for topology in ("v5p:4x4x4", "h100:1x4", "h100:1x8", "v6e:8x8"):
            yield Setting(name, config, topology)
    yield Setting("pgpo", PGPO, "v5e:8x8", margin=0.05)
    small = (
        "training.micro_batch_tokens_per_shard=9216",  # one sequence at a time
        "sampling.slots_per_shard=8",
    )
    yield Setting("hapo", HAPO, "v5e:8x8", small, margin=0.05)
    large = ("model.path=Qwen/Qwen3-32B", "mesh.tensor=4")
    for topology in ("h100:2x8", "v5p:4x4x4"):
        yield Setting("pgpo-32b", PGPO, topology, large)
    # Eight key-value heads: no more than eight chips share a group.
    huge = ("model.path=meta-llama/Llama-3.1-70B", "mesh.tensor=8")
    yield Setting(
        "pgpo-70b", PGPO, "v5p:8x8x8", (*huge, "training.prompts_per_step=64")
    )


def weak_scaling() -> Iterator[Setting]:
    """Two groups for each pair of chips, whatever their number: the config's mesh."""
    # GPUs, whose compiler takes a tenth of the time.
    topologies = {"h100:1x4": 4, "h100:2x8": 16, "h100:8x8": 64, "h100:32x8": 256}
    for topology, chips in topologies.items():
        groups = f"training.prompts_per_step={chips}"
        yield Setting("weak", PGPO, topology, (groups,))


def choices() -> Iterator[Setting]:
    """What else four GPUs could share a sequence by, and two sequences at a time."""
    two = "training.micro_batch_tokens_per_shard=57344"
    for overrides in (
        (),
        ("mesh.tensor=2",),
        ("mesh.tensor=4",),
        (two,),
        ("mesh.tensor=2", two),
    ):
        yield Setting("choice", PGPO, "h100:1x4", overrides, parts=("training",))


def everything() -> list[Setting]:
    """Whatever this script compiles."""
    return [*settings(), *choices(), *weak_scaling()]


def measure(setting: Setting, part: str) -> dict[str, object]:
    """Runs the command; what it prints, with how it was called."""
    command = [sys.executable, "-m", "jaxrl_post.cli", *setting.command(part)]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return {
        "setting": setting.name,
        "part": part,
        "command": shown(setting, part),
        "seconds": round(time.perf_counter() - start, 1),
        **json.loads(done.stdout),
    }


def record(row: dict[str, object]) -> None:
    """Puts the row in the place of an earlier one; drops those of no setting."""
    found = {(r["setting"], r["command"]): r for r in [*read(), row]}
    keys = [(s.name, shown(s, part)) for s in everything() for part in s.parts]
    rows = [found[key] for key in keys if key in found]
    EVIDENCE.write_text("".join(json.dumps(r) + "\n" for r in rows))


def shown(setting: Setting, part: str) -> str:
    """The command as a user types it."""
    return " ".join(["jaxrl-post", *setting.command(part)])


def read() -> list[dict]:
    """The rows that are there."""
    if not EVIDENCE.exists():
        return []
    return [json.loads(line) for line in EVIDENCE.read_text().splitlines()]


def joined(rows: list[dict]) -> list[dict]:
    """A row for each setting of which there is a part."""
    found = {(row["setting"], row["command"]): row for row in rows}
    keys = [[(s.name, shown(s, part)) for part in s.parts] for s in everything()]
    parts = [[found[key] for key in of_one if key in found] for of_one in keys]
    return [_join(of_one) for of_one in parts if of_one]


def _join(parts: list[dict]) -> dict:
    verdicts = {part["verdict"] for part in parts}
    steps = [part["step"] for part in parts]
    whole = {row["part"] for row in parts} == set(PARTS)
    seconds = sum(s["seconds"] for s in steps) if whole and all(steps) else None
    return {
        **parts[0],
        "parts": {part["part"]: part["programs"] for part in parts},
        "verdict": verdicts.pop() if len(verdicts) == 1 else "does not fit",
        "seconds": seconds,
    }


def table(rows: list[dict]) -> str:
    """A line for each setting, in Markdown; nothing before there is one."""
    if not rows:
        return ""
    lines = [
        "| setting | topology | fsdp x tensor | verdict, margin | update, GiB a chip "
        "| sampling | of the chip | FLOPs, x model | collectives of an update "
        "| a step, at least |",
        "|" + "---|" * 10,
    ]
    for row in joined(rows):
        if row["setting"] in ("choice", "weak"):
            continue
        chip, mesh = row["chip"], row["mesh"]
        peaks = {name: _peak(programs) for name, programs in row["parts"].items()}
        update = row["parts"].get("training", {}).get("update", {})
        ratio = update.get("flops", {}).get("ratio")
        sent = _sent(update) if update.get("flops") else None
        cells = (
            *(row["setting"], f"`{row['topology']}`"),
            f"{mesh['fsdp']} x {mesh['tensor']}",
            f"{row['verdict']}, {chip['margin']:.0%}",
            *(_gib(peaks.get(part)) for part in PARTS),
            f"{max(filter(None, peaks.values())) / chip['memory']:.0%}",
            "" if ratio is None else f"{ratio:.2f}",
            _gib(sent, 0),
            "" if row["seconds"] is None else f"{row['seconds']:.0f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choice_table(rows: list[dict]) -> str:
    """A line for each way to share four GPUs: GiB of one chip."""
    rows = [row for row in joined(rows) if row["setting"] == "choice"]

    def cells(row, update):
        bound = re.search(r"per_shard=(\d+)", row["command"])
        share = update["bytes"]["peak"] / row["chip"]["memory"]
        ratio = update["flops"]["ratio"]
        return {
            "at a time": "two sequences" if bound else "one sequence",
            "temp": _gib(update["bytes"]["temp"]),
            "of the chip": f"{share:.0%}",
            "FLOPs, x model": f"{ratio:.2f}",
        }

    return _update_table(rows, cells)


def weak_table(rows: list[dict]) -> str:
    """A line for each number of chips: GiB of one chip."""
    rows = [row for row in joined(rows) if row["setting"] == "weak"]

    def cells(row, update):
        return {
            "chips": str(row["chips"]),
            "state": _gib(sum(row["resident"].values()), 2),
            "update, temp": _gib(update["bytes"]["temp"]),
            "sampling, peak": _gib(_peak(row["parts"].get("sampling", {}))),
        }

    return _update_table(rows, cells)


def _update_table(rows: list[dict], cells) -> str:
    """The mesh, cells of each row and its update, and the update's collectives."""
    kinds, lines = _kinds(rows), []
    for row in rows:
        update, mesh = row["parts"]["training"]["update"], row["mesh"]
        columns = {
            "fsdp x tensor": f"{mesh['fsdp']} x {mesh['tensor']}",
            **cells(row, update),
            **{kind: _gib(_bytes(update, kind), 0) for kind in kinds},
        }
        if not lines:
            lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines.append(f"| {' | '.join(columns.values())} |")
    return "\n".join(lines)


def _bytes(program: dict, kind: str) -> int:
    return program["collectives"].get(kind, {}).get("bytes", 0)


def _gib(size: float | None, digits: int = 1) -> str:
    return "" if size is None else f"{size / 2**30:,.{digits}f}"


def _peak(programs: dict) -> float | None:
    """Of the program that needs most; None where there is none that says it."""
    peaks = [program["bytes"].get("peak", 0) for program in programs.values()]
    return max(peaks, default=None)


def _sent(program: dict) -> int:
    return sum(kind["bytes"] for kind in program["collectives"].values())


def _kinds(rows: list[dict]) -> list[str]:
    found = [row["parts"]["training"]["update"]["collectives"] for row in rows]
    return sorted({kind for kinds in found for kind in kinds})


def plot() -> None:
    """Bytes of a chip and of its collectives over the number of chips."""
    import matplotlib.pyplot as plt

    rows = [row for row in joined(read()) if row["setting"] == "weak"]
    chips = [row["chips"] for row in rows]
    figure, (memory, sent) = plt.subplots(1, 2, figsize=(9, 3.5))
    lines: dict[str, list[float]] = {}
    for row in rows:
        update = row["parts"]["training"]["update"]
        parts = {
            "update: peak": update["bytes"]["peak"],
            "update: temp": update["bytes"]["temp"],
            "sampling: peak": _peak(row["parts"].get("sampling", {})),
            **row["resident"],
        }
        for name, size in parts.items():
            lines.setdefault(name, []).append(float("nan") if size is None else size)
    for name, sizes in lines.items():
        memory.plot(chips, [size / 2**30 for size in sizes], "o-", label=name)
    for kind in _kinds(rows):
        sizes = [_bytes(row["parts"]["training"]["update"], kind) for row in rows]
        sent.plot(chips, [size / 2**30 for size in sizes], "o-", label=kind)
    for axes, title in ((memory, "GiB a chip"), (sent, "GiB of collectives, update")):
        axes.set(xscale="log", xlabel="chips", title=title)
        axes.set_xticks(chips, map(str, chips))
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": PLOT.stem}):  # the same rows, the same file
        figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    """Compiles what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="settings or topologies, by comma")
    parser.add_argument("--part", choices=PARTS, help="of the programs; else both")
    parser.add_argument("--plot", action="store_true", help="only draw")
    arguments = parser.parse_args()
    if not arguments.plot:
        wanted = tuple(arguments.only.split(","))
        for setting in everything():
            names = (f"{setting.name}@{setting.topology}", setting.topology)
            if any(name.startswith(wanted) for name in names):
                for part in setting.parts:
                    if arguments.part not in (None, part):
                        continue
                    row = measure(setting, part)
                    record(row)
                    print(*names[:1], part, row["verdict"], flush=True)
    if weak_table(read()):
        plot()


if __name__ == "__main__":
    main()
