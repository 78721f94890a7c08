"""What a training run is told: one YAML file, read before jax is imported.

The sections and keys below are the whole vocabulary of a config file and of
``section.key=value`` overrides. `task`, `recipe` and the evaluation blocks take further
keys of their own, the arguments of the task or recipe that they name; so do `model` and
`optimizer` where these are the user's own.

    model: {path: science_base}
    task: {name: science, levels: [1, 2]}
    recipe: {name: grpo, clip_high: 0.28}
    training: {steps: 40, prompts_per_step: 16, group_size: 8}
    evaluation:
      science: {rows: 128, samples: 16}
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jaxrl_post.errors import ConfigError, nearest
from jaxrl_post.training.configchecks import problems_of
from jaxrl_post.training.configfile import build, override, parse_yaml, plain
from jaxrl_post.training.configlearning import (
    CurriculumConfig,
    OptimizerConfig,
    RecipeConfig,
    SamplingConfig,
    TaskConfig,
    TrainingConfig,
)
from jaxrl_post.training.configrun import (
    EvaluationConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TrackingConfig,
)

__all__ = [
    "Config",
    "CurriculumConfig",
    "EvaluationConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RecipeConfig",
    "RunConfig",
    "SamplingConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainingConfig",
    "load_config",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Made by `load_config` or `Config.from_dict`, which check it.

    Attributes:
      run: folder and seed.
      model: what is trained.
      task: on what.
      recipe: by which algorithm.
      optimizer: the optax chain.
      training: for how long, in which portions.
      sampling: of the completions to train on.
      mesh: the devices.
      evaluation: blocks by name; empty for a run that is not evaluated.
      tracking: where metrics go beside ``metrics.jsonl``.
      stages: parts of configs by name, run in this order, each laid over this one:
        ``{warm: {recipe: {name: sft}, training: {steps: 50}}, rl: {}}``. A stage may
        set task, recipe, optimizer, training and sampling; one that names a task or a
        recipe replaces that section whole. Its `training.steps` are its own, while
        those by which the run is evaluated and saved count from the run's beginning.
    """

    run: RunConfig = RunConfig()
    model: ModelConfig
    task: TaskConfig
    recipe: RecipeConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    sampling: SamplingConfig = SamplingConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: Mapping[str, EvaluationConfig] = field(default_factory=dict)
    tracking: TrackingConfig = TrackingConfig()
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], source: str = "config") -> Config:
        """A checked config, what blocks leave open filled in from the other sections.

        Raises:
          ConfigError: with every problem found, each named by its dotted key.
        """
        if isinstance(tree.get("tracking"), list):
            tree = {**tree, "tracking": {"to": tree["tracking"]}}
        config = build(cls, tree, source)
        if problems := problems_of(config):
            raise ConfigError(source, problems)
        config = _resolved(config, default_dir=str(Path("runs", Path(source).stem)))
        problems = [x for name in config.stages for x in config._problems_of(name)]
        if problems:
            raise ConfigError(source, problems)
        return config

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: those of its stages, where it has any."""
        parts = [self.stage(name) for name in self.stages] or [self]
        return sum(part.training.steps for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns back into an equal config."""
        return plain(self)

    def to_yaml(self) -> str:
        """The text of a config file that means this config."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def stage(self, name: str) -> Config:
        """This config with the stage `name` laid over it, itself without stages."""
        tree = self.to_dict() | {"stages": {}}
        for section, keys in self.stages[name].items():
            # Another task or recipe has other arguments.
            whole = section in ("task", "recipe") and "name" in keys
            tree[section] = {**({} if whole else tree[section]), **keys}
        return Config.from_dict(tree, f"stages.{name}")

    def _problems_of(self, name: str) -> list[str]:
        """What is wrong with the stage `name`, each key as the user wrote it."""
        prefix, problems = f"stages.{name}", []
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            problems.append(f"{prefix!r}: name a stage by letters, digits and _ -")
        for section, keys in self.stages[name].items():
            if section not in _STAGE_SECTIONS:
                hint = nearest(section, _STAGE_SECTIONS)
                problems.append(f"{prefix}.{section}: no section of a stage; {hint}")
            elif not isinstance(keys, Mapping):
                problems.append(f"{prefix}.{section}={keys!r}: expected a section")
            elif section == "training" and (own := _WHOLE_RUN & keys.keys()):
                problems += [
                    f"{prefix}.training.{key}: is of the whole run; set training.{key}"
                    for key in sorted(own)
                ]
        if not problems:
            try:
                self.stage(name)
            except ConfigError as error:
                problems += [f"{prefix}.{problem}" for problem in error.problems]
        return problems


_WHOLE_RUN = {"keep_checkpoints", "keep_best", "stop_at_success"}
_STAGE_SECTIONS = ("task", "recipe", "optimizer", "training", "sampling")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, applies overrides, checks everything.

    Args:
      path: a YAML file.
      overrides: ``section.key=value`` each, the value in YAML; later ones win.

    Raises:
      ConfigError: before anything is written, compiled or even imported.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = path.parent.glob("*.yaml") if path.parent.is_dir() else ()
        hint = nearest(str(path), map(str, beside))
        raise ConfigError(str(path), [f"there is no such file; {hint}"]) from None
    except (OSError, ValueError) as error:  # ValueError: not text, or no path
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(str(path), ["expected sections such as 'model:' and 'task:'"])
    for assignment in overrides:
        override(tree, assignment)
    return Config.from_dict(tree, str(path))


def _resolved(config: Config, default_dir: str) -> Config:
    """`config` with every inherited field filled in."""
    task, blocks = config.task, {}
    for name, block in config.evaluation.items():
        blocks[name] = dataclasses.replace(
            block,
            task=block.task or task.name,
            options={**({} if block.task else task.options), **block.options},
            max_new_tokens=block.max_new_tokens or config.sampling.max_new_tokens,
            max_prompt_length=block.max_prompt_length or task.max_prompt_length,
            judge_timeout=block.judge_timeout or task.judge_timeout,
            stop=_stop(block, config.sampling),
        )
    run = dataclasses.replace(config.run, dir=config.run.dir or default_dir)
    return dataclasses.replace(config, run=run, evaluation=blocks)


def _stop(block: EvaluationConfig, sampling: SamplingConfig) -> tuple[str, ...]:
    if block.stop is not None:
        return block.stop
    return () if block.task else sampling.stop
