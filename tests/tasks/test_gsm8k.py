from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from jaxrl_post import tasks
from jaxrl_post.errors import InputError
from jaxrl_post.tasks import gsm8k
from jaxrl_post.types import Prompts, Verdict

SHARED = Path(__file__).parents[2] / "../shared/data/gsm8k"


def judge(completion: str, answer: str = "72") -> Verdict:
    prompts = Prompts(("q",), ((),), ({"answer": answer},), (None,))
    return gsm8k.judge(prompts, [completion])[0]


@pytest.mark.parametrize(
    "completion",
    [
        "48 + 24 = 72\n#### 72",
        "#### 72.0",
        "#### $72.",
        "####72 clips",
        "#### 48 + 24 = 72",
        r"so it is \boxed{72}.",
        r"\boxed{\$72}",
        r"\boxed{72\text{ clips}}",
        "The answer is 72 clips altogether.",
        "The answer is:\n\n**72**",
        "<answer>72</answer>",
        "#### 3\nOh no. #### 72\nThe answer is final.",
    ],
)
def test_right_answers(completion):
    verdict = judge(completion)
    assert (verdict.reward, verdict.success, verdict.feedback) == (1.0, True, None)
    assert verdict.extra == {"parsed": True, "answer": "72"}


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("#### 7", "7"),
        ("#### -72", "-72"),
        ("#### 720", "720"),
        ("#### 72\n#### 73", "73"),
        ("#### 0.72", "0.72"),
    ],
)
def test_wrong_answers(completion, found):
    verdict = judge(completion)
    assert (verdict.reward, verdict.success) == (0.0, False)
    assert verdict.extra == {"parsed": True, "answer": found}


@pytest.mark.parametrize(
    "completion",
    ["", "72", "it makes 72 clips", "####", "#### 72/2", r"\boxed{72^{2}}"],
)
def test_answers_that_cannot_be_read(completion):
    verdict = judge(completion)
    assert verdict.reward == 0.0 and verdict.success is False
    assert verdict.extra == {"parsed": False, "answer": None}
    assert "no final answer" in verdict.feedback


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("#### 1234567", "1,234,567"),
        ("#### 1,234,567.00", "1234567"),
        (r"\boxed{1{,}234}", "1,234"),
        ("#### -5", "-5"),
        ("#### \u22125", "-5"),
        ("#### -$5", "-5"),
        ("#### 0", "0"),
        ("#### .5", "0.5"),
        ("#### 5", "as before\n#### 5"),
    ],
)
def test_notations_of_a_number(completion, answer):
    assert judge(completion, answer).reward == 1.0


def test_a_row_without_a_number_judges_nobody():
    verdict = judge("#### 72", answer="many")
    assert (verdict.reward, verdict.success) == (None, None)
    assert "'many' is no number" in verdict.extra["error"]


@pytest.fixture
def folder(tmp_path):
    row = {
        "question": "How many?",
        "answer": "It is 2*3=<<2*3=6>>6 a day.\n"
        "In 1,000 days <<6*1000=6000>>6,000.\n#### 6,000",
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row))
    return str(tmp_path)


def test_rows(folder):
    task = tasks.load("gsm8k", path=folder)
    prompts = task.rows([0, 1])
    assert prompts.ids == ("gsm8k/train/0", "gsm8k/train/1")
    (message,) = prompts.messages[0]
    assert message["role"] == "user"
    assert message["content"].startswith("How many?\n\n")
    assert "####" in message["content"]
    assert prompts.columns[0] == {"question": "How many?", "answer": "6,000"}
    assert prompts.demonstrations[0] == (
        "It is 2*3=6 a day.\nIn 1,000 days 6,000.\n#### 6,000"
    )
    assert pickle.loads(pickle.dumps(task.judge)) is gsm8k.judge


def test_the_boxed_format(folder):
    task = tasks.load("gsm8k", path=folder, answer_format="boxed", instruction="Think.")
    prompts = task.rows([0])
    assert prompts.messages[0][0]["content"] == "How many?\n\nThink."
    assert prompts.demonstrations[0].endswith("\nThe answer is \\boxed{6,000}.")
    assert task.judge(prompts, prompts.demonstrations)[0].reward == 1.0


def test_bad_input(folder):
    with pytest.raises(
        InputError, match="answer_format is 'box'; did you mean 'boxed'"
    ):
        tasks.load("gsm8k", path=folder, answer_format="box")
    with pytest.raises(InputError, match="no split 'test'.*train"):
        tasks.load("gsm8k", path=folder, split="test")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the GSM8K files of ../shared")
@pytest.mark.parametrize("answer_format", ["hash", "boxed"])
def test_the_human_solutions_are_right(answer_format):
    task = tasks.load(
        "gsm8k", path=str(SHARED), split="test", answer_format=answer_format
    )
    prompts = task.rows(range(len(task)))
    assert len(prompts) == 1319
    verdicts = task.judge(prompts, prompts.demonstrations)
    assert {v.reward for v in verdicts} == {1.0}
    assert not any("<<" in text for text in prompts.demonstrations)
