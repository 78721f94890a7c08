from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from jaxrl_post import tasks
from jaxrl_post.errors import InputError
from jaxrl_post.tasks.math import MathJudge
from jaxrl_post.tasks.rows import exact_match, named_judge
from jaxrl_post.tasks.sources import read
from jaxrl_post.types import Prompts

SHARED = Path(__file__).parents[2] / "../shared/data/math_eval/valid.parquet"


def write(path: Path, records: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_columns_by_name(tmp_path):
    source = write(
        tmp_path / "quiz.jsonl",
        [
            {"q": "Capital of France?", "a": "Paris", "why": "I know.", "level": 1},
            {"q": "Capital of Italy?", "a": "Rome", "why": "I looked.", "level": 2},
        ],
    )
    task = tasks.load(
        "rows",
        source=source,
        prompt="q",
        answer="a",
        demonstration="why",
        system="Be brief.",
        instruction="One word.",
    )
    prompts = task.rows([1])
    assert task.name == "quiz"
    assert prompts.ids == ("quiz/1",)
    assert prompts.messages[0] == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capital of Italy?\n\nOne word."},
    )
    assert prompts.columns[0] == {
        "a": "Rome",
        "why": "I looked.",
        "level": 2,
        "answer": "Rome",
        "repeats": 1,
    }
    assert prompts.demonstrations == ("I looked.",)
    assert [v.reward for v in task.judge(prompts, ["Rome"])] == [1.0]


def test_rows_without_answers_need_a_reward_function(tmp_path):
    source = write(tmp_path / "d.jsonl", [{"prompt": "Hi?", "tone": "kind"}])
    with pytest.raises(InputError, match="no column 'answer'"):
        tasks.load("rows", source=source)
    with pytest.raises(InputError, match="the rows have no answers.*reward=module:"):
        tasks.load("rows", source=source, answer=None)
    task = tasks.load("rows", source=source, answer=None, reward=by_tone)
    assert task.judge(task.rows([0]), ["yes"])[0].reward == 4.0
    assert "answer" not in task.rows([0]).columns[0]
    own = tasks.load("rows", source=source, answer=None, judge="builtins:len")
    assert own.judge is len


def by_tone(completions, tone):
    return [float(len(word)) for word in tone]


def test_prompts_of_messages(tmp_path):
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
    ]
    source = write(tmp_path / "chat.jsonl", [{"prompt": turns, "answer": "x"}])
    task = tasks.load("rows", source=source, system="not needed", instruction="no")
    assert list(task.rows([0]).messages[0]) == turns


def verl(question: str, truth, source: str = "aime") -> dict:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 0},
    }


@pytest.fixture
def verl_file(tmp_path) -> str:
    records = [
        verl("a?", "1"),
        verl("b?", ["2"]),
        verl("a?", "1"),
        verl("a?", "1", "amc"),
        verl("a?", "1"),
    ]
    return write(tmp_path / "valid.jsonl", records)


def test_verls_layout_and_repeated_rows(verl_file):
    task = tasks.load("rows", source=verl_file)
    prompts = task.rows(range(len(task)))
    assert prompts.ids == ("aime/0", "aime/1", "amc/3")
    assert [row["answer"] for row in prompts.columns] == ["1", "2", "1"]
    assert [row["repeats"] for row in prompts.columns] == [3, 1, 1]
    assert prompts.columns[0]["data_source"] == "aime"
    assert task.judge == MathJudge()


def demonstrated(tmp_path, value) -> tuple[str | None, ...]:
    record = {"prompt": "p", "answer": "1", "target": value}
    source = write(tmp_path / "shown.jsonl", [record])
    task = tasks.load("rows", source=source, demonstration="target")
    return task.rows([0]).demonstrations


def test_demonstrations_of_messages(tmp_path):
    said = {"role": "assistant", "content": "<think>\nOne.\n</think>\n1"}
    asked = {"role": "user", "content": "p"}
    other = {"role": "assistant", "content": "Two."}
    for value in ([said], [asked, said], [[said]], [[said], [other]]):
        assert demonstrated(tmp_path, value) == (said["content"],)
    for value in (None, [], [[]]):
        assert demonstrated(tmp_path, value) == (None,)
    for value in (3, [asked], [said, other], ["One."]):
        with pytest.raises(InputError, match="A demonstration must be a text or mess"):
            demonstrated(tmp_path, value)


