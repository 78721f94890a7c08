"""The pass over the vocabulary on one device, against float64 numpy and dense JAX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_post.vocabulary import Logits, logits, map_logits

N, D, V = 11, 6, 13


def draw(*shape: int, seed: int = 0, dtype=np.float64) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def draw_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).integers(0, V, shape)


def log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def basic_scores(z: Logits, ids: jax.Array) -> dict[str, jax.Array]:
    return {
        "logps": z.log_probs(ids),
        "entropy": z.entropy(),
        "logsumexp": z.logsumexp(),
    }


def value_and_gradients(fn, hidden, unembedding, *per_token, cotangents, **options):
    """The result of the pass, and its gradients for given cotangents, jitted."""

    @jax.jit
    def run(hidden, unembedding):
        call = functools.partial(map_logits, fn, **options)
        result, pullback = jax.vjp(
            lambda h, w: call(h, w, *per_token), hidden, unembedding
        )
        ct = jax.tree.map(lambda c, r: jnp.asarray(c, r.dtype), cotangents, result)
        return result, pullback(ct)

    return run(hidden, unembedding)


def numpy_basic(hidden, unembedding, ids, cotangents, *, temperature, softcap, rows):
    """Scores and gradients in float64, derived by hand."""
    raw = hidden @ unembedding.T
    capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
    z = (capped / temperature)[:, :rows]
    logp = log_softmax(z)
    p = np.exp(logp)
    entropy = -(p * logp).sum(-1)
    one_hot = np.eye(rows)[ids]
    scores = {
        "logps": (one_hot * logp).sum(-1),
        "entropy": entropy,
        "logsumexp": np.log(np.exp(z).sum(-1)),
    }
    ct = {name: c[:, None] for name, c in cotangents.items()}
    dz = ct["logps"] * (one_hot - p)
    dz -= ct["entropy"] * p * (logp + entropy[:, None])
    dz += ct["logsumexp"] * p
    draw_ = np.zeros_like(raw)
    slope = 1 if softcap is None else (1 - np.tanh(raw / softcap) ** 2)[:, :rows]
    draw_[:, :rows] = dz * slope / temperature
    return scores, (draw_ @ unembedding, draw_.T @ hidden)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 3e-5), ("float64", 1e-12)])
@pytest.mark.parametrize(
    ("chunk_size", "softcap", "temperature", "rows"),
    [(None, None, 1.0, V), (4, None, 0.7, V), (3, 2.0, 1.3, V - 3), (1, None, 1.0, 1)],
)
def test_scores_and_gradients_match_numpy(
    dtype, rtol, chunk_size, softcap, temperature, rows
):
    hidden, unembedding = draw(N, D), draw(V, D)
    ids = draw_ids(N) % rows
    cotangents = {
        name: draw(N, seed=i)
        for i, name in enumerate(("logps", "entropy", "logsumexp"))
    }
    expected, expected_gradients = numpy_basic(
        hidden,
        unembedding,
        ids,
        cotangents,
        temperature=temperature,
        softcap=softcap,
        rows=rows,
    )
    with jax.enable_x64(dtype == "float64"):
        result, gradients = value_and_gradients(
            basic_scores,
            jnp.asarray(hidden, dtype),
            jnp.asarray(unembedding, dtype),
            jnp.asarray(ids),
            cotangents=cotangents,
            chunk_size=chunk_size,
            softcap=softcap,
            temperature=temperature,
            vocab_size=rows,
        )
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves((result, gradients)))
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=rtol, atol=rtol)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * abs(want).max())
    assert not np.any(gradients[1][rows:])


def divergence_scores(student: Logits, teacher: Logits) -> dict[str, jax.Array]:
    """What distillation asks for, in one pass."""
    values, ids = student.top_k(4)
    half = np.log(0.5)
    middle = jnp.logaddexp(student.log_softmax() + half, teacher.log_softmax() + half)
    return {
        "forward": teacher.expectation(lambda logps: logps - student.log_softmax()),
        "reverse": student.expectation(lambda logps: logps - teacher.log_softmax()),
        "jensen_shannon": 0.5 * student.expectation(lambda logps: logps - middle)
        + 0.5 * teacher.expectation(lambda logps: logps - middle),
        "student_top": values - student.logsumexp()[:, None],
        "teacher_top": teacher.log_probs(ids),
        "mean_logit": student.sum(student.values),
        "ids": ids.astype(jnp.float32),
    }


def dense_divergence_scores(hiddens, unembeddings, rows):
    z, y = ((h @ w.T)[:, :rows] for h, w in zip(hiddens, unembeddings, strict=True))
    s, t = jax.nn.log_softmax(z), jax.nn.log_softmax(y)
    m = jnp.log(0.5 * jnp.exp(s) + 0.5 * jnp.exp(t))
    top, ids = jax.lax.top_k(s, 4)
    return {
        "forward": (jnp.exp(t) * (t - s)).sum(-1),
        "reverse": (jnp.exp(s) * (s - t)).sum(-1),
        "jensen_shannon": 0.5 * (jnp.exp(s) * (s - m)).sum(-1)
        + 0.5 * (jnp.exp(t) * (t - m)).sum(-1),
        "student_top": top,
        "teacher_top": jnp.take_along_axis(t, ids, axis=-1),
        "mean_logit": z.sum(-1),
        "ids": ids.astype(jnp.float32),
    }


@pytest.mark.parametrize("rows", [V, V - 3])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_two_models_match_the_dense_computation(chunk_size, rows):
    with jax.enable_x64(True):
        hiddens = jnp.asarray(draw(N, D)), jnp.asarray(draw(N, D + 2))
        unembeddings = jnp.asarray(draw(V, D)), jnp.asarray(draw(V, D + 2))
        dense = functools.partial(dense_divergence_scores, rows=rows)
        expected, pullback = jax.vjp(dense, hiddens, unembeddings)
        cotangents = jax.tree.map(lambda x: jnp.asarray(draw(*x.shape)), expected)
        cotangents["ids"] = jnp.zeros_like(expected["ids"])
        result, gradients = value_and_gradients(
            divergence_scores,
            hiddens,
            unembeddings,
            cotangents=cotangents,
            chunk_size=chunk_size,
            vocab_size=rows,
        )
        close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
        jax.tree.map(close, result, expected)
        jax.tree.map(close, gradients, pullback(cotangents))


def test_top_k_orders_as_lax_top_k_and_stops_at_the_vocabulary():
    values = jnp.array([[1.0, 3.0, 3.0, 2.0, 9.0]])
    top, ids = Logits(values, vocab_size=4).top_k(100)
    np.testing.assert_array_equal(ids, [[1, 2, 3, 0]])
    np.testing.assert_array_equal(top, [[3.0, 3.0, 2.0, 1.0]])


def test_an_id_outside_the_vocabulary_gives_nan():
    scores = Logits(jnp.zeros((4, 5)), vocab_size=4).log_probs(jnp.array([3, 4, 5, -1]))
    np.testing.assert_array_equal(np.isnan(scores), [False, True, True, True])


def test_padding_has_no_part_in_sums_and_expectations():
    z = Logits(jnp.zeros((1, 5)), vocab_size=4)
    np.testing.assert_allclose(z.sum(jnp.ones((1, 5))), [4.0])
    np.testing.assert_allclose(z.expectation(lambda logps: logps**2), [np.log(4) ** 2])
    np.testing.assert_allclose(z.entropy(), [np.log(4)], rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_masked_garbage_reaches_neither_values_nor_gradients(chunk_size):
    mask = np.arange(N) % 3 != 1
    hidden, unembedding, ids = draw(N, D, dtype="f"), draw(V, D, dtype="f"), draw_ids(N)
    weights = draw(N, dtype="f")
    garbage = hidden.copy(), ids.copy(), weights.copy()
    garbage[0][~mask] = np.array([np.nan, np.inf, -np.inf, 1e38, 0, np.nan])
    garbage[1][~mask] = -100
    garbage[2][~mask] = np.nan

    def score(z, ids, weight):
        # At a masked token's zeros the square root has an infinite derivative.
        return jnp.sqrt(weight**2 * z.entropy()) + z.log_probs(ids) / weight

    run = functools.partial(value_and_gradients, score, chunk_size=chunk_size)
    result, gradients = run(
        jnp.asarray(garbage[0]),
        jnp.asarray(unembedding),
        jnp.asarray(garbage[1]),
        jnp.asarray(garbage[2]),
        cotangents=jnp.ones(N),
        mask=jnp.asarray(mask),
    )
    expected, expected_gradients = run(
        jnp.asarray(hidden[mask]),
        jnp.asarray(unembedding),
        jnp.asarray(ids[mask]),
        jnp.asarray(weights[mask]),
        cotangents=jnp.ones(mask.sum()),
    )
    np.testing.assert_array_equal(result[~mask], 0)
    np.testing.assert_array_equal(gradients[0][~mask], 0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(result[mask], expected)
    close(gradients[0][mask], expected_gradients[0])
    close(gradients[1], expected_gradients[1])


@settings(max_examples=8, deadline=None)
@given(
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    chunk_size=st.integers(1, 9),
    width=st.integers(1, 3),
)
def test_any_leading_shape_and_chunk_size(lead, chunk_size, width):
    hidden, unembedding = draw(*lead, D, dtype="f"), draw(V, D, dtype="f")
    per_token = {"ids": draw_ids(*lead, width), "none": None}
    result = map_logits(
        lambda z, tree: (z.log_probs(tree["ids"]), {"h": z.entropy()}),
        jnp.asarray(hidden),
        jnp.asarray(unembedding),
        per_token,
        chunk_size=chunk_size,
    )
    logp = log_softmax(hidden.astype("d") @ unembedding.T.astype("d"))
    expected = np.take_along_axis(logp, per_token["ids"], -1)
    np.testing.assert_allclose(result[0], expected, rtol=1e-4, atol=1e-5)
    entropy = -(np.exp(logp) * logp).sum(-1)
    np.testing.assert_allclose(result[1]["h"], entropy, rtol=1e-4, atol=1e-5)


def test_temperature_may_be_traced_and_has_a_gradient():
    hidden, unembedding = (
        jnp.asarray(draw(N, D, dtype="f")),
        jnp.asarray(draw(V, D, dtype="f")),
    )

    def total(temperature, chunk_size):
        return map_logits(
            lambda z: z.entropy(),
            hidden,
            unembedding,
            temperature=temperature,
            chunk_size=chunk_size,
        ).sum()

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    step = 1e-2
    slope = (total(0.8 + step, None) - total(0.8 - step, None)) / (2 * step)
    np.testing.assert_allclose(gradient(0.8, 4), slope, rtol=1e-3)


def test_fn_is_traced_once():
    traces = []

    def score(z):
        traces.append(z.values.shape)
        return z.entropy()

    def loss(hidden, unembedding):
        return map_logits(score, hidden, unembedding, chunk_size=4).sum()

    jax.jit(jax.value_and_grad(loss, (0, 1))).lower(draw(N, D), draw(V, D))
    assert traces == [(4, V)]


def test_half_precision_gradients_add_up_in_float32():
    # 512 equal contributions, one per chunk: summed in bfloat16 they stop growing.
    n = 512
    hidden = jnp.ones((n, 2), jnp.bfloat16)
    unembedding = jnp.zeros((3, 2), jnp.bfloat16)

    def loss(hidden, unembedding):
        ids = jnp.zeros(n, jnp.int32)
        return map_logits(
            lambda z, ids: z.log_probs(ids), hidden, unembedding, ids, chunk_size=1
        ).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, unembedding)
    assert value.dtype == jnp.float32
    assert all(g.dtype == jnp.bfloat16 for g in gradients)
    expected = n * (np.eye(3)[0] - 1 / 3)
    np.testing.assert_allclose(
        gradients[1].astype("f"), np.stack([expected] * 2, -1), rtol=4e-3
    )


def test_float32_weights_under_bfloat16_hidden_states_get_float32_gradients():
    hidden = jnp.asarray(draw(N, D), jnp.bfloat16)
    unembedding = jnp.asarray(draw(V, D, dtype="f"))
    ids = jnp.asarray(draw_ids(N))
    cotangents = {name: np.ones(N) for name in ("logps", "entropy", "logsumexp")}
    result, gradients = value_and_gradients(
        basic_scores, hidden, unembedding, ids, cotangents=cotangents, chunk_size=4
    )
    expected, expected_gradients = numpy_basic(
        np.asarray(hidden, "d"),
        np.asarray(unembedding.astype(jnp.bfloat16), "d"),
        np.asarray(ids),
        cotangents,
        temperature=1.0,
        softcap=None,
        rows=V,
    )
    assert gradients[1].dtype == jnp.float32
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-4, atol=1e-4)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=0.02 * abs(want).max())


def test_small_float16_gradients_do_not_vanish():
    hidden = jnp.ones((1, 2), jnp.float16)
    unembedding = jnp.zeros((3, 2), jnp.float32)

    def loss(unembedding):
        return 1e-9 * map_logits(lambda z: z.logsumexp(), hidden, unembedding).sum()

    np.testing.assert_allclose(jax.grad(loss)(unembedding), 1e-9 / 3, rtol=1e-3)


def test_a_stopped_teacher_shares_the_unembedding():
    hidden, unembedding = (
        jnp.asarray(draw(N, D, dtype="f")),
        jnp.asarray(draw(V, D, dtype="f")),
    )

    def loss(unembedding, shared):
        teacher = jax.lax.stop_gradient(unembedding) if shared else unembedding
        return map_logits(
            lambda s, t: t.expectation(lambda logps: logps) + 0 * s.entropy(),
            (hidden, hidden),
            (unembedding, teacher),
            chunk_size=4,
        ).sum()

    assert not np.any(jax.grad(loss)(unembedding, True))
    assert np.any(jax.grad(loss)(unembedding, False))


def test_inside_a_loop_over_micro_batches():
    hidden, unembedding = draw(3, N, D, dtype="f"), draw(V, D, dtype="f")

    def loss(unembedding, hidden):
        return map_logits(
            lambda z: z.entropy(), hidden, unembedding, chunk_size=4
        ).sum()

    def accumulate(gradient, hidden):
        return gradient + jax.grad(loss)(unembedding, hidden), None

    looped, _ = jax.jit(lambda w, hs: jax.lax.scan(accumulate, jnp.zeros_like(w), hs))(
        unembedding, hidden
    )
    whole = jax.grad(loss)(unembedding, hidden.reshape(-1, D))
    np.testing.assert_allclose(looped, whole, rtol=1e-5, atol=1e-5)


def compiled_pass(n: int, d: int, v: int, chunk_size: int, dtype="float32"):
    """XLA's program for value and gradients of what SDPO and GRPO together need."""

    def loss(hidden, unembedding, ids, mask):
        scores = map_logits(
            lambda z, ids: (z.log_probs(ids), z.entropy(), z.top_k(4)[0]),
            hidden,
            unembedding,
            ids,
            mask=mask,
            chunk_size=chunk_size,
        )
        return sum(jnp.sum(score) for score in scores)

    shape = jax.ShapeDtypeStruct
    return (
        jax.jit(jax.value_and_grad(loss, (0, 1)))
        .lower(
            shape((n, d), dtype),
            shape((v, d), dtype),
            shape((n,), "int32"),
            shape((n,), "bool"),
        )
        .compile()
    )


