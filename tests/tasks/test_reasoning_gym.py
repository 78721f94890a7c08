from __future__ import annotations

import pickle

import pytest

from jaxrl_post import tasks
from jaxrl_post.errors import InputError
from jaxrl_post.tasks import reasoning_gym as module
from jaxrl_post.types import Verdict

gym = pytest.importorskip("reasoning_gym")


def load(split: str = "train", dataset: str = "chain_sum", **options):
    options = {"size": 20} | options
    return tasks.load("reasoning_gym", split=split, dataset=dataset, **options)


def judge(task, completion: str) -> Verdict:
    return task.judge(task.rows([0]), [completion])[0]


def test_rows():
    task = load(seed=5)
    prompts = task.rows([3])
    item = gym.create_dataset("chain_sum", size=20, seed=5)[3]
    assert prompts.ids == ("chain_sum/train/5/3",)
    assert prompts.messages[0][0]["content"].startswith(item["question"])
    assert "<answer>" in prompts.messages[0][0]["content"]
    assert prompts.columns[0]["answer"] == item["answer"]
    assert pickle.loads(pickle.dumps(task.judge)) == task.judge


def test_splits_share_no_question_whatever_the_seed():
    # With seeds as reasoning-gym counts them, seeds 0 and 1 share 19 of 20 items.
    questions = {
        split: {m[0]["content"] for m in load(split).rows(range(20)).messages}
        for split in ("train", "validation", "test")
    }
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["test"] & questions["validation"]


def test_questions_seen_in_training_are_left_out_of_the_test():
    # Sums of two one-digit numbers: few questions, so the splits must collide.
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train = load("train", size=60, config=few)
    test = load("test", size=60, config=few)
    assert len(train) < 60  # each question once
    questions = [
        {m[0]["content"] for m in task.rows(range(len(task))).messages}
        for task in (train, test)
    ]
    assert not questions[0] & questions[1]
    made = module._items("chain_sum", test.judge.config, 60, 2_000_000_000)
    assert 0 < len(test) < len(made)  # some did collide


def test_the_answer_alone_is_scored():
    task = load()
    gold = task.rows([0]).columns[0]["answer"]
    for completion in (
        f"<answer>{gold}</answer>",
        f"Well, 1 + 1 = 2. The answer is {gold}.",
        gold,
    ):
        assert judge(task, completion).reward == 1.0
        assert judge(task, completion).success is True
    # The generator's scorer alone gives this .75 and more.
    verdict = judge(task, f"<answer>either {gold} or 7</answer>")
    assert (verdict.reward, verdict.success) == (0.0, False)
    assert 0 < verdict.extra["score"] < 1


def test_partial_credit_is_no_success():
    task = load(partial_credit=True)
    gold = task.rows([0]).columns[0]["answer"]
    verdict = judge(task, f"<answer>either {gold} or 7</answer>")
    assert 0 < verdict.reward < 1
    assert verdict.success is False
    assert judge(task, gold).success is True


def test_junk_that_the_scorer_cannot_cope_with_is_wrong():
    task = load(dataset="prime_factorization")
    with pytest.raises(ValueError):
        gym.get_score_answer_fn("prime_factorization")(
            "junk", dict(task.rows([0]).columns[0])
        )
    verdict = judge(task, "junk")
    assert (verdict.reward, verdict.success) == (0.0, False)
    assert verdict.extra["note"] == "the scorer raised ValueError"


def test_generators_without_a_gold_answer():
    task = load(dataset="propositional_logic", size=3)
    row = task.rows([0]).columns[0]
    assert row["answer"] is None
    assert judge(task, "<answer>nonsense</answer>").reward == 0.0


def test_bad_input():
    with pytest.raises(InputError, match="'chain_sun'; did you mean 'chain_sum'"):
        load(dataset="chain_sun")
    with pytest.raises(InputError, match="Unknown split 'eval'"):
        load("eval")
    with pytest.raises(InputError, match="seed is 2000000000"):
        load(seed=2_000_000_000)
