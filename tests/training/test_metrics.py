"""The metrics file: each step once, through crashes and resumes."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.training import metrics
from jaxrl_post.training.assembly import group_metrics
from jaxrl_post.training.metrics import MetricsWriter, read_metrics
from jaxrl_post.types import Verdict


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def write(folder, *numbers, **options):
    with MetricsWriter(folder, **options) as writer:
        for number in numbers:
            writer.write({"step": number, "loss": number / 10})


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write({"step": 0})
        assert steps(tmp_path / "run") == [0]


def test_a_resumed_run_drops_the_steps_that_it_does_again(tmp_path):
    write(tmp_path, 0, 1, 2, 3)
    with MetricsWriter(tmp_path, resumed_step=1) as writer:
        assert steps(tmp_path) == [0, 1]
        writer.write({"step": 2, "loss": 7.0})
    assert [row["loss"] for row in read_metrics(tmp_path)] == [0.0, 0.1, 7.0]


def test_a_run_that_begins_again_keeps_nothing(tmp_path):
    write(tmp_path, 0, 1)
    write(tmp_path, 0, resumed_step=-1)
    assert steps(tmp_path) == [0]


def test_without_a_resumed_step_every_row_stays(tmp_path):
    write(tmp_path, 0, 1)
    write(tmp_path, 2)
    assert steps(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}'])
def test_a_torn_last_line_is_no_row(tmp_path, torn):
    write(tmp_path, 0, 1)
    path = tmp_path / metrics.FILE_NAME
    path.write_text(path.read_text() + torn)
    assert steps(tmp_path) == [0, 1]
    write(tmp_path, 2, resumed_step=1)
    assert steps(tmp_path) == [0, 1, 2]


def test_a_broken_line_within_is_an_error_that_names_it(tmp_path):
    (tmp_path / metrics.FILE_NAME).write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2.*'step'"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_is_never_written_twice(tmp_path, step):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1})
        with pytest.raises(ValueError, match=f"step {step} would be"):
            writer.write({"step": step})
    assert steps(tmp_path) == [1]


def test_what_json_cannot_say_is_null_and_counted(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "loss": float("nan"), "kl": np.float32("inf"), "x": 1})
    text = (tmp_path / metrics.FILE_NAME).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "kl": None,
        "x": 1,
        "non_finite": 2,
    }


def test_scalars_of_every_library_become_json(tmp_path):
    row = {
        "step": np.int64(1),
        "a": np.float32(0.5),
        "b": jnp.asarray(0.25),
        "c": jnp.asarray(2.0, jnp.bfloat16),
        "d": np.True_,
        "e": None,
        "f": "text",
        "g": np.int32(3),
    }
    with MetricsWriter(tmp_path) as writer:
        writer.write(row)
    expected = {"step": 1, "a": 0.5, "b": 0.25, "c": 2.0, "d": True, "e": None}
    assert read_metrics(tmp_path) == [{**expected, "f": "text", "g": 3}]


@pytest.mark.parametrize("value", [np.zeros(2), [1.0], object()])
def test_what_is_no_scalar_is_named(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="metric 'loss'"):
            writer.write({"step": 1, "loss": value})
    assert steps(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_replacing_leaves_the_old_file(tmp_path, monkeypatch, call):
    write(tmp_path, 0, 1, 2)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics.os, call, crash)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, resumed_step=0)
    assert steps(tmp_path) == [0, 1, 2]


# Of a step's groups -------------------------------------------------------------------


def groups_of(rewards, levels, extras):
    """Groups as far as their metrics look at them: verdicts, columns, lengths."""
    from types import SimpleNamespace

    verdicts = tuple(
        tuple(
            Verdict(reward, reward == 1, extra=extra)
            for reward, extra in zip(row, more, strict=True)
        )
        for row, more in zip(rewards, extras, strict=True)
    )
    shape = np.shape(rewards)
    return SimpleNamespace(
        verdicts=verdicts,
        lengths=np.ones(shape),
        stopped=np.ones(shape, bool),
        prompts=SimpleNamespace(columns=[{"level": level} for level in levels]),
    )


def test_rewards_by_level_and_by_function():
    extras = [[{"reward/f": 1.0}, {"reward/f": None}], [{"reward/f": 3.0}, {}]]
    groups = groups_of([[1.0, 1.0], [0.0, 0.5]], [2, "hard"], extras)
    metrics = group_metrics(groups)
    assert metrics["reward/level/2"] == 1.0 and metrics["reward/level/hard"] == 0.25
    assert metrics["reward/f/mean"] == 2.0 and metrics["reward/f/std"] == 1.0
    assert metrics["reward/solved_groups"] == metrics["reward/unsolved_groups"] == 0.5


def test_a_column_of_many_values_is_no_level():
    groups = groups_of([[1.0]] * 21, range(21), [[{}]] * 21)
    assert not any(name.startswith("reward/level") for name in group_metrics(groups))


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    import types

    import jax

    from jaxrl_post.training.memory import peak_memory

    told = [None, {"bytes_in_use": 5}, {"peak_bytes_in_use": 2**30}]
    told.append({"peak_bytes_in_use": 3 * 2**29})

    def devices():
        return [types.SimpleNamespace(memory_stats=lambda x=x: x) for x in told]

    monkeypatch.setattr(jax, "local_devices", devices)
    assert peak_memory() == {"throughput/peak_memory_gib": 1.5}
    del told[2:]
    assert peak_memory() == {}