def temp_bytes(*shape_and_chunk: int, dtype: str = "float32") -> int:
    analysis = compiled_pass(*shape_and_chunk, dtype).memory_analysis()
    return analysis.temp_size_in_bytes


def test_memory_per_token_does_not_depend_on_the_vocabulary():
    d, chunk_size, few, many = 16, 8, 64, 1024
    slopes = []
    for v in (256, 1024):
        start = temp_bytes(few, d, v, chunk_size)
        slopes.append((temp_bytes(many, d, v, chunk_size) - start) / (many - few))
    ragged = (temp_bytes(many - 1, d, v, chunk_size) - start) / (many - 1 - few)
    assert max(*slopes, ragged) <= 4 * d * 4
    assert abs(slopes[0] - slopes[1]) <= 1


def test_logits_are_computed_twice_and_multiplied_four_times():
    n, d, v = 64, 32, 512
    # XLA counts a loop's body once: here, one chunk of each of the two loops.
    flops = compiled_pass(2 * n, d, v, n).cost_analysis()["flops"]
    product = 2 * n * d * v
    elementwise = 40 * n * v
    assert 4 * product <= flops <= 4 * product + elementwise


def test_single_step_logits_are_those_of_the_pass():
    hidden, unembedding = (
        jnp.asarray(draw(N, D, dtype="f")),
        jnp.asarray(draw(V, D, dtype="f")),
    )
    options = {"temperature": 0.7, "softcap": 2.0, "vocab_size": V - 2}
    whole = map_logits(lambda z: z.values, hidden, unembedding, chunk_size=4, **options)
    np.testing.assert_allclose(
        logits(hidden, unembedding, **options), whole, rtol=1e-6, atol=1e-6
    )
    np.testing.assert_array_equal(whole[:, V - 2 :], -1e9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": draw(N, D + 1)}, r"hidden \(11, 7\) and unembedding \(13, 6\)"),
        ({"hidden": (draw(N, D), draw(N - 1, D))}, r"hidden \(10, 6\)"),
        ({"unembedding": (draw(V, D), draw(V, D))}, "1 hidden and 2 unembedding"),
        ({"ids": draw_ids(N + 1)}, r"per_token\[0\] has shape \(12,\)"),
        ({"mask": np.ones((N, 1), bool)[:3]}, r"mask has shape \(3, 1\)"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"vocab_size": V + 1}, "vocab_size is 14"),
        ({"fn": lambda z, ids: z.entropy().mean()}, r"fn's result.* has shape \(\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "fn": lambda z, ids: z.log_probs(ids),
        "hidden": draw(N, D),
        "unembedding": draw(V, D),
        "ids": draw_ids(N),
        **change,
    }
    positional = [
        arguments.pop(name) for name in ("fn", "hidden", "unembedding", "ids")
    ]
    with pytest.raises(ValueError, match=message):
        map_logits(*positional, **arguments)


def test_unembeddings_of_different_height_are_refused():
    with pytest.raises(ValueError, match=r"same number of rows, got \[13, 12\]"):
        map_logits(
            lambda s, t: s.entropy(), (draw(N, D),) * 2, (draw(V, D), draw(V - 1, D))
        )
