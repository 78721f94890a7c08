"""Which metrics are shown together, in which order; what is not named comes last."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

from jaxrl_post.report.axes import Steps
from jaxrl_post.report.charts import Chart, Line, share_bar
from jaxrl_post.report.histograms import HistogramChart
from jaxrl_post.report.run import Run
from jaxrl_post.training.progress import format_seconds

Drawable = Chart | HistogramChart


class Panel(NamedTuple):
    """A chart of all metrics whose names match one of the patterns.

    Attributes:
      title: with the unit.
      patterns: names of metrics, or shell patterns of them.
      labels: of the lines, in the order of the patterns; else the names' last parts.
      draw: how, from the panel, the run, the steps that its charts share, and the
        names of the metrics that it has; one line each unless said otherwise.
      note: what a reader must know of it.
    """

    title: str
    patterns: tuple[str, ...]
    labels: tuple[str, ...] = ()
    draw: Callable[[Panel, Run, Steps, list[str]], Drawable] | None = None
    note: str | None = None


class Section(NamedTuple):
    """Charts under one heading.

    Attributes:
      title: the heading.
      panels: in order.
      needs: a metric without which there is no such section; what it would have shown
        is then left to the sections below.
      together: whether the charts stand side by side in one frame.
    """

    title: str
    panels: tuple[Panel, ...]
    needs: str | None = None
    together: bool = False


class Drawn(NamedTuple):
    """A section's charts in HTML, the notes on them, and what they were drawn of."""

    charts: list[str]
    notes: list[str]
    drawables: list[Drawable]

    def add(self, drawable: Drawable, note: str | None = None) -> None:
        """Takes a chart in, unless it has no values."""
        if chart := drawable.html():
            self.charts.append(chart)
            self.drawables.append(drawable)
            if note:
                self.notes.append(note)


def _lines(panel: Panel, run: Run, steps: Steps, keys: list[str]) -> Chart:
    lines = [Line(_label(panel, k, keys), run.series(k)) for k in keys]
    return Chart(panel.title, lines, steps)


def _shares(panel: Panel, run: Run, steps: Steps, keys: list[str]) -> Chart:
    """Metrics that are 0 or 1 in most steps, of which the run's mean says most."""
    lines = []
    for key in keys:
        known = [y for _, y in run.series(key) if y is not None]
        mean = f"{sum(known) / len(known):.1%}" if known else None
        lines.append(Line(_label(panel, key, keys), run.series(key), figure=mean))
    return Chart(panel.title, lines, steps)


def _multiplier(panel: Panel, run: Run, steps: Steps, keys: list[str]) -> Chart:
    """The multiplier and its cap, which a step of capped updates alone tells."""
    capped = {step for step, share in run.series("information/capped") if share == 1}
    lines = [Line(_label(panel, k, keys), run.series(k)) for k in keys]
    caps = [y for k in keys for x, y in run.series(k) if x in capped and y is not None]
    level = ("cap", caps[-1]) if caps else None
    return Chart(panel.title, lines, steps, level)


def _histogram(panel: Panel, run: Run, steps: Steps, keys: list[str]) -> HistogramChart:
    """Metrics ``.../0.0`` to ``.../0.9``: shares of what lies in [x, x + 0.1)."""
    by_step: dict[int, dict[float, float]] = {}
    for key in keys:
        for step, share in run.series(key):
            if share is not None:
                low = float(key.rpartition("/")[2])
                by_step.setdefault(step, {})[low] = share
    return HistogramChart(panel.title, by_step, width=0.1, steps=steps)


