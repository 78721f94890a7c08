"""``jaxrl-post selftest``"""

from __future__ import annotations

import argparse
import json

SUMMARY = "check that this machine's devices compute right"
DESCRIPTION = """\
Check this package on the devices that are here, in about a minute: losses and the
vocabulary pass against float64, attention against NumPy, the sampler's log-probs
against the trainer's, and an update on all devices against one.

Each line is a difference and the bound that it must keep. Exit code 0: all are kept.
1: not. In an issue, add the output of --json.

  jaxrl-post selftest
  JAX_NUM_CPU_DEVICES=8 JAX_PLATFORMS=cpu jaxrl-post selftest"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the checks and prints."""
    from jaxrl_post import selftest

    if arguments.json:
        report = selftest.run()
        print(json.dumps(report.to_dict(), allow_nan=False))
        return 0 if report.passed else 1
    report = selftest.run(report=lambda one: print(one, flush=True))
    device = report.device
    print(f"{device['count']} x {device['kind']} ({device['platform']})")
    print(", ".join(f"{name} {number}" for name, number in report.versions.items()))
    seconds = sum(report.seconds.values())
    print(f"{'passed' if report.passed else 'FAILED'} in {seconds:.0f} s")
    return 0 if report.passed else 1
