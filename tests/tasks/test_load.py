from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest

from jaxrl_post import tasks
from jaxrl_post.errors import InputError
from jaxrl_post.tasks.base import Row, RowsTask
from jaxrl_post.tasks.lookup import check_types, resolve

MODULE = """
from jaxrl_post.tasks import Row, RowsTask
from jaxrl_post.types import Verdict

def judge(prompts, completions):
    return [Verdict(0.0) for _ in completions]

def load(split="train", *, count=2):
    rows = [Row(f"{split}{i}", ()) for i in range(count)]
    return RowsTask("mine", rows, judge)

def anything(split, **options):
    return load(split)

def length(completions, scale=None, **kwargs):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(autouse=True)
def my_tasks(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_tasks", None)


def test_imports_are_light():
    code = (
        "import sys, jaxrl_post.tasks, jaxrl_post.isolation\n"
        "heavy = ['jax', 'torch', 'transformers', 'datasets', 'pyarrow', 'sympy',"
        " 'math_verify', 'reasoning_gym']\n"
        "assert not set(heavy) & set(sys.modules), set(heavy) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_task_of_my_own():
    task = tasks.load("my_tasks:load", split="test", count=3)
    assert task.rows([0, 1, 2]).ids == ("test0", "test1", "test2")
    assert len(tasks.load("my_tasks:anything", what="ever")) == 2


def test_every_built_in_name_has_a_loader():
    for name in tasks.BUILT_IN:
        with pytest.raises(InputError, match="no option 'nonsense'"):
            tasks.load(name, nonsense=1)


def test_wrong_names_are_met_with_the_nearest_right_one():
    with pytest.raises(InputError, match="Unknown task 'gms8k'; did you mean 'gsm8k'"):
        tasks.load("gms8k")
    with pytest.raises(InputError, match="no option 'answerformat'.*answer_format"):
        tasks.load("gsm8k", answerformat="boxed")
    with pytest.raises(InputError, match="'rows' needs the option 'source'"):
        tasks.load("rows")
    with pytest.raises(InputError, match="No module 'my_tusks'.*PYTHONPATH"):
        tasks.load("my_tusks:load")
    with pytest.raises(InputError, match="no function 'lode'; did you mean 'load'"):
        tasks.load("my_tasks:lode")


def test_an_import_error_inside_a_users_module_is_not_hidden(tmp_path):
    (tmp_path / "broken.py").write_text("import not_there_at_all")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        resolve("broken:load")


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("my_tasks:length", 4.0),
        (["my_tasks:length", "my_tasks:length"], 8.0),
        ({"functions": "my_tasks:length", "weights": [0.5]}, 2.0),
    ],
)
def test_a_reward_function_takes_the_place_of_the_judge(tmp_path, reward, expected):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"question": "2+2?", "answer": "so\n#### 4"}))
    task = tasks.load("gsm8k", path=str(file), reward=reward)
    assert task.judge(task.rows([0]), ["four"])[0].reward == expected


def test_rows_task_is_exported():
    assert (tasks.Row, tasks.RowsTask) == (Row, RowsTask)


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (3, int, True),
        (np.int64(3), int, True),
        (True, int, False),
        (3.0, int, False),
        (3, float, True),
        (np.float32(3), float, True),
        ("3", float, False),
        (None, int | None, True),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (range(3), Sequence[int], True),
        ([1, "a"], Sequence[int], False),
        ("abc", Sequence[str], False),
        ("abc", str | Sequence[str], True),
        ({}, Mapping[str, Any], True),
        ([], Mapping[str, Any], False),
        (3, Callable[..., Any] | None, True),  # what no config can write
    ],
)
def test_types_that_options_declare(value, hint, fits):
    def load(option):
        pass

    load.__annotations__ = {"option": hint}
    if fits:
        check_types(load, {"option": value}, "task")
    else:
        with pytest.raises(InputError, match=r"task\.option=.*: expected "):
            check_types(load, {"option": value}, "task")
