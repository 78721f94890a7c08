"""Hugging Face configs and the table of tensors."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from goldens import GOLDENS, NAMES

from jaxrl_post import models
from jaxrl_post.errors import InputError
from jaxrl_post.models.families import config_from_hf, config_to_hf
from jaxrl_post.models.tensors import tensor_rules

BASE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def rope(**settings):
    return {"rope_scaling": settings}


LONGROPE = rope(rope_type="longrope", short_factor=[1.0], long_factor=[1.0] * 4)


@pytest.mark.parametrize("name", NAMES)
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
        ({"rope_scaling": {"type": "linar", "factor": 2}}, "'linar' is not.*longrope"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "lacks factor, low_freq_factor"),
        (
            rope(rope_type="yarn", mrope_section=[2]),
            "mrope_section of rope_type",
        ),
        (rope(rope_type="yarn", factor="4"), "factor = '4' is not a positive number"),
        (LONGROPE, "short_factor is no list of 4 factors"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not"),
        ({"model_type": "gemma3", "vision_config": {}}, "'gemma3' is not.*images"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "1 entries"),
        ({"model_type": "olmo3", "layer_types": ["chunked"] * 2}, "'chunked'.*sliding"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [1]},
            r"layers = \[1\]",
        ),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "experts_per_token=8"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "gelu_pytorch_tanh"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "one entry for each of 2"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_unsupported_configs_are_named(change, words):
    with pytest.raises(InputError, match=words):
        config_from_hf({**BASE, **change})


def test_which_layers_have_windows():
    """Where the file has no layer_types; as transformers' config classes say."""

    def local(model_type, **values):
        layout = {"num_hidden_layers": 7, "model_type": model_type}
        config = config_from_hf({**BASE, "num_key_value_heads": 2, **layout, **values})
        return config.window, config.local_layers

    assert local("mistral") == (4096, tuple(range(7)))
    assert local("mistral", sliding_window=None) == (None, ())
    assert local("gemma2", sliding_window=8) == (8, (0, 2, 4, 6))
    assert local("gemma3_text") == (4096, (0, 1, 2, 3, 4, 6))
    assert local("gemma3_text", sliding_window_pattern=3) == (4096, (0, 1, 3, 4, 6))
    assert local("olmo3") == (4096, (0, 1, 2, 4, 5, 6))
    assert local("phi3") == (None, ())
    assert local("qwen2", max_window_layers=5) == (None, ())
    switched = {"use_sliding_window": True, "max_window_layers": 5}
    assert local("qwen2", **switched) == (4096, (5, 6))
    assert local("qwen3_moe", **switched) == (4096, tuple(range(7)))
    assert local("smollm3", use_sliding_window=True, sliding_window=9) == (9, (3,))
    assert local("smollm3") == (None, ())


def test_every_problem_at_once():
    with pytest.raises(InputError, match="hidden_act.*mlp_bias"):
        config_from_hf({**BASE, "hidden_act": "gelu", "mlp_bias": True})


def test_no_family_for_odd_options():
    config = models.DecoderConfig(64, 32, 48, 2, 4, 2, 8, qkv_bias=True, qk_norm=True)
    with pytest.raises(InputError, match="none of transformers' models"):
        config_to_hf(config)


@pytest.mark.parametrize("name", NAMES)
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
        assert (*rule.stacked(config.num_layers), *rule.shape) == shapes[path]


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
