"""What a run holds, as shapes on a mesh: nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_post import recipes
from jaxrl_post.errors import InputError, nearest
from jaxrl_post.models import checkpoints, families
from jaxrl_post.models.adapters import (
    adapter_shapes,
    merge_adapter,
    quantised_axes,
    quantised_shapes,
    split_adapter,
)
from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.policy import Policy
from jaxrl_post.models.stack import decoder
from jaxrl_post.models.tensors import tensor_rules
from jaxrl_post.models.weights_in import fit_vocabulary
from jaxrl_post.recipes.batch import Batch
from jaxrl_post.recipes.groups import Demonstrations, Groups
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.sharding import batch_sharding, batch_shards, param_shardings
from jaxrl_post.tasks.lookup import is_own
from jaxrl_post.training.assembly import make_batch
from jaxrl_post.training.config import Config
from jaxrl_post.training.offload import offload
from jaxrl_post.training.optimizer import make_optimizer
from jaxrl_post.training.setup import base_of
from jaxrl_post.training.state import TrainState, init_state
from jaxrl_post.training.teacher_contexts import TeacherContexts
from jaxrl_post.types import Prompts, Verdict

_SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
)
PUBLISHED: Mapping[str, tuple[Any, ...]] = {
    "Qwen/Qwen3-8B": (
        *("qwen3", 151_936, 4096, 12_288, 36, 32, 8, 128, 40_960, False),
    ),
    "Qwen/Qwen3-32B": (
        *("qwen3", 151_936, 5120, 25_600, 64, 64, 8, 128, 40_960, False),
    ),
    "Qwen/Qwen2.5-Math-7B": (
        *("qwen2", 152_064, 3584, 18_944, 28, 28, 4, 128, 4096, False),
    ),
    "Elliott/Qwen2.5-Math-7B-16k-think": (
        *("qwen2", 152_064, 3584, 18_944, 28, 28, 4, 128, 16_384, False),
    ),
    "meta-llama/Llama-3.1-70B": (
        *("llama", 128_256, 8192, 28_672, 80, 64, 8, 128, 131_072, False),
    ),
}
"""Sizes from the models' own config.json, for where that is not at hand."""


def find_model(path: str) -> tuple[DecoderConfig, str]:
    """A model's architecture, and where it was found.

    Nothing is downloaded: a folder or file, the hub's cache, or `PUBLISHED`.

    Raises:
      InputError: it is in none of these.

    >>> config, source = find_model("Qwen/Qwen3-8B")
    >>> config.num_layers, config.head_dim
    (36, 128)
    """
    if is_own(path):
        raise InputError(
            f"model.path={path!r}: preflight knows the sizes of the package's families "
            "alone, not those of a model of one's own."
        )
    if path in checkpoints.EMBEDDED or Path(path).expanduser().exists():
        return _config_of(path), path
    from huggingface_hub import try_to_load_from_cache

    cached = None
    if path.count("/") == 1:
        cached = try_to_load_from_cache(path, "config.json")
    if isinstance(cached, str):
        return _config_of(str(Path(cached).parent)), cached
    if path in PUBLISHED:
        values = dict(zip(_SIZES, PUBLISHED[path], strict=True))
        # Llama 3.1 scales its rotations, which changes no shape.
        config = families.config_from_hf(values, path)
        return config, "sizes as published, from preflight's own table"
    raise InputError(
        f"model.path={path!r}: neither here nor in the hub's cache nor among the "
        f"models whose sizes are known; {nearest(path, PUBLISHED)} Fetch its "
        f"config.json with `hf download {path} config.json`."
    )


def _config_of(path: str) -> DecoderConfig:
    checkpoint = checkpoints.open_checkpoint(path)
    return fit_vocabulary(checkpoint.config, checkpoint.tokenizer(), path)


def open_policy(config: Config, sizes: DecoderConfig) -> Policy:
    """The config's policy, as `models.load` makes it, without weights."""
    section = config.model
    return decoder(
        sizes,
        compute_dtype=section.compute_dtype,
        remat=section.remat,
        attention=section.attention,
    )


def params_of(
    policy: Policy, config: Config, mesh: jax.sharding.Mesh
) -> tuple[Policy, chex.ArrayTree]:
    """The parameters' shapes, laid out on the mesh as `models.load` does, an adapter
    among them where the config has one; and the policy of these."""
    base = base_of(config)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(base.dtype)),
        jax.eval_shape(policy.init, jax.random.key(0)),
    )
    rules = list(tensor_rules(policy.config))
    if base.int8:
        shapes = quantised_shapes(shapes, rules)
        axes = quantised_axes(policy.logical_axes, rules)
        policy = replace(policy, logical_axes=axes)
    if base.adapter is not None:
        chosen = base.adapter.select(rules)
        policy, own = adapter_shapes(policy, base.adapter, chosen)
        shapes = merge_adapter(shapes, own)
    laid_out = param_shardings(shapes, policy.logical_axes, mesh, config.mesh.rules)
    return policy, jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        laid_out,
    )


