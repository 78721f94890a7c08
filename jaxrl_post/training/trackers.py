"""Where a run's rows go beside ``metrics.jsonl``: TensorBoard and trackio, by name."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from jaxrl_post.errors import InputError, one_line
from jaxrl_post.training.config import Config, TrackingConfig

Row = Mapping[str, Any]

TRL_NAMES = {
    "reward/mean": "reward",
    "reward/zero_std_groups": "frac_reward_zero_std",
    "length/mean": "completions/mean_length",
    "length/max": "completions/max_length",
    "length/truncated": "completions/clipped_ratio",
    "policy/clipped_low": "clip_ratio/low_mean",
    "policy/clipped_high": "clip_ratio/high_mean",
    "sampler/logp_gap": "sampling/sampling_logp_difference/mean",
    "sampler/ratio": "sampling/importance_sampling_ratio/mean",
    "time/step": "step_time",
    "teacher/success_groups": "self_distillation/success_group_fraction",
    "teacher/feedback": "self_distillation/feedback_available_fraction",
}
"""TRL's names of metrics that mean the same; what both name alike is not listed."""

_PACKAGES = {"tensorboard": "tensorboardX", "trackio": "trackio"}


class Tracker(Protocol):
    """Takes the numbers of steps."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a step, each finite."""
        ...

    def close(self) -> None:
        """The run has ended."""
        ...


def check_trackers(section: TrackingConfig) -> None:
    """Refuses trackers whose package is not installed.

    Raises:
      InputError: names the package and how it is installed.
    """
    for name in section.to:
        package = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"tracking: {name} needs the package {package}, which is not "
                "installed: pip install 'jaxrl_post[tracking]'"
            )


def aliased(name: str) -> str:
    """TRL's name of a metric, or the same where there is none.

    >>> aliased("reward/mean"), aliased("reward/format/std"), aliased("loss")
    ('reward', 'rewards/format/std', 'loss')
    """
    if name in TRL_NAMES:
        return TRL_NAMES[name]
    first, _, rest = name.partition("/")
    of_function = first == "reward" and rest.endswith(("/mean", "/std"))
    return f"rewards/{rest}" if of_function else name


class Trackers:
    """The trackers of a run. One that fails is left out from then on, with a warning:
    ``metrics.jsonl`` has every row in any case.

    Args:
      config: its section `tracking` says which.
      run_dir: the run's folder.
      step: the last that was done before; later ones are logged anew.
      warn: called with one line for a tracker that fails.
      make: opens a tracker by name.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        step: int,
        warn: Callable[[str], None],
        *,
        make: Callable[..., Tracker] | None = None,
    ) -> None:
        self._warn, self._alias = warn, config.tracking.names == "trl"
        self._open: dict[str, Tracker] = {}
        for name in config.tracking.to:
            with self._warned(name):
                self._open[name] = (make or _make)(name, config, run_dir, step)

    def log(self, row: Row) -> None:
        """Hands on the finite numbers of a row."""
        values = {
            aliased(name) if self._alias else name: float(value)
            for name, value in row.items()
            if name != "step" and _is_finite(value)
        }
        for name, tracker in list(self._open.items()):
            with self._warned(name):
                tracker.log(int(row["step"]), values)

    @contextlib.contextmanager
    def _warned(self, name: str):
        try:
            yield
        except Exception as error:  # whatever a tracker raises
            self._open.pop(name, None)
            self._warn(
                f"warning: tracking: {name} failed and gets no more rows: "
                f"{one_line(error)}"
            )

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, tracker in list(self._open.items()):
            with self._warned(name):
                tracker.close()


class TensorBoard:
    """Event files in the folder ``tensorboard`` of a run."""

    def __init__(self, run_dir: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        # A viewer then drops what a killed run logged of steps that are done again.
        folder = str(run_dir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run in trackio's local database (``TRACKIO_DIR``), named like the folder."""

    def __init__(self, project: str, run_dir: Path, settings: Mapping[str, Any]):
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):  # advertisements
            self._run = trackio.init(
                project=project,
                name=run_dir.resolve().name,
                config=dict(settings),
                resume="allow",
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


def _make(name: str, config: Config, run_dir: Path, step: int) -> Tracker:
    if name == "tensorboard":
        return TensorBoard(run_dir, step)
    return Trackio(config.tracking.project, run_dir, config.to_dict())


def _is_finite(value: Any) -> bool:
    if value is None or isinstance(value, str | bool):
        return False
    return math.isfinite(float(value))
