"""Judges that behave and judges that don't, for the tests of the pool."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from jaxrl_post.types import Prompts, Verdict


def echo(prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
    """Reward: the number in the completion, doubled by the row's factor."""
    return [
        Verdict(float(text) * row["factor"], True, extra={"pid": os.getpid()})
        for text, row in zip(completions, prompts.columns, strict=True)
    ]


def obey(prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
    """Does what the completion says."""
    verdicts: list = []
    for text in completions:
        command, _, argument = text.partition(" ")
        if command == "hang":
            time.sleep(3600)
        elif command == "hold":  # hangs without ever releasing the interpreter lock
            sum(range(10**13))
        elif command == "exit":
            os._exit(3)
        elif command == "sysexit":
            sys.exit(1)
        elif command == "raise":
            raise RuntimeError(argument)
        elif command == "nan":
            verdicts.append(Verdict(float("nan")))
        elif command == "none":
            return None
        elif command == "unjudged":
            verdicts.append(Verdict(None))
        elif command == "zero":
            verdicts.append(Verdict(0.0, False))
        elif command == "numpy":
            import numpy as np

            extra = {"parsed": np.bool_(True), "answer": "7"}
            verdicts.append(Verdict(np.float32(0.5), np.bool_(True), extra=extra))
        elif command == "success":
            verdicts.append(Verdict(1.0, "yes"))
        elif command == "feedback":
            verdicts.append(Verdict(1.0, True, 7))
        elif command == "extra-none":
            verdicts.append(Verdict(1.0, True, extra=None))
        elif command == "answer":
            verdicts.append(Verdict(1.0, True, extra={"answer": [1]}))
        elif command == "parsed":
            verdicts.append(Verdict(1.0, True, extra={"parsed": "yes"}))
        elif command == "text":
            verdicts.append(Verdict("1.0"))
        elif command == "fork":  # both return
            os.fork()
            verdicts.append(Verdict(float(os.getpid()), True))
        elif command == "desert":  # the child goes on, the judge's process ends
            if os.fork():
                os._exit(0)
            verdicts.append(Verdict(2.0, True))
        elif command == "breed":
            if not os.fork():
                Path(argument).write_text(str(os.getpid()))
                time.sleep(3600)
            verdicts.append(Verdict(1.0, True))
        elif command == "swell":
            hoard = []
            while True:
                hoard.append(bytearray(os.urandom(1)) * 2**24)
        elif command == "garbage":
            for descriptor in (1, 2):
                os.write(descriptor, bytes(range(256)) * 64)
            sys.stdout.close()
            verdicts.append(Verdict(1.0, True))
        elif command == "flood":  # every file descriptor, the pool's own socket too
            for descriptor in range(3, 4096):
                try:
                    os.write(descriptor, argument.encode())
                except OSError:
                    continue
            verdicts.append(Verdict(1.0, True))
        elif command == "close":
            os.closerange(3, 4096)
            verdicts.append(Verdict(1.0, True))
        elif command == "close-low":  # as programs do that make themselves daemons
            os.closerange(3, 64)
            verdicts.append(Verdict(1.0, True))
        elif command == "recurse":
            obey(prompts, completions)
        elif command == "wrong-type":
            verdicts.append(1.0)
        elif command == "extra":
            verdicts += [Verdict(1.0), Verdict(1.0)]
        elif command == "unpicklable":
            verdicts.append(Verdict(1.0, extra={"f": lambda: 0}))
        elif command == "eat":
            verdicts.append(Verdict(float(len(bytearray(int(argument))))))
        elif command == "print":
            print("noise")
            verdicts.append(Verdict(1.0))
        elif command == "look":
            verdicts.append(
                Verdict(
                    1.0,
                    extra={
                        "jax": "jax" in sys.modules,
                        "platforms": os.environ.get("JAX_PLATFORMS"),
                        "main thread": threading.current_thread()
                        is threading.main_thread(),
                    },
                )
            )
        elif command == "child":
            child = subprocess.Popen(["sleep", "3600"])
            Path(argument).write_text(str(child.pid))
            time.sleep(3600)
        elif command == "sleep":
            Path(argument).write_text(str(os.getpid()))
            time.sleep(3600)
        else:
            verdicts.append(Verdict(1.0, True))
    return verdicts


def hang_always(prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
    time.sleep(3600)
    return []