def state_of(
    params: chex.ArrayTree,
    optimizer: Any,
    recipe: Recipe,
    config: Config,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """The training state's shapes, laid out as training lays them out.

    What belongs to a parameter (moments, teacher, reference) lies as it does; all else
    is small and lies on every device.
    """
    training = config.training
    window = None if training.spike_deviations is None else training.spike_window
    state = jax.eval_shape(
        lambda trainable, frozen: init_state(
            trainable,
            optimizer,
            recipe,
            jax.random.key(0),
            frozen=frozen,
            reference={} if frozen else None,
            spike_window=window,
            off_policy=training.steps_off_policy > 0,
        ),
        *split_adapter(params),
    )
    layouts = {
        jax.tree_util.keystr(path): (x.shape, x.sharding)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }

    def lay_out(path, x):
        sharding = NamedSharding(mesh, P())
        for start in range(len(path)):
            layout = layouts.get(jax.tree_util.keystr(path[start:]))
            if layout is not None and layout[0] == x.shape:
                sharding = layout[1]
                break
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.tree_util.tree_map_with_path(lay_out, state)
    return offload(state, training.offload)


def batch_of(config: Config, recipe: Recipe, mesh: jax.sharding.Mesh) -> Batch:
    """The batch of one update at its longest, made by what makes a run's batches.

    Every prompt has `task.max_prompt_length` tokens, every response
    `sampling.max_new_tokens`, and every sequence a teacher context of its own, of
    `max_length` tokens.
    """
    training = config.training
    prompts = training.prompts_per_step // training.updates_per_step
    groups = _groups(config, recipe, prompts)
    for transform in recipe.group_transforms:
        groups = transform(groups)
    teacher = None
    if recipe.reprompt is not None:
        size, shards = groups.rewards.size, batch_shards(mesh)
        count = math.ceil((1 << (size - 1).bit_length()) / shards) * shards
        shape = (count, recipe.reprompt.max_length)
        each = groups.rewards.shape
        teacher = TeacherContexts(
            contexts=np.ones(shape, np.int32),
            context_mask=np.ones(shape, bool),
            index=np.arange(size, dtype=np.int32).reshape(each),
            distilled=np.ones(each, bool),
            weights=np.ones(each, np.float32),
            metrics={},
        )
    batch = make_batch(
        groups,
        recipe,
        count=prompts,
        context_limit=config.task.max_prompt_length,
        teacher=teacher,
    )
    if training.updates_per_step > 1:
        batch = batch.replace(old_logps=np.zeros(batch.responses.shape, np.float32))
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding
        ),
        batch,
    )


def _groups(config: Config, recipe: Recipe, prompts: int) -> Groups:
    """Full-length groups of which one sequence succeeds, with demonstrations."""
    size = config.training.group_size if recipe.rollouts else 1
    time = config.sampling.max_new_tokens
    ids = tuple(map(str, range(prompts)))
    rewards = np.zeros((prompts, size), np.float32)
    rewards[:, 0] = 1
    verdicts = tuple(Verdict(float(r), success=bool(r)) for r in rewards[0])
    given = Demonstrations(
        tokens=np.ones((prompts, time), np.int32),
        mask=np.ones((prompts, time), bool),
        is_teacher=np.ones((prompts, time), bool),
        sampler_logps=np.zeros((prompts, time), np.float32),
        stopped=np.ones(prompts, bool),
        rewards=np.ones(prompts, np.float32),
        available=np.ones(prompts, bool),
        texts=("",) * prompts,
        verdicts=(Verdict(1.0, success=True),) * prompts,
    )
    contexts = (prompts, config.task.max_prompt_length)
    tokens = (prompts, size, time)
    groups = Groups(
        prompts=Prompts(ids, ((),) * prompts, ({},) * prompts, (None,) * prompts),
        contexts=np.ones(contexts, np.int32),
        context_mask=np.ones(contexts, bool),
        tokens=np.ones(tokens, np.int32),
        mask=np.ones(tokens, bool),
        sampler_logps=np.zeros(tokens, np.float32),
        stopped=np.ones((prompts, size), bool),
        completions=(("",) * size,) * prompts,
        verdicts=(verdicts,) * prompts,
        rewards=rewards,
        judged=np.ones((prompts, size), bool),
        demonstrations=given if recipe.demonstrations else None,
        posterior=None if recipe.posterior_discount is None else np.ones((prompts, 2)),
    )
    if recipe.rollouts:
        return groups
    return replace(groups, is_teacher=np.ones(tokens, bool), demonstrations=None)


def bytes_per_chip(tree: chex.ArrayTree, *, on_host: bool = False) -> int:
    """Bytes of the tree that one device holds, or its host for it."""

    def size(x) -> int:
        kind = getattr(x.sharding, "memory_kind", None)
        if (kind == "pinned_host") != on_host:
            return 0
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
            return x.size * x.dtype.itemsize
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


@dataclass(frozen=True)
class Shapes:
    """What a config's programs are made of."""

    config: Config
    sizes: DecoderConfig
    policy: Policy
    recipe: Recipe
    mesh: jax.sharding.Mesh
    optimizer: Any
    state: TrainState
    batch: Batch

    @classmethod
    def of(
        cls, config: Config, sizes: DecoderConfig, mesh: jax.sharding.Mesh
    ) -> Shapes:
        """Shapes of state and batch.

        Raises:
          InputError: they cannot be laid out on this mesh.
        """
        recipe = recipes.make(config.recipe.name, **config.recipe.arguments)
        training = config.training
        policy = open_policy(config, sizes)
        updates = training.steps * training.updates_per_step
        optimizer = make_optimizer(config.optimizer, updates, recipe.information)
        policy, params = params_of(policy, config, mesh)
        state = state_of(params, optimizer, recipe, config, mesh)
        batch = batch_of(config, recipe, mesh)
        return cls(config, sizes, policy, recipe, mesh, optimizer, state, batch)

    @property
    def resident(self) -> dict[str, int]:
        """Bytes on one chip between programs, by what they are."""
        state = self.state
        parts = {
            "parameters": (state.trainable, state.frozen),
            "optimizer": state.opt_state,
            "teacher": state.teacher,
            "reference": state.reference,
            "sampled from": state.previous,
        }
        sizes = {name: bytes_per_chip(part) for name, part in parts.items()}
        sizes["host"] = bytes_per_chip(state, on_host=True)
        return {name: size for name, size in sizes.items() if size}
