"""Which metrics are shown together, in which order; what is not named comes last."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

from jaxrl_post.report.charts import Line, line_chart, share_bar
from jaxrl_post.report.run import Run
from jaxrl_post.training.progress import format_seconds


class Panel(NamedTuple):
    """A chart of all metrics whose names match one of the patterns."""

    title: str
    patterns: tuple[str, ...]


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Training": (
        Panel("Reward", ("reward/mean",)),
        Panel("Right and parsed, share", ("reward/success", "reward/parsed")),
        Panel("Groups of equal rewards, share", ("reward/zero_std_groups",)),
        Panel("Response length, tokens", ("length/mean",)),
        Panel("Truncated responses, share", ("length/truncated",)),
        Panel("Entropy, nats per token", ("entropy",)),
        Panel("KL, nats per token", ("kl", "kl/*", "*/kl", "*_kl", "*/kl_*")),
        Panel("Loss", ("loss",)),
        Panel("Gradient norm", ("grad_norm",)),
        Panel("Learning rate", ("learning_rate",)),
        Panel("Sampler against trainer, nats", ("sampler/logp_gap",)),
    ),
    "Information from the teacher": (
        Panel("Information gain, nats", ("information/gain",)),
        Panel("Entropy of student and teacher", ("information/*_entropy",)),
        Panel("Step multiplier", ("information/multiplier",)),
        Panel(
            "Capped and negative steps, share",
            ("information/capped", "information/negative"),
        ),
    ),
    "Injected solutions": (
        Panel("Injected", ("injection/count",)),
        Panel("Confidence of the prompts", ("injection/confidence",)),
        Panel("Probability of injection", ("injection/probability",)),
    ),
    "Teacher": (Panel("Reprompted, share", ("teacher/reprompted",)),),
    "Speed": (Panel("Tokens per second", ("throughput/*_per_second",)),),
}

PHASES = ("generate", "judge", "score", "update", "evaluate", "checkpoint")


def sections(run: Run) -> dict[str, list[str]]:
    """Charts by section; sections without data are left out.

    A metric that no panel names gets a chart of its own under "Further metrics".
    Evaluations and the time of phases have charts of their own.
    """
    left = [k for k in run.keys() if k != "step" and not k.startswith("eval/")]
    left = [k for k in left if k not in {f"time/{phase}" for phase in PHASES}]
    charts: dict[str, list[str]] = {}
    for section, panels in SECTIONS.items():
        for panel in panels:
            keys = [k for k in left if any(fnmatchcase(k, p) for p in panel.patterns)]
            left = [k for k in left if k not in keys]
            chart = line_chart(panel.title, [_line(run, k, keys) for k in keys])
            charts.setdefault(section, []).append(chart)
    charts["Further metrics"] = [line_chart(k, [_line(run, k, [k])]) for k in left]
    found = {name: [*filter(None, items)] for name, items in charts.items()}
    return {name: items for name, items in found.items() if items}


def evaluation_chart(run: Run, block: str) -> str:
    """The scores of an evaluation block over the steps, with their intervals."""
    prefix = f"eval/{block}/"
    names = [k.removeprefix(prefix) for k in run.keys() if k.startswith(prefix)]
    lines = []
    for score in ("avg", "maj", "pass"):
        for name in names:
            if name.partition("@")[0] != score or "/" in name:
                continue
            low, high = (
                dict(run.series(f"{prefix}{name}/{end}")) for end in ("low", "high")
            )
            band = [
                (step, bottom, top)
                for step, bottom in low.items()
                if bottom is not None and (top := high.get(step)) is not None
            ]
            lines.append(Line(name, run.series(prefix + name), band))
    return line_chart("", lines, smooth=False)


def time_bar(run: Run) -> str:
    """Where the time of the whole run went."""
    seconds = {
        phase: sum(y for _, y in run.series(f"time/{phase}") if y is not None)
        for phase in PHASES
    }
    parts = [(p, s, format_seconds(s)) for p, s in seconds.items() if s > 0]
    return share_bar("Where the time went", parts)


def _line(run: Run, key: str, together: list[str]) -> Line:
    prefixes = {k.rpartition("/")[0] for k in together}
    label = key.rpartition("/")[2] if len(prefixes) == 1 else key
    label = label.removesuffix("_per_second").replace("_", " ")
    return Line(label, run.series(key))
