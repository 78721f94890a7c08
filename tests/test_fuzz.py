"""scripts/fuzz.py: five seconds of each target, and that it would notice."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz.py"
TARGETS = ("gguf", "config", "dataset", "tests", "answers")


@pytest.fixture(scope="module")
def fuzz():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz"]


@pytest.mark.parametrize("name", TARGETS)
def test_five_seconds_of_each(name, tmp_path):
    log = tmp_path / "fuzz.jsonl"
    arguments = [name, "--minutes", str(5 / 60), "--seed", "7", "--log", str(log)]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    record = json.loads(log.read_text())
    assert record == json.loads(result.stdout)
    assert (record["target"], record["seed"], record["crashes"]) == (name, 7, 0)
    assert record["executions"] > 10
    assert record["command"].startswith(f"python scripts/fuzz.py {name}")


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_are_accepted_and_inputs_repeat(fuzz, name, tmp_path):
    """Fuzzing means something only if some inputs get through to the end."""
    target = fuzz.TARGETS[name]
    record = fuzz.fuzz(name, target, tmp_path, seconds=3)
    assert 0 <= record["refused"] < record["executions"]
    for number in range(20):
        made = [target.make(fuzz.Random(f"{name} 0 {number}")) for _ in range(2)]
        assert repr(made[0]) == repr(made[1])


def test_the_unspoilt_gguf_file_is_a_model(fuzz, tmp_path):
    fuzz.run_gguf(fuzz.write_gguf(fuzz._MODEL, fuzz._TENSORS), tmp_path)


def loop_for_ever():
    while True:
        pass


@pytest.mark.parametrize(
    "action, words",
    [
        (lambda: {}["x"], "KeyError: 'x'"),
        (loop_for_ever, "Hang: more than 0.2 s of processor time"),
        (lambda: bytearray(2**26).extend(b"x" * 2**26), "MemoryError"),
    ],
    ids=["raises", "hangs", "swells"],
)
def test_a_surprise_stops_it_and_can_be_had_again(
    fuzz, action, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(fuzz, "HANG", 0.2)
    monkeypatch.setattr(fuzz, "MEMORY", -1 if words == "MemoryError" else 2**40)

    def run(data, folder):
        if data > 0.7:
            action()

    if words == "MemoryError":  # any memory at all is too much
        run = lambda data, folder: action()  # noqa: E731
    target = fuzz.Target(lambda rng: rng.random(), run)
    record = fuzz.fuzz("it", target, tmp_path, seed=3, seconds=60)
    assert record["crashes"] == 1
    error = capsys.readouterr().err
    assert words in error
    again = error.rpartition("again: python scripts/fuzz.py it --seed 3 --only ")[2]
    alone = fuzz.fuzz("it", target, tmp_path, seed=3, only=int(again), seconds=60)
    assert (alone["crashes"], alone["executions"]) == (1, 1)
    assert list(tmp_path.glob("crash-it-3-*"))
