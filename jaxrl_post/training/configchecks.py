"""What is wrong with a config although each key for itself is right."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxrl_post import tasks
from jaxrl_post.errors import nearest, shown
from jaxrl_post.tasks.lookup import is_own

if TYPE_CHECKING:
    from jaxrl_post.training.config import Config


OPTIMIZERS = ("adamw", "sgd")
"""Names that `optimizer.name` may have, besides those of a user's functions."""


def problems_of(config: Config) -> list[str]:
    """One line per problem, each begins with the dotted key."""
    problems = []
    training, sampling, mesh = config.training, config.sampling, config.mesh
    if training.prompts_per_step % training.updates_per_step:
        problems.append(
            f"training.updates_per_step={training.updates_per_step}: must divide "
            f"training.prompts_per_step={training.prompts_per_step}, for the groups of "
            "a step are shared out evenly"
        )
    if not sampling.allow_truncated_sampling:
        problems += [
            f"sampling.{name}={getattr(sampling, name)!r}: truncated sampling makes "
            "rollouts off-policy; leave it to evaluation blocks, or set "
            "sampling.allow_truncated_sampling=true"
            for name in ("top_k", "top_p", "min_p")
            if getattr(sampling, name) is not None
        ]
    if training.steps_off_policy and config.run.replay is not None:
        problems.append(
            f"training.steps_off_policy={training.steps_off_policy}: with run.replay "
            "nothing is sampled; set it to 0"
        )
    if config.model.attention == "cudnn" and config.model.compute_dtype == "float32":
        problems.append(
            "model.attention='cudnn': computes in bfloat16; set model.compute_dtype="
            "bfloat16, or model.attention=auto"
        )
    optimizer, built_in = config.optimizer.name, " or ".join(map(repr, OPTIMIZERS))
    if optimizer not in OPTIMIZERS and not is_own(optimizer):
        problems.append(
            f"optimizer.name={optimizer!r}: expected {built_in} or 'module:function'; "
            + nearest(optimizer, OPTIMIZERS)
        )
    if config.model.lora is not None and is_own(config.model.path):
        problems.append(
            f"model.lora: an adapter needs a model of the package's families, which "
            f"model.path={config.model.path!r} is not; leave out model.lora"
        )
    longest = config.task.max_prompt_length + sampling.max_new_tokens
    problems += [
        f"training.{name}={bound}: must be at least {longest}, the tokens of the "
        "longest sequence (task.max_prompt_length + sampling.max_new_tokens)"
        for name in ("micro_batch_tokens", "micro_batch_tokens_per_shard")
        if (bound := getattr(training, name)) is not None and bound < longest
    ]
    if (lora := config.model.lora) is not None and not lora.targets:
        problems.append("model.lora.targets=[]: name a module, or '*' for all")
    problems += [
        f"task.questions={shown(wanted)}: expected ids, or row numbers from 0"
        for wanted in config.task.questions or ()
        if not isinstance(wanted, str) and (type(wanted) is not int or wanted < 0)
    ]
    if config.task.curriculum is not None and config.run.replay is not None:
        problems.append(
            "task.curriculum: run.replay takes the questions of another run; leave out "
            "one of them"
        )
    if config.task.questions == ():
        problems.append("task.questions=[]: name a question, or null for all")
    if config.run.dir is not None and not config.run.dir.isprintable():
        problems.append(
            f"run.dir={config.run.dir!r}: has characters that cannot be shown; choose "
            "another name"
        )
    sizes = mesh.sizes
    problems += [
        f"mesh.{axis}=0: must be a number of devices, or -1 for the rest"
        for axis, size in sizes.items()
        if size == 0
    ]
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1 and rest != ["fsdp", "tensor"]:
        given = " and ".join(f"mesh.{axis}=-1" for axis in rest)
        problems.append(
            f"{given}: only one axis can be the rest, or fsdp and tensor together"
        )
    for name, axes in mesh.rules.items():
        for axis in axes if isinstance(axes, list) else [axes]:
            if axis is not None and axis not in [*sizes]:
                problems.append(
                    f"mesh.rules.{name}={shown(axes)}: must be an axis of the mesh "
                    f"({', '.join(sizes)}), a list of them, or null for not split"
                )
    if (best := training.keep_best) is not None and best.startswith("eval/"):
        block_name = best.split("/")[1]
        if block_name not in config.evaluation:
            problems.append(
                f"training.keep_best={best!r}: there is no evaluation block "
                f"{block_name!r}; {nearest(block_name, config.evaluation)}"
            )
    for name, block in config.evaluation.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.@-]*", name):
            problems.append(
                f"evaluation.{name!r}: a block's name is part of metric names; use "
                "letters, digits and . _ - @"
            )
        if block.greedy and block.samples > 1:
            problems.append(
                f"evaluation.{name}.samples={block.samples}: greedy completions are "
                "all the same; set samples to 1"
            )
    return problems + _task_problems(config)


def _task_problems(config: Config) -> list[str]:
    """Tasks that do not exist, and options that they do not have or lack."""
    task = config.task
    problems = _problems_of_task("task", "name", task.name, task, task.options)
    for name, block in config.evaluation.items():
        path = f"evaluation.{name}"
        if block.task:
            problems += _problems_of_task(
                path, "task", block.task, block, block.options
            )
        elif task.name in tasks.BUILT_IN:  # what the block inherits was looked at above
            problems += _unknown_options(path, task.name, block, block.options)
    return problems


def _problems_of_task(
    path: str, key: str, name: str, section: Any, options: Mapping[str, Any]
) -> list[str]:
    if ":" in name:  # a module of the user's, which reading a config does not import
        return []
    if name not in tasks.BUILT_IN:
        hint = nearest(name, tasks.BUILT_IN)
        return [f"{path}.{key}={name!r}: there is no such task; {hint}"]
    _, needed = tasks.options_of(name) or ((), ())
    return _unknown_options(path, name, section, options) + [
        f"{path}.{option}: missing; the task {name!r} needs it"
        for option in needed
        if option not in options
    ]


def _unknown_options(
    path: str, name: str, section: Any, options: Mapping[str, Any]
) -> list[str]:
    if (known := tasks.options_of(name)) is None:
        return []
    keys = {f.name for f in dataclasses.fields(section) if not f.metadata.get("rest")}
    keys |= {*known[0], "reward"}
    return [
        f"{path}.{option}={shown(value)}: no such key; {nearest(option, keys)}"
        for option, value in options.items()
        if option not in keys
    ]
