"""HAPO, LUFFY, SRFT and SFT through the update step, against float64 by hand.

The model gives log-probs and entropies of whole logits; loss and derivative of every
token are written down here from the papers' equations, and pulled back through it.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import GROUP_SIZE, GROUPS, PARAMS, POLICY, TIME, WIDTH, make_batch

from jaxrl_post import recipes
from jaxrl_post.errors import InputError
from jaxrl_post.recipes import Injection, PrefixSchedule
from jaxrl_post.recipes.mixed import PRESETS
from jaxrl_post.training.forward import predicting_states
from jaxrl_post.training.state import init_state
from jaxrl_post.training.update import make_update_step
from jaxrl_post.transforms import scale_by_information

ROWS = GROUPS * GROUP_SIZE
SGD = optax.sgd(1.0)


def whole_logits(params, contexts, context_mask, index, batch):
    states = predicting_states(
        POLICY, params, contexts, context_mask, index, batch.responses, batch.token_mask
    )
    logps = jax.nn.log_softmax(states @ POLICY.unembedding(params)[:19].T)
    sampled = jnp.take_along_axis(logps, batch.responses[..., None], -1)[..., 0]
    return sampled, -jnp.sum(jnp.exp(logps) * logps, -1)


@pytest.fixture(scope="module")
def case():
    """A batch with a demonstration, a mixed sequence and a filler row; its numbers."""
    rng = np.random.default_rng(5)
    batch = make_batch(3)
    lengths = np.array([6, 1, 4, 6, 3, 5, 2, 6])
    mask = np.arange(TIME) < lengths[:, None]
    is_teacher = np.zeros((ROWS, TIME), bool)
    is_teacher[1] = is_teacher[2] = True  # whole demonstrations
    is_teacher[5, :2] = True  # the first two tokens, the policy goes on
    real = np.arange(ROWS) < ROWS - 1
    batch = batch.replace(
        token_mask=mask,
        loss_mask=mask & (np.arange(ROWS) != 4)[:, None],  # row 4 was not judged
        sequence_mask=real,
        is_teacher=is_teacher,
        extras={"confidence": rng.uniform(0.1, 0.9, ROWS).astype(np.float32)},
    )
    behind = (batch.contexts, batch.context_mask, None, batch)
    (logps, entropy), pull = jax.vjp(
        jax.jit(lambda p: whole_logits(p, *behind)), PARAMS
    )
    logps, entropy = (np.asarray(x, np.float64) for x in (logps, entropy))
    # Ratios on both sides of both clips.
    old = logps + rng.choice([-0.5, -0.1, 0.1, 0.5], logps.shape)
    trained = batch.loss_mask & real[:, None]
    return SimpleNamespace(
        batch=batch.replace(
            old_logps=old.astype(np.float32),
            sampler_logps=(old + rng.normal(0, 0.3, old.shape)).astype(np.float32),
        ),
        pull=pull,
        p=np.exp(logps),
        logps=logps,
        h=entropy,
        ratio=np.exp(logps - old.astype(np.float32)),
        advantage=np.asarray(batch.advantages, np.float64)[:, None] + 0 * logps,
        doubt=1 - np.asarray(batch.extras["confidence"], np.float64)[:, None],
        own=trained & ~is_teacher,
        given=trained & is_teacher,
        trained=trained,
    )


def surrogate(case, clip=0.2):
    """``-CLIP(r, A, eps)`` and its derivative by the log-prob; clip None: ``-A r``."""
    a, r = case.advantage, case.ratio
    if clip is None:
        return -a * r, -a * r
    clipped = np.clip(r, 1 - clip, 1 + clip)
    free = np.where(a >= 0, r <= 1 + clip, r >= 1 - clip)
    return -np.minimum(a * r, a * clipped), np.where(free, -a * r, 0.0)


def shaped(case, weight=1.0, gamma=0.1):
    """``-w p / (p + gamma)``; the derivative is ``-w gamma p / (p + gamma)^2``."""
    p = case.p
    return -weight * p / (p + gamma), -weight * gamma * p / (p + gamma) ** 2


def likelihood(case, weight=1.0):
    return -weight * case.logps, -weight * np.ones_like(case.logps)


def both(case, own, given):
    """Token losses and derivatives: `own` on own tokens, `given` on the teacher's."""
    return [
        np.where(case.own, a, 0) + np.where(case.given, b, 0)
        for a, b in zip(own, given, strict=True)
    ]


