"""State in the host's memory: the same numbers, and it stays there."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import PARAMS, POLICY
from whole_logits import distillation_batch

from jaxrl_post import recipes
from jaxrl_post.errors import InputError
from jaxrl_post.sharding import make_mesh, shard
from jaxrl_post.training import offload as offload_module
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.offload import offload
from jaxrl_post.training.state import init_state
from jaxrl_post.training.teacher_accuracy import teacher_params
from jaxrl_post.training.update import make_update_step

PARTS = ("teacher", "reference", "optimizer")
SDPO = recipes.sdpo(top_k=None, teacher="ema", teacher_rate=0.1)
RECIPE = dataclasses.replace(
    SDPO, terms=(*SDPO.terms, recipes.grpo(kl_weight=0.1).terms[-1])
)
OPTIMIZER = optax.adamw(1e-2)


def begin(parts, mesh=None):
    params = jax.tree.map(jnp.copy, PARAMS)
    if mesh is not None:
        params = shard(params, POLICY.logical_axes, mesh)
    return offload(init_state(params, OPTIMIZER, RECIPE, jax.random.key(0)), parts)


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


@pytest.mark.parametrize(
    "sizes", [None, pytest.param((2, 2, 2), marks=pytest.mark.slow)]
)
def test_the_same_updates(sizes):
    """Two of them, the teacher and both moments moving; in two micro-batches."""
    mesh = None if sizes is None else make_mesh(*sizes)
    bound = None if mesh is not None else 60
    update = make_update_step(
        POLICY, RECIPE, OPTIMIZER, mesh=mesh, micro_batch_tokens=bound
    )

    def train(parts):
        state = begin(parts, mesh)
        before = jax.tree.map(np.asarray, state.teacher)
        for _ in range(2):
            state, metrics = update(state, distillation_batch(4))
        after = jax.tree.map(np.asarray, state.teacher)
        moved = jax.tree.map(lambda a, b: np.any(a != b), before, after)
        assert any(jax.tree.leaves(moved))
        return state, metrics

    (kept, metrics), (away, metrics_away) = train(()), train(PARTS)
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, (kept.trainable, kept.opt_state, kept.teacher)),
        jax.tree.map(np.asarray, (away.trainable, away.opt_state, away.teacher)),
    )
    chex.assert_trees_all_equal(metrics, metrics_away)
    assert kinds((away.teacher, away.reference, away.opt_state)) == {"pinned_host"}
    assert kinds(away.trainable) == kinds(kept) == {"device"}
    assert kinds(teacher_params(RECIPE, away)) == {"device"}


def test_only_what_is_named_and_exists():
    state = begin(("optimizer",))
    assert kinds(state.opt_state) == {"pinned_host"}
    assert kinds((state.teacher, state.reference, state.trainable)) == {"device"}
    grpo = init_state(PARAMS, OPTIMIZER, recipes.grpo(), jax.random.key(0))
    assert offload(grpo, ("teacher",)).teacher is None
    assert offload(grpo, ()) is grpo


def test_a_checkpoint_comes_back_to_where_it_lay(tmp_path):
    state = begin(PARTS)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore(begin(PARTS))
    checkpoints.close()
    assert kinds((restored.teacher, restored.opt_state)) == {"pinned_host"}
    assert kinds(restored.trainable) == {"device"}
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, restored.teacher),
        jax.tree.map(np.asarray, state.teacher),
    )


def test_a_platform_without_the_memory(monkeypatch):
    monkeypatch.setattr(offload_module, "_HOST", "elsewhere")
    with pytest.raises(
        InputError, match=r"training.offload=\['optimizer'\]: cpu has no .*elsewhere"
    ):
        begin(("optimizer",))
