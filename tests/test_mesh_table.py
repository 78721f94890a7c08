"""The table over meshes, on a model of a few thousand parameters."""

from __future__ import annotations

import functools
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_post.models import DecoderConfig, decoder
from jaxrl_post.recipes.batch import split_batch
from jaxrl_post.sharding import make_mesh, param_shardings, shard_batch

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "mesh_table.py"
spec = spec_from_file_location("mesh_table", SCRIPT)
assert spec is not None and spec.loader is not None
script = module_from_spec(spec)
sys.modules[spec.name] = script  # where dataclasses look their annotations up
spec.loader.exec_module(script)

CONFIG = DecoderConfig(
    vocab_size=61,
    padded_vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
)
MESHES = ["2x2x2", pytest.param("1x2x4", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def problem():
    policy = decoder(CONFIG)
    params = policy.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    mask = np.arange(6)[::-1] < rng.integers(1, 7, 8)[:, None]
    contexts = rng.integers(0, 61, mask.shape).astype(np.int32)
    return script.Problem(
        policy, jax.device_get(params), contexts, mask, group_size=2, length=8
    )


@pytest.fixture(scope="module")
def outcomes(problem):
    """Gives that of a mesh, on the tokens of 1x1x1."""

    @functools.cache
    def outcome(name):
        reference = None if name == "1x1x1" else outcome("1x1x1")
        return script.measure(problem, script.MESHES[name], reference)

    return outcome


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_rounding_alone(problem, outcomes, name):
    row = script.compare(problem, name, outcomes("1x1x1"), outcomes(name))
    assert row["random_tokens_equal"]
    assert row["unexplained"] == []
    assert max(row["logps"], row["loss"], row["gradient"]) < 1e-5
    assert row["largest_gradient"] > 1e-2  # there is something to compare


@pytest.mark.parametrize("name", MESHES)
def test_the_state_lies_as_the_rules_say(problem, outcomes, name):
    """Parameters, both moments and the teacher."""
    mesh, found = make_mesh(*script.MESHES[name]), outcomes(name).shardings
    wanted = param_shardings(problem.params, problem.policy.logical_axes, mesh)
    adam = found["optimizer"][0]
    for tree in (found["parameters"], found["teacher"], adam.mu, adam.nu):
        jax.tree.map(
            lambda a, b, x: np.testing.assert_(a.is_equivalent_to(b, x.ndim)),
            tree,
            wanted,
            problem.params,
        )
    one, held = outcomes("1x1x1").bytes, outcomes(name).bytes
    whole = sum(x.nbytes for x in jax.tree.leaves(problem.params))
    assert one["parameters"] == one["teacher"] == whole
    for part in ("parameters", "optimizer", "teacher"):  # norms are not split
        assert held[part] < 1.1 * one[part] / (
            mesh.shape["fsdp"] * mesh.shape["tensor"]
        )


@pytest.mark.parametrize("name", MESHES)
def test_the_cache_is_split_over_sequences_and_heads(problem, outcomes, name):
    data, fsdp, tensor = script.MESHES[name]
    cache = outcomes(name).shardings["cache"]
    heads, rows = CONFIG.num_kv_heads, 16
    assert cache.shard_shape((rows, heads, 7, 8)) == (
        rows // (data * fsdp),
        heads // tensor,
        7,
        8,
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_groups_stay_on_one_shard(problem, parts):
    """Contexts beside their responses, and micro-batches where the batch was."""
    mesh = make_mesh(2, 2, 2)
    size = problem.group_size
    tokens = np.zeros((16, 8), np.int32)
    batch = script.make_batch(problem, tokens, tokens == 0)
    batch = batch.replace(
        contexts=np.tile(np.arange(8, dtype=np.int32)[:, None], (1, 6)),
        responses=np.tile(np.arange(16, dtype=np.int32)[:, None], (1, 8)),
    )
    placed = shard_batch(batch, mesh)

    def held(x):
        return {s.device: {*np.unique(s.data).tolist()} for s in x.addressable_shards}

    whole = held(placed.contexts)
    assert all(len(groups) == 2 for groups in whole.values())
    if parts > 1:
        with jax.set_mesh(mesh):
            cut = jax.jit(split_batch, static_argnums=1)(placed, parts)
        placed = jax.tree.map(lambda x: x[-1], cut)
        moved = held(placed.contexts)
        assert all(len(moved[d]) == 1 and moved[d] <= whole[d] for d in whole)
    contexts = held(placed.contexts)
    for device, rows in held(placed.responses).items():
        assert {row // size for row in rows} == contexts[device]
        assert len(rows) == size * len(contexts[device])


def test_only_close_calls_are_explained(problem, outcomes):
    """A token that a random number moved by 0.3 gives is near 0.3 and not 1e-4."""
    tokens, row, at = outcomes("1x1x1").tokens, 5, 3
    assert script.near_tokens(problem, tokens, row, at, 0.0) == {tokens[row, at]}
    assert script.unexplained(problem, tokens, tokens) == []
    near = script.near_tokens(problem, tokens, row, at, 0.3) - {tokens[row, at]}
    others = tokens.copy()
    others[row, at] = near.pop()
    assert script.unexplained(problem, tokens, others) == [row]
    assert script.unexplained(problem, tokens, others, edge=0.3) == []
