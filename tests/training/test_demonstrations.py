"""Demonstrations: verified once, continued in part, trained on in whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_groups import TIME, make_demonstrations
from tiny_policy import PARAMS
from tiny_runs import StopAfter, assert_same_state, lasting
from transformers import AutoTokenizer

from jaxrl_post import recipes, training
from jaxrl_post.errors import InputError
from jaxrl_post.injection import update_posterior
from jaxrl_post.isolation import JudgePool
from jaxrl_post.recipes import Term
from jaxrl_post.recipes.grpo import sampled_logps
from jaxrl_post.tasks import Row, RowsTask
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.demonstrations import DemonstrationStore
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.training.prefixes import continue_prefixes
from jaxrl_post.training.progress import Progress
from jaxrl_post.training.stages import make_stages
from jaxrl_post.training.state import init_state
from jaxrl_post.types import Verdict

VERDICTS = {
    "good": Verdict(1.0, True),
    "bad": Verdict(0.0, False),
    "unknown": Verdict(None),
    "full": Verdict(1.0),  # a judge that knows no success
    "most": Verdict(0.9),
    "half": Verdict(0.5, True),
    "high": Verdict(1.0, False),
}


def judge(prompts, completions):
    """What the text says of itself; "raise" is not among it."""
    return [VERDICTS[text] for text in completions]


def make_task(*demonstrations):
    rows = [
        Row(f"q{i}", ({"role": "user", "content": f"say {i}"},), demonstration=text)
        for i, text in enumerate(demonstrations)
    ]
    return RowsTask("demonstrated", rows, judge)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def open_store(tokenizer):
    def make(*demonstrations, limit=8, **arguments):
        with JudgePool(workers=0) as pool:
            return DemonstrationStore(
                make_task(*demonstrations),
                tokenizer,
                pool,
                max_new_tokens=limit,
                **arguments,
            )

    return make


def test_every_demonstration_is_counted_once(open_store):
    texts = ["good", "bad", None, "far too long", "unknown", "raise", "most", "full"]
    store = open_store(*texts, "half", "high")
    assert store.metrics == {
        "demonstrations/available": 0.3,  # good, full, half
        "demonstrations/rejected": 0.5,  # bad, unknown, raise, most, high
        "demonstrations/too_long": 0.1,
        "demonstrations/missing": 0.1,
    }
    assert str(store) == (
        "demonstrations of 10 questions: "
        "30.0% available, 50.0% rejected, 10.0% too long, 10.0% missing"
    )
    given = store.take([f"q{i}" for i in (8, 0, 2, 5)])
    assert given.available.tolist() == [True, True, False, False]
    assert given.rewards.tolist() == [0.5, 1.0, 0.0, 0.0]  # its own, verified
    assert given.texts == ("half", "good", "", "raise")
    assert given.verdicts[2] is None and given.verdicts[1] == VERDICTS["good"]


def test_tokens_end_with_the_end_token(open_store, tokenizer):
    store = open_store("good", "bad", "full", limit=5)  # four bytes and the end
    given = store.take(["q2", "q1"])
    assert given.tokens.shape == (2, 5) and given.tokens.dtype == np.int32
    assert tokenizer.decode(given.tokens[0]) == "full<end>"
    assert given.tokens[0, -1] == tokenizer.eos_token_id
    assert given.mask.tolist() == [[True] * 5, [False] * 5]
    np.testing.assert_array_equal(given.is_teacher, given.mask)
    assert given.stopped.all() and not given.sampler_logps.any()
    with pytest.raises(InputError, match="none of the 1 question.* max_new_tokens=4"):
        open_store("good", limit=4)


@pytest.mark.parametrize("opens", [True, False])
def test_what_the_template_has_written_is_not_written_again(
    open_store, tokenizer, monkeypatch, opens
):
    with monkeypatch.context() as patch:
        patch.setitem(VERDICTS, "<think>\ngood", Verdict(1.0, True))
        if opens:
            tokenizer.chat_template += "{{ '<think>\\n' }}"
        store = open_store("<think>\ngood", "good", limit=16)
    given = store.take(["q0", "q1"])
    whole = "good" if opens else "<think>\ngood"
    assert given.texts == (whole, "good")
    assert tokenizer.decode(given.tokens[0][given.mask[0]]) == whole + "<end>"


def test_arguments_of_the_template_decide_what_it_has_written(open_store, tokenizer):
    tokenizer.chat_template += "{% if thinking %}<think>\n{% endif %}"
    arguments = {"chat_template_arguments": {"thinking": True}, "limit": 16}
    store = open_store("<think>\ngood", "good", **arguments)
    assert store.take(["q0"]).texts == ("good",) and store.take(["q0"]).available[0]


def test_no_demonstration_at_all_is_one_error(open_store, tokenizer):
    with pytest.raises(InputError) as error:
        open_store("bad", None, "far too long", "raise", key="stages.sft.task")
    message = str(error.value)
    assert message.startswith("stages.sft.task: the recipe needs demonstrations")
    assert "(0 available, 2 rejected, 1 too long, 1 missing)" in message
    with pytest.raises(InputError, match="1 missing"):
        open_store(None)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        open_store("good")


# Prefixes.


def rollouts(lengths, stopped):
    mask = np.arange(TIME) < np.array(lengths)[:, None]
    return SimpleNamespace(
        tokens=np.where(mask, 20 + np.arange(TIME), 0).astype(np.int32),
        mask=mask,
        sampler_logps=np.where(mask, -1.0 - np.arange(TIME), np.nan),
        stopped=np.array(stopped),
    )


def test_prefixes_are_continued_in_one_sequence():
    """Whole, cut and ended, nothing kept, cut by the limit, and not there at all."""
    given = make_demonstrations([True, True, True, True, False], length=4)
    before = jax.tree.map(np.copy, vars(given))
    kept, goes_on = np.array([4, 2, 0, 3, 0]), np.array([0, 1, 1, 1, 0], bool)
    made = rollouts([1, 2, 6, 5, 1], [True, True, False, True, True])
    whole = continue_prefixes(given, kept, goes_on, made)
    lengths = np.array([4, 4, 6, 6, 0])
    np.testing.assert_array_equal(whole.mask, np.arange(TIME) < lengths[:, None])
    np.testing.assert_array_equal(
        whole.is_teacher, np.arange(TIME) < np.array([4, 2, 0, 3, 0])[:, None]
    )
    assert whole.tokens[1].tolist() == [7, 7, 20, 21, 0, 0]
    assert whole.tokens[2].tolist() == [20, 21, 22, 23, 24, 25]
    assert whole.tokens[3].tolist() == [7, 7, 7, 20, 21, 22]
    assert whole.sampler_logps[1].tolist() == [-0.5, -0.5, -1, -2, 0, 0]
    # The fourth's end lies beyond the limit; the third never came to one.
    assert whole.stopped.tolist() == [True, True, False, False, True]
    for name in ("tokens", "mask", "is_teacher", "sampler_logps"):
        for p in (0, 4):
            np.testing.assert_array_equal(
                getattr(whole, name)[p], getattr(given, name)[p]
            )
    jax.tree.map(np.testing.assert_array_equal, before, vars(given))  # not in place


# Whole runs.


@pytest.fixture
def config(tiny_config, tmp_path):
    """Makes a config of a run over five questions, four with demonstrations."""

    def make(dir="run", steps=3, stages=None, size=4, task=(), **recipe):
        return tiny_config(
            run={"dir": str(tmp_path / dir)},
            task={"name": "tiny_task:load_demonstrated", **dict(task)},
            **({"stages": stages} if stages else {"recipe": recipe}),
            optimizer={"learning_rate": 0.03},
            training={"steps": steps, "prompts_per_step": 2, "group_size": size},
            evaluation={},
        )

    return make


def completions(folder, step):
    text = (folder / "completions" / f"step_{step:06d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


class Counting(Progress):
    """Counts the programs that had been compiled when a step was shown."""

    compiled: list[int] = []

    def update(self, step, row):
        super().update(step, row)
        self.compiled.append(_compilations[0])


_compilations = [0]


@pytest.fixture(scope="module")
def compilations():
    def listen(event, seconds, **_):
        _compilations[0] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    return _compilations


def test_hapo_with_a_memory_resumes_to_the_bit(config, tmp_path, compilations):
    arguments = {"name": "hapo", "posterior_discount": 0.9, "prefix": None}
    whole, cut = config("whole", 4, **arguments), config("cut", 4, **arguments)
    result = training.run(whole, progress=Counting)
    with pytest.raises(training.Interrupted):
        training.run(cut, progress=StopAfter)
    resumed = training.run(cut)
    rows = read_metrics(tmp_path / "whole")
    assert lasting(read_metrics(tmp_path / "cut")) == lasting(rows)
    assert_same_state(result.state, resumed.state)
    gate = result.state.gate
    assert gate.dtype == np.float64
    assert resumed.state.gate.tobytes() == gate.tobytes()

    # By hand, from what the run has written down.
    expected = np.ones((5, 2))
    available = [True, True, False, True, True]
    for step in range(1, 5):
        expected = follow(expected, rows[step], tmp_path / "whole", step, available)
    np.testing.assert_allclose(gate, expected, rtol=1e-12)
    assert sum(row["injection/count"] for row in rows[1:]) > 0
    assert np.all(gate.sum(1) > 2)  # every question has been visited
    # From the third step on everything has its shape, injections or not.
    first, *_, last = Counting.compiled[2:]
    assert 0 < first == last
    shares = {k: v for k, v in rows[0].items() if k.startswith("demonstrations/")}
    assert shares == {
        "demonstrations/available": 0.8,
        "demonstrations/rejected": 0.2,
        "demonstrations/too_long": 0.0,
        "demonstrations/missing": 0.0,
    }


def follow(posterior, row, folder, step, available):
    """One step by hand: the posterior before it becomes that after it."""
    kept = completions(folder, step)
    confidences, rates = [], []
    visited = list({int(r["prompt_id"]) for r in kept})
    faded = update_posterior(posterior, [0] * 5, 1, discount=0.9) - [0, 1]
    posterior = posterior.copy()
    posterior[visited] = faded[visited]
    own = [r for r in kept if "teacher_tokens" not in r]
    for first in range(0, len(kept), 4):
        group = kept[first : first + 4]
        question = int(group[0]["prompt_id"])
        given = [r for r in group if "teacher_tokens" in r]
        wins = sum(r["success"] for r in group) - len(given)
        # Where an epoch ends a question may come twice: each group sees its own visit.
        a, b = faded[question] + [wins, 4 - wins]
        posterior[question] += [wins, 4 - wins]
        confidences.append(a / (a + b))
        due = a / (a + b) < 0.8 and wins < 4 and available[question]
        assert len(given) == due
        rates.append(due)
        for r in given:
            assert r["success"] and r["teacher_tokens"] == len(r["response_ids"])
            assert r["response"] == ("4", "123", "x")[question % 3]
    assert row["injection/count"] == sum(rates)
    np.testing.assert_allclose(row["injection/rate"], np.mean(rates))
    np.testing.assert_allclose(row["injection/confidence"], np.mean(confidences))
    # The reward is the policy's: those that gave way had failed.
    wins = np.sum([r["success"] for r in own])
    np.testing.assert_allclose(row["reward/mean"], wins / len(kept), rtol=1e-6)
    return posterior


def test_a_step_that_teaches_nothing_is_no_visit(config, tmp_path):
    """Where the update is skipped the posterior stays that of the step before."""

    def broken(scores, batch):
        del batch
        return scores["logps"] * jnp.nan

    hapo = recipes.hapo(posterior_discount=0.9)
    recipe = replace(hapo, terms=(Term("broken", sampled_logps, broken),))
    result = training.run(config(steps=2, name="hapo"), recipe=recipe)
    assert [r["update/skipped"] for r in read_metrics(tmp_path / "run")[1:]] == [1, 1]
    assert result.state.gate.tolist() == np.ones((5, 2)).tolist()
    assert int(result.state.cursor) == 4


def test_posteriors_in_checkpoints(tmp_path):
    recipe = recipes.hapo(posterior_discount=0.9)

    def state(questions, **fields):
        made = init_state(
            PARAMS, optax.sgd(0.1), recipe, jax.random.key(0), questions=questions
        )
        return made.replace(**fields)

    gate = 1 + np.random.default_rng(0).random((5, 2)) / 3  # no float32 among them
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(5, gate=gate))
    checkpoints.wait()
    restored = checkpoints.restore(state(5)).gate
    assert restored.dtype == np.float64 and restored.tobytes() == gate.tobytes()
    with pytest.raises(InputError, match=r"\.gate: shape"):
        checkpoints.restore(state(6))
    forgetful = init_state(
        PARAMS, optax.sgd(0.1), recipes.hapo(), jax.random.key(0), questions=5
    )
    assert forgetful.gate is None
    with pytest.raises(InputError, match=r"not expected: \.gate"):
        checkpoints.restore(forgetful)
    checkpoints.close()


def test_luffy_goes_on_where_a_prefix_ends_and_resumes_to_the_bit(config, tmp_path):
    prefix = {"lowest": 0.3, "highest": 0.7}
    texts = ("123", "12345")
    arguments = {"name": "luffy", "prefix": prefix, "task": {"demonstrations": texts}}
    whole, cut = (config(folder, 3, **arguments) for folder in ("whole", "cut"))
    result = training.run(whole)
    with pytest.raises(training.Interrupted):
        training.run(cut, progress=StopAfter)
    resumed = training.run(cut)
    rows = read_metrics(tmp_path / "whole")
    assert lasting(read_metrics(tmp_path / "cut")) == lasting(rows)
    assert_same_state(result.state, resumed.state)
    counts = set()
    for row in rows[1:]:
        kept = completions(tmp_path / "whole", row["step"])
        for r in kept:
            if not (given := r.get("teacher_tokens")):
                continue
            text = texts[int(r["prompt_id"]) % 2]
            counts.add((len(text) + 1, given))
            assert r["response"].startswith(text[:given])
            assert len(r["response_ids"]) > given
            logps = np.array(r["sampler_logps"])
            assert not logps[:given].any() and (logps[given:] < 0).all()
        assert [g for g, r in enumerate(kept) if "teacher_tokens" in r] == [3, 7]
        assert row["injection/count"] == 2
    # floor(share * length), the end token counted: of 4 one or two, of 6 one to four.
    assert counts <= {(4, 1), (4, 2), (6, 1), (6, 2), (6, 3), (6, 4)}
    assert len(counts) > 2  # each prompt has its own share
    assert "injection/probability" not in rows[1]


def test_sft_then_rl(config, tmp_path):
    stages = {
        "warm": {"recipe": {"name": "sft"}, "training": {"group_size": 1}},
        "rl": {"recipe": {"name": "grpo"}, "training": {"steps": 1}},
    }
    training.run(config(steps=6, stages=stages))
    rows = read_metrics(tmp_path / "run")
    assert [row.get("stage") for row in rows] == [None, *6 * [1], 2]
    assert rows[0]["demonstrations/available"] == 0.8
    losses = [row["loss"] for row in rows[1:7]]
    assert losses[-1] < losses[0] - 0.3  # it learns to say what it is shown
    assert all(row["entropy"] > 0 for row in rows[1:])
    for row in rows[1:7]:
        kept = completions(tmp_path / "run", row["step"])
        assert len(kept) == 2
        assert all(r["response"] in ("4", "123") for r in kept)
        for r in kept:
            assert r["teacher_tokens"] == len(r["response_ids"]) == sum(r["mask"])
        lengths = [r["teacher_tokens"] for r in kept]
        np.testing.assert_allclose(row["length/mean"], np.mean(lengths))
        assert not any(k.startswith(("reward/", "injection/")) for k in row)
        assert "time/generate" not in row
    assert "reward/mean" in rows[7] and "time/generate" in rows[7]
    assert len(completions(tmp_path / "run", 7)) == 8
    # A question in five has no demonstration to train on, and is passed over.
    assert rows[6]["sampling/kept_groups"] == 2


@pytest.mark.parametrize(
    ("size", "recipe", "message"),
    [
        (8, {"name": "sft"}, "training.group_size=8: recipe 'sft' samples nothing"),
        (8, {"name": "hapo", "threshold": 0.95}, "'hapo': .*replace_successes=true"),
        (2, {"name": "hapo"}, "0.8 is above .* for group_size=2"),
        (8, {"name": "sdpo", "injection": {"threshold": 0.95}}, "replace_successes"),
    ],
)
def test_group_sizes_that_do_not_go_with_the_recipe(config, size, recipe, message):
    with pytest.raises(InputError, match=message):
        training.run(config(size=size, **recipe))
    staged = config(size=size, stages={"a": {"recipe": recipe}})
    with pytest.raises(InputError, match="stages.a: .*" + message):
        training.run(staged)


def test_group_sizes_that_go_with_the_recipe(config):
    fitting = {"name": "hapo", "threshold": 0.95, "replace_successes": True}
    assert make_stages(config(size=8, **fitting))[0].recipe.name == "hapo"
    assert make_stages(config(size=3, name="hapo"))  # 0.8 is (3 + 1)/(3 + 2)
    with pytest.warns(UserWarning, match="nothing will ever be injected"):
        make_stages(config(size=8, name="hapo", threshold=0.1))


def test_a_task_without_demonstrations_is_one_error(config):
    without = config(name="hapo")
    tree = {"demonstrations": [None]}
    task = replace(without.task, options=tree)
    with pytest.raises(InputError, match="task: the recipe needs demonstrations"):
        training.run(replace(without, task=task))
