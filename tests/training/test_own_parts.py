"""A model and an optimizer of the user's own, named in a config."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import StopAfter, assert_same_run, lasting

from jaxrl_post import training
from jaxrl_post.cli import main
from jaxrl_post.errors import ConfigError, InputError
from jaxrl_post.preflight.shapes import find_model
from jaxrl_post.training import Config
from jaxrl_post.training.checkpoints import load_policy
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.training.stages import make_stages


@pytest.fixture
def own_config(tiny_config, tiny_model):
    def make(**sections):
        model = {"path": "own_parts:load", "tokenizer": str(tiny_model), "hidden": 6}
        model |= sections.pop("model", {})
        return tiny_config(model=model, **sections)

    return make


OWN_CHAIN = {"name": "own_parts:own_schedule", "learning_rate": 1e-6, "peak": 0.1}


def test_a_run_of_both_that_was_stopped_ends_as_one_that_was_not(own_config, tmp_path):
    def config(name):
        run = {"dir": str(tmp_path / name)}
        return own_config(run=run, optimizer=OWN_CHAIN, evaluation={})

    whole = training.run(config("whole"))
    with pytest.raises(training.Interrupted):
        training.run(config("stopped"), progress=StopAfter)
    training.run(config("stopped"))
    assert_same_run(tmp_path / "stopped", whole.dir)
    # Its model is whole, says whose it is, and says that the run is finished.
    folder = tmp_path / "stopped" / "model"
    about = json.loads((folder / "config.json").read_text())
    assert about["path"] == "own_parts:load" and about["arguments"]["hidden"] == 6
    policy, params, _ = load_policy(tmp_path / "stopped")
    saved = load_file(folder / "params.safetensors")
    assert saved.keys() == {"module.embed", "module.mix"}
    np.testing.assert_array_equal(saved["module.mix"], params["module"]["mix"])
    fresh = policy.init(jax.random.key(0))
    assert not np.array_equal(params["module"]["mix"], fresh["module"]["mix"])
    assert training.run(config("stopped")).state is None
    # The rate of the chain is its own.
    assert "learning_rate" not in read_metrics(whole.dir)[-1]
    assert "eval/held/avg@2" in training.evaluate_run(
        own_config(run={"dir": str(tmp_path / "stopped")}), tmp_path / "stopped"
    )


def test_a_chain_of_ones_own_is_the_chain(tiny_config, tmp_path):
    """Clipping included: to the bit what the built-in name makes of its defaults."""
    rows = []
    for i, name in enumerate(["adamw", "own_parts:like_adamw"]):
        optimizer = {"name": name, "schedule": "cosine", "warmup_updates": 1}
        config = tiny_config(
            run={"dir": str(tmp_path / str(i))}, optimizer=optimizer, evaluation={}
        )
        rows.append(lasting(read_metrics(training.run(config).dir)))
    assert rows[0] == rows[1] and len({row["loss"] for row in rows[0][1:]}) > 1


def test_what_it_was_given_is_part_of_the_run(own_config):
    config = own_config(optimizer=OWN_CHAIN)
    assert Config.from_dict(config.to_dict()) == config
    assert config.to_dict()["optimizer"] == {
        **OWN_CHAIN, "schedule": "constant", "warmup_updates": 0
    }  # fmt: skip
    training.run(own_config(optimizer=OWN_CHAIN, training={"steps": 1}, evaluation={}))
    for sections, words in [
        ({"optimizer": {**OWN_CHAIN, "peak": 0.2}}, "optimizer.peak: 0.1 -> 0.2 "),
        ({"model": {"hidden": 7}, "optimizer": OWN_CHAIN}, "model.hidden: 6 -> 7 "),
        ({"training": {"steps": 2}, "optimizer": OWN_CHAIN}, "training.steps: 1 -> 2 "),
    ]:
        sections.setdefault("training", {"steps": 1})
        with pytest.raises(InputError, match=words + r"\(alters the mathematics\)"):
            training.run(own_config(evaluation={}, **sections))


def test_the_gain_modulates_behind_it(tiny_config):
    optimizer = {"name": "own_parts:like_adamw"}
    recipe = {"name": "pgpo", "sensitivity": 1.0}
    (stage,) = make_stages(tiny_config(optimizer=optimizer, recipe=recipe))
    state = stage.optimizer.init({"x": np.ones(2, np.float32)})
    assert "ScaleByInformationState" in str(state)
    plain = {**recipe, "scale_decay": False}
    with pytest.raises(InputError, match="set recipe.scale_decay=true"):
        make_stages(tiny_config(optimizer=optimizer, recipe=plain))


OPTIMIZERS = [
    ({"name": "no_such_module:chain"}, "optimizer.name: No module 'no_such_module'"),
    ({"name": "own_parts:like_adam"},
     "has no function 'like_adam'; did you mean 'like_adamw'"),
    ({"name": "own_parts:NOT_CALLABLE"}, "has no function 'NOT_CALLABLE'"),
    ({"name": "own_parts:no_chain"}, "returned None, no optax chain"),
    ({"name": "own_parts:like_adamw", "max_norm": 2},
     "optimizer.max_norm: 'own_parts:like_adamw' has no such argument; did you mean "
     "'max_grad_norm'"),
    ({"name": "own_parts:like_adamw", "b1": 0.5}, "optimizer.b1: .* no such argument"),
    ({"name": "own_parts:load"}, "optimizer.tokenizer: missing"),
    ({"name": "own_parts:own_schedule", "learning_rate": 0.1},
     "has no argument learning_rate; leave it out"),
    ({"name": "own_parts:own_schedule", "learning_rate": 1e-6, "peak": "high"},
     "optimizer.peak='high': expected float"),
]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "words"), OPTIMIZERS)
def test_a_wrong_optimizer_is_found_before_the_model(tiny_config, optimizer, words):
    config = tiny_config(model={"path": "no-model"}, optimizer=optimizer)
    with pytest.raises(InputError, match=words):
        training.run(config)


@pytest.mark.parametrize("command", ["run", "evaluate_run"])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_module:load", "model.path: No module 'no_such_module'"),
        ("own_parts:laod", "model.path: .*no function 'laod'; did you mean 'load'"),
        ("own_parts:NOT_CALLABLE", "model.path: .*no function 'NOT_CALLABLE'"),
    ],
)
def test_a_wrong_name_of_a_model_is_found_first(tiny_config, path, words, command):
    config = tiny_config(model={"path": path}, task={"name": "no_such:task"})
    with pytest.raises(InputError, match=words):
        getattr(training, command)(config)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("policy", "it must return three things"),
        ("swapped", "returned dict as its first thing, no Policy"),
        ("no params", "as its second thing, no tree of arrays"),
        ("no tokenizer", "returned None as its third thing, no tokenizer"),
        ("other params", r"\['module'\]\['embed'\] is \(8, 8\), not \(258, 8\)"),
        ("few words", "258 tokens and a policy with 4; they do not belong together"),
    ],
)
def test_what_is_no_model_is_found_when_it_is_opened(own_config, what, words):
    model = {"path": "own_parts:wrong_load", "what": what}
    config = own_config(model=model)
    del config.model.arguments["hidden"]
    with pytest.raises(
        InputError, match=f"model.path='own_parts:wrong_load' .*{words}"
    ):
        training.run(config)


def test_keys_of_built_in_names_are_known(tiny_config):
    for section, words in [
        ({"model": {"hidden": 3}}, "model.hidden=3: no such key"),
        ({"optimizer": {"peak": 3}}, "optimizer.peak=3: no such key"),
        ({"optimizer": {"arguments": {}}}, "optimizer.arguments={}: no such key"),
        ({"optimizer": {"name": "adam"}},
         "expected 'adamw' or 'sgd' or 'module:function'; did you mean 'adamw'"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            tiny_config(**section)


def test_what_needs_one_of_our_families_says_so(own_config, tmp_path, capsys):
    with pytest.raises(
        ConfigError, match="model.lora: an adapter needs a model of the"
    ):
        own_config(model={"lora": {"rank": 2}})
    config = own_config(training={"steps": 0})
    training.run(config)
    assert main(["export", config.run.dir, str(tmp_path / "out")]) == 2
    assert "is a model of your own" in capsys.readouterr().err
    with pytest.raises(InputError, match="not those of a model of one's own"):
        find_model(config.model.path)
