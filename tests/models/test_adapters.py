"""Adapters and int8 kernels: the product, the files, what is trained."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from tiny_policy import PARAMS, POLICY, make_batch

from jaxrl_post import models, recipes
from jaxrl_post.errors import InputError
from jaxrl_post.models.adapters import (
    EXTRAS,
    Lora,
    merged_kernel,
    project,
    quantise,
    split_adapter,
)
from jaxrl_post.models.tensors import tensor_rules
from jaxrl_post.recipes import Teacher
from jaxrl_post.sharding import make_mesh
from jaxrl_post.training.state import init_state, merge_params
from jaxrl_post.training.update import make_update_step

GOLDENS = Path(__file__).parents[1] / "goldens" / "models"
FAMILIES = ["llama", "llama_tied", "qwen2", "qwen3", "phi3", "qwen3_moe"]


def load(name, **options):
    """A golden model with an adapter whose B is not zero."""
    policy, params, _ = models.load(GOLDENS / name, **options)
    return policy, awake(params)


def awake(params, key=7):
    def leaf(path, x):
        if path[-1].key != "lora_b":
            return x
        return 0.1 * jax.random.normal(jax.random.key(key), x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)


def logits(policy, params, tokens):
    where = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = policy.hidden(params, tokens, where, jnp.ones_like(tokens))
    return hidden @ policy.unembedding(params).T


TOKENS = jnp.arange(12).reshape(2, 6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_a_merged_one_is_the_same(name, tmp_path):
    policy, base, _ = models.load(GOLDENS / name)
    adapted = models.load(GOLDENS / name, adapter=Lora(rank=3, alpha=5))[1]
    plain = logits(policy, base, TOKENS)
    np.testing.assert_array_equal(logits(policy, adapted, TOKENS), plain)

    adapted = awake(adapted)
    expected = logits(policy, adapted, TOKENS)
    assert np.abs(expected - plain).max() > 1e-2
    unstacked = models.unstack_params(adapted)
    np.testing.assert_allclose(logits(policy, unstacked, TOKENS), expected, atol=1e-5)
    for params in (adapted, unstacked):
        path = models.save(policy, params, None, tmp_path / "m", overwrite=True)
        merged = models.load(path)[1]
        np.testing.assert_allclose(logits(policy, merged, TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_eight_bits_are_the_dequantised_matrices(name, tmp_path):
    policy, params = load(name, int8=True, adapter=Lora(rank=2, targets=("q_proj",)))
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.int8
    path = models.save(policy, params, None, tmp_path / "out")
    plain = models.load(path)[1]
    found = logits(policy, params, TOKENS)
    np.testing.assert_allclose(logits(policy, plain, TOKENS), found, atol=1e-5)
    unstacked = models.unstack_params(params)
    np.testing.assert_allclose(logits(policy, unstacked, TOKENS), found, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantisation_is_within_half_a_step(dtype):
    kernel = jax.random.normal(jax.random.key(0), (3, 4, 5, 6)).astype(dtype)
    kernel = kernel.at[0, :, :, 1].set(0)  # a channel without weights
    values, scale = quantise(kernel, 2)
    back = merged_kernel({"kernel": values, "kernel_scale": scale}, 2, np.float32)
    wide = np.asarray(kernel, np.float64)
    half = np.abs(wide).max((1, 2), keepdims=True) / 127 / 2
    assert (np.abs(back - wide) <= half * (1 + 1e-5)).all()
    assert not back[0, :, :, 1].any()


def test_the_backward_pass_keeps_no_dequantised_kernels():
    layers, width = 16, 128
    kernels = jnp.ones((layers, width, width), jnp.int8)
    scales, a = jnp.ones((layers, width)) / width, jnp.ones((layers, width, 1))
    b, alpha = jnp.zeros((layers, 1, width)), jnp.ones(layers)

    def loss(a, b):
        def body(x, layer):
            return project(x, dict(zip(("kernel", *EXTRAS), layer, strict=True)), 1), ()

        xs = (kernels, scales, a, b, alpha)
        return jnp.sum(jax.lax.scan(body, jnp.ones((2, width)), xs)[0])

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(a, b).compile()
    one_layer = width * width * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * one_layer


def test_gradients_are_those_of_the_merged_matrix():
    """dA = scale dW B^T and dB = scale A^T dW, and no others are made."""
    adapter = Lora(rank=2, alpha=6, targets=("o_proj", "mlp.down_proj"))
    policy, params = load("llama", adapter=adapter)
    trained, frozen = split_adapter(params)
    assert len(jax.tree.leaves(trained)) == 4

    def loss(trained):
        return jnp.sum(jnp.sin(logits(policy, merge_params(trained, frozen), TOKENS)))

    found = jax.grad(loss)(trained)["layers"]
    merged = jax.tree.map(lambda x: x, params)
    for part, name, inputs in (("attention", "o", 2), ("mlp", "down", 1)):
        leaves = dict(params["layers"][part][name])
        merged["layers"][part][name] = {
            "kernel": jnp.asarray(merged_kernel(leaves, inputs, np.float32))
        }
    dense = jax.grad(lambda p: jnp.sum(jnp.sin(logits(policy, p, TOKENS))))(merged)
    for part, name in (("attention", "o"), ("mlp", "down")):
        leaves, own = params["layers"][part][name], found[part][name]
        layers, rank = len(leaves["lora_b"]), adapter.rank
        dw = np.asarray(dense["layers"][part][name]["kernel"], np.float64)
        dw = dw.reshape(layers, -1, dw.shape[-1])
        a = np.asarray(leaves["lora_a"], np.float64).reshape(layers, -1, rank)
        b = np.asarray(leaves["lora_b"], np.float64)
        da = 3 * np.einsum("lio,lro->lir", dw, b)
        db = 3 * np.einsum("lir,lio->lro", a, dw)
        np.testing.assert_allclose(own["lora_a"].reshape(da.shape), da, atol=2e-4)
        np.testing.assert_allclose(own["lora_b"], db, atol=2e-4)


def test_an_update_trains_the_adapter_alone():
    """Base untouched; moments, teacher and reference no larger than the adapter."""
    policy, params = load("qwen3", adapter=Lora(rank=2))
    batch = make_batch()
    trained, frozen = split_adapter(jax.tree.map(jnp.copy, params))
    recipe = replace(recipes.grpo(kl_weight=0.5), teacher=Teacher("ema", 0.5))
    optimizer = optax.adam(1e-2)
    key = jax.random.key(0)
    state = init_state(trained, optimizer, recipe, key, frozen=frozen, reference={})
    count = sum(x.size for x in jax.tree.leaves(trained))
    before, state.frozen["probe"] = jax.tree.map(np.asarray, frozen), jnp.ones(3)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * count + 1
    assert sum(x.size for x in jax.tree.leaves(state.teacher)) == count
    assert not jax.tree.leaves(state.reference)

    new, metrics = make_update_step(policy, recipe, optimizer)(state, batch)
    assert metrics["grad_norm"] > 0 and metrics["loss/kl"] > 0
    del new.frozen["probe"]
    jax.tree.map(np.testing.assert_array_equal, new.frozen, before)
    start = split_adapter(params)[0]
    for old, now, teacher in zip(
        *map(jax.tree.leaves, (start, new.trainable, new.teacher)), strict=True
    ):
        assert np.abs(now - old).max() > 1e-3
        np.testing.assert_allclose(teacher, (old + now) / 2, atol=1e-6)


def test_the_reference_is_the_base_without_a_copy():
    """Its divergence is that from a copy of the base's weights."""
    policy, base, _ = models.load(GOLDENS / "llama")
    _, params = load("llama", adapter=Lora(rank=2))
    batch, recipe = make_batch(), recipes.grpo(kl_weight=1.0)
    found = []
    for reference in ({}, "copy"):
        trained, frozen = split_adapter(jax.tree.map(jnp.copy, params))
        if reference:  # an adapter that adds nothing
            reference = jax.tree_util.tree_map_with_path(
                lambda path, x: x * (path[-1].key == "lora_a"), trained
            )
        state = init_state(
            trained,
            optax.sgd(1.0),
            recipe,
            jax.random.key(0),
            frozen=frozen,
            reference=reference,
        )
        found.append(make_update_step(policy, recipe, optax.sgd(1.0))(state, batch)[1])
    assert found[0]["loss/kl"] > 1e-3
    np.testing.assert_allclose(found[0]["loss/kl"], found[1]["loss/kl"], rtol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_a_mesh_holds_the_same_adapter_in_parts(int8):
    options = {"int8": int8, "adapter": Lora(rank=3)}
    mesh = make_mesh(2, 2, 2)
    policy, params, _ = models.load(GOLDENS / "llama", mesh, **options)
    whole = models.load(GOLDENS / "llama", **options)[1]
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    down, o = params["layers"]["mlp"]["down"], params["layers"]["attention"]["o"]
    assert down["lora_a"].sharding.spec == P(None, "tensor", None)
    assert down["lora_b"].sharding.spec == P(None, None, "fsdp")
    assert o["lora_a"].sharding.spec == P(None, "tensor", None, None)
    if int8:
        assert down["kernel_scale"].sharding.spec == P(None, "fsdp")

    def same(x, names):
        assert x.ndim == len(names)

    jax.tree.map(same, params, policy.logical_axes)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda p: logits(policy, p, TOKENS))(params)
    np.testing.assert_allclose(found, logits(policy, whole, TOKENS), atol=1e-5)


