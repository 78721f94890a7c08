"""Runs that train an adapter: resumed, on a mesh, from the config to the model."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_runs import DieAfter, Died, assert_same_run, lasting, newest_arrays

from jaxrl_post import models, training
from jaxrl_post.errors import ConfigError, InputError
from jaxrl_post.models.adapters import split_adapter
from jaxrl_post.training.checkpoints import load_policy
from jaxrl_post.training.metrics import read_metrics

LORA = {"rank": 2, "alpha": 8, "targets": ["self_attn.*", "up_proj"]}
RECIPE = {"name": "grpo", "kl_weight": 0.1}


def config_of(tiny_config, path, **sections):
    lora = {**LORA, **sections.pop("lora", {})}
    options = {
        "model": {"lora": lora},
        "recipe": RECIPE,
        "training": {"steps": 2, "checkpoint_every": 1, "prompts_per_step": 4},
        "evaluation": {},
        "run": {"dir": str(path)},
    }
    return tiny_config(**{**options, **sections})


class DieInTheSecond(DieAfter):
    step = 2  # the checkpoint of the first is there


def test_an_int8_base_is_resumed_and_left_as_it_was(tiny_config, tmp_path, tiny_model):
    bits = {"base_dtype": "int8"}
    whole = config_of(tiny_config, tmp_path / "whole", lora=bits)
    result = training.run(whole)
    rows = read_metrics(tmp_path / "whole")
    # The sampler decodes with the very model that is trained.
    assert rows[1]["sampler/logp_gap"] < 1e-4
    assert rows[1]["loss/kl"] == 0 and rows[2]["loss/kl"] > 0
    names = newest_arrays(tmp_path / "whole")
    assert not [name for name in names if name.startswith((".frozen", ".reference"))]

    cut = config_of(tiny_config, tmp_path / "cut", lora=bits)
    with pytest.raises(Died):
        training.run(cut, progress=DieInTheSecond)
    training.run(cut)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")

    base = models.load(tiny_model, int8=True)[1]
    jax.tree.map(
        np.testing.assert_array_equal,
        result.state.frozen["layers"]["mlp"]["up"]["kernel"],
        base["layers"]["mlp"]["up"]["kernel"],
    )
    policy, params, _ = load_policy(tmp_path / "whole")
    trained = split_adapter(params)[0]
    jax.tree.map(np.testing.assert_array_equal, trained, result.state.trainable)
    merged = models.load(tmp_path / "whole" / "model")[1]
    tokens = np.arange(12)[None]
    hidden, plain = (
        policy.hidden(p, tokens, tokens, np.ones_like(tokens))[0]
        for p in (params, merged)
    )
    np.testing.assert_allclose(hidden, plain, atol=1e-5)


@pytest.mark.slow
def test_a_mesh_trains_the_same_adapter(tiny_config, tmp_path):
    rows = {}
    for name, mesh in {"one": {"data": 1}, "mesh": {"data": 2, "fsdp": 4}}.items():
        config = config_of(tiny_config, tmp_path / name, mesh=mesh)
        tree = config.to_dict()
        tree["training"] |= {"prompts_per_step": 8, "group_size": 2}
        training.run(training.Config.from_dict(tree))
        rows[name] = lasting(read_metrics(tmp_path / name))[1:]
    for one, several in zip(rows["one"], rows["mesh"], strict=True):
        assert one["reward/mean"] == several["reward/mean"]
        for key in ("loss", "grad_norm", "entropy"):
            np.testing.assert_allclose(several[key], one[key], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_mixture_trains_its_experts_adapters_and_balances_them(
    tiny_config, tmp_path, tiny_model
):
    _, _, tokenizer = models.load(tiny_model)
    small = models.DecoderConfig(
        family="qwen3_moe",
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        qk_norm=True,
        num_experts=4,
        experts_per_token=2,
        expert_size=8,
        max_positions=256,
    )
    policy = models.decoder(small)
    path = tmp_path / "mixture"
    models.save(policy, policy.init(jax.random.key(0)), tokenizer, path)
    lora = {**LORA, "targets": ["mlp.experts.*"], "base_dtype": "int8"}
    section = {"path": str(path), "lora": lora, "router_aux_loss_coef": 0.1}
    result = training.run(config_of(tiny_config, tmp_path / "run", model=section))
    rows = read_metrics(tmp_path / "run")
    assert all(row["loss/router"] > 0.2 for row in rows[1:])  # two chosen, balanced
    assert rows[1]["sampler/logp_gap"] < 1e-4
    trained = result.state.trainable["layers"]
    assert set(trained) == {"mlp"} and np.abs(trained["mlp"]["up"]["lora_b"]).max() > 0
    policy, params, _ = load_policy(tmp_path / "run")
    merged = models.load(tmp_path / "run" / "model")[1]
    tokens = np.arange(12)[None]
    hidden, plain = (
        policy.hidden(p, tokens, tokens, np.ones_like(tokens))[0]
        for p in (params, merged)
    )
    np.testing.assert_allclose(hidden, plain, atol=1e-5)


def test_an_adapter_is_not_resumed_on_other_weights(tiny_config, tmp_path, tiny_model):
    policy, params, tokenizer = models.load(tiny_model)
    path = models.save(policy, params, tokenizer, tmp_path / "base")
    config = config_of(
        tiny_config, tmp_path / "run", model={"path": str(path)} | {"lora": LORA}
    )
    with pytest.raises(Died):
        training.run(config, progress=DieInTheSecond)
    params["final_norm"]["scale"] += 1e-3
    models.save(policy, params, tokenizer, path, overwrite=True)
    with pytest.raises(InputError, match=r"other weights: .*final_norm.*differ"):
        training.run(config)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "model.lora.rank=0: must be at least 1"),
        ({"alpha": 0}, "model.lora.alpha=0.0: must be above 0"),
        ({"targets": []}, "name a module, or"),
        ({"targets": "q_proj"}, "expected a list"),
        ({"base_dtype": "int4"}, "'float32' or 'bfloat16' or 'int8'"),
        ({"rnak": 3}, "did you mean 'model.lora.rank'"),
        ({"r": 3}, "no such key"),
    ],
)
def test_wrong_settings(tiny_config, tmp_path, lora, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tiny_config, tmp_path, lora=lora)


def test_unknown_modules_are_found_before_weights_are_read(tiny_config, tmp_path):
    config = config_of(tiny_config, tmp_path / "run", lora={"targets": ["query"]})
    with pytest.raises(InputError, match=r"'query' names no module.*self_attn.q_proj"):
        training.run(config)
