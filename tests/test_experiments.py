"""The experiments: their statistics, the order of their runs, rows and verdicts."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

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


def test_a_new_seed_is_held_against_the_final_rows(
    experiments, runs, study, monkeypatch, tmp_path
):
    new_seed = experiments("new_seed")
    monkeypatch.setattr(runs, "EVIDENCE", tmp_path)
    number = study.claims[0].number
    study = study._replace(headline=1, columns={new_seed.SCORE: number})
    monkeypatch.setattr(new_seed, "STUDIES", (study,))
    assert new_seed.table() == "" and list(new_seed.jobs(study)) == []
    for method in ("a", "b"):
        for seed, test in enumerate((0.4, 0.5, 0.6)):
            runs.append(study.path, result(method, "final", seed, 1e-3, 0.4, test))
    jobs = list(new_seed.jobs(study))
    assert [job.method for job in jobs] == ["b", "a"]
    assert {(job.phase, job.seed, job.rate) for job in jobs} == {("check", 100, 1e-3)}
    # 99 %: .5 ± 9.92 x .1 x sqrt(4 / 3)
    for method, test in (("b", 1.6), ("a", 1.7)):
        runs.append(study.path, result(method, "check", 100, 1e-3, 0.4, test))
    lines = new_seed.table().splitlines()
    assert lines[2] == "| b | 3 | -0.646 to 1.646 | 1.600 | yes |"
    assert lines[3].endswith("| 1.700 | no |")
    assert list(new_seed.jobs(study)) == []
    # It is no final row.
    assert all(len(rows) == 3 for rows in runs.finals(runs.read(study.path)).values())


def test_what_is_cut_short_is_called_incomplete(runs, study):
    assert runs.seeds(study, 2) == "2"
    assert runs.seeds(study, 1) == "1 of 2: incomplete"


@pytest.mark.parametrize(
    "numbers",
    [{"sensitivity": 0.5}, {"min_multiplier": 1.0}, {"max_multiplier": 1.0}],
)
def test_kept_programs_take_the_steps_of_the_config(experiments, numbers):
    """To the bit, and a program made for other numbers does so too."""
    from jaxrl_post.recipes.recipe import Information
    from jaxrl_post.training.config import OptimizerConfig
    from jaxrl_post.training.optimizer import make_optimizer

    make = experiments("_programs")._make_optimizer
    program = jax.jit(make(OptimizerConfig(learning_rate=0.5), 9, Information()).update)
    config = OptimizerConfig(learning_rate=3e-4)
    kept, plain = (f(config, 9, Information(**numbers)) for f in (make, make_optimizer))
    params = jnp.arange(3.0)
    states = [kept.init(params), plain.init(params)]
    for gain in (0.3, -0.2, 1.7):
        grads = gain * jnp.asarray([0.1, 0.2, -0.3])
        both = []
        for number, update in enumerate((program, jax.jit(plain.update))):
            updates, states[number] = update(
                grads, states[number], params, information=jnp.asarray(gain)
            )
            both.append(updates.tolist())
        assert both[0] == both[1]
    with pytest.raises(ValueError, match="constant rate"):
        make(OptimizerConfig(warmup_updates=1), 9)


def test_falls_and_warnings_are_read_off_means(experiments):
    stability = experiments("stability")
    row = {
        "series": {
            "reward/mean": [0.6] * 10 + [0.0] * 10,
            "information/teacher_entropy": [0.1] * 6 + [0.4] * 14,
            "information/gain": [-0.1] + [0.1] * 7 + [-0.2] * 12,
        }
    }
    # Means over six steps: below .3 after four zeros, above .15 with the second .4
    # (.2), below 0 with the third -.2 (-.05).
    assert stability.fall(row) == 14
    assert stability.entropy_warns(row) == 8
    assert stability.gain_warns(row) == 11
    assert stability._lead(row) == 3
    row["series"]["reward/mean"] = [0.6] * 20
    assert math.isinf(stability.fall(row)) and math.isnan(stability._lead(row))


def test_a_verbose_teacher_is_right(experiments):
    task = experiments("controls").verbose("test", levels=(3,), size=2)
    prompts = task.rows(range(len(task)))
    verdicts = task.judge(prompts, list(prompts.demonstrations))
    assert {verdict.reward for verdict in verdicts} == {1.0}
    from jaxrl_post.tasks import science

    plain = science.load("test", levels=(3,), size=2)
    short = plain.rows(range(len(plain))).demonstrations
    assert all(
        len(long) >= len(brief)
        for long, brief in zip(prompts.demonstrations, short, strict=True)
    )
    assert sum(map(len, prompts.demonstrations)) > 1.2 * sum(map(len, short))


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


def test_credit_by_sequence_is_the_mean_of_its_tokens(experiments):
    (term,) = experiments("controls").by_sequence(truncated_importance=None).terms
    logps = np.array([[-1.0, -2.0, 9.0], [-3.0, 7.0, 8.0]])
    teacher = np.array([[-0.5, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    weight = {"distillation_weight": jnp.ones(2)}
    batch = SimpleNamespace(
        loss_mask=mask, old_logps=None, sampler_logps=None, extras=weight
    )
    scores = {"logps": jnp.asarray(logps), "teacher_logps": jnp.asarray(teacher)}

    def total(logps):
        return jnp.where(mask, term.loss({**scores, "logps": logps}, batch), 0).sum()

    credit = jax.grad(total)(scores["logps"])
    np.testing.assert_allclose(credit, mask * np.array([[-0.75], [-2.0]]), atol=1e-6)


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
