"""Frequencies of rotations: against transformers' functions, and in closed form."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import GOLDENS

from jaxrl_post import models
from jaxrl_post.models.kinds import layer_kinds, rotations
from jaxrl_post.models.layers import cos_sin_of, rotate
from jaxrl_post.models.rope import frequencies
from jaxrl_post.models.stack import decoder

CASES = json.loads((GOLDENS / "rope.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_as_transformers_has_them(name):
    case = CASES[name]
    rope = case["rope"]
    found, factor = frequencies(
        int(8 * rope.get("partial_rotary_factor", 1)),
        rope["rope_theta"],
        rope,
        case["max_positions"],
        case["extended_positions"],
    )
    np.testing.assert_allclose(found, case["frequencies"], rtol=1e-5)
    assert factor == pytest.approx(case["factor"], rel=1e-6)


def test_dynamic_is_plain_up_to_its_positions():
    plain = frequencies(8, 1e4, {}, 64)
    dynamic = frequencies(8, 1e4, {"rope_type": "dynamic", "factor": 4.0}, 64)
    np.testing.assert_array_equal(plain[0], dynamic[0])


def config(**changes):
    return models.DecoderConfig(8, 4, 4, 3, 1, 1, 8, **changes)


def test_layers_without_rotation_leave_queries_as_they_are():
    ours = config(unrotated_layers=(1,), rope_theta=100.0)
    ways = rotations(ours)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 1, 8)), jnp.float32)
    cos_sin = cos_sin_of(ways, jnp.arange(3)[None])
    turned = [rotate(x, cos_sin, which) for which in layer_kinds(ours).rotation]
    np.testing.assert_array_equal(turned[1], x)
    np.testing.assert_array_equal(turned[0], turned[2])
    assert np.abs(turned[0] - x)[:, 1:].max() > 0.1


def test_part_of_a_head_is_rotated():
    cos_sin = cos_sin_of(rotations(config(partial_rotary=0.5)), jnp.array([[0, 9]]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 1, 8)), jnp.float32)
    out = rotate(x, cos_sin)
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    angles = 9 * 1e4 ** -(np.arange(2) / 2)
    turned = (x[0, 1, 0, :2] + 1j * x[0, 1, 0, 2:4]) * np.exp(1j * angles)
    np.testing.assert_allclose(out[0, 1, 0, :2], turned.real, atol=1e-5)
    np.testing.assert_allclose(out[0, 1, 0, 2:4], turned.imag, atol=1e-5)


def test_local_layers_have_their_own_base():
    ours = config(
        local_rope_theta=100.0,
        rope_scaling=(("rope_type", "linear"), ("factor", 2.0)),
        window=4,
        local_layers=(0, 2),
    )
    window, of_layers = layer_kinds(ours).window, layer_kinds(ours).rotation
    found = rotations(ours).frequencies[of_layers]
    plain = 100.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(found[[0, 2]], [plain, plain], rtol=1e-6)
    scaled = 1e4 ** -(np.arange(4) / 4) / 2
    np.testing.assert_allclose(found[1], scaled, rtol=1e-6)
    assert window.tolist()[::2] == [4, 4] and window[1] > 1e9


def test_angles_are_computed_once_for_all_layers():
    policy = decoder(config())
    params = jax.eval_shape(policy.init, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    steps = jax.make_jaxpr(policy.hidden)(params, ids, ids, ids).jaxpr.eqns
    (layers,) = (step for step in steps if step.primitive.name == "scan")
    assert [step.primitive.name for step in steps].count("cos") == 1
    assert " cos " not in str(layers.params["jaxpr"])
    assert layer_kinds(config()).rotation is None


def test_longrope_uses_the_long_set_beyond_its_original_length():
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0, 2.0],
        "long_factor": [3.0, 4.0],
        "original_max_position_embeddings": 64,
    }
    short = frequencies(4, 100.0, scaling, 64, 256)
    long = frequencies(4, 100.0, scaling, 256)
    np.testing.assert_allclose(short[0], [1.0, 0.1 / 2], rtol=1e-6)
    np.testing.assert_allclose(long[0], [1 / 3, 0.1 / 4], rtol=1e-6)
    assert short[1] == long[1] == pytest.approx((1 + np.log(4) / np.log(64)) ** 0.5)