def expected(case, values, slopes, weights, entropy_weight=0.0):
    """The loss and its gradient, from losses per token and their weights."""
    share = case.trained / case.trained.sum()
    loss = (values * weights).sum() - entropy_weight * (case.h * share).sum()
    cotangents = slopes * weights, -entropy_weight * share
    (gradient,) = case.pull(tuple(jnp.asarray(x, jnp.float32) for x in cotangents))
    return loss, gradient


def stepped(recipe, batch, optimizer=SGD, teacher=None, **options):
    state = init_state(
        jax.tree.map(jnp.copy, PARAMS), optimizer, recipe, jax.random.key(0)
    )
    if teacher is not None:
        state = state.replace(teacher=jax.tree.map(jnp.copy, teacher))
    state, metrics = make_update_step(POLICY, recipe, optimizer, **options)(
        state, batch
    )
    return jax.tree.map(lambda a, b: a - b, PARAMS, state.trainable), metrics


def check(case, recipe, loss, gradient, batch=None, **options):
    ours, metrics = stepped(recipe, batch or case.batch, chunk_size=7, **options)
    norm = float(optax.tree.norm(gradient))
    assert norm > 1e-3
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
    chex.assert_trees_all_close(ours, gradient, atol=2e-6 * max(norm, 1))
    return metrics


def token_mean(case):
    return case.trained / case.trained.sum()


@pytest.mark.parametrize("weight", ["unit", "advantage", "doubt"])
def test_hapo_is_one_mean_over_everybodys_tokens(case, weight):
    """Eqs. 8 and 9: CLIP on own tokens, F(p) on the demonstrations'."""
    w = {"unit": 1.0, "advantage": case.advantage, "doubt": case.doubt}[weight]
    per_token = both(case, surrogate(case), shaped(case, w))
    metrics = check(
        case,
        recipes.hapo(teacher_weight=weight),
        *expected(case, *per_token, token_mean(case)),
    )
    share = token_mean(case)
    for name, mask in (("policy_gradient", case.own), ("imitation", case.given)):
        mine = (per_token[0] * share)[mask].sum()
        np.testing.assert_allclose(metrics[f"loss/{name}"], mine, rtol=2e-5)
    np.testing.assert_allclose(
        metrics["demonstration/logp"], case.logps[case.given].mean(), rtol=1e-5
    )
    # Of the policy's own tokens only, like the ratio's metrics.
    np.testing.assert_allclose(metrics["entropy"], case.h[case.own].mean(), rtol=1e-5)
    gap = np.abs(case.batch.old_logps - case.batch.sampler_logps)[case.own].mean()
    np.testing.assert_allclose(metrics["sampler/logp_gap"], gap, rtol=1e-4)


def test_a_mean_over_sequences_counts_all_tokens_of_a_mixed_one(case):
    lengths = case.trained.sum(1, keepdims=True)
    weights = case.trained / np.maximum(lengths, 1) / (lengths > 0).sum()
    per_token = both(case, surrogate(case), shaped(case, gamma=0.3))
    recipe = recipes.hapo(reduction="sequence_mean", gamma=0.3)
    check(case, recipe, *expected(case, *per_token, weights))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_the_policy_did_not_write_has_no_ratio(case, level):
    """Old and sampler's log-probs of demonstrations reach nothing, not even a weight
    of the whole sequence."""
    batch = case.batch
    garbage = np.where(case.own, 0, np.where(np.arange(TIME) % 2, np.nan, -1e30))
    batch = batch.replace(
        old_logps=(batch.old_logps + garbage).astype(np.float32),
        sampler_logps=(batch.sampler_logps - garbage).astype(np.float32),
    )
    gap = np.where(case.own, case.batch.old_logps - case.batch.sampler_logps, 0)
    if level == "sequence":
        gap = gap.sum(1, keepdims=True) + 0 * gap
    correction = np.minimum(np.exp(gap.astype(np.float64)), 1.2)
    own = [correction * x for x in surrogate(case)]
    per_token = both(case, own, shaped(case))
    recipe = recipes.hapo(truncated_importance=1.2, truncated_importance_level=level)
    metrics = check(
        case, recipe, *expected(case, *per_token, token_mean(case)), batch=batch
    )
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_ratio_of_a_mixed_sequence_is_that_of_the_policys_part(case):
    """GSPO's: the geometric mean over own tokens."""
    log_ratio = np.where(case.own, np.log(case.ratio), 0)
    counts = np.maximum(case.own.sum(1, keepdims=True), 1)
    s = np.exp(log_ratio.sum(1, keepdims=True) / counts)
    sequences = replace_fields(case, ratio=s + 0 * case.ratio)
    per_token = both(sequences, surrogate(sequences, 0.2), likelihood(case))
    # d s / d logp_t = s / n: the token form has it once at each of its n tokens.
    recipe = recipes.replace_sft(importance="sequence")
    check(case, recipe, *expected(case, *per_token, token_mean(case)))


