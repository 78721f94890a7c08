"""Hugging Face configs and the table of tensors."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.errors import InputError
from jaxrl_post.models.families import config_from_hf, config_to_hf, tensor_rules

GOLDENS = Path(__file__).parents[1] / "goldens" / "models"
BASE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_config_there_and_back(name):
    values = json.loads((GOLDENS / name / "config.json").read_text())
    config = config_from_hf(values)
    written = config_to_hf(config)
    assert config_from_hf(written) == config
    for key in written.keys() & values.keys():
        assert written[key] == values[key], key


def test_old_and_new_places_of_the_rope_base():
    old = config_from_hf({**BASE, "rope_theta": 5e5, "rope_scaling": None})
    new = config_from_hf(
        {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )
    assert old == new
    assert old.rope_theta == 5e5
    assert config_from_hf(BASE).rope_theta == 10_000.0


def test_derived_and_default_numbers():
    config = config_from_hf(BASE)
    assert (config.head_dim, config.num_kv_heads) == (8, 4)
    assert not config.tie_embeddings
    qwen = config_from_hf({**BASE, "model_type": "qwen3", "num_key_value_heads": 2})
    assert (qwen.head_dim, qwen.num_kv_heads) == (128, 2)
    assert config_from_hf({**BASE, "eos_token_id": [3, 5]}).stop_token_ids == (3, 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, "'lama' is not supported; did you mean 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type = 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type = 'llama3'"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_unsupported_configs_are_named(change, words):
    with pytest.raises(InputError, match=words):
        config_from_hf({**BASE, **change})


def test_every_problem_at_once():
    with pytest.raises(InputError, match="hidden_act.*mlp_bias"):
        config_from_hf({**BASE, "hidden_act": "gelu", "mlp_bias": True})


def test_no_family_for_odd_options():
    config = models.DecoderConfig(64, 32, 48, 2, 4, 2, 8, qkv_bias=True, qk_norm=True)
    with pytest.raises(InputError, match="none of transformers' models"):
        config_to_hf(config)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_rules_cover_the_parameters(name):
    values = json.loads((GOLDENS / name / "config.json").read_text())
    config = config_from_hf(values)
    tree = jax.eval_shape(models.decoder(config).init, jax.random.key(0))
    shapes = {
        tuple(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    rules = {rule.path: rule for rule in tensor_rules(config)}
    assert rules.keys() == shapes.keys()
    for path, rule in rules.items():
        stacked = (config.num_layers,) if rule.per_layer else ()
        assert (*stacked, *rule.shape) == shapes[path]


def test_any_part_of_a_leaf_can_be_read():
    """Heads and dimensions that a file keeps in one axis are cut apart rightly."""
    config = config_from_hf({**BASE, "model_type": "qwen2", "num_key_value_heads": 2})
    rng = np.random.default_rng(0)
    for rule in tensor_rules(config):
        leaf = rng.normal(size=rule.shape)
        tensor = rule.to_file(leaf)
        assert tensor.shape == rule.file_shape
        for index in (
            (slice(None),) * leaf.ndim,
            tuple(slice(n // 2, n) for n in leaf.shape),
        ):
            block = tensor[rule.file_index(index)]
            np.testing.assert_array_equal(rule.from_file(block, index), leaf[index])


def test_projections_are_stored_as_torch_has_them():
    """``x @ W.T`` in the file's layout is the contraction with our kernel."""
    config = config_from_hf({**BASE, "num_key_value_heads": 2})
    rules = {rule.path[1:3]: rule for rule in tensor_rules(config)}
    rng = np.random.default_rng(0)
    q, o = rules["attention", "q"], rules["attention", "o"]
    x, weight = rng.normal(size=(3, 32)), rng.normal(size=q.file_shape)
    kernel = q.from_file(weight, (slice(None),) * 3)
    heads = np.tensordot(x, kernel, 1)
    np.testing.assert_allclose(heads, (x @ weight.T).reshape(3, 4, 8))
    weight = rng.normal(size=o.file_shape)
    out = np.tensordot(heads, o.from_file(weight, (slice(None),) * 3), 2)
    np.testing.assert_allclose(out, heads.reshape(3, 32) @ weight.T)
