"""``jaxrl-post watch``"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

SUMMARY = "show a run's numbers in the terminal, live"
DESCRIPTION = """\
Show a run's numbers in the terminal: progress, alerts, evaluations, and the curves of
its report as rows of bars, anew whenever a step is done. Ends with the run, or by
Ctrl-C; the run does not notice. Of a finished run, or where the output is no terminal,
the numbers are printed once.

  jaxrl-post watch runs/quickstart"""

_CLEAR = "\x1b[H\x1b[2J\x1b[3J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--every",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="between two looks at the folder (2)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Shows the run until it is finished."""
    from jaxrl_post.errors import InputError
    from jaxrl_post.report.run import read_run
    from jaxrl_post.report.terminal import summary

    if not arguments.every > 0:
        raise InputError(f"--every={arguments.every:g}: must be above 0 seconds.")
    live, seen = sys.stdout.isatty(), -1.0
    color = live and "NO_COLOR" not in os.environ
    try:
        while True:
            changed = _changed(Path(arguments.run_dir))
            if changed != seen:
                size = shutil.get_terminal_size()
                found = read_run(arguments.run_dir)
                text = summary(found, size.columns if live else 80, color=color)
                if live and not _finished(found.path):
                    lines = text.splitlines()[: size.lines - 1]
                    print(_CLEAR + "\n".join(lines), flush=True)
                else:
                    print((_CLEAR if live and seen > 0 else "") + text)
                    return 0
                seen = changed
            time.sleep(arguments.every)
    except KeyboardInterrupt:  # how one leaves, no interruption of anything
        return 0


def _changed(run_dir: Path) -> float:
    """When the metrics, or what else tells that the run is finished, last changed."""
    names = ("metrics.jsonl", "config.yaml", "model/config.json")
    paths = [run_dir / name for name in names]
    return max((p.stat().st_mtime for p in paths if p.exists()), default=0.0)


def _finished(run_dir: Path) -> bool:
    model, metrics = run_dir / "model" / "config.json", run_dir / "metrics.jsonl"
    if not (model.exists() and metrics.exists()):
        return False
    return model.stat().st_mtime_ns >= metrics.stat().st_mtime_ns
