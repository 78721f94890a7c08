"""What a training run is told: one YAML file, read before jax is imported.

The sections and keys below are the whole vocabulary of a config file and of
``section.key=value`` overrides. `task`, `recipe` and the evaluation blocks take further
keys of their own, the arguments of the task or recipe that they name.

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
from typing import Any, Literal

import yaml

from jaxrl_post.errors import ConfigError, nearest
from jaxrl_post.training.configchecks import problems_of
from jaxrl_post.training.configfile import (
    build,
    inherited,
    number,
    override,
    parse_yaml,
    plain,
    rest,
)

DType = Literal["float32", "bfloat16"]
Attention = Literal["auto", "plain", "chunked", "splash", "cudnn"]
Remat = Literal[
    "none",
    "full",
    "products",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "attention_saveable",
    "attention_offloaded",
]
Offloaded = Literal["teacher", "reference", "optimizer"]


@dataclass(frozen=True)
class RunConfig:
    """The run itself.

    Attributes:
      dir: the run's folder; by default ``runs/`` and the name of the config file.
      seed: of everything random: sampling, the order of prompts, dropped samples.
      judge_workers: processes that judge completions; by default one per core, at
        most 8.
      grace_seconds: from SIGINT or SIGTERM until the process is gone. The step under
        way is given up after half of them, which leaves the rest for saving.
      replay: folder of a run whose saved completions are trained on, in the place of
        sampled ones; null: sample.
    """

    dir: str = inherited()
    seed: int = number(0, at_least=0, at_most=2**32 - 1)
    judge_workers: int | None = number(None, at_least=1)
    grace_seconds: float = number(60.0, above=0)
    replay: str | None = None


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter, which is trained in the place of the model's weights.

    Attributes:
      rank: of each matrix that is added (peft: ``r``).
      alpha: what is added counts ``alpha / rank`` times (``lora_alpha``).
      targets: patterns of the modules that are adapted (``target_modules``), such as
        ``[q_proj, v_proj]`` or ``[self_attn.*]``; by default every linear map of the
        layers.
      base_dtype: of the frozen weights. ``int8``: the matrices of the layers in eight
        bits, computed with in `compute_dtype`; by default `compute_dtype`.
    """

    rank: int = number(16, at_least=1)
    alpha: float = number(32.0, above=0)
    targets: tuple[str, ...] = ("*",)
    base_dtype: Literal["float32", "bfloat16", "int8"] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The model to train.

    Attributes:
      path: ``science_base`` (the embedded model), a Hugging Face folder or hub id, or
        a GGUF file.
      lora: train an adapter and leave the model's own weights as they are; null: train
        these.
      param_dtype: of the trained weights, their gradients and the optimizer's moments.
      compute_dtype: of activations and matrix products; log-probs and losses are
        float32 in any case.
      attention: the program that computes it: ``plain`` (all scores at once),
        ``chunked`` (a block at a time, on any device), ``splash`` (TPU), ``cudnn``
        (GPU, bfloat16); ``auto`` chooses by platform, length and dtype.
      router_aux_loss_coef: weight of a loss that keeps the experts of a mixture equally
        busy, transformers' `load_balancing_loss_func`; 0: none.
      remat: what of each layer is kept for the backward pass; the rest is computed
        again. ``none``: all is kept. ``full``: nothing. ``products``: what products of
        matrices and attention put out. Besides, the names of jax's policies, and what
        attention put out alone, on the device (``attention_saveable``) or in the
        host's memory (``attention_offloaded``).
      chat_template_arguments: passed to the tokenizer's chat template, for example
        ``{enable_thinking: false}``.
    """

    path: str
    lora: LoraConfig | None = None
    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"
    attention: Attention = "auto"
    router_aux_loss_coef: float = number(0.0, at_least=0)
    remat: Remat = "products"
    chat_template_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CurriculumConfig:
    """Questions that all answers of a group solve, or none, are asked less often.

    Attributes:
      floor: chance of a question that is always solved, or never, to be asked when its
        turn comes; one of which half the answers succeed has 1.
      discount: how much of what earlier visits of a question showed still counts at
        the next; recipes that remember by themselves have their own.
    """

    floor: float = number(0.1, above=0, at_most=1)
    discount: float = number(0.5, at_least=0, at_most=1)


@dataclass(frozen=True)
class TaskConfig:
    """What is asked, and how answers are judged.

    Attributes:
      name: a built-in task, or ``my_module:my_task``.
      split: the part of the data to train on.
      questions: those to train on, by id or by row number from 0; null: all.
      curriculum: ask questions by how often they are solved; null: all alike.
      max_prompt_length: tokens; longer prompts are dropped and counted, never cut.
      max_dropped_share: of the prompts; when more are too long, that is an error.
      judge_timeout: seconds that the judging of one completion may take.
      options: every other key of the section, arguments of the task.
    """

    name: str
    split: str = "train"
    questions: tuple[Any, ...] | None = None
    curriculum: CurriculumConfig | None = None
    max_prompt_length: int = number(1024, at_least=1)
    max_dropped_share: float = number(0.1, at_least=0, at_most=1)
    judge_timeout: float = number(10.0, above=0)
    options: Mapping[str, Any] = rest()


@dataclass(frozen=True)
class RecipeConfig:
    """The algorithm.

    Attributes:
      name: a built-in recipe, or ``my_module:my_recipe``.
      arguments: every other key of the section, arguments of the recipe.
    """

    name: str
    arguments: Mapping[str, Any] = rest()


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates. Schedules count updates, not steps.

    Attributes:
      name: ``adamw`` or ``sgd``.
      learning_rate: at its peak, after the warm-up.
      schedule: of the learning rate after the warm-up; ``linear`` and ``cosine``
        reach 0 at the last update.
      warmup_updates: over which the learning rate rises linearly from 0.
      weight_decay: decoupled, multiplied by the learning rate (adamw).
      b1: decay of the first moment (adamw), or the momentum (sgd).
      b2: decay of the second moment (adamw).
      eps: added to the root of the second moment (adamw).
      max_grad_norm: global norm to which gradients are clipped; null for no clipping.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = number(1e-6, at_least=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_updates: int = number(0, at_least=0)
    weight_decay: float = number(0.0, at_least=0)
    b1: float = number(0.9, at_least=0, below=1)
    b2: float = number(0.999, at_least=0, below=1)
    eps: float = number(1e-8, above=0)
    max_grad_norm: float | None = number(1.0, above=0)


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how much at once, and what is saved. A step is one rollout batch.

    Attributes:
      steps: rollout batches in the whole run.
      prompts_per_step: prompts drawn for one step, over all processes.
      group_size: completions sampled per prompt.
      updates_per_step: equal parts that a step's groups are split into, one optimizer
        update for each.
      micro_batch_tokens: bound on the tokens (contexts and responses, padding
        included) of one forward and backward pass, over all devices; null: a whole
        update at once. Holds at least one sequence of the greatest length.
      micro_batch_tokens_per_shard: the same for each of the data x fsdp shards of a
        batch, so that it suits any number of devices; where both are set, both hold.
      chunk_size: tokens whose logits exist at one time; null: chosen for the memory.
      steps_off_policy: by how many steps the parameters that completions are sampled
        from lag behind, 0 or 1. With 1 a step's completions are sampled before the
        updates of the step before and judged during them. A copy more of the trained
        parameters is kept, and the recipe must weight tokens by importance.
      offload: parts of the state that lie in the host's memory between their uses, of
        ``teacher``, ``reference`` and ``optimizer``; slower, for memory on the device.
      max_skipped_updates: updates in a row that may be skipped, for a loss or a
        gradient that is not finite or for a spike, before the run stops.
      spike_deviations: skips updates whose gradient norm lies more than so many robust
        deviations above the median of those before; null: none are skipped for that.
      spike_window: updates that this median is taken over; the first ones only fill it.
      evaluate_every: steps between evaluations; null: only the base, and the end.
      teacher_samples: answers per question that the self-teacher is asked for in the
        first step and in those that are evaluated, to measure its accuracy beside the
        student's; null: none.
      teacher_tokens: whether the self-teacher's log-probs of a few completions' tokens
        are kept with them in the same steps, for the report to show what it would
        change; one more program to compile.
      checkpoint_every: steps between checkpoints; one more is made at the end and on
        a signal.
      keep_checkpoints: how many of the last checkpoints stay.
      stop_at_success: ends the run with the first step in which the judge calls a
        completion a success.
      keep_best: a metric, such as ``eval/science/avg@16``: of the checkpoints of steps
        that have it, the one where it is greatest stays as well; null: none.
    """

    steps: int = number(at_least=0)
    prompts_per_step: int = number(16, at_least=1)
    group_size: int = number(8, at_least=1)
    updates_per_step: int = number(1, at_least=1)
    micro_batch_tokens: int | None = number(None, at_least=1)
    micro_batch_tokens_per_shard: int | None = number(None, at_least=1)
    chunk_size: int | None = number(None, at_least=1)
    steps_off_policy: int = number(0, at_least=0, at_most=1)
    offload: tuple[Offloaded, ...] = ()
    max_skipped_updates: int = number(10, at_least=1)
    spike_deviations: float | None = number(None, above=0)
    spike_window: int = number(50, at_least=2)
    evaluate_every: int | None = number(None, at_least=1)
    teacher_samples: int | None = number(None, at_least=1)
    teacher_tokens: bool = False
    checkpoint_every: int = number(50, at_least=1)
    keep_checkpoints: int = number(2, at_least=1)
    stop_at_success: bool = False
    keep_best: str | None = None


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are sampled for training.

    Attributes:
      temperature: that logits are divided by, in sampling and in every loss.
      top_k: keep the k likeliest tokens.
      top_p: keep the likeliest tokens that together reach this probability.
      min_p: keep tokens at least this share as likely as the likeliest.
      max_new_tokens: per completion; a completion that reaches it counts as truncated.
      slots: completions decoded at the same time, over all devices; null: all of a
        step.
      slots_per_shard: the same for each of the data x fsdp shards of a batch; where
        both are set, both hold.
      stop: texts that end a completion, besides the tokenizer's end tokens.
      allow_truncated_sampling: permits top_k, top_p and min_p here, although the loss
        is that of the untruncated policy.
    """

    temperature: float = number(1.0, above=0)
    top_k: int | None = number(None, at_least=1)
    top_p: float | None = number(None, above=0, at_most=1)
    min_p: float | None = number(None, above=0, at_most=1)
    max_new_tokens: int = number(256, at_least=1)
    slots: int | None = number(None, at_least=1)
    slots_per_shard: int | None = number(None, at_least=1)
    stop: tuple[str, ...] = ()
    allow_truncated_sampling: bool = False


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1, for one of them: the rest.

    `fsdp` and `tensor` may both be -1: `fsdp` then takes as many of the rest as an
    update's groups divide by, `tensor` what is left.

    Attributes:
      data: copies of the model, each with its own prompts.
      fsdp: devices that parameters are spread over, each with its own prompts.
      tensor: devices that share each matrix product.
      fast_within: which devices fast links join: those of a TPU ``slice`` or GPU node,
        as they report it, of a ``process``, or ``all``. Over the slow network between
        them go `data`, then `fsdp`, never `tensor`.
      rules: entries that replace those of `sharding.RULES`: the axis, or the list of
        axes, that splits a dimension of the parameters, or null.
        ``{kv_heads: null}`` has every device of `tensor` keep all key-value heads.
    """

    data: int = number(-1, at_least=-1)
    fsdp: int = number(1, at_least=-1)
    tensor: int = number(1, at_least=-1)
    fast_within: Literal["slice", "process", "all"] = "slice"
    rules: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation block; its metrics are named ``eval/<name of the block>/...``.

    Attributes:
      task: as in the section `task`; by default the training task with its options,
        which the block's own options then override one by one.
      split: the part of the data to evaluate on.
      rows: how many questions, from the split's beginning; null: all.
      samples: completions per question: the k of avg@k, pass@k and maj@k.
      greedy: take the likeliest token each time instead of sampling.
      temperature: as in `sampling`, with any truncation allowed.
      top_k: as in `sampling`.
      top_p: as in `sampling`.
      min_p: as in `sampling`.
      max_new_tokens: by default that of `sampling`.
      max_prompt_length: by default that of `task`.
      judge_timeout: by default that of `task`.
      stop: texts that end a completion; by default those of `sampling`, and none where
        the block names a task of its own.
      options: every other key of the block, arguments of the task.
    """

    task: str = inherited()
    split: str = "validation"
    rows: int | None = number(None, at_least=1)
    samples: int = number(1, at_least=1)
    greedy: bool = False
    temperature: float = number(1.0, above=0)
    top_k: int | None = number(None, at_least=1)
    top_p: float | None = number(None, above=0, at_most=1)
    min_p: float | None = number(None, above=0, at_most=1)
    max_new_tokens: int = inherited(at_least=1)
    max_prompt_length: int = inherited(at_least=1)
    judge_timeout: float = inherited(above=0)
    stop: tuple[str, ...] = inherited()
    options: Mapping[str, Any] = rest()


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go beside ``metrics.jsonl``.

    ``tracking: [tensorboard, trackio]`` is short for ``tracking: {to: [...]}``.

    Attributes:
      to: ``tensorboard`` (event files in the run's folder), ``trackio`` (its local
        database); their packages come with ``jaxrl_post[tracking]``.
      names: of the metrics there: ``own``, or ``trl``, the names that TRL gives to
        those that mean the same.
      project: of trackio.
    """

    to: tuple[Literal["tensorboard", "trackio"], ...] = ()
    names: Literal["own", "trl"] = "own"
    project: str = "jaxrl_post"


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
