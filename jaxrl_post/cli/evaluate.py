"""``jaxrl-post evaluate``"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl_post.cli import processes
from jaxrl_post.cli.train import add_overrides
from jaxrl_post.errors import InputError

if TYPE_CHECKING:
    from jaxrl_post.training.config import Config

SUMMARY = "measure a model on the evaluation blocks of a config"
DESCRIPTION = """\
Measure a model: avg@k, pass@k and maj@k of each evaluation block, with 95 % intervals
over questions.

WHAT is one of
  a config file   its model, before any training
  a run's folder  its newest checkpoint
  a model         science_base, a Hugging Face folder or hub id, or a GGUF file, on
                  the test split of the task named by --task

  jaxrl-post evaluate runs/quickstart evaluation.science.samples=32
  jaxrl-post evaluate science_base --task science evaluation.science.levels=[3]"""

SAMPLES = 16
LENGTH = 256
"""Tokens of a prompt, and of an answer, at most: together the embedded model's 512."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("what", metavar="WHAT", help="a config, a run or a model")
    add_overrides(parser)
    parser.add_argument(
        "--task", help="the task to measure a model on (default: science)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    processes.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates and prints."""
    config, run_dir = _config(arguments)
    if not config.evaluation:
        raise InputError(
            f"{arguments.what}: there is no evaluation block; add one, for example "
            "evaluation.test.samples=4"
        )
    return processes.run(
        arguments,
        lambda: _measure(arguments, config, run_dir),
        lambda: "Run the same command again, in all processes.",
    )


def _measure(
    arguments: argparse.Namespace, config: Config, run_dir: Path | None
) -> int:
    scores = _evaluate(config, run_dir)

    from jaxrl_post.sharding.processes import is_main

    if not is_main():
        return 0
    if arguments.json:
        from jaxrl_post.training.metrics import to_json

        print(to_json(scores))
    else:
        from jaxrl_post.cli.tables import score_table
        from jaxrl_post.report.evaluations import scores_of

        print(score_table(scores_of(scores)))
    return 0


def is_run(path: str | Path) -> bool:
    """Whether a path is a folder that `jaxrl-post train` has written."""
    try:
        return (Path(path) / "config.yaml").is_file()
    except OSError:  # no path at all, such as a name that is too long
        return False


def _evaluate(config: Config, run_dir: Path | None) -> dict[str, float]:
    from jaxrl_post.cli.cache import check_compilation_cache
    from jaxrl_post.cli.memory import keep_freed_memory
    from jaxrl_post.training.evaluation import evaluate_run

    check_compilation_cache()
    keep_freed_memory()
    return evaluate_run(config, run_dir)


def _config(arguments: argparse.Namespace) -> tuple[Config, Path | None]:
    """The config, and the run whose newest checkpoint is meant, if any."""
    from jaxrl_post.training.config import Config, load_config
    from jaxrl_post.training.configfile import override

    path, overrides = Path(arguments.what), arguments.overrides
    of_run = is_run(path)
    is_config = path.suffix in (".yaml", ".yml")
    if (of_run or is_config) and arguments.task:
        raise InputError(
            f"--task={arguments.task}: {path} names its task itself; change it with "
            "task.name=... or in an evaluation block."
        )
    if of_run:
        return load_config(path / "config.yaml", overrides), path
    if is_config:
        return load_config(path, overrides), None
    task = arguments.task or "science"
    block = task.replace(":", ".")  # of a task of one's own; a name in metrics
    tree = {
        "model": {"path": arguments.what},
        "task": {"name": task, "max_prompt_length": LENGTH},
        "sampling": {"max_new_tokens": LENGTH},
        # Demanded of every config; an evaluation uses neither.
        "recipe": {"name": "grpo"},
        "training": {"steps": 0},
        # Not every task has a validation split, which is a config's default.
        "evaluation": {block: {"split": "test", "samples": SAMPLES}},
    }
    for assignment in overrides:
        override(tree, assignment)
    return Config.from_dict(tree, arguments.what), None
