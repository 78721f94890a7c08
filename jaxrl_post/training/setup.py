"""What a config names, opened: model, tasks, sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax

from jaxrl_post import models, tasks
from jaxrl_post.errors import InputError, nearest
from jaxrl_post.generation import Sampler, stop_token_ids
from jaxrl_post.models.attention import check_platform
from jaxrl_post.models.policy import Policy
from jaxrl_post.sharding import RULES, batch_shards, make_mesh
from jaxrl_post.tasks.lookup import is_own
from jaxrl_post.training.config import Config, SamplingConfig, TrainingConfig
from jaxrl_post.training.own_model import open_own_model


def open_mesh(
    config: Config, *, trains: bool = True, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh | None:
    """The mesh that the config asks for; None for one device, which needs none.

    Args:
      config: its section `mesh`, and the groups that are to be shared out.
      trains: whether there will be updates; an evaluation has none.
      devices: those to use, always as a mesh; None: jax's.

    Raises:
      InputError: the devices, or the groups of an update, do not divide by it; or a
        rule is of no dimension that there is.
    """
    section = config.mesh
    if unknown := sorted(section.rules.keys() - RULES.keys()):
        raise InputError(
            f"mesh.rules.{unknown[0]}: models have no such dimension; "
            f"{nearest(unknown[0], RULES)}"
        )
    sizes = set(section.sizes.values())
    one = sizes == {1} or (jax.device_count() == 1 and sizes <= {1, -1})
    if one and devices is None and jax.process_count() == 1:
        return None
    training = config.training
    groups = training.prompts_per_step // training.updates_per_step
    fsdp = section.fsdp
    if fsdp == section.tensor == -1:
        count = jax.device_count() if devices is None else len(devices)
        fsdp = math.gcd(groups // section.data, count // section.data)
    mesh = make_mesh(
        section.data,
        fsdp,
        section.tensor,
        devices,
        fast_within=section.fast_within,
    )
    shards = batch_shards(mesh)
    if trains and groups % shards:
        raise InputError(
            f"training.prompts_per_step={training.prompts_per_step} gives {groups} "
            f"groups to an update; {shards} shards (mesh.data x mesh.fsdp) cannot "
            "share them evenly: make it a multiple of "
            f"{shards * training.updates_per_step}, or set mesh.data=1 mesh.fsdp=-1 "
            "mesh.tensor=-1, which lets several devices share a group."
        )
    return mesh


def over_all_shards(
    whole: int | None, each: int | None, mesh: jax.sharding.Mesh | None
) -> int | None:
    """The tighter of a bound over all devices and one for each shard of the batch.

    >>> over_all_shards(100, 30, mesh=None), over_all_shards(None, None, mesh=None)
    (30, None)
    """
    if each is not None:
        each *= 1 if mesh is None else batch_shards(mesh)
    return min((x for x in (whole, each) if x is not None), default=None)


def micro_batch_bound(
    training: TrainingConfig, mesh: jax.sharding.Mesh | None
) -> int | None:
    """Tokens of one pass over all devices, by both of the config's bounds."""
    each = training.micro_batch_tokens_per_shard
    return over_all_shards(training.micro_batch_tokens, each, mesh)


def slots_bound(sampling: SamplingConfig, mesh: jax.sharding.Mesh | None) -> int | None:
    """Completions decoded at a time over all devices, by both bounds."""
    return over_all_shards(sampling.slots, sampling.slots_per_shard, mesh)


class Base(NamedTuple):
    """How a config's weights are held.

    Attributes:
      dtype: of those that are not of eight bits.
      int8: whether the matrices of the layers are.
      adapter: what is trained in their place; None: they are.
    """

    dtype: str
    int8: bool = False
    adapter: models.Lora | None = None


def base_of(config: Config) -> Base:
    """How a config's weights are held, with or without `model.lora`."""
    section, lora = config.model, config.model.lora
    if lora is None:
        return Base(section.param_dtype)
    dtype = lora.base_dtype or section.compute_dtype
    int8 = dtype == "int8"
    adapter = models.Lora(
        rank=lora.rank,
        alpha=lora.alpha,
        targets=lora.targets,
        dtype=section.param_dtype,
        seed=config.run.seed,
    )
    return Base(section.compute_dtype if int8 else dtype, int8, adapter)


def open_model(
    config: Config, mesh: jax.sharding.Mesh | None = None
) -> tuple[Policy, chex.ArrayTree, Any]:
    """Policy, parameters (on the mesh, if any) and tokenizer.

    Raises:
      InputError: no such model, one without a tokenizer, or an attention that does not
        run here.
    """
    section, base = config.model, base_of(config)
    check_platform(section.attention)
    if is_own(section.path):
        return open_own_model(config, mesh)
    policy, params, tokenizer = models.load(
        section.path,
        mesh,
        config.mesh.rules,
        dtype=base.dtype,
        compute_dtype=section.compute_dtype,
        remat=section.remat,
        attention=section.attention,
        int8=base.int8,
        adapter=base.adapter,
    )
    if tokenizer is None:
        raise InputError(
            f"model.path={section.path!r}: there is no tokenizer beside it."
        )
    return policy, params, tokenizer


def open_task(name: str, split: str, options: Mapping[str, Any], key: str):
    """A task by name; `key` is the config's section, for messages."""
    try:
        return tasks.load(name, split=split, **options)
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{key}: {error}") from error


def open_sampler(
    policy: Policy, tokenizer: Any, section: Any, max_prompt_length: int, **changes: Any
) -> Sampler:
    """A sampler as a section `sampling`, or an evaluation block, describes it.

    Args:
      policy: what is sampled from.
      tokenizer: for the tokens that end a completion.
      section: a `SamplingConfig` or an `EvaluationConfig`.
      max_prompt_length: of the prompts that it will get.
      **changes: arguments of `Sampler` that replace the section's.

    Raises:
      InputError: prompt and completion may exceed the model's positions.
    """
    positions = getattr(policy.config, "max_positions", None)
    longest = max_prompt_length + section.max_new_tokens
    if positions is not None and longest > positions:
        raise InputError(
            f"max_prompt_length={max_prompt_length} and max_new_tokens="
            f"{section.max_new_tokens} make {longest} tokens, more than the model's "
            f"{positions} positions; lower one of them."
        )
    stop = stop_token_ids(tokenizer, getattr(section, "stop", ()))
    ends = {*models.stop_token_ids(policy, tokenizer), *stop}
    greedy = getattr(section, "greedy", False)
    arguments = {
        "max_new_tokens": section.max_new_tokens,
        "temperature": 0.0 if greedy else section.temperature,
        "top_k": section.top_k,
        "top_p": section.top_p,
        "min_p": section.min_p,
        "stop_tokens": sorted(ends),
        "pad_token": tokenizer.pad_token_id or 0,
    }
    return Sampler(policy, **{**arguments, **changes})