def test_patterns():
    rules = list(tensor_rules(POLICY.config))

    def named(*targets):
        return [rule.path[-2] for rule in Lora(targets=targets).select(rules)]

    assert named("*") == ["q", "k", "v", "o", "gate", "up", "down"]
    assert named("q_proj", "self_attn.v_proj") == ["q", "v"]
    assert named("mlp.*") == ["gate", "up", "down"]
    with pytest.raises(InputError, match=r"'q_prj' names no module.*self_attn.q_proj,"):
        named("v_proj", "q_prj")
    with pytest.raises(InputError, match="name a module"):
        named()
    with pytest.raises(InputError, match="rank=0"):
        Lora(rank=0)


def test_only_adapters_are_saved_as_such(tmp_path):
    with pytest.raises(InputError, match="there is no adapter"):
        models.save_adapter(POLICY, PARAMS, None, tmp_path / "out")
    policy, params = load("llama", adapter=Lora(rank=2))
    path = models.save_adapter(policy, params, None, tmp_path / "out", base="base")
    assert sorted(x.name for x in path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(InputError, match="exists; choose another path"):
        models.save_adapter(policy, params, None, path)
    models.save_adapter(policy, params, None, path, overwrite=True)
    with pytest.raises(InputError, match="has no config.json; it is not overwritten"):
        models.save(policy, params, None, path, overwrite=True)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "qwen3_moe"])
