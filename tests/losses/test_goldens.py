"""Our losses against numbers that were not made by them.

Two sources: `tests/goldens/losses.json`, a float64 NumPy derivation with
complex-step gradients (scripts/make_goldens.py), and a table of ten printed digits
computed elsewhere, each row also obtained from the authors' or verl's own functions.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses

ROOT = Path(__file__).parents[2]
GOLDENS = json.loads((ROOT / "tests" / "goldens" / "losses.json").read_text())["cases"]

# Loss, Frobenius norm of the gradient w.r.t. the student's logits, and the gradient's
# entries [0, 0, 0] and [2, 1, 3]. Outside oracle, float64; printed to 10 decimals.
PRINTED = {
    "full a=0.0 token": (0.2653957491, 0.1298469600, -0.0296088213, -0.0084540304),
    "full a=0.5 token": (0.0592096733, 0.0282783256, -0.0093454494, -0.0020090244),
    "full a=1.0 token": (0.2436104931, 0.1194027781, -0.0463742204, -0.0079965628),
    "top2+tail a=0.5 token": (
        0.0320775578,
        0.0268070574,
        -0.0069990836,
        -0.0012486075,
    ),
    "sampled a=1 token": (0.6739509708, 0.2856910948, -0.0328091781, 0.0008414457),
    "full a=.5 isclip1.5 token": (
        0.0672048142,
        0.0321697166,
        -0.0093454494,
        -0.0009425623,
    ),
    "full a=.5 seqall": (0.0373103699, 0.0201713850, -0.0046727247, -0.0020090244),
    "full a=.5 token all-masked": (0.0, 0.0, 0.0, 0.0),
    "top6(K=V) renorm a=.5 == full": (
        0.0592096733,
        0.0282783256,
        -0.0093454494,
        -0.0020090244,
    ),
    "ppo .2/.28 c3 token-mean": (
        -0.2007790033,
        0.1935123935,
        0.0271366899,
        0.0010879251,
    ),
    "ppo seq-mean": (-0.1277010110, 0.1790765462, 0.0203525174, 0.0016318876),
    "gspo .3/.4 token form": (-0.2448717758, 0.1914223763, 0.0197168671, 0.0037538702),
    "gspo .3/.4 sequence form": (
        -0.2448717758,
        0.1914223763,
        0.0197168671,
        0.0037538702,
    ),
    "cispo(verl 2-sided) token": (
        0.6441222562,
        0.2410546613,
        0.0271366899,
        0.0018550863,
    ),
    "luffy noclip token-mean": (0.0961084689, 0.2282076824, 0.0014128863, 0.0014505668),
}


class Inputs:
    """The inputs of the table, made once more, as jax arrays of any dtype."""

    def __init__(self, dtype):
        b, t, v = jnp.meshgrid(
            jnp.arange(3.0), jnp.arange(4.0), jnp.arange(6.0), indexing="ij"
        )
        self.student = (1.5 * jnp.sin(0.7 * (1 + b) + 1.3 * t + 0.9 * v)).astype(dtype)
        self.teacher = (1.5 * jnp.cos(0.4 * b + 0.8 * t + 1.1 * v)).astype(dtype)
        b, t = b[..., 0], t[..., 0]
        self.tokens = ((2 * b + 3 * t + 1) % 6).astype(jnp.int32)
        self.mask = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], bool)
        self.samples = jnp.array([1, 0, 1], bool)
        self.distilled = self.mask & self.samples[:, None]
        self.old = self.logps(self.student) - jnp.sin(b + 2 * t).astype(dtype)
        self.sampler = self.old - (0.9 * jnp.cos(b + t)).astype(dtype)
        self.advantages = jnp.array([1.0, -0.5, 0.25])
        self.luffy_advantages = (jnp.array([1.0, 0.0, 1.0]) - 2 / 3)[:, None]
        self.is_teacher = jnp.array([True, False, False])[:, None]

    def logps(self, z):
        logps = jax.nn.log_softmax(z)
        return jnp.take_along_axis(logps, self.tokens[..., None], -1)[..., 0]


def distill(mask="distilled", mode="token_mean", **options):
    def loss(x, z):
        value = losses.self_distillation(z, x.teacher, **options)
        return losses.reduce(value, getattr(x, mask), mode=mode)

    return loss


def on_logps(function, mode="token_mean"):
    return lambda x, z: losses.reduce(function(x, x.logps(z)), x.mask, mode=mode)


def ppo(x, logps, dual_clip=3.0):
    return losses.clipped_policy_gradient(
        logps, x.old, x.advantages, clip_high=0.28, dual_clip=dual_clip
    )


def corrected_ppo(level):
    def loss(x, logps):
        weights = losses.truncated_importance_weights(
            x.old, x.sampler, x.mask, level=level
        )
        return ppo(x, logps) * weights

    return on_logps(loss)


def gspo(x, logps):
    return losses.sequence_policy_gradient(
        logps, x.old, x.advantages, x.mask, clip_low=0.3, clip_high=0.4
    )


def cispo(**options):
    return on_logps(
        lambda x, logps: losses.clipped_importance_policy_gradient(
            logps, x.old, x.advantages, **options
        )
    )


def luffy(x, logps):
    own = losses.clipped_policy_gradient(
        logps, x.old, x.luffy_advantages[:, 0], clip_low=None, clip_high=None
    )
    imitated = losses.shaped_imitation(logps, gamma=0.1) * x.luffy_advantages
    return jnp.where(x.is_teacher, imitated, own)


def clipped_distillation(x, z):
    value = losses.self_distillation(z, x.teacher, alpha=0.5)
    factor = losses.importance_clip(x.logps(z), x.old, clip=1.5)
    return losses.reduce(value * factor, x.distilled)


def sampled(x, z):
    value = losses.sampled_token_distillation(x.logps(z), x.logps(x.teacher))
    return losses.reduce(value, x.distilled)


def k(estimator):
    return on_logps(
        lambda x, logps: losses.reference_kl(logps, x.old, estimator=estimator)
    )


CASES = {
    "full a=0.0 token": distill(alpha=0.0),
    "full a=0.3 token": distill(alpha=0.3),
    "full a=0.5 token": distill(alpha=0.5),
    "full a=1.0 token": distill(alpha=1.0),
    "top2+tail a=0.5 token": distill(alpha=0.5, top_k=2),
    "top2+tail a=0.0 token": distill(alpha=0.0, top_k=2),
    "top2+tail a=1.0 token": distill(alpha=1.0, top_k=2),
    "top3 renorm a=0.5 token": distill(alpha=0.5, top_k=3, tail=False),
    "teacher top3+tail a=0.5 token": distill(alpha=0.5, top_k=3, support="teacher"),
    "teacher top3 renorm a=1.0 token": distill(
        alpha=1.0, top_k=3, tail=False, support="teacher"
    ),
    "top6+tail a=0.5 token": distill(alpha=0.5, top_k=6),
    "sampled a=1 token": sampled,
    "full a=.5 isclip1.5 token": clipped_distillation,
    "full a=.5 seqall": distill(alpha=0.5, mode="sequence_mean_over_all"),
    "full a=.5 token all-masked": lambda x, z: losses.reduce(
        losses.self_distillation(z, x.teacher), jnp.zeros_like(x.mask)
    ),
    "top6(K=V) renorm a=.5 == full": distill(alpha=0.5, top_k=6, tail=False),
    "ppo .2/.28 c3 token-mean": on_logps(ppo),
    "ppo seq-mean": on_logps(ppo, "sequence_mean"),
    "ppo seq-sum-mean": on_logps(ppo, "sequence_sum_mean"),
    "ppo dual clip 1.2 token-mean": on_logps(lambda x, logps: ppo(x, logps, 1.2)),
    "ppo tis token": corrected_ppo("token"),
    "ppo tis sequence": corrected_ppo("sequence"),
    "gspo .3/.4 token form": on_logps(gspo, "sequence_mean"),
    # The sequence form is an identity to test, not a second function of ours.
    "gspo .3/.4 sequence form": on_logps(gspo, "sequence_mean"),
    "cispo(verl 2-sided) token": cispo(clip_low=0.2, clip_high=0.28),
    "cispo(trl cap 2) token": cispo(absolute_cap=2.0),
    "luffy noclip token-mean": on_logps(luffy),
    "k1 token": k("k1"),
    "k2 token": k("k2"),
    "k3 token": k("k3"),
    "entropy token": lambda x, z: losses.reduce(losses.entropy(z), x.mask),
    "nll token": on_logps(lambda x, logps: losses.negative_log_likelihood(logps)),
}


def evaluate(dtype, names):
    """Loss and gradient of all the cases, as one program: compiling is what costs."""
    inputs = Inputs(dtype)

    def each(z):
        return {
            name: jax.value_and_grad(lambda z, f=CASES[name]: f(inputs, z).mean())(z)
            for name in names
        }

    return jax.jit(each)(inputs.student)


@pytest.fixture(scope="module")
def computed():
    with jax.enable_x64(True):
        return evaluate(jnp.float64, CASES)


@pytest.mark.parametrize("name", CASES)
def test_float64_equals_the_derivation(computed, name):
    loss, gradient = computed[name]
    assert loss.dtype == gradient.dtype == jnp.float64
    np.testing.assert_allclose(loss, GOLDENS[name]["loss"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradient, GOLDENS[name]["gradient"], rtol=0, atol=1e-12)
    if name in PRINTED:
        gradient = np.asarray(gradient)
        shown = (loss, np.linalg.norm(gradient), gradient[0, 0, 0], gradient[2, 1, 3])
        np.testing.assert_allclose(shown, PRINTED[name], rtol=0, atol=5.1e-11)


def test_float32_agrees_to_its_rounding():
    names = ["top2+tail a=0.5 token", "gspo .3/.4 token form"]
    for name, (loss, gradient) in evaluate(jnp.float32, names).items():
        np.testing.assert_allclose(loss, GOLDENS[name]["loss"], atol=1e-6)
        np.testing.assert_allclose(gradient, GOLDENS[name]["gradient"], atol=1e-6)


def test_every_golden_is_used_and_every_printed_row_exists():
    assert set(CASES) == set(GOLDENS)
    assert set(PRINTED) <= set(GOLDENS)


def test_the_committed_file_is_what_the_script_computes():
    script = runpy.run_path(str(ROOT / "scripts" / "make_goldens.py"))
    for name, fresh in script["compute"]().items():
        np.testing.assert_allclose(fresh["loss"], GOLDENS[name]["loss"], atol=1e-13)
        np.testing.assert_allclose(
            fresh["gradient"], GOLDENS[name]["gradient"], atol=1e-13
        )