def replace_fields(case, **fields):
    return SimpleNamespace(**{**vars(case), **fields})


def test_luffy_has_no_clip_and_weighs_by_the_advantage(case):
    per_token = both(case, surrogate(case, None), shaped(case, case.advantage))
    recipe = recipes.luffy(entropy_weight=0.05)
    check(case, recipe, *expected(case, *per_token, token_mean(case), 0.05))


def test_luffy_with_a_plain_ratio(case):
    ratio = [-case.advantage * case.p] * 2  # of a demonstrator who is always sure
    per_token = both(case, surrogate(case, None), ratio)
    recipe = recipes.luffy(shaping="ratio", entropy_weight=0.0)
    check(case, recipe, *expected(case, *per_token, token_mean(case)))


@pytest.fixture(scope="module")
def padded(case):
    """LUFFY's script: a sum over a padded length of 12, the entropy bonus a mean."""
    per_token = both(case, surrogate(case, None), shaped(case, case.advantage))
    return expected(case, *per_token, case.trained / 12, 0.05)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_sum_over_the_padded_length_in_any_number_of_parts(case, padded, parts):
    recipe = recipes.make(
        "luffy", preset="released", max_length=12, entropy_weight=0.05
    )
    bound = (GROUPS * WIDTH + ROWS * TIME) // parts
    options = {"micro_batch_tokens": bound} if parts > 1 else {}
    metrics = check(case, recipe, *padded, **options)
    np.testing.assert_allclose(
        metrics["demonstration/logp"], case.logps[case.given].mean(), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["entropy"], case.h[case.own].mean(), rtol=1e-5)


def test_hapo_cut_through_its_groups_is_the_same(case):
    per_token = both(case, surrogate(case), shaped(case, case.doubt))
    loss, gradient = expected(case, *per_token, token_mean(case))
    recipe = recipes.hapo(teacher_weight="doubt")
    check(case, recipe, loss, gradient, micro_batch_tokens=WIDTH + TIME)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_srft_is_sure_of_one_and_curious_of_the_other(case, preset):
    """exp(-H) on demonstrations in the paper, exp(+H) in the code; no gradient."""
    sign = {"paper": -1, "released": 1}[preset]
    boost = np.where(case.advantage > 0, 0.1 * np.exp(case.h), 1.0)
    own = [boost * x for x in surrogate(case, None)]
    given = [
        a + b
        for a, b in zip(
            shaped(case, case.advantage),
            likelihood(case, 0.5 * np.exp(sign * case.h)),
            strict=True,
        )
    ]
    recipe = recipes.make("srft", preset=preset, entropy_weight=0.05)
    per_token = both(case, own, given)
    check(case, recipe, *expected(case, *per_token, token_mean(case), 0.05))


def test_replace_sft_is_the_plain_loss_on_demonstrations(case):
    per_token = both(case, surrogate(case), likelihood(case, 0.7))
    recipe = recipes.replace_sft(sft_weight=0.7)
    check(case, recipe, *expected(case, *per_token, token_mean(case)))


def test_sft_is_the_mean_of_all_its_tokens(case):
    batch = case.batch.replace(
        is_teacher=np.ones((ROWS, TIME), bool), old_logps=None, sampler_logps=None
    )
    loss, gradient = expected(case, *likelihood(case), token_mean(case))
    metrics = check(case, recipes.sft(), loss, gradient, batch=batch)
    # There are no other tokens: the entropy is the policy's on the demonstrations.
    np.testing.assert_allclose(
        metrics["entropy"], case.h[case.trained].mean(), rtol=1e-5
    )


def distillable(case):
    rng = np.random.default_rng(6)
    extras = {
        "distilled": np.arange(ROWS) % 4 != 3,
        "distillation_weight": np.ones(ROWS, np.float32),
    }
    return case.batch.replace(
        teacher_contexts=rng.integers(0, 19, (3, 9)).astype(np.int32),
        teacher_context_mask=np.arange(9)[::-1] < np.array([[9], [5], [7]]),
        teacher_index=rng.integers(0, 3, ROWS).astype(np.int32),
        extras={**case.batch.extras, **extras},
    )


