"""Whole runs: folders, resuming, signals, errors."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import StopAfter, assert_same_state, lasting

from jaxrl_post import models, training
from jaxrl_post.errors import InputError
from jaxrl_post.training.checkpoints import Checkpoints, load_policy
from jaxrl_post.training.metrics import read_metrics


def test_run_resumes_to_the_same_end(tiny_config, tmp_path):
    """Interrupted after two steps and resumed equals uninterrupted, to the bit."""
    options = {"training": {"checkpoint_every": 3, "evaluate_every": 2}}
    whole = tiny_config(run={"dir": str(tmp_path / "whole")}, **options)
    cut = tiny_config(run={"dir": str(tmp_path / "cut")}, **options)

    result = training.run(whole)
    with pytest.raises(training.Interrupted) as stop:
        training.run(cut, progress=StopAfter)
    assert stop.value.signum == signal.SIGINT
    assert [row["step"] for row in read_metrics(tmp_path / "cut")] == [0, 1, 2]
    resumed = training.run(cut)

    rows = read_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert lasting(read_metrics(tmp_path / "cut")) == lasting(rows)
    assert_same_state(result.state, resumed.state)
    check_folder(tmp_path / "whole", rows, result)
    check_second_run_does_nothing(whole)
    check_changed_config_is_refused(whole, tiny_config)


def test_the_last_checkpoint_is_on_disk_before_the_model(tiny_config, monkeypatch):
    """The model marks a run as finished: killed after it, nothing would be redone."""
    order = []
    for owner, name in ((Checkpoints, "wait"), (models, "save")):
        own = getattr(owner, name)

        def noted(*args, own=own, name=name, **options):
            order.append(name)
            return own(*args, **options)

        monkeypatch.setattr(owner, name, noted)
    training.run(tiny_config(training={"steps": 1, "group_size": 2}, evaluation={}))
    assert order == ["wait", "save"]


def check_folder(folder, rows, result):
    assert rows[0].keys() == {"step", "time/evaluate"} | {
        k for k in rows[0] if k.startswith("eval/held/")
    }
    evaluated = [row["step"] for row in rows if "eval/held/avg@2" in row]
    assert evaluated == [0, 2, 4]
    for name in ("reward/mean", "loss", "grad_norm", "entropy", "length/mean"):
        assert all(np.isfinite(row[name]) for row in rows[1:]), name
    # learning rate 0 would give exactly 0; the sampler and the trainer agree.
    assert rows[1]["sampler/logp_gap"] < 1e-4

    lines = (folder / "completions" / "step_000001.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert len(kept) == 16
    mean = np.mean([row["reward"] for row in kept])
    np.testing.assert_allclose(rows[1]["reward/mean"], mean)
    lengths = [len(row["response_ids"]) for row in kept]
    np.testing.assert_allclose(rows[1]["length/mean"], np.mean(lengths))

    _, saved, tokenizer = load_policy(folder)
    _, exported, _ = models.load(folder / "model")
    for a, b, c in zip(
        jax.tree.leaves(saved),
        jax.tree.leaves(exported),
        jax.tree.leaves(result.state.trainable),
        strict=True,
    ):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, c)
    assert tokenizer is not None


def check_second_run_does_nothing(config):
    folder = Path(config.run.dir)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "lock"}
    result = training.run(config)
    assert result.state is None and result.last_row["step"] == 4
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "lock"}
    assert before == after


def check_changed_config_is_refused(config, tiny_config):
    other = tiny_config(
        run={"dir": config.run.dir, "seed": 5}, optimizer={"learning_rate": 0.5}
    )
    with pytest.raises(InputError) as error:
        training.run(other)
    assert "optimizer.learning_rate: 0.01 -> 0.5" in str(error.value)
    assert "run.seed: 0 -> 5" in str(error.value)


def test_folder_in_use_is_refused(tiny_config):
    from jaxrl_post.training.run_folder import owned

    config = tiny_config()
    with (
        owned(Path(config.run.dir)),
        pytest.raises(InputError, match="is in use by process"),
    ):
        training.run(config)


def test_unwritable_folder_is_one_error(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny_config(run={"dir": str(tmp_path / "file" / "run")})
    with pytest.raises(InputError, match="cannot be written"):
        training.run(config)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"name": "tiny_tsk:load"}}, "tiny_tsk"),
        ({"task": {"cuont": 3}}, "count"),
        ({"model": {"path": "no/such/model"}}, "no/such/model"),
        ({"recipe": {"name": "grop"}}, "did you mean 'grpo'"),
    ],
)
def test_wrong_names_are_one_error(tiny_config, sections, message):
    with pytest.raises(InputError, match=message):
        training.run(tiny_config(**sections))


def test_several_updates_dynamic_sampling_and_mixed_options(tiny_config):
    config = tiny_config(
        training={"steps": 2, "updates_per_step": 2, "micro_batch_tokens": 60},
        recipe={
            "dynamic_sampling": True,
            "kl_weight": 0.1,
            "truncated_importance": 2.0,
            "overlong_buffer": 2,
            "max_length": 6,
            "mask_truncated": True,
            "max_sampling_rounds": 3,
        },
        sampling={"slots": 8, "temperature": 0.7},
        optimizer={"learning_rate": 0.0},
        evaluation={},
    )
    result = training.run(config)
    # Nothing is learned, so sampler and trainer must agree, at this temperature too.
    gaps = [r["sampler/logp_gap"] for r in read_metrics(config.run.dir)[1:]]
    assert max(gaps) < 1e-4
    assert int(result.state.update) == 4
    assert result.last_row["sampling/rounds"] >= 1
    assert np.isfinite(result.last_row["loss/kl"])


PGPO = {"name": "pgpo", "top_k": 5, "max_length": 64, "weights": "token"}


@pytest.mark.parametrize("recipe", [{"name": "grpo"}, PGPO], ids=lambda r: r["name"])
def test_a_mesh_trains_as_one_device_does(tiny_config, tmp_path, recipe):
    options = {
        "recipe": recipe,
        "training": {"steps": 2, "prompts_per_step": 8, "group_size": 2},
        "evaluation": {},
    }
    rows = {}
    for name, mesh in {"one": {"data": 1}, "eight": {"data": 2, "fsdp": 4}}.items():
        config = tiny_config(run={"dir": str(tmp_path / name)}, mesh=mesh, **options)
        training.run(config)
        rows[name] = lasting(read_metrics(tmp_path / name))[1:]
    for one, eight in zip(rows["one"], rows["eight"], strict=True):
        assert one.keys() == eight.keys()
        assert one["reward/mean"] == eight["reward/mean"]  # the same tokens
        modulation = [key for key in one if key.startswith("information/")]
        assert (recipe is PGPO) == ("information/multiplier" in modulation)
        for key in ("loss", "grad_norm", "entropy", *modulation):
            np.testing.assert_allclose(eight[key], one[key], rtol=1e-4, atol=1e-6)
