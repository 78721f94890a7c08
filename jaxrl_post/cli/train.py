"""``jaxrl-post train``"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl_post.cli import processes

if TYPE_CHECKING:
    from jaxrl_post.training.config import Config

SUMMARY = "train a model as a config says, or resume that"
DESCRIPTION = """\
Train a model as a config file says.

The run is a folder (run.dir, by default runs/NAME of the config): config.yaml,
metrics.jsonl, completions/, checkpoints/ and report.html. The same command on the
same folder resumes the run; Ctrl-C saves it first, a second one leaves at once.

  jaxrl-post train configs/quickstart.yaml
  jaxrl-post train configs/quickstart.yaml training.steps=20 run.dir=runs/short"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    add_overrides(parser)
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="resume although the config alters what the run computes",
    )
    parser.add_argument(
        "--replay",
        metavar="RUN",
        help="train on the completions saved in that run's folder, without sampling; "
        "the same as run.replay=RUN",
    )
    processes.add_arguments(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Declares ``section.key=value ...``."""
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without one argparse calls it required
        metavar="section.key=value",
        help="settings in place of the config's, the values in YAML",
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains; at the end prints the base beside the result."""
    from jaxrl_post.training.config import load_config

    overrides = [*arguments.overrides]
    if arguments.replay is not None:
        overrides.append(f"run.replay={arguments.replay}")
    config = load_config(arguments.config, overrides)
    assert config.run.dir is not None  # load_config sees to that
    folder = Path(config.run.dir)
    return processes.run(
        arguments,
        lambda: train(arguments, config, show),
        lambda: resumes(folder),
    )


def resumes(run_dir: Path) -> str:
    """What the same command would do, as the names of the checkpoints tell."""
    saved = [
        int(path.name)
        for path in run_dir.glob("checkpoints/[0-9]*")
        if path.name.isdigit()
    ]
    where = f"resumes after step {max(saved)}" if saved else "begins again"
    return f"The same command, in all processes, {where}."


def train(
    arguments: argparse.Namespace, config: Config, show: Callable[[Path], None]
) -> int:
    """Trains, or resumes, and shows the finished run; returns the exit code."""
    from jaxrl_post.cli.cache import check_compilation_cache
    from jaxrl_post.cli.memory import keep_freed_memory
    from jaxrl_post.sharding.processes import is_main, on_main
    from jaxrl_post.training.loop import Interrupted, run
    from jaxrl_post.training.progress import Progress

    check_compilation_cache()
    keep_freed_memory()
    try:
        run(config, progress=Progress, allow_changes=arguments.allow_changes)
    except Interrupted as stop:
        command = ["jaxrl-post", *arguments.argv]
        if is_main():
            name = signal.Signals(stop.signum).name
            print(f"stopped by {name}; saved. To resume:", file=sys.stderr)
            print(f"  {shlex.join(command)}", file=sys.stderr)
        return 128 + stop.signum
    run_dir = Path(config.run.dir or "")
    on_main(lambda: show(run_dir))
    return 0


def show(run_dir: Path) -> None:
    """Prints a run's evaluations, writes its report where that is due, says where."""
    from jaxrl_post import report
    from jaxrl_post.cli.tables import comparison_table

    if comparisons := report.compare_evaluations(report.read_run(run_dir).rows):
        print(comparison_table(comparisons))
    page, metrics = run_dir / "report.html", run_dir / "metrics.jsonl"
    if not page.exists() or page.stat().st_mtime_ns < metrics.stat().st_mtime_ns:
        page = report.build(run_dir)
    print(f"report: {page}")
