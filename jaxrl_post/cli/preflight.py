"""``jaxrl-post preflight``"""

from __future__ import annotations

import argparse
import json
import sys

from jaxrl_post.cli.train import add_overrides
from jaxrl_post.errors import InputError

SUMMARY = "find out whether a config fits devices that are not here"
DESCRIPTION = """\
Compile a config's programs ahead of time for a TPU slice or GPU nodes, by the real
compilers and without the devices; print the memory, the operations and the collectives
of each, and a verdict. Where the config does not fit, changes are tried, the cheapest
first.

  jaxrl-post preflight configs/pgpo_qwen3_8b_sciknoweval.yaml --topology v5p:4x4x4
  jaxrl-post preflight configs/quickstart.yaml --topology cpu:8 --json

Exit codes: 0 it fits, 1 it does not, 2 bad input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    add_overrides(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="v5p:4x4x4, v5e:8x8, v6e:8x8, tpu7x:2x2x2, h100:2x8 (nodes x GPUs), cpu:8",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of each chip's memory that must stay free (default: 0.05)",
    )
    parser.add_argument(
        "--tries",
        type=int,
        default=8,
        metavar="N",
        help="changes to try where it does not fit; 0: none (default: 8)",
    )
    parser.add_argument(
        "--only",
        choices=("training", "sampling"),
        help="compile, and judge, the programs of updates or of the sampler alone",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def run(arguments: argparse.Namespace) -> int:
    """Compiles, prints and judges."""
    from jaxrl_post.training.config import load_config

    if not 0 <= arguments.margin < 1:
        raise InputError(f"--margin {arguments.margin}: must be at least 0, below 1.")
    if arguments.tries < 0:
        raise InputError(f"--tries {arguments.tries}: must be at least 0.")
    config = load_config(arguments.config, arguments.overrides)

    from jaxrl_post import preflight

    preflight.prepare_process(arguments.topology)
    topology = preflight.open_topology(arguments.topology)
    report = preflight.check(
        config,
        topology,
        margin=arguments.margin,
        max_tries=arguments.tries,
        only=arguments.only,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.json:
        print(json.dumps(report))
    else:
        from jaxrl_post.preflight.page import page

        print(page(report))
    return 0 if report["verdict"] == preflight.FITS else 1
