"""Attention in blocks and by kernels against all scores at once, in float64."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.errors import InputError
from jaxrl_post.models import attention, kernels
from jaxrl_post.models.chunked import chunked_attention, join
from jaxrl_post.sharding import make_mesh, shard, shard_batch


def oracle(q, k, v, seen, scale=None, softcap=None):
    """In numpy: q ``[B, T, H, d]``, k, v ``[B, Hkv, N, d]``, seen ``[B, T, N]``; the
    output, and the logarithm of the normaliser, of queries that see something."""
    k, v = (np.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("bthd,bhnd->bthn", q, k)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.where(seen[:, :, None], np.exp(scores), 0)
    norm = weights.sum(-1, keepdims=True)
    norm = np.where(norm, norm, 1)
    return np.einsum("bthn,bhnd->bthd", weights / norm, v), np.log(norm[..., 0])


def inputs(batch=2, time=13, slots=13, heads=4, kv_heads=2, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, time, heads, dim))
    return q, *rng.normal(size=(2, batch, kv_heads, slots, dim))


SEGMENTS = {
    "whole": np.ones((2, 13), int),
    "padded left": np.array([[0] * 5 + [1] * 8, [1] * 13]),
    "padded right": np.array([[1] * 13, [1] * 4 + [0] * 9]),
    "packed": np.array([[1] * 3 + [2] * 7 + [3] * 2 + [0], [2] * 6 + [1] * 7]),
    "nothing": np.array([[0] * 13, [1] * 13]),
}
OPTIONS = {
    "causal": {"offset": 0},
    "both ways": {},
    "window": {"offset": 0, "window": 3},
    "window of a block": {"offset": 0, "window": 4},
    "softcap": {"offset": 0, "softcap": 1.5},
    "scale": {"offset": 0, "scale": 0.9},
}


def seen_by(queries, keys, offset=None, window=None):
    rows = np.arange(queries.shape[1])[:, None] + (offset or 0)
    back = rows - np.arange(keys.shape[1])[None]
    seen = (queries[:, :, None] == keys[:, None]) & (queries > 0)[:, :, None]
    if offset is not None:
        seen = seen & (back >= 0)
    return seen if window is None else seen & (back < window)


@pytest.mark.parametrize("options", OPTIONS)
def test_chunks_against_all_scores_in_float64(options):
    """Values and all gradients, through the output and the normaliser, to 1e-11."""
    options = OPTIONS[options]
    masks = {k: v for k, v in options.items() if k in ("offset", "window")}
    scoring = {k: v for k, v in options.items() if k not in masks}

    def chunked(q, k, v, ids, seen):
        sizes = {"query_chunk": 4, "key_chunk": 5}
        return chunked_attention(q, k, v, ids, ids, **sizes, **options)

    def plain(q, k, v, ids, seen):
        k, v = (jnp.repeat(x, 2, axis=1) for x in (k, v))
        scores = jnp.einsum("bthd,bhnd->bthn", q, k)
        scores = scores * scoring.get("scale", 6**-0.5)
        if cap := scoring.get("softcap"):
            scores = cap * jnp.tanh(scores / cap)
        scores = jnp.where(seen[:, :, None], scores, -1e30)
        weights = jnp.where(seen[:, :, None], jax.nn.softmax(scores), 0)
        norm = jax.scipy.special.logsumexp(scores, axis=-1)
        return jnp.einsum("bthn,bhnd->bthd", weights, v), norm

    def with_gradients(fn):
        def run(q, k, v, ids, seen, cotangents):
            out, pull = jax.vjp(lambda *x: fn(*x, ids, seen), q, k, v)
            return out, pull(cotangents)

        return jax.jit(run)

    chunked, plain = with_gradients(chunked), with_gradients(plain)
    arrays = inputs()
    for name, segments in SEGMENTS.items():
        seen = seen_by(segments, segments, **masks)
        empty = ~seen.any(-1)
        rng = np.random.default_rng(1)
        cotangents = rng.normal(size=arrays[0].shape), rng.normal(size=(2, 13, 4))
        cotangents[1][empty] = 0  # of a constant
        with jax.enable_x64(True):
            given = (*arrays, segments.astype(np.int32), seen, cotangents)
            (out, norm), grads = chunked(*given)
            _, expected = plain(*given)
        want, want_norm = oracle(*arrays, seen, **scoring)
        np.testing.assert_allclose(out, want, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(norm[~empty], want_norm[~empty], atol=1e-12)
        assert np.all(np.asarray(norm)[empty] == -1e30)
        chex.assert_trees_all_close(grads, expected, atol=1e-11)


@pytest.mark.parametrize("chunks", [(1, 1), (3, 7), (13, 29), (256, 256)])
def test_offset_into_a_longer_cache(chunks):
    """A traced offset; slots that are not written yet are not seen."""
    q, k, v = inputs(slots=29)
    slots = np.tile((np.arange(29) < 20).astype(int), (2, 1))
    ones = np.ones((2, 13), int)

    @jax.jit
    def run(offset):
        args = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
        ids = jnp.asarray(ones, jnp.int32), jnp.asarray(slots, jnp.int32)
        size = dict(zip(("query_chunk", "key_chunk"), chunks, strict=True))
        return chunked_attention(*args, *ids, offset=offset, **size)[0]

    for offset in (0, 7, 16):
        want, _ = oracle(q, k, v, seen_by(ones, slots, offset))
        np.testing.assert_allclose(run(jnp.int32(offset)), want, atol=2e-6)


def test_parts_join_to_the_whole():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in inputs())
    ones = jnp.ones((2, 13), jnp.int32)

    def joined(q, k, v):
        parts = [
            chunked_attention(q, k[:, :, part], v[:, :, part], ones, ones[:, part])
            for part in (slice(0, 4), slice(4, 13))
        ]
        return join(parts)

    def whole(q, k, v):
        return chunked_attention(q, k, v, ones, ones)[0]

    def gradient(fn):
        loss = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(fn(*x))), (0, 1, 2)))
        return loss(q, k, v)

    np.testing.assert_allclose(joined(q, k, v), whole(q, k, v), atol=1e-6)
    chex.assert_trees_all_close(gradient(joined), gradient(whole), atol=2e-6)


def test_a_block_that_nobody_sees_is_not_computed():
    """NaN after the queries, or before all windows, is never read."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in inputs(time=4, slots=16))
    poisoned = [x.at[:, :, 12:].set(jnp.nan).at[:, :, :4].set(jnp.nan) for x in (k, v)]
    ones = jnp.ones((2, 16), jnp.int32)
    out, _ = chunked_attention(
        q, *poisoned, ones[:, :4], ones, offset=8, window=4, query_chunk=4, key_chunk=4
    )
    assert np.all(np.isfinite(out))


