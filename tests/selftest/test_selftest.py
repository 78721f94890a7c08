"""Every check passes here, and fails where what it checks is broken."""

from __future__ import annotations

import json
import math

import jax
import pytest

from jaxrl_post import cli, losses, selftest, vocabulary
from jaxrl_post.models import stack
from jaxrl_post.selftest import formulas, programs
from jaxrl_post.selftest.measured import Measured


def test_the_command(capsys):
    """All checks, on the eight devices of the tests, as JSON."""
    assert cli.main(["selftest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["device"]["count"] == 8
    assert found["versions"]["jax"] == jax.__version__
    assert found["seconds"].keys() == selftest.CHECKS.keys()
    names = [one["name"] for one in found["checks"]]
    assert len(names) == len(set(names)) > len(selftest.CHECKS)
    for one in found["checks"]:
        assert one["passed"] and 0 <= one["value"] <= one["bound"], one
    # Bounds are of use where they are not met by luck: float32 stays far below.
    exact = [x["value"] for x in found["checks"] if "bfloat16" not in x["name"]]
    assert max(exact) < 2e-5


def failed(check, capsys, monkeypatch):
    """What the command prints when only this check runs; it must fail."""
    monkeypatch.setattr(selftest.report, "CHECKS", {"one": check})
    monkeypatch.setattr(
        selftest.run, "__defaults__", ({"one": check}, lambda one: None)
    )
    assert cli.main(["selftest"]) == 1
    output = capsys.readouterr().out
    assert "\nFAILED in " in output
    return output


def test_a_wrong_loss_is_seen(capsys, monkeypatch):
    right = losses.clipped_policy_gradient

    def wrong(*arguments, clip_high, **options):
        return right(*arguments, clip_high=clip_high + 0.01, **options)

    monkeypatch.setattr(losses, "clipped_policy_gradient", wrong)
    output = failed(formulas.check_losses, capsys, monkeypatch)
    lines = [line for line in output.splitlines() if line.startswith("WRONG")]
    assert len(lines) == 1 and "clipped policy gradient" in lines[0]


@pytest.mark.parametrize("name", ["map_logits", "sum_logits"])
def test_a_wrong_vocabulary_pass_is_seen(name, capsys, monkeypatch):
    right = getattr(vocabulary, name)
    monkeypatch.setattr(
        vocabulary,
        name,
        lambda *arguments, **options: right(*arguments, temperature=1.01, **options),
    )
    output = failed(formulas.check_vocabulary, capsys, monkeypatch)
    wrong = {"map_logits": "pass", "sum_logits": "sum"}[name]
    lines = [line for line in output.splitlines() if line.startswith("WRONG")]
    assert len(lines) == 1 and f"vocabulary {wrong}" in lines[0]


def test_a_sum_that_forgets_its_weights_is_seen(capsys, monkeypatch):
    """The unembedding's gradient alone is wrong."""
    right = vocabulary.sum_logits
    monkeypatch.setattr(
        vocabulary,
        "sum_logits",
        lambda loss, hidden, unembedding, *rest, **options: right(
            loss, hidden, jax.lax.stop_gradient(unembedding), *rest, **options
        ),
    )
    output = failed(formulas.check_vocabulary, capsys, monkeypatch)
    assert "WRONG vocabulary sum" in output


def test_a_wrong_attention_is_seen(capsys, monkeypatch):
    """One program that does not see padding for what it is."""
    right = programs.programs

    def wrong(dtype):
        policy = right(dtype)["plain"]

        def hidden(params, tokens, positions, segments):
            return policy.hidden(params, tokens, positions, segments * 0 + 1)

        return {"plain": policy, "broken": stack.replace(policy, hidden=hidden)}

    monkeypatch.setattr(programs, "programs", wrong)
    lines = failed(programs.check_attention, capsys, monkeypatch).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["ok", "WRONG"] * 2


def test_a_wrong_trainer_is_seen(capsys, monkeypatch):
    right = programs.make_score_step
    monkeypatch.setattr(
        programs, "make_score_step", lambda policy: right(policy, temperature=1.001)
    )
    output = failed(programs.check_gap, capsys, monkeypatch)
    assert "WRONG log-probs of sampler and trainer" in output


@pytest.mark.slow
def test_a_wrong_mesh_is_seen(capsys, monkeypatch):
    right = programs.make_update_step

    def wrong(*arguments, mesh):
        temperature = 1.0 if mesh.size == 1 else 1.001
        return right(*arguments, mesh=mesh, temperature=temperature)

    monkeypatch.setattr(programs, "make_update_step", wrong)
    output = failed(programs.check_mesh, capsys, monkeypatch)
    assert "WRONG update on all devices and on one" in output


def test_one_device_has_nothing_to_compare(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    (found,) = programs.check_mesh()
    assert found.value is None and found.passed and "one device" in str(found)


def test_a_check_that_raises_has_failed():
    def broken():
        yield Measured("first", 0.0, 1.0)
        raise RuntimeError("no such\n kernel")

    shown = []
    report = selftest.run({"broken": broken}, shown.append)
    assert not report.passed and report.measured == shown
    first, second = report.to_dict()["checks"]
    assert first["passed"] and not second["passed"] and second["value"] is None
    assert second["note"] == "RuntimeError: no such kernel"


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.1])
def test_what_is_not_below_the_bound_fails(value):
    assert not Measured("x", value, 1.0).passed
