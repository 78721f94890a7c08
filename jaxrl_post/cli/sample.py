"""``jaxrl-post sample``"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator

from jaxrl_post.cli.evaluate import is_run
from jaxrl_post.errors import InputError

SUMMARY = "ask a model questions"
DESCRIPTION = """\
Ask a model: type a question, read the answer. Ctrl-D ends. Questions may also be
piped in, one a line, or be given as --prompt.

MODEL is science_base (the embedded model), a Hugging Face folder or hub id, a GGUF
file, or a run's folder, of which the newest checkpoint is asked.

  jaxrl-post sample runs/quickstart
  jaxrl-post sample model.gguf --prompt "What is the capital of France?" """

CONTEXT_MULTIPLE = 64

_BOUNDS = (
    ("max_new_tokens", 1, 2**31 - 1),
    ("n", 1, 2**31 - 1),
    ("temperature", 0, 1e6),
    ("seed", 0, 2**32 - 1),
)

Ask = Callable[[str], list[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a model or a run's folder")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this and end")
    parser.add_argument("--system", metavar="TEXT", help="a system message before it")
    parser.add_argument(
        "--temperature",
        type=float,
        help="that logits are divided by; 0 takes the likeliest token each time "
        "(default: 0 for one answer, 1 for several)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="length limit of an answer (default: 256)",
    )
    parser.add_argument(
        "-n", type=int, default=1, metavar="N", help="answers per question (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Answers one prompt, piped lines, or whatever is typed."""
    _check(arguments)
    ask = load(arguments)
    if arguments.prompt is not None:
        _print(ask(arguments.prompt))
        return 0
    for question in _questions():
        try:
            _print(ask(question))
        except InputError as error:  # of this question; the next may be right
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)
    return 0


def load(arguments: argparse.Namespace) -> Ask:
    """Loads the model; returns the function that answers a question."""
    import jax
    import numpy as np

    from jaxrl_post import generation, models
    from jaxrl_post.cli.cache import check_compilation_cache
    from jaxrl_post.cli.memory import keep_freed_memory

    check_compilation_cache()
    keep_freed_memory()
    if is_run(arguments.model):
        from jaxrl_post.training.checkpoints import load_policy

        policy, params, tokenizer = load_policy(arguments.model)
    else:
        policy, params, tokenizer = models.load(arguments.model)
    if tokenizer is None:
        raise InputError(f"{arguments.model}: the model has no tokenizer beside it.")
    temperature = arguments.temperature
    sampler = generation.Sampler(
        policy,
        max_new_tokens=arguments.max_new_tokens,
        temperature=float(arguments.n > 1) if temperature is None else temperature,
        stop_tokens=models.stop_token_ids(policy, tokenizer),
    )
    asked = iter(range(sys.maxsize))
    system = [{"role": "system", "content": arguments.system}]

    def ask(question: str) -> list[str]:
        messages = [{"role": "user", "content": question}]
        rows = generation.tokenize_prompts(
            tokenizer, [(system if arguments.system else []) + messages]
        )
        contexts, mask = generation.pad_contexts(rows, CONTEXT_MULTIPLE)
        key = jax.random.fold_in(jax.random.key(arguments.seed), next(asked))
        try:
            rollouts = sampler.generate(
                params, contexts, mask, group_size=arguments.n, key=key
            )
        except ValueError as error:  # an empty question, or one too long
            raise InputError(str(error)) from error
        tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
        return generation.decode_responses(tokenizer, tokens, mask)

    return ask


def _check(arguments: argparse.Namespace) -> None:
    for name, low, high in _BOUNDS:
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            option = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
            raise InputError(f"{option} {value}: must be from {low} to {high:g}.")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise InputError("--prompt is empty; give it a question.")
    if arguments.n > 1 and arguments.temperature == 0:
        raise InputError(
            f"-n {arguments.n} with --temperature 0: the answers would all be the "
            "same; raise the temperature."
        )


def _questions() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with contextlib.suppress(ImportError):  # where there is one, lines can be edited
        import readline  # noqa: F401
    print("Type a question; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if question:
            yield question


def _print(answers: list[str]) -> None:
    several = len(answers) > 1
    for number, answer in enumerate(answers, start=1):
        head = f"[{number}] " if several else ""
        print(f"{head}{answer.strip()}", flush=True)