def test_pgpo_on_hapo_makes_the_step_and_not_the_loss_larger(case):
    batch, teacher = distillable(case), POLICY.init(jax.random.key(7))
    behind = batch.teacher_contexts, batch.teacher_context_mask, batch.teacher_index
    entropy = np.asarray(whole_logits(teacher, *behind, batch)[1], np.float64)
    mask = case.own & batch.extras["distilled"][:, None]
    some = mask.any(1)
    gains = np.where(mask, case.h - entropy, 0).sum(1)[some] / mask.sum(1)[some]
    rho = min(np.exp(4.0 * gains.mean()), 2.0)
    assert abs(rho - 1) > 1e-2

    recipe = recipes.make("hapo", information={"sensitivity": 4.0})
    chained = optax.chain(SGD, scale_by_information(4.0))
    per_token = both(case, surrogate(case), shaped(case))
    loss, gradient = expected(case, *per_token, token_mean(case))
    scaled = jax.tree.map(lambda x: rho * x, gradient)
    options = {"batch": batch, "optimizer": chained, "teacher": teacher}
    metrics = check(case, recipe, loss, scaled, **options)
    np.testing.assert_allclose(
        metrics["information/gain"], gains.mean(), rtol=1e-4, atol=1e-6
    )


def test_behind_a_gate_sdpo_distils_no_demonstration(case):
    """Whichever tokens a demonstration has, the update is the same to the bit."""
    recipe = recipes.make("sdpo", top_k=5, injection={"threshold": 0.5})
    batch = distillable(case)
    rows = (batch.is_teacher & batch.loss_mask).all(1, where=batch.loss_mask)
    assert rows.sum() >= 2
    other = np.where(rows[:, None], (batch.responses + 3) % 19, batch.responses)
    teacher = POLICY.init(jax.random.key(7))
    state = [
        stepped(recipe, b, teacher=teacher)[0]
        for b in (batch, batch.replace(responses=other))
    ]
    assert float(optax.tree.norm(state[0])) > 1e-4
    chex.assert_trees_all_equal(*state)


# Arguments, presets and layers.


@pytest.mark.parametrize(
    ("name", "preset"), [(n, p) for n, presets in PRESETS.items() for p in presets]
)
def test_presets_resolve(name, preset):
    arguments = PRESETS[name][preset]
    length = {"max_length": 32} if "padded_length" in arguments.values() else {}
    recipe = recipes.make(name, preset=preset, **length)
    assert recipe.name == name and recipe.demonstrations and recipe.rollouts
    if length:
        with pytest.raises(InputError, match="max_length"):
            recipes.make(name, preset=preset)


def test_presets_are_what_was_released_and_what_was_written():
    """The advantages of one success in eight, of each."""
    rewards = np.array([[1.0] + 7 * [0.0]])
    centred = np.array([[7 / 8] + 7 * [-1 / 8]])
    for name, preset, std in (
        ("luffy", "released", 1.0),
        ("luffy", "paper", np.sqrt(7) / 8),
        ("srft", "paper", 1.0),
        ("hapo", "luffy_script", 1.0),
        ("hapo", "paper", np.sqrt(7) / 8),
    ):
        recipe = recipes.make(name, preset=preset, max_length=32)
        advantages = recipe.advantages(rewards)
        np.testing.assert_allclose(advantages, centred / std, rtol=1e-4, err_msg=name)
        names = [term.name for term in recipe.terms]
        assert ("entropy_bonus" in names) == ((name, preset) != ("hapo", "paper"))


def test_a_preset_gives_way_to_arguments():
    recipe = recipes.make("luffy", preset="paper", entropy_weight=0.0, clip_high=0.28)
    assert [term.name for term in recipe.terms] == ["policy_gradient", "imitation"]


def injections(recipe):
    return [t for t in recipe.group_transforms if isinstance(t, Injection)]


@pytest.mark.parametrize("name", ["grpo", "sdpo", "pgpo", "hapo", "luffy", "srft"])
def test_any_recipe_goes_behind_one_gate(name):
    fields = {"threshold": {"kind": "annealed", "start": 0.6}, "gate": "thompson"}
    recipe = recipes.make(name, injection=fields)
    (injection,) = injections(recipe)  # a second one would count the first's success
    assert injection == Injection(**fields) and recipe.demonstrations
    assert recipe.group_transforms[0] is injection
    assert "worst rollout, where p ~ posterior < gamma, annealed" in str(recipe)


