"""``jaxrl-post discover``"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

from jaxrl_post.cli import processes
from jaxrl_post.cli.train import add_overrides, resumes, train
from jaxrl_post.errors import ConfigError, InputError, nearest

SUMMARY = "look for a first right answer to one hard question, learning from feedback"
DESCRIPTION = """\
Look for a first right answer to one question within a budget of attempts.

  sdpo        each step's attempts are judged and the feedback goes into the weights
  best_of_k   the base is asked again and again
  multi_turn  the feedback goes into the context of the next attempt

The search ends with the first success. Its folder is a run's, by default
runs/NAME-METHOD-QUESTION, and resumes as one; discovery.jsonl there has a row for each
attempt.

  jaxrl-post discover configs/discover_science.yaml --question 17
  jaxrl-post discover configs/discover_science.yaml --question 17 --method best_of_k"""

METHODS = ("sdpo", "best_of_k", "multi_turn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    add_overrides(parser)
    parser.add_argument(
        "--question", metavar="Q", help="id or row number (default: 0, the first)"
    )
    parser.add_argument(
        "--problem",
        metavar="FILE",
        help="a JSON file with the question, in place of task.source",
    )
    parser.add_argument(
        "--attempts", type=int, metavar="N", help="the budget (default: the config's)"
    )
    parser.add_argument("--method", default="sdpo", help=" | ".join(METHODS))
    processes.add_arguments(parser)
    parser.set_defaults(allow_changes=False)


def run(arguments: argparse.Namespace) -> int:
    """Searches; at the end prints discovery@k."""
    from jaxrl_post.training.config import load_config

    method, wanted = arguments.method, arguments.question or "0"
    if method not in METHODS:
        raise InputError(f"--method {method!r}: {nearest(method, METHODS)}")
    overrides = [*arguments.overrides]
    if arguments.problem is not None:
        if not Path(arguments.problem).is_file():
            raise InputError(f"--problem {arguments.problem!r}: there is no such file.")
        overrides.append(f"task.source={arguments.problem}")
    try:
        config = load_config(arguments.config, overrides)
    except ConfigError as error:
        if arguments.problem and any("task.source" in x for x in error.problems):
            raise InputError(
                f"--problem: the task of {arguments.config} reads no file; take a "
                "config whose task has an option source, such as task.name: code."
            ) from error
        raise
    question = int(wanted) if wanted.isdecimal() else wanted

    from jaxrl_post.training.discovery import discovery_config

    config = discovery_config(config, method, question, arguments.attempts)
    default = Path("runs", Path(arguments.config).stem)
    if config.run.dir == str(default):
        asked = arguments.problem and Path(arguments.problem).stem
        name = re.sub(r"[^\w.-]+", "_", f"{asked or wanted}")
        folder = default.with_name(f"{default.name}-{method}-{name}")
        config = replace(config, run=replace(config.run, dir=str(folder)))
    folder = Path(config.run.dir or "")
    return processes.run(
        arguments,
        lambda: train(arguments, config, show),
        lambda: resumes(folder),
    )


def show(run_dir: Path) -> None:
    """Writes discovery.jsonl; prints discovery@k, and where the first success is."""
    from jaxrl_post.training.discovery import (
        FILE_NAME,
        discovery_at_k,
        first_success,
        powers_of_two,
        write_discovery,
    )

    rows = write_discovery(run_dir)
    first = first_success(rows)
    for k, share in discovery_at_k([first], powers_of_two(len(rows))).items():
        print(f"discovery@{k}: {share:g}")
    if first is None:
        print(f"no success in {len(rows)} attempts")
    else:
        print(f"first success: attempt {first}, in step {rows[first - 1]['step']}")
    print(f"attempts: {run_dir / FILE_NAME}")
