"""The benchmarks' own arithmetic: what they refuse, what they count, what they ask."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.stack import decoder
from jaxrl_post.training.config import Config

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts can be imported, and what they import of each other."""
    before = set(sys.modules)
    sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "peers")]
    yield
    del sys.path[:2]
    for name in set(sys.modules) - before:
        if name.startswith(("bench_", "rewards")):
            del sys.modules[name]


@pytest.fixture
def peers():
    return importlib.import_module("bench_peers")


@pytest.fixture
def limit():
    return importlib.import_module("bench_limit")


WORK = {
    "parameters": 5_246_464,
    "prompt_tokens": 112,
    "lengths": [64],
    "sequences": 96,
    "optimizer_steps": 3,
    "probe_loss": 9.4,
    "first_loss": 0.0,
    "first_entropy": 8.6,
    "distilled": None,
}


def run_of(seconds, rss, **unlike):
    return {"step": [9.0, *seconds], "peak_rss": rss, "work": {**WORK, **unlike}}


def test_the_ratio_is_the_median_over_pairs_of_medians_without_the_first_step(peers):
    pairs = [
        (run_of([1.0, 2.0, 90.0], 1), run_of([4.0, 4.0, 4.0], 4)),
        (run_of([1.0, 1.0, 1.0], 3), run_of([10.0, 10.0, 1.0], 4)),
        (run_of([3.0, 3.0, 3.0], 2), run_of([4.0, 4.0, 4.0], 4)),
    ]
    found = peers.compare("grpo", "step", "trl", 0.5, pairs)
    assert (found["ratios"], found["median"]) == ([0.5, 0.1, 0.75], 0.5)
    found = peers.compare("grpo", "peak_rss", "trl", 0.7, pairs)
    assert (found["ratios"], found["median"]) == ([0.25, 0.75, 0.5], 0.5)


@pytest.mark.parametrize(
    "unlike",
    [
        {"parameters": 5_246_465},
        {"prompt_tokens": 113},
        {"lengths": [63, 64]},
        {"sequences": 95},
        {"optimizer_steps": 6},
        {"probe_loss": 9.5},
        {"first_loss": 0.5},
        {"first_entropy": 8.0},
    ],
)
def test_no_ratio_where_the_work_differs(peers, unlike):
    alike = (run_of([1.0], 1), run_of([2.0], 1))
    other = (run_of([1.0], 1), run_of([2.0], 1, **unlike))
    found = peers.compare("grpo", "step", "trl", 0.5, [alike, other])
    assert "median" not in found and "ratios" not in found
    (reason,) = found["refused"]
    assert reason.startswith(next(iter(unlike)))


def test_what_a_library_does_not_tell_is_not_held_against_it(peers):
    silent = {k: v for k, v in WORK.items() if k in (*peers.EXACT, "probe_loss")}
    assert peers.differences(WORK, silent) == []
    assert peers.differences(WORK, {**silent, "distilled": 0.9}) == []
    missing = {k: v for k, v in silent.items() if k != "parameters"}
    assert peers.differences(WORK, missing) == ["parameters: 5246464, None"]


def test_arguments(peers, limit, capsys):
    steps = importlib.import_module("bench_steps")
    chosen = peers.parse(["--only", "sdpo", "--pairs", "1", "--trl-python", "python"])
    assert (chosen.only, chosen.trl_python, chosen.tunix_python) == (
        ["sdpo"],
        "python",
        None,
    )
    assert steps.parse([]).only == ["pgpo", "teacher", "prompt", "startup"]
    assert limit.parse(["--shape", "1", "2", "3", "4"]).shape == [1, 2, 3, 4]
    for parse, wrong in (
        (peers.parse, ["--only", "verl"]),
        (peers.parse, ["--pairs", "0"]),
        (steps.parse, ["--repeats", "0"]),
        (limit.parse, ["--chips", "0"]),
    ):
        with pytest.raises(SystemExit) as refused:
            parse(wrong)
        assert refused.value.code == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_random_tokens_come_back_as_about_as_many_and_prompts_are_equally_long(peers):
    work = importlib.import_module("bench_work")
    tokenizer = work.make_tokenizer(8192)
    assert (len(tokenizer), tokenizer.eos_token_id) == (8192, work.END)
    prompts, length = work.make_prompts(tokenizer, 24)
    assert len(set(prompts)) == 24
    assert {len(ids) for ids in tokenizer(prompts)["input_ids"]} == {length}

    ids = np.random.default_rng(0).integers(0, 8192, (64, 64))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    again = [len(x) for x in tokenizer(texts)["input_ids"]]
    assert 64 < np.mean(again) < 1.5 * 64

    rewards = importlib.import_module("rewards")
    solved = rewards.solved(texts)
    assert 0.3 < np.mean(solved) < 0.7
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert rewards.solved(chats) == solved
    assert np.std(rewards.digits(texts)) > 0


def test_our_side_is_a_config_that_the_trainer_takes(peers, tmp_path):
    for setting in peers.ROWS.values():
        work = {
            **setting._asdict(),
            "checkpoint": "somewhere",
            "prompt_length": 28,
            "steps": 4,
            "learning_rate": 1e-4,
        }
        config = Config.from_dict(peers.config_of(work, tmp_path))
        assert config.training.steps == 5
        assert config.recipe.name == setting.recipe


TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "tie_embeddings": True,
}


