"""The command ``jaxrl-post``. Its parts are thin: they read arguments, call, print.

Nothing heavy is imported before the arguments, and the config they name, are known to
be right.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from jaxrl_post import __version__
from jaxrl_post.cli import (
    discover,
    evaluate,
    export,
    preflight,
    report,
    sample,
    selftest,
    train,
    watch,
)
from jaxrl_post.errors import InputError, nearest

COMMANDS = {
    "train": train,
    "discover": discover,
    "evaluate": evaluate,
    "sample": sample,
    "preflight": preflight,
    "report": report,
    "watch": watch,
    "export": export,
    "selftest": selftest,
}

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code.

    0: finished. 2: bad input, one error on stderr. 130 and 143: stopped by Ctrl-C or
    SIGTERM, a training run saved before. 1: anything else.

    Args:
      argv: the arguments; by default the program's own.
    """
    debug = False
    # A console script's path lacks the current folder, where the modules lie that
    # configs name; judge workers get the path as it is here.
    if "" not in sys.path:
        sys.path.insert(0, "")
    _give_devices_threads()
    try:
        arguments = _parse(argv)
        debug = getattr(arguments, "debug", False)
        return arguments.run(arguments)
    except SystemExit as end:  # --help, --version
        return int(end.code or 0)
    except InputError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return 1


def _give_devices_threads() -> None:
    """A thread for each fake device of this CPU that waits for the others.

    XLA runs the devices' programs in a pool with a thread for each core: where the
    devices are more, they can wait for each other for ever, which ends the process
    after 40 seconds. The pool's size is read when jax starts.
    """
    flag = re.search(
        r"xla_force_host_platform_device_count=(\d+)", os.getenv("XLA_FLAGS", "")
    )
    count = flag[1] if flag else os.getenv("JAX_NUM_CPU_DEVICES", "")
    if count.isdigit() and int(count) > 1:
        cores = os.cpu_count() or 1
        os.environ.setdefault("NPROC", str(max(cores, 4 * int(count))))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    # argparse loses overrides that come after an option.
    takes_more = hasattr(arguments, "overrides")
    if wrong := [x for x in more if x.startswith("-") or not takes_more]:
        known = re.findall(r"--[a-z-]+", arguments.usage)
        hint = nearest(wrong[0].partition("=")[0], {*known, "--debug"})
        raise InputError(f"unrecognized argument {wrong[0]!r}; {hint}")
    if more:
        arguments.overrides += more
    return arguments


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of the command does."""

    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"argument COMMAND: invalid choice: '([^']*)'", message):
            message = f"there is no command {wrong[1]!r}; {nearest(wrong[1], COMMANDS)}"
        raise InputError(f"{message} (`{self.prog} --help` says more.)")


def _parser() -> argparse.ArgumentParser:
    # One --debug for every place where people put it; suppressed defaults keep the
    # sub-command's from undoing the main one's.
    common = _Parser(add_help=False)
    common.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the traceback of every error",
    )
    parser = _Parser(
        prog="jaxrl-post",
        description="Post-train language models by reinforcement learning and "
        "self-distillation, in JAX.",
        epilog="`jaxrl-post COMMAND --help` says more about a command.",
        parents=[common],
    )
    version = f"jaxrl-post {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, usage=command.format_usage())
    return parser
