"""Several real processes on loopback: they agree, train, are lost, and are resumed."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrl_post import training
from jaxrl_post.cli import main
from jaxrl_post.errors import InputError
from jaxrl_post.sharding import processes
from jaxrl_post.training import loop
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.config import load_config
from jaxrl_post.training.fingerprints import SHA256, SUMS, checksums
from jaxrl_post.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}"}


@pytest.fixture(scope="module")
def table():
    """scripts/process_table.py"""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/process_table.py")))


@pytest.fixture
def tiny(tiny_config, tmp_path):
    """The path of a config of eight steps, each with a checkpoint."""
    options = {"steps": 8, "prompts_per_step": 8, "group_size": 2}
    options["checkpoint_every"] = 1
    config = tiny_config(training=options, evaluation={}, mesh={"data": -1})
    path = tmp_path / "tiny.yaml"
    path.write_text(config.to_yaml())
    return path


@pytest.fixture
def single(tiny, tmp_path):
    """The folder of its run in this process, on one device."""
    folder = tmp_path / "single"
    training.run(load_config(tiny, [f"run.dir={folder}", "mesh.data=1"]))
    return folder


def test_processes_agree_on_values_and_on_errors(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(HELPERS / "agreeing.py"), str(tmp_path), port, "2"]
    environment = {**os.environ, **ENVIRONMENT}
    started = [
        subprocess.Popen(
            [*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=90)[0] for process in started]
    first, second = (json.loads(text.splitlines()[-1]) for text in outputs)
    assert [first.pop("main"), second.pop("main")] == [True, False]
    named = {"bad input": "?", "nested": "inside", "crossed": "before"}
    for name, text in named.items():
        assert first.pop(name) == ["InputError", f"process 1: {text}"]
        assert second.pop(name) == ["InputError", text]
    assert first.pop("bug") == ["RuntimeError", "process 1: KeyError: 'k'"]
    assert second.pop("bug") == ["KeyError", "'k'"]
    assert first.pop("full") == ["RuntimeError", True]
    assert second.pop("full") == ["ValueError", True]
    whole = {"a": np.arange(24, dtype=np.float32).reshape(8, 3)}
    assert (
        first
        == second
        == {
            "gather": [0, 10],
            "long": [0, 5000],
            "on_main": "of 0",
            "in_shares": ["a", "b", "c", "d", "e"],
            "few": ["a"],
            "together": True,
            "after": [0, 1],
            "kinds": [SUMS, SHA256],
            "fetched": True,
            "restored": [True, True],
            SUMS: checksums(whole, SUMS)["a"],
            SHA256: checksums(whole, SHA256)["a"],
        }
    )


def test_a_lost_process_ends_all_and_another_mesh_resumes_the_run(
    table, tiny, single, tmp_path
):
    run = tmp_path / "run"
    lost = table.train(
        table.Layout(2, 1, data=2),
        [str(tiny), f"run.dir={run}"],
        kill=1,
        when=run / "checkpoints" / "2",
        within=90,
        heartbeat=5,
        environment=ENVIRONMENT,
    )
    assert lost.codes == [1, 1], lost.output
    assert "error: process 1 of 2 was lost. The same command" in lost.output[0]
    assert "process 1 of 2 was killed by SIGKILL" in lost.output[1]
    assert "[Gloo]" not in lost.output[0]
    checkpoints = Checkpoints(run, read_only=True)
    saved = checkpoints.latest()
    assert checkpoints.about(saved)[SHA256]  # data=2: every process has all of it
    checkpoints.close()
    assert f"resumes after step {saved}." in lost.output[0]

    mesh = ["mesh.data=2", "mesh.fsdp=4"]  # of this process's devices
    training.run(load_config(tiny, [f"run.dir={run}", *mesh]))
    assert [row["step"] for row in read_metrics(run)] == [*range(9)]
    compared = table.compare(run, single)
    assert compared["same_tokens"] == compared["tokens"] > 0
    assert compared["difference"] < 1e-5


@pytest.mark.slow
def test_four_processes_lose_the_first_and_two_go_on(table, tiny, single, tmp_path):
    begun = table.Layout(4, 1, data=1, fsdp=4)
    resumed = table.Layout(2, 2, data=2, fsdp=2)
    row = table.kill_and_resume(
        tmp_path, [str(tiny)], single, (begun, 0, "SIGKILL", resumed), ENVIRONMENT
    )
    assert row["good"], row
    assert row["same_tokens"] == row["tokens"] > 0


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_ends_all(table, tiny, tmp_path):
    run, layout = tmp_path / "run", table.Layout(2, 1, data=1, fsdp=2)
    told = [str(tiny), f"run.dir={run}", *layout.overrides()]
    stopped = table.train(
        layout,
        told,
        kill=1,
        signum=signal.SIGTERM,
        when=run / "checkpoints" / "1",
        within=60,
        environment=ENVIRONMENT,
    )
    assert stopped.codes == [143, 143], stopped.output
    assert "stopped by SIGTERM; saved. To resume:" in stopped.output[0]
    checkpoints = Checkpoints(run, read_only=True)
    assert checkpoints.latest() == read_metrics(run)[-1]["step"] < 8
    assert checkpoints.about(checkpoints.latest())[SUMS]
    checkpoints.close()


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(table, tiny, tmp_path):
    def train(name, override):
        told = [str(tiny), f"run.dir={tmp_path / name}", override]
        return table.train(
            table.Layout(2, 1, data=2), told, within=90, environment=ENVIRONMENT
        )

    failed = train("failed", "recipe.name=one_fails_recipe:make")
    assert failed.codes == [1, 1], failed.output
    assert "RuntimeError: only here" in failed.output[1]
    uneven = train("uneven", "training.prompts_per_step=7")
    assert uneven.codes == [2, 2], uneven.output
    for text in uneven.output:
        assert "error: training.prompts_per_step=7 gives 7 groups" in text


@pytest.mark.slow
def test_processes_need_one_folder(table, tiny, tmp_path):
    layout = table.Layout(2, 1, data=2)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    apart = table.train(
        layout, [str(tiny), "run.dir=run"], folders=folders, environment=ENVIRONMENT
    )
    assert apart.codes == [2, 2], apart.output
    for text in apart.output:
        assert "error: run.dir='run': not every process sees there" in text


GROUP = "--coordinator=h:1 --processes=2 --process"


@pytest.mark.parametrize(
    "flags, error",
    [
        (f"{GROUP}=2", "--process=2: must be from 0 to 1, one less than --processes=2"),
        (f"{GROUP}=-1", "--process=-1: must be from 0 to 1"),
        (f"{GROUP}=x", "argument --process: invalid int value: 'x'"),
        (f"{GROUP}=0 --processes=0", "--processes=0: there must be one at least"),
        (f"{GROUP}=0 --coordinator=h", "--coordinator=h: must be HOST:PORT"),
        (f"{GROUP}=0 --heartbeat-timeout=0", "--heartbeat-timeout=0: must be 1 s"),
        ("--processes=2 --process=0", "--coordinator must be given too"),
    ],
)
def test_arguments_that_describe_no_group(tiny, flags, error, capsys):
    assert main(["train", str(tiny), *flags.split()]) == 2
    assert f"error: {error}" in capsys.readouterr().err


def test_a_coordinator_that_does_not_answer():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(InputError, match=f"coordinator {address}: nothing answered"):
        processes.start(address, 2, 1, start_timeout=0.3)


def test_sums_see_every_bit_and_place():
    array = np.arange(1, 25, dtype=np.float32).reshape(4, 6)
    changed = {"as it is": array}
    for bit in range(0, 32, 7):
        other = array.copy()
        other.view(np.uint32)[2, 3] ^= np.uint32(1 << bit)
        changed[f"bit {bit}"] = other
    changed |= {
        "rows swapped": array[[1, 0, 2, 3]],
        "transposed shape": array.reshape(6, 4),
        "zeroed": np.zeros_like(array),
        "integers": array.view(np.int32),
        "half": array.astype(np.float16),
        "true": array > 3,
    }
    assert len({*checksums(changed, SUMS).values()}) == len(changed)


def test_processes_must_be_told_the_same(tiny, monkeypatch):
    config = load_config(tiny)
    trees = [config.to_dict() for _ in range(3)]
    trees[2]["optimizer"]["learning_rate"] = 0.5
    monkeypatch.setattr(loop, "gather", lambda fn: trees)
    with pytest.raises(InputError) as error:
        training.run(config)
    assert str(error.value) == (
        "processes 0 and 2 were given different configs:\n"
        "  optimizer.learning_rate: 0.01 and 0.5"
    )