def test_counted_weights_are_those_of_the_model(limit):
    params = decoder(DecoderConfig(**TINY)).init(jax.random.key(0))
    layers = jax.tree.leaves(params["layers"])
    matrices = sum(x.size for x in layers if x.ndim > 2)
    assert limit.weights(TINY) == (matrices, params["embed"].size)


def test_counted_operations_are_those_of_the_products(limit):
    shape = limit.Shape(prompts=2, group=1, length=6, new=1)
    policy = decoder(DecoderConfig(**TINY))

    def forward(params, tokens):
        places = jnp.broadcast_to(jnp.arange(6), tokens.shape)
        hidden, _ = policy.hidden(params, tokens, places, jnp.ones_like(tokens))
        return hidden[:, -1] @ policy.unembedding(params).T

    params = policy.init(jax.random.key(0))
    jaxpr = jax.make_jaxpr(forward)(params, jnp.zeros((2, 6), jnp.int32))
    (cost,) = limit.costs(TINY, shape)["prefill"]
    # Attention computes all pairs; of those 21 of 36 are not masked away.
    pair = 4 * 2 * 16
    assert products(jaxpr.jaxpr) == cost.flops + pair * 2 * (36 - 21)


def products(jaxpr, times=1) -> int:
    """Operations in the matrix products of a program."""
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = np.prod([left[i] for i in contracted], dtype=int)
            found += 2 * times * depth * equation.outvars[0].aval.size
        more = equation.params.get("length", 1)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += products(inner, times * more)
    return int(found)


def test_the_parts_of_a_step_add_up_and_peaks_scale_with_chips(limit):
    shape = limit.Shape(4, 8, 32, 64)
    parts = limit.costs(TINY, shape)
    assert len(parts["decode"]) == 63
    whole = sum(limit.bound(parts[x], 1e9, 1e9) for x in ("prefill", "decode"))
    whole += limit.bound(parts["update"], 1e9, 1e9)
    assert limit.bound(parts["step"], 1e9, 1e9) == pytest.approx(whole)
    one = {r["chip"]: r for r in limit.peak_rows("qwen3-8b", shape, 1)}
    ten = {r["chip"]: r for r in limit.peak_rows("qwen3-8b", shape, 10)}
    assert one.keys() == limit.PEAKS.keys()
    for chip, row in one.items():
        for phase, seconds in row["bound"].items():
            assert seconds == pytest.approx(
                10 * ten[chip]["bound"][phase], abs=1e-3, rel=1e-2
            )


def test_a_run_of_ours_is_read_as_the_peers_tell_theirs(peers, tmp_path):
    policy = decoder(DecoderConfig(**TINY))
    models.save(policy, policy.init(jax.random.key(0)), None, tmp_path / "model")
    rows = [{"step": 0}] + [
        {
            "step": step,
            "time/step": 1.0,
            "time/generate": 0.5,
            "time/update": 0.25,
            "length/mean": 8.0,
            "length/max": 8.0,
            "loss": 0.0,
            "entropy": 3.5,
        }
        for step in (1, 2)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    work = {"count": 2, "group": 4, "prompt_length": 7, "probe_loss": 3.6}
    told = peers.read_run(tmp_path, work)
    assert told["step"] == [1.0, 1.0] and told["generate"] == [0.5, 0.5]
    counted = told["work"]
    assert (counted["sequences"], counted["lengths"]) == (16, [8.0])
    assert (counted["prompt_tokens"], counted["optimizer_steps"]) == (14, 2)
    leaves = jax.tree.leaves(policy.init(jax.random.key(0)))
    assert counted["parameters"] == sum(x.size for x in leaves)


def test_tables_say_what_was_missed_and_what_was_refused():
    tables = importlib.import_module("bench_tables")
    row = {"bench": "peers", "row": "grpo", "figure": "step"}
    rows = [
        {**row, "over": "trl", "median": 0.2},
        {**row, "over": "trl", "median": 0.512},
        {**row, "over": "tunix", "refused": ["lengths: [64], [63, 64]"]},
        {"bench": "steps", "row": "pgpo", "value": 1.01},
        {"bench": "limit", "row": "smollm2", "phase": "decode", "share": 0.49},
    ]
    assert tables.figures(rows).splitlines()[2:] == [
        "| GRPO step, ours / TRL | ≤ 0.5 | 0.512 | **no** |",
        "| GRPO step, ours / Tunix | ≤ 0.55 | refused: lengths: [64], [63, 64] |  |",
        "| decoding, SmolLM2-135M, batch 8, 32 new, share of the bound | ≥ 0.5 "
        "| 0.49 | **no** |",
        "| PGPO step / SDPO step | ≤ 1.01 | 1.01 | yes |",
    ]
    assert tables.figures([]) == tables.runs([]) == tables.peaks([]) == ""


def test_the_table_of_adapters_has_the_last_row_of_each_mode():
    adapters = importlib.import_module("bench_adapters")
    assert adapters.table([]) == ""
    row = {
        "mode": "lora",
        "trained": 2_500_000,
        "arguments": 2**30,
        "temp": 2**29,
        "peak_rss": 3 * 2**30,
        "generate": 1.0,
        "update": 2.0,
        "step": 3.0,
    }
    newer = {**row, "step": 4.0, "greedy_tokens": 64, "greedy_equal": 63}
    assert adapters.table([row, newer]).splitlines()[2:] == [
        "| lora | 2.50 | 1,024 | 512 | 3,072 | 1.00 | 2.00 | 4.00 | 63 of 64 |"
    ]
    assert adapters.parse(["--only", "full"]).only == ["full"]
    with pytest.raises(SystemExit):
        adapters.parse(["--repeats", "0"])