def test_half_precision_accumulates_in_float32():
    """bfloat16 inputs: no further from float64 than rounding them and the output."""
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(time=512, slots=512, dim=16))
    ones = jnp.ones((2, 512), jnp.int32)
    out, norm = chunked_attention(q, k, v, ones, ones, offset=0)
    seen = seen_by(np.ones((2, 512)), np.ones((2, 512)), 0)
    want, want_norm = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), seen)
    assert out.dtype == jnp.bfloat16 and norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, want_norm, atol=1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=2e-2, rtol=2**-7)


@pytest.mark.parametrize("options", [{"window": 4}, {"offset": 0, "window": 0}])
def test_windows_that_make_no_sense(options):
    q, k, v = inputs()
    ones = np.ones((2, 13), np.int32)
    with pytest.raises(ValueError, match="window="):
        chunked_attention(q, k, v, ones, ones, **options)


def test_memory_is_linear_in_tokens():
    """Temporary bytes of value and gradient: doubled with T, where the plain program's
    grow four times."""

    def temporary(how, time):
        shape = jax.ShapeDtypeStruct((1, time, 2, 16), jnp.float32)
        cached = jax.ShapeDtypeStruct((1, 2, time, 16), jnp.float32)

        def loss(q, k, v):
            ids = jnp.ones((1, time), jnp.int32)
            own = jnp.tri(time, dtype=bool)[None] if how == "plain" else None
            visible = attention.Visibility(ids, ids, own, how=how)
            out = attention.attend(q, attention.LayerCache(k, v), visible)
            return jnp.sum(out**2)

        program = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        return program.lower(shape, cached, cached).compile().memory_analysis()

    short, long = (temporary("chunked", t).temp_size_in_bytes for t in (2048, 4096))
    assert long < 2.1 * short
    plain = [temporary("plain", t).temp_size_in_bytes for t in (2048, 4096)]
    assert plain[1] > 3.8 * plain[0]
    assert long < 0.05 * plain[1]


