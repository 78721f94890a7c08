"""The papers' settings against pods, by `jaxrl-post preflight`, a row for each.

Nothing but compilers is needed, ``pip install 'jaxrl_post[tpu]'`` and
``'jaxrl_post[cuda12]'``, in one environment or in two:

  python scripts/preflight_papers.py                    # all
  python scripts/preflight_papers.py --only v5p,h100    # topologies that begin so
  python scripts/preflight_papers.py --only weak        # weak scaling
  python scripts/preflight_papers.py --plot             # draws what is there

A row of docs/evidence/preflight.jsonl holds the command, the time that it took and
what it printed. A row that is there already is made anew; others stay.
"""

from __future__ import annotations

import argparse
import json
import os
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


@dataclass(frozen=True)
class Setting:
    """What is compiled: a config with overrides, for a topology."""

    name: str
    config: str
    topology: str
    overrides: tuple[str, ...] = ()
    margin: float = 0.15

    @property
    def command(self) -> list[str]:
        """Arguments of the `jaxrl-post` command."""
        return [
            *("preflight", self.config, *self.overrides),
            *("--topology", self.topology, "--margin", str(self.margin)),
            *("--tries", "0", "--json"),
        ]


def settings() -> Iterator[Setting]:
    """The papers' own, by their configs alone; then larger models."""
    for name, config in (("pgpo", PGPO), ("hapo", HAPO)):
        for topology in ("v5p:4x4x4", "h100:1x4", "h100:1x8", "v6e:8x8"):
            yield Setting(name, config, topology)
        yield Setting(name, config, "v5e:8x8", margin=0.05)
    large = ("model.path=Qwen/Qwen3-32B", "mesh.tensor=4")
    yield Setting("pgpo-32b", PGPO, "h100:2x8", (*large, "sampling.slots_per_shard=16"))
    yield Setting("pgpo-32b", PGPO, "v5p:4x4x4", large)
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


def measure(setting: Setting) -> dict[str, object]:
    """Runs the command; what it prints, with how it was called."""
    command = [sys.executable, "-m", "jaxrl_post.cli", *setting.command]
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
        "command": " ".join(["jaxrl-post", *setting.command]),
        "seconds": round(time.perf_counter() - start, 1),
        **json.loads(done.stdout),
    }


def record(row: dict[str, object]) -> None:
    """Puts the row in the place of an earlier one of the same name and topology."""
    rows = read()
    key = ("setting", "topology")
    rows = [r for r in rows if any(r[k] != row[k] for k in key)]
    EVIDENCE.write_text("".join(json.dumps(r) + "\n" for r in [*rows, row]))


def read() -> list[dict]:
    """The rows that are there."""
    if not EVIDENCE.exists():
        return []
    return [json.loads(line) for line in EVIDENCE.read_text().splitlines()]


def table(rows: list[dict]) -> str:
    """A line for each setting, in Markdown; nothing before there is one."""
    if not rows:
        return ""
    lines = [
        "| setting | topology | fsdp x tensor | verdict, margin | update, GiB a chip "
        "| prefill | decode | of the chip | FLOPs, x model | a step, at least |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        programs, chip, mesh = row["programs"], row["chip"], row["mesh"]

        def gib(name, programs=programs):
            peak = programs.get(name, {}).get("bytes", {}).get("peak")
            return "?" if peak is None else f"{peak / 2**30:.1f}"

        peaks = [p["bytes"].get("peak", 0) for p in programs.values()]
        ratio = programs["update"]["flops"].get("ratio")
        step = row["step"] and row["step"]["seconds"]
        cells = (
            *(row["setting"], f"`{row['topology']}`"),
            f"{mesh['fsdp']} x {mesh['tensor']}",
            f"{row['verdict']}, {chip['margin']:.0%}",
            *(gib("update"), gib("prefill"), gib("decode")),
            f"{max(peaks) / chip['memory']:.0%}",
            "?" if ratio is None else f"{ratio:.2f}",
            "?" if not step else f"{step:.0f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot() -> None:
    """Bytes of a chip and of its collectives over the number of chips."""
    import matplotlib.pyplot as plt

    rows = [row for row in read() if row["setting"] == "weak"]
    rows.sort(key=lambda row: row["chips"])
    chips = [row["chips"] for row in rows]
    figure, (memory, sent) = plt.subplots(1, 2, figsize=(9, 3.5))
    lines: dict[str, list[float]] = {}
    for row in rows:
        update = row["programs"]["update"]
        parts = {
            "update: peak": update["bytes"]["peak"],
            "update: temp": update["bytes"]["temp"],
            "decode: peak": row["programs"]["decode"]["bytes"]["peak"],
            **row["resident"],
        }
        for name, size in parts.items():
            lines.setdefault(name, []).append(size / 2**30)
    for name, sizes in lines.items():
        memory.plot(chips, sizes, "o-", label=name)
    kinds = sorted({k for r in rows for k in r["programs"]["update"]["collectives"]})
    for kind in kinds:
        found = [r["programs"]["update"]["collectives"].get(kind, {}) for r in rows]
        sent.plot(chips, [x.get("bytes", 0) / 2**30 for x in found], "o-", label=kind)
    for axes, title in ((memory, "GiB a chip"), (sent, "GiB of collectives, update")):
        axes.set(xscale="log", xlabel="chips", title=title, xticks=chips)
        axes.set_xticklabels(map(str, chips))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PLOT)


def main() -> None:
    """Compiles what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="settings or topologies, by comma")
    parser.add_argument("--plot", action="store_true", help="only draw")
    arguments = parser.parse_args()
    if not arguments.plot:
        wanted = tuple(arguments.only.split(","))
        for setting in (*settings(), *weak_scaling()):
            names = (f"{setting.name}@{setting.topology}", setting.topology)
            if any(name.startswith(wanted) for name in names):
                row = measure(setting)
                record(row)
                print(setting.name, setting.topology, row["verdict"], flush=True)
    if any(row["setting"] == "weak" for row in read()):
        plot()


if __name__ == "__main__":
    main()