SECTIONS: tuple[Section, ...] = (
    Section(
        "Rollouts and teacher samples",
        (
            Panel("Reward", ("reward/mean",)),
            Panel("Response length, tokens", ("length/mean",)),
            Panel(
                "Teacher samples per step",
                ("injection/count",),
                note="Reward and length are those of the policy's own rollouts, before "
                "a demonstration takes the place of one: what the teacher wrote counts "
                "in neither.",
            ),
        ),
        needs="injection/count",
        together=True,
    ),
    Section(
        "Training",
        (
            Panel("Reward", ("reward/mean",)),
            Panel("Right and parsed, share", ("reward/success", "reward/parsed")),
            Panel("Reward by level", ("reward/level/*",)),
            Panel("Reward by function, mean", ("reward/*/mean",)),
            Panel("Reward by function, spread", ("reward/*/std",)),
            Panel(
                "Groups all right and none right, share",
                ("reward/solved_groups", "reward/unsolved_groups"),
                ("all", "none"),
            ),
            Panel(
                "Groups of equal rewards, share",
                ("reward/zero_std_groups", "injection/zero_std_groups"),
                ("before injection", "after injection"),
            ),
            Panel("Response length, tokens", ("length/mean",)),
            Panel("Truncated responses, share", ("length/truncated",)),
            Panel("Entropy, nats per token", ("entropy",)),
            Panel("KL, nats per token", ("kl", "kl/*", "*/kl", "*_kl", "*/kl_*")),
            Panel("Loss", ("loss",)),
            Panel("Gradient norm", ("grad_norm",)),
            Panel("Learning rate", ("learning_rate",)),
            Panel("Sampler against trainer, nats", ("sampler/logp_gap",)),
            Panel(
                "Importance of samples",
                ("sampler/ratio", "sampler/ratio_squared", "sampler/truncated"),
                ("mean ratio", "mean of squares", "share truncated"),
            ),
            Panel(
                "Importance behind earlier updates on the batch",
                ("policy/ratio", "policy/ratio_squared"),
                ("mean ratio", "mean of squares"),
            ),
            Panel(
                "Effective sample size, share",
                ("sampler/ess", "policy/ess"),
                ("of the samples", "behind earlier updates"),
            ),
        ),
    ),
    Section(
        "Injected solutions",
        (
            Panel(
                "Groups with a teacher sample, share",
                ("injection/rate", "injection/probability"),
                ("measured", "binomial formula"),
                note="The formula is the chance that a gate without memory opens if "
                "every prompt succeeds at the step's mean rate. Prompts of unequal "
                "difficulty, and those without a demonstration, make the measured "
                "share another.",
            ),
            Panel("Mean confidence of the groups", ("injection/confidence",)),
            Panel(
                "Confidence, share of the groups",
                ("injection/confidence_bins/[01].[0-9]",),
                draw=_histogram,
            ),
        ),
    ),
    Section(
        "Information from the teacher",
        (
            Panel("Information gain, nats", ("information/gain",)),
            Panel(
                "Entropy, nats per token",
                ("information/student_entropy", "information/teacher_entropy"),
                ("student", "teacher"),
            ),
            Panel("Step multiplier", ("information/multiplier",), draw=_multiplier),
            Panel("Sensitivity, adapted", ("information/sensitivity",)),
            Panel(
                "Capped and negative, share of steps",
                ("information/capped", "information/negative"),
                draw=_shares,
                note="Shares of capped and negative steps are means over the run.",
            ),
        ),
    ),
    Section(
        "Teacher",
        (
            Panel(
                "Accuracy on the step's questions",
                ("teacher/student_accuracy", "teacher/accuracy"),
                ("student", "teacher"),
                note="Accuracy is measured at some steps only, on those of their "
                "questions for which the teacher has a context of its own.",
            ),
            Panel(
                "Rollouts with a teacher's context, share",
                ("teacher/reprompted", "teacher/demonstrated", "teacher/feedback"),
                ("any", "demonstration", "feedback"),
            ),
            Panel("Groups with a success, share", ("teacher/success_groups",)),
        ),
    ),
    Section(
        "Speed",
        (
            Panel("Tokens per second", ("throughput/*_per_second",)),
            Panel(
                "Model FLOP utilisation",
                ("throughput/mfu", "throughput/update_mfu"),
                ("step", "update"),
            ),
            Panel("Most memory of a device, GiB", ("throughput/peak_memory_gib",)),
        ),
    ),
)

FURTHER = "Further metrics"

PHASES = ("generate", "judge", "score", "update", "teacher", "evaluate", "checkpoint")


# Shares of the data set, which stand in the page's head.
DEMONSTRATIONS = {
    "demonstrations/available": "Demonstrations",
    "demonstrations/rejected": "… rejected",
    "demonstrations/too_long": "… too long",
    "demonstrations/missing": "… missing",
}


def sections(run: Run) -> dict[str, Drawn]:
    """Charts by the title of their section; sections without data are left out.

    A metric that no panel names gets a chart of its own under `FURTHER`. Evaluations
    have charts of their own.
    """
    known, steps = run.keys(), shared_steps(run)
    elsewhere = {"step", "stage", *DEMONSTRATIONS, *(f"time/{x}" for x in PHASES)}
    left = [k for k in known if k not in elsewhere and not k.startswith("eval/")]
    found: dict[str, Drawn] = {}
    for section in SECTIONS:
        if section.needs and section.needs not in known:
            continue
        drawn = found[section.title] = Drawn([], [], [])
        for panel in section.panels:
            matching = [k for p in panel.patterns for k in left if fnmatchcase(k, p)]
            keys = list(dict.fromkeys(matching))
            left = [k for k in left if k not in keys]
            drawn.add((panel.draw or _lines)(panel, run, steps, keys), panel.note)
    if bar := time_bar(run):
        found["Speed"].charts.append(bar)
    further = found[FURTHER] = Drawn([], [], [])
    for key in left:
        further.add(_lines(Panel(key, (key,)), run, steps, [key]))
    return {title: drawn for title, drawn in found.items() if drawn.charts}


def shared_steps(run: Run) -> Steps:
    """All charts of a run reach over its steps; where a stage begins is marked."""
    done = [row["step"] for row in run.rows if row["step"]]
    later = list(run.stages.items())[1:]
    return Steps(
        span=(min(done), max(done)) if done else (),
        marks=[(first, name) for name, (first, _) in later],
    )


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
    return Chart("", lines, shared_steps(run), smooth=False).html()


def time_bar(run: Run) -> str:
    """Where the time of the whole run went."""
    seconds = {
        phase: sum(y for _, y in run.series(f"time/{phase}") if y is not None)
        for phase in PHASES
    }
    parts = [(p, s, format_seconds(s)) for p, s in seconds.items() if s > 0]
    return share_bar("Where the time went", parts)


def _label(panel: Panel, key: str, together: list[str]) -> str:
    if panel.labels:
        return panel.labels[panel.patterns.index(key)]
    prefixes = {k.rpartition("/")[0] for k in together}
    ends = {k.rpartition("/")[2] for k in together}
    if len(prefixes) == 1:
        label = key.rpartition("/")[2]
    elif len(ends) == 1:  # reward/<function>/mean
        label = key.rpartition("/")[0].partition("/")[2] or key
    else:
        label = key
    return label.removesuffix("_per_second").replace("_", " ")