# -- kernels -----------------------------------------------------------------------


def kernel_case(time, offset, segments, *, heads=4, kv_heads=2, dim=64, seed=0):
    """A prefix of `offset` slots, padded on both sides, before responses."""
    q, k, v = inputs(2, time, offset + time, heads, kv_heads, dim, seed)
    queries = np.ones((2, time), int)
    if segments == "padded":
        queries = (np.arange(time) < np.array([[time], [time // 3]])).astype(int)
    if segments == "padded left":
        queries = (np.arange(time) >= np.array([[0], [time // 3]])).astype(int)
    if segments == "packed":
        queries = np.tile(1 + (np.arange(time) > time // 2), (2, 1))
    prefix = np.ones((2, offset), int)
    prefix[0, : offset // 4], prefix[1, offset // 2 :] = -1, -1
    slots = np.concatenate([prefix, queries], axis=1)
    return (q, k, v), queries, slots


def splash(*args, offset):
    return kernels.splash(*args, offset=offset, interpret=True)


def cudnn(*args, offset):
    return kernels.cudnn(*args, offset=offset, implementation="xla")


@pytest.mark.parametrize(
    ("kernel", "time", "offset", "segments"),
    [
        (splash, 200, 0, "padded left"),
        (splash, 150, 0, "packed"),
        (splash, 130, 70, "padded"),
        (cudnn, 30, 0, "padded left"),
        (cudnn, 30, 17, "padded"),
    ],
)
def test_kernels_against_the_reference(kernel, time, offset, segments):
    """Values and gradients at real tokens; splash in Pallas' interpreter, cuDNN's call
    with XLA in its place."""
    arrays, queries, slots = kernel_case(time, offset, segments)
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in arrays)
    ids = jnp.asarray(queries, jnp.int32), jnp.asarray(slots, jnp.int32)
    real = jnp.asarray(queries > 0)[:, :, None, None]

    def gradient(fn):
        def loss(*arrays):
            out = jnp.where(real, fn(*arrays), 0)
            return jnp.sum(jnp.sin(out)), out

        run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
        return run(*arrays)

    grads, out = gradient(lambda *x: kernel(*x, *ids, offset=offset))
    expected, want = gradient(lambda *x: chunked_attention(*x, *ids, offset=offset)[0])
    np.testing.assert_allclose(out, want, atol=2e-6)
    chex.assert_trees_all_close(grads, expected, atol=1e-5)


def test_cudnn_does_not_know_packing():
    arrays, queries, slots = kernel_case(8, 0, "packed")
    assert np.all(np.isnan(cudnn(*arrays, queries, slots, offset=0)))


# -- the choice, and the decoder ---------------------------------------------------


def choice(asked="auto", dtype=jnp.bfloat16, **shape):
    sizes = {"time": 2048, "slots": 2048, "prefix": 512, "head_dim": 128} | shape
    return attention.choose(asked, dtype=dtype, **sizes)


def test_choice_by_platform(monkeypatch):
    monkeypatch.setattr(attention, "_platform", lambda: "tpu")
    assert choice() == "splash"
    assert choice(head_dim=80) == "chunked"
    assert choice(slots=4096) == "chunked"  # behind what a cache already holds
    assert choice(time=1) == choice("splash", time=1) == "plain"
    assert choice(time=128, slots=128, prefix=128) == "plain"
    assert choice("splash", time=128, slots=128, prefix=128) == "splash"
    with pytest.raises(InputError, match="head_dim=80 .* use auto or chunked"):
        choice("splash", head_dim=80)
    with pytest.raises(InputError, match="cudnn: runs on gpu, and this is tpu"):
        choice("cudnn")

    monkeypatch.setattr(attention, "_platform", lambda: "gpu")
    assert choice() == "cudnn"
    assert choice(dtype=jnp.float32) == "chunked"
    assert choice(prefix=4096) == "chunked"
    with pytest.raises(InputError, match="float32, not bfloat16"):
        choice("cudnn", dtype=jnp.float32)

    monkeypatch.setattr(attention, "_platform", lambda: "cpu")
    assert choice() == "chunked"
    assert choice(time=256, slots=256, prefix=0) == "plain"
    assert choice("plain", time=9999, slots=9999) == "plain"


def test_platform_is_that_of_the_mesh():
    with jax.set_mesh(make_mesh()):
        assert attention._platform() == "cpu"


CONFIG = models.DecoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    contexts, responses = (
        rng.integers(50, size=(8, 24)),
        rng.integers(50, size=(16, 40)),
    )
    context_mask = np.arange(24) >= rng.integers(0, 20, (8, 1))
    mask = np.arange(40) < rng.integers(1, 41, (16, 1))
    arrays = contexts, context_mask, responses, mask
    return tuple(np.asarray(x, np.int32) for x in arrays)


def responses_loss(policy, index):
    """Contexts once, responses behind them: what training computes."""

    def loss(params, batch):
        contexts, context_mask, responses, mask = batch
        positions = jnp.maximum(jnp.cumsum(context_mask, axis=1) - 1, 0)
        cache = policy.init_cache(*contexts.shape)
        _, cache = policy.hidden(params, contexts, positions, context_mask, cache)
        lengths = jnp.repeat(context_mask.sum(1), 2)[:, None]
        positions = lengths + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        own = policy.init_cache(*responses.shape)
        own = own.replace(prefix=cache.as_prefix(index))
        out, _ = policy.hidden(params, responses, positions, mask, own)
        out = jnp.where(mask[:, :, None] > 0, out, 0)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def plain(batch):
    policy = models.decoder(CONFIG, attention="plain")
    params = policy.init(jax.random.key(0))
    return params, responses_loss(policy, None)(params, batch)


@pytest.mark.parametrize(
    ("how", "grouped"),
    [("chunked", True), ("chunked", False), ("splash", True), ("cudnn", True)],
)
def test_decoder_by_every_program(plain, batch, how, grouped, monkeypatch):
    params, expected = plain
    if how != "chunked":
        monkeypatch.setattr(attention, "_platform", lambda: kernels.PLATFORMS[how])
        monkeypatch.setattr(kernels, "problem", lambda *args: None)
        monkeypatch.setitem(
            kernels.KERNELS, how, {"splash": splash, "cudnn": cudnn}[how]
        )
    policy = models.decoder(CONFIG, attention=how)
    index = None if grouped else jnp.repeat(jnp.arange(8), 2)
    out = responses_loss(policy, index)(params, batch)
    chex.assert_trees_all_close(out, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("how", "sizes"),
    [("chunked", (2, 2, 2)), ("chunked", (1, 2, 4)), ("splash", (2, 2, 2))],
)
def test_on_a_mesh(plain, batch, sizes, how, monkeypatch):
    """Rows and heads on their own devices, kernels too; four devices share two heads of
    keys."""
    if how == "splash":
        monkeypatch.setattr(attention, "_platform", lambda: "tpu")
        monkeypatch.setitem(kernels.KERNELS, how, splash)
    params, expected = plain
    policy, mesh = models.decoder(CONFIG, attention=how), make_mesh(*sizes)
    rules = {"kv_heads": None} if sizes[2] > 2 else {}
    params = shard(params, policy.logical_axes, mesh, rules | {"vocab": None})
    with jax.set_mesh(mesh):
        out = responses_loss(policy, None)(params, shard_batch(batch, mesh))
    chex.assert_trees_all_close(out, expected, atol=1e-4, rtol=1e-5)


def test_packing_behind_a_prefix_is_loud_in_kernels(monkeypatch):
    visible = attention.Visibility(
        jnp.full((1, 4), 2), jnp.full((1, 4), 2), prefix=jnp.ones((1, 3), bool)
    )
    keys = jnp.ones((1, 1, 4, 2))
    cache = attention.LayerCache(keys, keys, keys[:, :, :3], keys[:, :, :3])
    visible = visible.replace(how="splash")
    monkeypatch.setitem(kernels.KERNELS, "splash", lambda q, *rest, offset: q)
    assert np.all(np.isnan(attention.attend(jnp.ones((1, 4, 1, 2)), cache, visible)))


def test_unknown_names():
    with pytest.raises(ValueError, match="attention='flash'.*did you mean|one of"):
        models.decoder(CONFIG, attention="flash")
    with pytest.raises(ValueError, match="remat=True: there is no such policy"):
        models.decoder(CONFIG, remat=True)
