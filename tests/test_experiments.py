"""The experiments: their statistics, the order of their runs, rows and verdicts."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.recipes.groups import Groups
from jaxrl_post.transforms import scale_by_information

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def experiments():
    """Loads a module of scripts/experiments."""
    sys.path.insert(0, str(ROOT))
    yield lambda name: importlib.import_module(f"scripts.experiments.{name}")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def stats(experiments):
    return experiments("_statistics")


@pytest.fixture(scope="module")
def runs(experiments):
    return experiments("_runs")


@pytest.mark.parametrize(
    ("probability", "freedom", "known"),
    # Source: printed tables of Student's t.
    [
        (0.975, 1, 12.7062),
        (0.995, 1, 63.6567),
        (0.975, 2, 4.3027),
        (0.975, 4, 2.7764),
        (0.975, 9, 2.2622),
        (0.995, 9, 3.2498),
        (0.975, 30, 2.0423),
        (0.9, 120, 1.2886),
    ],
)
def test_quantiles_of_t(stats, probability, freedom, known):
    assert stats.t_quantile(probability, freedom) == pytest.approx(known, abs=5e-5)


@pytest.mark.parametrize("freedom", range(1, 12))
def test_t_is_the_integral_of_its_density(stats, freedom):
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    t, step = np.linspace(0, 1.7, 20_001, retstep=True)
    density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    area = 0.5 + step * (density.sum() - density[[0, -1]].mean())
    assert stats.t_probability(1.7, freedom) == pytest.approx(area, abs=1e-8)
    assert stats.t_probability(-1.7, freedom) == pytest.approx(1 - area, abs=1e-8)


def test_intervals_cover_as_often_as_they_say(stats):
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for values in rng.normal(1.0, 0.3, (4000, 6)):
        *seeds, new = values.tolist()
        mean = stats.mean_interval(seeds)
        other = stats.prediction_interval(seeds)
        hits += [mean.low < 1.0 < mean.high, other.low < new < other.high]
    # Three standard errors of a share of 4000.
    assert hits / 4000 == pytest.approx([0.95, 0.99], abs=0.011)


def test_the_verdict_is_the_intervals(stats):
    def says(low, high):
        return stats.verdict(stats.Interval((low + high) / 2, low, high, 10))

    assert says(0.001, 0.003) == "holds"
    assert says(0.0, 0.2) == "unclear"  # as good as excluded is not excluded
    assert says(-0.02, 0.0099) == "does not"
    assert says(-0.02, 0.01) == "unclear"
    alone = stats.mean_interval([0.5])
    assert stats.verdict(alone) == "unclear" and str(alone) == "+.500"
    margin = stats.Interval(0.0, -0.3, 0.3, 10)
    assert stats.verdict(margin, margin=1.0) == "does not"


def result(method, phase, seed, rate, score, test=0.0):
    curve = {
        "0": {"validation/avg@16": 0.1, "test": 0.0},
        "5": {"validation/avg@16": 0.5, "test": 0.7},
        "10": {"validation/avg@16": score, "test": test},
    }
    keys = ("method", "phase", "seed", "learning_rate")
    row = dict(zip(keys, (method, phase, seed, rate), strict=True))
    return {**row, "curve": curve, "series": {}, "time/seconds": 1.0}


@pytest.fixture
def study(runs):
    size = runs.Size(10, (), {}, (1e-3, 2e-3), (7, 8), (0, 1))
    arms = {
        "a": runs.Arm("a"),
        "b": runs.Arm("b"),
        "a's": runs.Arm("b", (), "a", lambda row: ()),
    }
    number = lambda row: runs.last(row, "test")  # noqa: E731
    claims = (runs.Claim("b above a", "1", "b", "a", number),)
    return runs.Study("s", "d", arms, {"default": size}, (), claims, {"last": number})


def test_all_are_tuned_alike_and_then_paired(runs, study):
    size, methods = study.sizes["default"], list(study.arms)
    jobs = list(runs.left(study, size, [], methods))
    assert len(jobs) == len(set(jobs)) == 2 * 2 * 2
    assert {job.phase for job in jobs} == {"tune"}
    scores = {("a", 1e-3): 0.5, ("a", 2e-3): 0.6, ("b", 1e-3): 0.6, ("b", 2e-3): 0.6}
    rows = [
        result(j.method, "tune", j.seed, j.rate, scores[j.method, j.rate]) for j in jobs
    ]
    assert next(runs.left(study, size, rows[:-1], methods)) == jobs[-1]
    # Equal scores: the smaller rate; what comes after a method has its rate.
    rates = {"a": 2e-3, "b": 1e-3, "a's": 2e-3}
    wanted = [runs.Job(m, "final", seed, rates[m]) for seed in (0, 1) for m in methods]
    assert list(runs.left(study, size, rows, methods)) == wanted
    rows.append(result("a", "final", 0, 2e-3, 0.6))
    assert list(runs.left(study, size, rows, methods)) == wanted[1:]
    assert {job.method for job in runs.left(study, size, rows, ["b"])} == {"b"}


def test_estimates_are_of_pairs_at_the_last_step(experiments, runs, study):
    page = experiments("page")
    (claim,) = study.claims
    rows = [result("a", "final", s, 1e-3, 0.4, 0.1 * s) for s in (0, 1, 2)]
    assert page.estimate(claim, rows) is None
    rows += [result("b", "final", s, 1e-3, 0.4, 0.1 * s + 0.05) for s in (0, 2, 5)]
    rows += [result("b", "tune", 1, 1e-3, 0.4, 0.9)]
    found = page.estimate(claim, rows)
    assert found.seeds == 2 and found.mean == pytest.approx(0.05)
    assert runs.best(rows[0], "test") == 0.7


def test_rows_are_compared_without_times(runs):
    one, other = (result("a", "final", 0, 1e-3, s) for s in (0.5, 0.6))
    assert runs.differences(one, {**one, "time/seconds": 9.0}) == []
    assert runs.differences(one, other) == ["curve"]
    assert runs.differences(one, {**one, "new": 1}) == ["new"]


def test_the_page_says_what_was_not_run(experiments, monkeypatch, tmp_path):
    page, runs = experiments("page"), experiments("_runs")
    monkeypatch.setattr(runs, "EVIDENCE", tmp_path)
    lines = page.claims_table().splitlines()
    assert len(lines) == 2 + sum(len(study.claims) for study in page.STUDIES)
    assert all("| not run |" in line for line in lines[2:])


def test_every_arm_is_a_config(experiments, runs):
    """All overrides of all studies name what exists."""
    from jaxrl_post.training.config import load_config
    from jaxrl_post.training.stages import make_stages

    sys.path.insert(0, str(ROOT))
    for study in experiments("page").STUDIES:
        for size in study.sizes.values():
            for arm in study.arms.values():
                told = runs.settings(arm, size, seed=3, rate=1e-3)
                told += arm.derived(row_of_every_step(size)) if arm.after else ()
                config = load_config(ROOT / "configs" / f"{arm.config}.yaml", told)
                stages = make_stages(config)
                assert stages[-1].last == size.steps
                assert config.run.seed == 3
                assert (
                    stages[-1].config.training.evaluate_every
                    == size.steps // size.evaluations
                )
    sys.path.remove(str(ROOT))


def row_of_every_step(size):
    series = {"information/multiplier": [1.1] * size.steps}
    return {"series": series, "learning_rate": 1e-3, "seed": 0}


def test_replayed_multipliers_are_those_given(experiments):
    recipe = experiments("controls").replayed(multipliers=[0.5, 2.0, 3.0])
    transform = recipe.information.transform()
    params = jnp.ones(2)
    state, seen = transform.init(params), []
    for gain in (0.3, -9.0, 7.0, 0.0):
        updates, state = jax.jit(transform.update)(
            params, state, information=jnp.asarray(gain)
        )
        seen.append(float(updates[0]))
        assert float(state[0].multiplier) == pytest.approx(seen[-1])
    assert seen == pytest.approx([0.5, 2.0, 3.0, 3.0])
    plain = scale_by_information(1.0).init(params)
    assert jax.tree.structure(plain) == jax.tree.structure(state[0])


def test_misled_samples_are_shown_wrong_answers(experiments):
    from jaxrl_post.types import Prompts, Verdict

    right = [1, 1, 0, 0, 0]
    verdicts = tuple(Verdict(float(r), success=bool(r)) for r in right)
    texts = ("r0", "r1", "w2", "w3", "w4")
    shape = (1, len(right))
    fields = {
        "prompts": Prompts(
            ids=("q",),
            messages=(({"role": "user", "content": "?"},),),
            demonstrations=(None,),
            columns=({},),
        ),
        "contexts": np.ones((1, 1), np.int32),
        "context_mask": np.ones((1, 1), bool),
        "tokens": np.ones((*shape, 1), np.int32),
        "mask": np.ones((*shape, 1), bool),
        "sampler_logps": np.zeros((*shape, 1), np.float32),
        "stopped": np.ones(shape, bool),
        "rewards": np.asarray([right], np.float32),
        "judged": np.ones(shape, bool),
    }
    groups = Groups(completions=(texts,), verdicts=(verdicts,), **fields)
    for share, allowed in ((0.0, {"r0", "r1"}), (1.0, {"w2", "w3", "w4"})):
        reprompt = experiments("controls").misled(share=share).reprompt
        rng = np.random.default_rng(0)
        shown = {x.demonstration for x in reprompt.choose(groups, rng)[0]}
        assert shown <= allowed and shown


def test_the_brake_holds_back_what_exceeds_the_first_entropies(experiments):
    recipe = experiments("controls").braked(window=2)
    transform = recipe.information.transform()
    params, seen = jnp.ones(2), []
    state = transform.init(params)
    for entropy in (0.1, 0.3, 0.4, 0.1, 0.2):
        updates, state = jax.jit(transform.update)(
            params, state, information=jnp.asarray(-entropy)
        )
        seen.append(float(updates[0]))
    assert seen == pytest.approx([1.0, 1.0, 0.5, 1.0, 1.0])
