from __future__ import annotations

import json
import pickle
import threading

import pytest

from jaxrl_post import tasks
from jaxrl_post.isolation import JudgePool
from jaxrl_post.tasks.math import MathJudge
from jaxrl_post.types import Prompts, Verdict

pytest.importorskip("math_verify")


def judge(completion: str, answer: str, **options) -> Verdict:
    prompts = Prompts(("q",), ((),), ({"answer": answer},), (None,))
    return MathJudge(**options)(prompts, [completion])[0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{0.5}", r"\frac12"),
        (r"The answer is $\frac{2}{4}$.", "0.5"),
        ("So the answer is 204.", "204"),
        (r"\boxed{2}, but no: \boxed{3}", "3"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{3, 4}", r"\{4, 3\}"),
        (r"\boxed{\$32,\!348}", r"\$32,\!348"),
        (r"\boxed{32348}", r"\$32,\!348"),
        (r"\boxed{x = 3}", "3"),
        (r"\boxed{2\sqrt{3}}", r"so it is \boxed{\sqrt{12}}"),
        (r"\boxed{7}", "$7$"),
    ],
)
def test_right_answers(completion, answer):
    verdict = judge(completion, answer)
    assert (verdict.reward, verdict.success) == (1.0, True)
    assert verdict.extra["parsed"] is True


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{3}, but no: \boxed{2}", "3"),  # no set of both, and not the first
        (r"\boxed{(2, 1)}", "(1,2)"),
        ("So the answer is 205.", "204"),
        (r"\boxed{-\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{y}", "x"),
    ],
)
def test_wrong_answers(completion, answer):
    verdict = judge(completion, answer)
    assert (verdict.reward, verdict.success) == (0.0, False)
    assert verdict.extra["parsed"] is True


@pytest.mark.parametrize("completion", ["", "I don't know", r"\boxed{}"])
def test_answers_that_cannot_be_read(completion):
    verdict = judge(completion, "3")
    assert (verdict.reward, verdict.success) == (0.0, False)
    assert verdict.extra == {"parsed": False, "answer": None}
    assert "no final answer" in verdict.feedback


@pytest.mark.parametrize("answer", ["", "-1./3", r"np.arcsin(10/13)"])
def test_an_unreadable_gold_answer_judges_nobody(answer):
    verdict = judge(r"\boxed{3}", answer)
    assert (verdict.reward, verdict.success) == (None, None)
    assert "is not mathematics" in verdict.extra["error"]


def test_strictness():
    assert judge(r"\boxed{z = 3}", "x = 3").reward == 0.0
    assert judge(r"\boxed{z = 3}", "x = 3", strict=False).reward == 1.0


@pytest.mark.parametrize(
    ("completion", "reward", "parsed"),
    [
        (r"One and one.</think> It is \boxed{2}.", 1.0, True),
        (r"<think>\boxed{2}</think> It is \boxed{3}.", 0.0, True),
        (r"\boxed{3}</think> \boxed{2} </think> \boxed{3}", 1.0, True),  # between both
        (r"It is \boxed{2}.", 0.0, False),
        (r"It is \boxed{2}.</think>", 0.0, False),
    ],
)
def test_only_what_follows_the_thinking(completion, reward, parsed):
    verdict = judge(completion, "2", after_thinking=True)
    assert (verdict.reward, verdict.success) == (reward, reward == 1.0)
    assert verdict.extra["parsed"] is parsed


def test_no_thinking_at_all_is_said():
    verdict = judge(r"\boxed{2}", "2", after_thinking=True)
    assert "no </think>" in verdict.feedback


def test_a_monster_is_wrong_after_its_time():
    # Without the time-out this would not end.
    verdict = judge(r"\boxed{10^{10^{10}}}", "3", seconds=1)
    assert verdict.reward == 0.0


def test_other_threads_judge_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(judge(r"\boxed{3}", "3")))
    thread.start()
    thread.join()
    assert found[0].reward == 1.0


def test_it_runs_in_the_pool():
    judge = MathJudge()
    prompts = Prompts(("q",) * 2, ((),) * 2, ({"answer": "3"},) * 2, (None,) * 2)
    with JudgePool(1, timeout=60) as pool:
        verdicts = pool.judge(judge, prompts, [r"\boxed{3}", r"\boxed{4}"])
    assert [v.reward for v in verdicts] == [1.0, 0.0]


def test_load(tmp_path):
    row = {"problem": "1+1?", "solution": r"It is \boxed{2}.", "level": "1"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    task = tasks.load(
        "math",
        split="test",
        source=str(tmp_path),
        demonstration="solution",
        strict=False,
    )
    prompts = task.rows([0])
    assert prompts.messages[0][0]["content"].startswith("1+1?\n\n")
    assert r"\boxed{}" in prompts.messages[0][0]["content"]
    assert prompts.demonstrations == (r"It is \boxed{2}.",)
    assert task.judge == pickle.loads(pickle.dumps(MathJudge(strict=False)))
    assert task.judge(prompts, [r"\boxed{2}"])[0].reward == 1.0
    assert task.name == "math"


def test_trajectories_in_verls_layout(tmp_path):
    """As Elliott/Openr1-Math-46k-8192 has them."""
    trace = "<think>\nOne and one.\n</think>\n\n\\boxed{2}"
    record = {
        "data_source": "openr1",
        "prompt": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "1+1?"},
        ],
        "target": [[{"role": "assistant", "content": trace}]],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 0, "split": "default"},
    }
    other = {**record, "data_source": "other", "prompt": [record["prompt"][1]]}
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.Table.from_pylist([record, other]), tmp_path / "train.parquet"
    )
    task = tasks.load(
        "math",
        source=str(tmp_path),
        prompt="prompt",
        demonstration="target",
        data_source="openr1",
        after_thinking=True,
    )
    prompts = task.rows(range(len(task)))
    assert list(prompts.messages[0]) == record["prompt"]
    assert prompts.demonstrations == (trace,)
    assert prompts.columns[0]["answer"] == "2"
    completions = [trace, r"\boxed{2}"]
    verdicts = task.judge(prompts.take([0, 0]), completions)
    assert [v.reward for v in verdicts] == [1.0, 0.0]