def test_saved_alone_it_adds_to_the_base_what_the_merged_model_has(name, tmp_path):
    """By peft's formula: W + alpha / r B A, ranks by the longest fitting name.

    Of Phi-3's fused matrices, one adapter of all parts; of experts one each.
    """
    lora = Lora(rank=2, alpha=3, targets=("q*_proj", "gate*_proj", "down_proj"))
    policy, params = load(name, adapter=lora)
    path = models.save_adapter(policy, params, None, tmp_path / "adapter")
    settings = json.loads((path / "adapter_config.json").read_text())
    factors = load_file(path / "adapter_model.safetensors")
    models.save(policy, params, None, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(GOLDENS / name / "model.safetensors")
    changed = {k for k, v in merged.items() if (v != base[k].astype(v.dtype)).any()}
    stems = {
        k.removeprefix("base_model.model.")[: -len(".lora_A.weight")] for k in factors
    }
    assert changed == {f"{stem}.weight" for stem in stems}
    for stem in stems:
        a, b = (factors[f"base_model.model.{stem}.lora_{x}.weight"] for x in "AB")
        own = [k for k in settings["rank_pattern"] if stem.endswith(k)]
        rank, alpha = settings["r"], settings["lora_alpha"]
        if own:
            rank = settings["rank_pattern"][own[0]]
            alpha = settings["alpha_pattern"][own[0]]
        assert a.shape[0] == b.shape[1] == rank
        expected = base[f"{stem}.weight"].astype(np.float64) + alpha / rank * (b @ a)
        np.testing.assert_allclose(merged[f"{stem}.weight"], expected, atol=1e-5)
        modules = [re.sub(r"experts\.\d+", "experts", stem)]
        assert any(modules[0].endswith(f".{x}") for x in settings["target_modules"])


def test_experts_are_adapted_each_by_its_own_and_split_over_a_mesh():
    lora = Lora(rank=2, targets=("mlp.experts.*",))
    policy, params = load("qwen3_moe", adapter=lora)
    gate, count = params["layers"]["mlp"]["gate"], policy.config.num_experts
    layers, width = policy.config.num_layers, policy.config.hidden_size
    assert gate["lora_a"].shape == (layers, count, width, 2)
    assert np.abs(gate["lora_a"]).max() <= width**-0.5
    assert "lora_a" not in params["layers"]["attention"]["q"]
    assert "router" not in split_adapter(params)[0]["layers"]["mlp"]
    expected = logits(policy, params, TOKENS)
    mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
    placed = models.load(GOLDENS / "qwen3_moe", mesh, adapter=lora)[1]
    assert placed["layers"]["mlp"]["down"]["lora_b"].sharding.spec[1] == "tensor"
    placed = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, placed)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda p: logits(policy, p, TOKENS))(placed)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_fused_matrices_are_adapted_by_part():
    lora = models.Lora(rank=2, targets=("qkv_proj", "down_proj"))
    _, params, _ = models.load(GOLDENS / "phi3", adapter=lora)
    adapted = {k for k, v in params["layers"]["attention"].items() if "lora_a" in v}
    assert adapted == {"q", "k", "v"}
