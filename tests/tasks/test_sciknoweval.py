from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest

from jaxrl_post import tasks
from jaxrl_post.errors import InputError
from jaxrl_post.tasks import sciknoweval
from jaxrl_post.tasks.sciknoweval import MultipleChoice, hub_records
from jaxrl_post.types import Prompts, Verdict

SHARED = Path(__file__).parents[2] / "../shared/data/sciknoweval"


def judge(completion: str, answer: str = "B", answer_format: str = "tags") -> Verdict:
    prompts = Prompts(("q",), ((),), ({"answer": answer},), (None,))
    return MultipleChoice(answer_format)(prompts, [completion])[0]


@pytest.mark.parametrize(
    ("completion", "reward", "letter", "incorrect_format"),
    [
        ("<reasoning>x</reasoning>\n<answer>\nB\n</answer>", 1.0, "B", False),
        ("<answer>B</answer>\n", 1.0, "B", False),
        ("<answer>A</answer> no, <answer>B</answer>", 1.0, "B", False),
        ("<answer>B</answer> no, <answer>A</answer>", 0.0, "A", False),
        ("<answer>B</answer> and that is it", 1.0, "B", True),
        ("<answer>B", 1.0, "B", True),
        ("B", 1.0, "B", True),
        (" B </answer> A", 1.0, "B", True),
        ("b", 0.0, None, True),
        ("<answer>B: 3.2</answer>", 0.0, None, True),
        ("<answer>E</answer>", 0.0, None, True),
        ("<answer></answer>", 0.0, None, True),
        ("", 0.0, None, True),
    ],
)
def test_tags(completion, reward, letter, incorrect_format):
    verdict = judge(completion)
    assert (verdict.reward, verdict.success) == (reward, reward == 1.0)
    assert verdict.feedback is None
    assert verdict.extra == {
        "answer": letter,
        "parsed": letter is not None,
        "incorrect_format": incorrect_format,
    }


@pytest.mark.parametrize(
    ("completion", "reward", "letter", "incorrect_format"),
    [
        (r"so \boxed{B}.", 1.0, "B", False),
        (r"$\boxed{ B }$", 1.0, "B", False),
        (r"\boxed{A}, or \boxed{B}", 1.0, "B", False),
        (r"\boxed{B} it is", 1.0, "B", True),
        (r"\boxed{A}", 0.0, "A", False),
        (r"\boxed{\text{B}}", 0.0, None, True),
        ("B", 0.0, None, True),
    ],
)
def test_boxed(completion, reward, letter, incorrect_format):
    verdict = judge(completion, answer_format="boxed")
    assert verdict.reward == reward
    assert verdict.extra["answer"] == letter
    assert verdict.extra["incorrect_format"] is incorrect_format


@pytest.fixture
def folder(tmp_path):
    for domain in sciknoweval.DOMAINS:
        (tmp_path / domain).mkdir()
        for split in ("train", "test"):
            row = {
                "system": "Be brief.",
                "prompt": f"{domain} {split}?",
                "answer": "C",
                "kind": "mcq",
                "idx": 7,
            }
            (tmp_path / domain / f"{split}.jsonl").write_text(json.dumps(row))
    return str(tmp_path)


def test_local_rows(folder):
    task = tasks.load("sciknoweval", path=folder)
    prompts = task.rows(range(len(task)))
    assert prompts.ids == tuple(
        f"sciknoweval/{d}/7" for d in ("biology", "chemistry", "materials", "physics")
    )
    assert prompts.messages[1] == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "chemistry train?"},
    )
    assert prompts.columns[1] == {"answer": "C", "domain": "chemistry"}
    assert prompts.demonstrations == (None,) * 4
    assert pickle.loads(pickle.dumps(task.judge)) == MultipleChoice("tags")


def test_domains_and_system_prompts(folder):
    task = tasks.load(
        "sciknoweval",
        path=folder,
        split="test",
        domain=["physics", "biology"],
        answer_format="boxed",
    )
    prompts = task.rows([0, 1])
    assert [m[1]["content"] for m in prompts.messages] == [
        "physics test?",
        "biology test?",
    ]
    assert prompts.messages[0][0]["content"] == sciknoweval.SYSTEM["boxed"]
    assert task.judge == MultipleChoice("boxed")
    task = tasks.load("sciknoweval", path=folder, domain="physics", system="Hm.")
    assert len(task) == 1
    assert task.rows([0]).messages[0][0]["content"] == "Hm."


def hub(domain: str, level: str, kind: str, i: int) -> dict:
    return {
        "domain": domain,
        "details": {"level": level},
        "type": kind,
        "question": f"{domain} {i}?",
        "choices": {"text": ["yes", "no"], "label": ["A", "B"]},
        "answerKey": "A",
    }


def test_hub_rows_are_filtered_and_split_as_in_the_paper(monkeypatch):
    records = []
    for i in range(500):
        records.append(
            hub("Biology", "L3", "mcq-4-choices" if i % 2 else "mcq-2-choices", i)
        )
        records.append(hub("Biology", "L1", "mcq-4-choices", -1))
        records.append(hub("Biology", "L3", "open-ended-qa", -1))
        records.append(hub("Material", "L3", "mcq-4-choices", -1))
    train = hub_records(records, "biology", "train")
    test = hub_records(records, "biology", "test")
    # First indices of datasets' train_test_split(test_size=0.1, seed=42) on 500 rows.
    assert [r["idx"] for r in train[:4]] == [489, 454, 164, 174]
    assert [r["idx"] for r in test[:4]] == [473, 132, 472, 46]
    assert (len(train), len(test)) == (450, 50)
    assert {r["idx"] for r in train + test} == set(range(500))
    assert train[0] == {
        "idx": 489,
        "prompt": "Biology 489?\n\nA: yes\nB: no\nPlease reason step by step.",
        "answer": "A",
    }

    monkeypatch.setattr(sciknoweval, "read", lambda source, split: records)
    task = tasks.load("sciknoweval", split="test", domain="biology")
    assert len(task) == 50
    assert task.rows([0]).messages[0][0]["content"] == sciknoweval.SYSTEM["tags"]


def test_the_split_is_that_of_datasets():
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"i": list(range(93))}).train_test_split(
        test_size=0.1, seed=42
    )
    records = [hub("Physics", "L3", "mcq-4-choices", i) for i in range(93)]
    for name in ("train", "test"):
        ours = [r["idx"] for r in hub_records(records, "physics", name)]
        assert ours == split[name]["i"]


def test_bad_input(folder):
    with pytest.raises(InputError, match="'physic'; did you mean 'physics'"):
        tasks.load("sciknoweval", path=folder, domain="physic")
    with pytest.raises(InputError, match="not 'validation'"):
        tasks.load("sciknoweval", path=folder, split="validation")
    with pytest.raises(InputError, match="answer_format is 'tag'; did you mean 'tags'"):
        tasks.load("sciknoweval", path=folder, answer_format="tag")


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the SciKnowEval files of ../shared"
)
def test_the_published_sizes():
    sizes = {}
    for split in ("train", "test"):
        task = tasks.load("sciknoweval", path=str(SHARED), split=split)
        columns = task.rows(range(len(task))).columns
        sizes[split] = Counter(row["domain"] for row in columns)
        assert {row["answer"] for row in columns} == set("ABCD")
    assert sizes["train"] == {
        "biology": 450,
        "chemistry": 1890,
        "materials": 841,
        "physics": 720,
    }
    assert sizes["test"] == {
        "biology": 50,
        "chemistry": 210,
        "materials": 94,
        "physics": 80,
    }