def test_rows_of_one_source(verl_file):
    assert len(tasks.load("rows", source=verl_file, data_source="amc")) == 1
    assert len(tasks.load("rows", source=verl_file, data_source=["amc", "aime"])) == 3
    with pytest.raises(InputError, match="data_source 'aim'; did you mean 'aime'"):
        tasks.load("rows", source=verl_file, data_source="aim")


def test_parquet_and_json_equal_jsonl(tmp_path, verl_file):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    records = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "2"}]
    jsonl = write(tmp_path / "train.jsonl", records)
    columns = {name: [r[name] for r in records] for name in ("prompt", "answer")}
    table = pyarrow.table(columns | {"__index_level_0__": [0, 1]})
    parquet.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "t.json").write_text(json.dumps(records))
    for source in (jsonl, str(tmp_path / "t.parquet"), str(tmp_path / "t.json")):
        assert read(source, "train") == records
    assert read(str(tmp_path), "train") == records


def test_hub_ids_go_to_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"prompt": "p", "answer": "1"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = tasks.load("rows", split="test", source="some/set", subset="main")
    assert task.rows([0]).messages[0][0]["content"] == "p"
    options = {"split": "test", "revision": None}
    assert calls == [(("some/set", "main"), options)]


def test_a_data_set_that_the_hub_does_not_give_is_bad_input(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="'some/set' is no local .*no network.*copy"):
        tasks.load("rows", split="test", source="some/set")


def test_bad_input(tmp_path):
    source = write(tmp_path / "d.jsonl", [{"prompt": "p", "answr": "1"}])
    with pytest.raises(InputError, match="no column 'answer'; did you mean 'answr'"):
        tasks.load("rows", source=source)
    with pytest.raises(InputError, match="Unknown judge 'maths'; did you mean 'math'"):
        tasks.load("rows", source=source, answer="answr", judge="maths")
    with pytest.raises(InputError, match="folder '.*gone.jsonl'; name the place"):
        tasks.load("rows", source=str(tmp_path / "gone.jsonl"))
    source = write(tmp_path / "e.jsonl", [{"prompt": 3, "answer": "1"}])
    with pytest.raises(InputError, match="text or a list of messages, .*got 3"):
        tasks.load("rows", source=source)
    (tmp_path / "f.jsonl").write_text('{"prompt": "p"}\n{"prompt":\n')
    with pytest.raises(InputError, match="f.jsonl, line 2"):
        tasks.load("rows", source=str(tmp_path / "f.jsonl"))
    (tmp_path / "g.csv").write_text("")
    with pytest.raises(InputError, match="g.csv must end in one of .jsonl"):
        tasks.load("rows", source=str(tmp_path / "g.csv"))


@pytest.mark.parametrize(
    ("completion", "reward", "parsed"),
    [
        ("<answer>New  York</answer>", 1.0, True),
        ("The answer is New York.", 1.0, True),
        (" New York\n", 1.0, False),
        ("new york", 0.0, False),
        ("I like New York", 0.0, False),
        ("New York. But the answer is Boston", 0.0, True),
    ],
)
def test_exact_match(completion, reward, parsed):
    prompts = Prompts(("q",), ((),), ({"answer": "New York"},), (None,))
    (verdict,) = exact_match(prompts, [completion])
    assert (verdict.reward, verdict.success) == (reward, reward == 1.0)
    assert verdict.extra["parsed"] is parsed


@pytest.mark.parametrize(
    ("name", "completion"),
    [
        ("exact", "4"),
        ("gsm8k", "#### 4"),
        ("math", r"\boxed{4}"),
        ("mcq", "<answer>4</answer>"),
        ("jaxrl_post.tasks.rows:exact_match", "4"),
    ],
)
def test_judges_by_name(name, completion):
    prompts = Prompts(("q",), ((),), ({"answer": "4"},), (None,))
    assert named_judge(name)(prompts, [completion])[0].reward == 1.0


@pytest.mark.skipif(not SHARED.is_file(), reason="needs valid.parquet of ../shared")
def test_a_published_file_in_verls_layout():
    task = tasks.load("rows", source=str(SHARED))
    columns = task.rows(range(len(task))).columns
    counts = Counter((row["data_source"], row["repeats"]) for row in columns)
    assert counts == {
        ("olympiad_bench", 1): 675,
        ("math", 1): 500,
        ("minerva", 1): 272,
        ("amc", 4): 83,
        ("aime", 8): 30,
    }
