"""``jaxrl-post report``"""

from __future__ import annotations

import argparse

SUMMARY = "write report.html into run folders"
DESCRIPTION = """\
Write report.html: the curves, evaluations and sampled completions of a run, in one
file that needs no network. The run may still be going on.

  jaxrl-post report runs/quickstart
  jaxrl-post report runs/quickstart --png           # its charts as pictures too
  jaxrl-post report runs/a runs/b --compare a_b.html

With --compare all runs stand on one page; those whose configs differ in the seed alone
are one line, their mean, in a band from the lowest to the highest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--png", action="store_true", help="write every chart as a picture too"
    )
    parser.add_argument(
        "--compare", metavar="FILE", help="write one page that compares the runs"
    )


def run(arguments: argparse.Namespace) -> int:
    """Builds the pages and prints their paths."""
    from jaxrl_post import report

    if arguments.compare is not None:
        page = report.build_comparison(
            arguments.runs, arguments.compare, pictures=arguments.png
        )
        print(page)
        return 0
    for run_dir in arguments.runs:
        print(report.build(run_dir, pictures=arguments.png))
    return 0
