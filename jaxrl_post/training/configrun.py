"""Sections of a config that say what is run where: run, model, mesh, evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxrl_post.training.configfile import inherited, number, rest

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
      path: ``science_base`` (the embedded model), a Hugging Face folder or hub id, a
        GGUF file, or ``my_module:my_model``, a function that returns what `models.load`
        does: a `Policy`, its parameters and a tokenizer. It gets the section's other
        keys, and of `compute_dtype`, `attention`, `remat` and ``seed`` what it names.
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
      arguments: every other key of the section, arguments of a function of one's own.
    """

    path: str
    lora: LoraConfig | None = None
    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"
    attention: Attention = "auto"
    router_aux_loss_coef: float = number(0.0, at_least=0)
    remat: Remat = "products"
    chat_template_arguments: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = rest(own="path")


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
      peak_flops: operations per second of a device that `throughput/mfu` counts as
        all; null: its maker's, of bfloat16, for TPUs and the H100, else no such metric.
    """

    data: int = number(-1, at_least=-1)
    fsdp: int = number(1, at_least=-1)
    tensor: int = number(1, at_least=-1)
    fast_within: Literal["slice", "process", "all"] = "slice"
    rules: Mapping[str, Any] = field(default_factory=dict)
    peak_flops: float | None = number(None, above=0)

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