@pytest.mark.parametrize("name", ["grpo", "hapo", "luffy", "replace_sft"])
def test_any_recipe_gets_pgpos_steps(name):
    recipe = recipes.make(
        name,
        injection={"threshold": 0.5},
        information={"sensitivity": 0.5, "teacher": {"kind": "live"}},
    )
    assert recipe.information.sensitivity == 0.5 and recipe.teacher.kind == "live"
    assert recipe.needs == {"teacher"} and recipe.reprompt is not None
    assert len(injections(recipe)) == 1


def test_a_recipe_without_rollouts_has_no_gate():
    with pytest.raises(InputError, match="recipe.injection: .*'sft' samples no roll"):
        recipes.make("sft", injection={"threshold": 0.3})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hapo", {"treshold": 0.8}, "recipe.treshold: did you mean 'threshold'"),
        ("hapo", {"threshold": 1.2}, "threshold.start=1.2"),
        ("hapo", {"threshold": {"kind": "anealed"}}, "threshold.kind='anealed'"),
        (
            "hapo",
            {"gate": "median"},
            "recipe.gate='median': expected 'mean' or 'thompson'",
        ),
        ("hapo", {"tie": "last"}, "tie='last'"),
        ("hapo", {"teacher_weight": "one"}, "teacher_weight='one'"),
        ("hapo", {"posterior_discount": 1.5}, "posterior_discount is 1.5"),
        ("hapo", {"reduction": "constant"}, "max_length"),
        ("luffy", {"shaping": "square"}, "shaping='square'"),
        ("luffy", {"prefix": {"lowest": 0.9, "highest": 0.1}}, "lowest=0.9"),
        ("luffy", {"prefix": {"lowset": 0.9}}, "lowset"),
        ("srft", {"entropy_sign": 0.5}, "entropy_sign=0.5"),
        ("srft", {"prefix": {}}, "prefix"),
        ("luffy", {"preset": "relased"}, "recipe.preset='relased': did you mean"),
        ("sft", {"redaction": 1}, "recipe.redaction: did you mean 'reduction'"),
        ("sdpo", {"injection": {"treshold": 1}}, "recipe.injection: .*treshold"),
        ("sdpo", {"injection": 0.5}, "recipe.injection=0.5: expected a mapping"),
        ("grpo", {"information": {"alhpa": 1}}, "recipe.information: .*alhpa"),
        (
            "grpo",
            {"information": {"teacher": {"kidn": "ema"}}},
            "recipe.information: .*kidn",
        ),
    ],
)
def test_wrong_fields_are_one_error_with_their_name(name, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        recipes.make(name, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "lines"),
    [
        (
            recipes.hapo(gate="thompson", prefix={"lowest": 0.5}, entropy_weight=0.1),
            [
                "hapo",
                "  1 x policy_gradient (token_mean)",
                "  1 x imitation (token_mean)",
                "  0.1 x entropy_bonus (token_mean)",
                "  groups: the demonstration in place of the worst rollout, "
                "where p ~ posterior < 0.8",
                "  demonstrations: first 50% to 100%, at random, continued by the "
                "policy",
            ],
        ),
        (
            recipes.luffy(reduction="padded_length", max_length=8, kl_weight=0.2),
            [
                "luffy",
                "  1 x policy_gradient (constant)",
                "  1 x imitation (constant)",
                "  0.2 x kl (constant, reads reference)",
                "  0.001 x entropy_bonus (token_mean)",
                "  groups: the demonstration in place of the last rollout",
            ],
        ),
    ],
)
def test_printing(recipe, lines):
    assert str(recipe).splitlines() == lines


# Prefixes.


def test_prefix_shares():
    rng = np.random.default_rng(0)
    shares = PrefixSchedule(0.3, 0.7).shares(4000, 0.9, rng)
    assert 0.3 <= shares.min() < 0.31 and 0.69 < shares.max() < 0.7
    assert abs(shares.mean() - 0.5) < 0.01  # 5 standard errors are 0.0091
    linear = PrefixSchedule(0.2, 1.0, "linear")
    for progress, share in ((0.0, 1.0), (0.25, 0.8), (0.5, 0.6), (1.0, 0.2)):
        np.testing.assert_allclose(linear.shares(3, progress, rng), share, rtol=1e-12)
    assert PrefixSchedule().shares(2, 0.5, rng).tolist() == [1.0, 1.0]
    assert str(replace(linear, lowest=1.0)) == "first 100%"
    assert str(linear) == "first 100%, falling to 20%"
    with pytest.raises(ValueError, match="kind='fixed'"):
        PrefixSchedule(kind="fixed")
