"""Verdict and remedies; programs come from a table instead of a compiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxrl_post import preflight
from jaxrl_post.cli import main
from jaxrl_post.errors import InputError
from jaxrl_post.preflight import verdict as module
from jaxrl_post.preflight.programs import Program
from jaxrl_post.preflight.shapes import PUBLISHED, find_model
from jaxrl_post.training import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")
OVERRIDES = ["training.prompts_per_step=8", "training.micro_batch_tokens=null"]


def program(name, share, memory):
    sizes = {"arguments": 0, "outputs": 0, "aliases": 0, "peak": int(share * memory)}
    return Program(name, bytes=sizes, flops={"compiled": 1.0, "model": 0.0})


@pytest.fixture
def topology():
    return preflight.open_topology("cpu:8")


@pytest.fixture
def table(monkeypatch, topology):
    """Sets how much of a chip update and decoding take, as functions of the config."""
    compiled = []

    def install(update=lambda config: 0.5, decode=lambda config: 0.5):
        def of(name, share):
            def compile_part(shapes):
                compiled.append(name)
                yield program(name, share(shapes.config), topology.chip.memory)

            return compile_part

        monkeypatch.setattr(module, "compile_training", of("update", update))
        monkeypatch.setattr(module, "compile_sampling", of("decode", decode))
        return compiled

    return install


@pytest.fixture
def config():
    return load_config(QUICKSTART, OVERRIDES)


def test_what_fits_needs_no_remedy(table, config, topology):
    compiled = table()
    report = module.check(config, topology)
    assert report["verdict"] == "fits" and report["remedy"] is None
    assert compiled == ["update", "decode"]


def test_a_part_alone_is_judged_alone(table, config, topology):
    compiled = table(update=lambda config: 2.0)
    report = module.check(config, topology, only="sampling")
    assert report["verdict"] == "fits" and compiled == ["decode"]
    report = module.check(config, topology, only="training", max_tries=1)
    assert report["verdict"] == "does not fit"
    assert compiled == ["decode", "update", "update"]


def test_the_margin_counts(table, config, topology):
    table(update=lambda config: 0.9)
    assert module.check(config, topology, margin=0.05)["verdict"] == "fits"
    report = module.check(config, topology, margin=0.15, max_tries=0)
    assert report["verdict"] == "does not fit" and report["remedy"] is None
    assert not report["programs"]["update"]["fits"]
    assert report["programs"]["decode"]["fits"]


def test_the_cheapest_remedy_is_tried_first_and_is_enough(table, config, topology):
    compiled = table(
        update=lambda c: 0.9 if c.training.micro_batch_tokens else 1.5,
    )
    report = module.check(config, topology)
    (override,) = report["remedy"]["overrides"]
    assert override.startswith("training.micro_batch_tokens=")
    assert report["remedy"]["fits"] and report["verdict"] == "does not fit"
    assert compiled == ["update", "decode", "update"]  # decoding is as it was


def test_remedies_that_help_are_kept_and_others_are_not(table, config, topology):
    """Micro-batches help a little, the softer policy of remat not at all."""

    def update(c):
        share = 2.0 if c.training.micro_batch_tokens is None else 1.5
        return share - 0.7 * (c.model.remat == "full")

    table(update=update)
    report = module.check(config, topology)
    keys = [x.partition("=")[0] for x in report["remedy"]["overrides"]]
    assert keys == ["training.micro_batch_tokens", "model.remat"]
    assert "model.remat=full" in report["remedy"]["overrides"]
    assert report["remedy"]["fits"]


def test_decoding_is_given_fewer_slots(table, config, topology):
    compiled = table(decode=lambda c: 0.5 if (c.sampling.slots or 64) <= 16 else 1.2)
    report = module.check(config, topology)
    assert report["remedy"]["fits"]
    assert report["remedy"]["overrides"] == ["sampling.slots=16"]
    assert compiled.count("update") == 1


def test_tries_are_bounded(table, config, topology):
    compiled = table(update=lambda c: 3.0)
    report = module.check(config, topology, max_tries=3)
    assert not (report["remedy"] or {"fits": False})["fits"]
    assert compiled.count("update") <= 4


def test_too_few_groups_for_all_devices(table, config, topology):
    """Half of them share each group's products."""
    table()
    config = load_config(
        QUICKSTART, ["training.prompts_per_step=4", "mesh.fsdp=-1", "mesh.data=1"]
    )
    sizes, _ = find_model(config.model.path)
    report = module.check(config, topology)
    assert report["verdict"] == "does not fit" and report["programs"] == {}
    assert "share them evenly" in report["problem"]
    if sizes.num_kv_heads % 2 == 0:
        assert "mesh.tensor=2" in report["remedy"]["overrides"]


@pytest.mark.parametrize("key", ["micro_batch_tokens", "micro_batch_tokens_per_shard"])
def test_the_least_micro_batch_of_a_larger_mesh(table, topology, key):
    """The student's tokens alone are fewer than those of a pass with the teacher."""
    table()
    config = load_config(
        QUICKSTART, ["training.prompts_per_step=8", f"training.{key}=80"]
    )
    report = module.check(config, topology)
    assert "smallest part" in report["problem"]
    assert report["remedy"]["fits"]
    (override,) = report["remedy"]["overrides"]
    name, _, least = override.partition("=")
    assert name == f"training.{key}"
    changed = load_config(
        QUICKSTART, ["training.prompts_per_step=8", f"training.{key}={int(least) - 1}"]
    )
    assert "smallest part" in module.check(changed, topology)["problem"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v5q:2x2"], "did you mean 'v5p'?"),
        (["--topology", "abc"], "v4, v5e, v5p, v6e, tpu7x, h100, cpu"),
        (["--topology", "v5p:4x4"], "v5p:4x4x4"),
        (["--topology", "h100:8"], "h100:2x4"),
        (["--topology", "cpu:8", "--margin", "1"], "--margin"),
        (["--topology", "cpu:8", "model.path=Qwen/Qwen3-9B"], "Qwen/Qwen3-8B"),
    ],
)
def test_bad_input_is_one_error(capsys, arguments, words):
    assert main(["preflight", QUICKSTART, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err and captured.err.count("error:") == 1


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jaxrl_post\[tpu\]'"):
        preflight.open_topology("v5e:2x2")
    with pytest.raises(InputError, match=r"pip install 'jaxrl_post\[cuda12\]'"):
        preflight.open_topology("h100:1x2")


def test_json_is_alone_on_stdout_and_the_exit_code_is_the_verdict(table, capsys):
    table()
    command = ["preflight", QUICKSTART, *OVERRIDES, "--topology", "cpu:8"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "fits" and report["remedy"] is None
    assert set(report["programs"]) == {"update", "decode"}
    table(update=lambda c: 1.5)
    assert main([*command, "--json", "--tries", "0"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "does not fit"
    assert main([*command, "--tries", "0"]) == 1
    assert "Verdict: does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_make_models_of_the_size_in_their_name(name):
    sizes, source = find_model(name)
    d, dim = sizes.hidden_size, sizes.head_dim
    attention = 2 * d * dim * (sizes.num_heads + sizes.num_kv_heads)
    layer = attention + 3 * d * sizes.intermediate_size
    total = sizes.num_layers * layer + 2 * sizes.rows * d
    billions = float(name.split("B")[0].rpartition("-")[2])
    assert abs(total / 1e9 - billions) < 0.1 * billions
    assert "published" in source
