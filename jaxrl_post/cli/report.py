"""``jaxrl-post report``"""

from __future__ import annotations

import argparse

SUMMARY = "write report.html into run folders"
DESCRIPTION = """\
Write report.html: the curves, evaluations and sampled completions of a run, in one
file that needs no network. The run may still be going on.

  jaxrl-post report runs/quickstart"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")


def run(arguments: argparse.Namespace) -> int:
    """Builds the pages and prints their paths."""
    from jaxrl_post import report

    for run_dir in arguments.runs:
        print(report.build(run_dir))
    return 0
