"""The programs of a training step against others that compute the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import models, recipes
from jaxrl_post.errors import InputError
from jaxrl_post.generation import Rollouts, Sampler
from jaxrl_post.models import DecoderConfig, Policy, decoder
from jaxrl_post.models.attention import IMPLEMENTATIONS
from jaxrl_post.recipes import Batch
from jaxrl_post.selftest.measured import Measured
from jaxrl_post.sharding import make_mesh, shard
from jaxrl_post.training import make_update_step
from jaxrl_post.training.state import init_state
from jaxrl_post.training.update import make_score_step

EXACT, ROUNDED = 1e-4, 3e-2
"""Bounds of relative differences: of float32 products at the highest precision, and of
bfloat16, whose numbers are 2**-8 apart."""

_ATTENTION = DecoderConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=128,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,  # what the kernels take
)
_TOKENS = 256
_WIDTH, _TIME, _GROUP = 8, 12, 2


def programs(compute_dtype: Any) -> Mapping[str, Policy]:
    """The same decoder by every attention that this platform offers, by name; the
    first is the one that the others' gradients are held against."""
    tokens = np.zeros((2, _TOKENS), np.int32)
    offered = {}
    for name in [name for name in IMPLEMENTATIONS if name != "auto"]:
        policy = decoder(_ATTENTION, compute_dtype=compute_dtype, attention=name)
        params = jax.eval_shape(policy.init, jax.random.key(0))
        try:
            jax.eval_shape(policy.hidden, params, tokens, tokens, tokens)
        except InputError:  # of another platform, or not for this dtype
            continue
        offered[name] = policy
    return offered


def check_attention() -> Iterator[Measured]:
    """A decoder layer by every program: forward against NumPy in float64, the gradient
    against the first program's. Contexts are padded on either side."""
    rng = np.random.default_rng(1)
    time = _TOKENS
    tokens = rng.integers(0, _ATTENTION.vocab_size, (2, time))
    segments = np.stack([np.arange(time) >= 37, np.arange(time) < 201]).astype(np.int32)
    positions = np.maximum(segments.cumsum(1) - 1, 0)
    real = jnp.asarray(segments > 0)[..., None]
    weights = jnp.asarray(rng.normal(size=(2, time, 128)), jnp.float32)
    params = decoder(_ATTENTION).init(jax.random.key(0))
    expected = np.where(real, _decoder_layer(params, tokens, positions, segments), 0)

    def both(policy, params):
        def total(params):
            hidden, _ = policy.hidden(params, tokens, positions, segments)
            hidden = jnp.where(real, hidden.astype(jnp.float32), 0)
            return (hidden * weights).sum(), hidden

        grads, hidden = jax.grad(total, has_aux=True)(params)
        return hidden, grads["layers"]["attention"]

    for dtype, bound in ((jnp.float32, EXACT), (jnp.bfloat16, ROUNDED)):
        slopes = []
        for name, policy in programs(dtype).items():
            with jax.default_matmul_precision("highest"):
                hidden, slope = jax.jit(functools.partial(both, policy))(params)
            slopes.append(slope)
            value = max(_distance(hidden, expected), _distance(slope, slopes[0]))
            yield Measured(f"attention: {name}, {jnp.dtype(dtype).name}", value, bound)


def check_gap() -> Iterator[Measured]:
    """Log-probs that the sampler gave its tokens, and those that training gives."""
    default = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    for dtype in dict.fromkeys((jnp.float32, default)):
        policy, params, _ = models.load("science_base", compute_dtype=dtype)
        exact = dtype == jnp.float32
        precision = "highest" if exact else None
        with jax.default_matmul_precision(precision):
            rollouts = sample(policy, params, prompts=4)
            logps = make_score_step(policy)(params, make_batch(rollouts, prompts=4))
        gap = np.where(rollouts.mask, np.asarray(logps) - rollouts.logps, 0)
        value = float(np.sqrt((gap**2).sum() / rollouts.mask.sum()))
        name = f"log-probs of sampler and trainer, {jnp.dtype(dtype).name}"
        yield Measured(name, value, EXACT if exact else ROUNDED)


def check_mesh() -> Iterator[Measured]:
    """An update of PGPO on all devices of this process, and on one of them."""
    devices = jax.local_devices()
    count = len(devices)
    name = "update on all devices and on one"
    if count == 1:
        yield Measured(name, None, EXACT, "there is one device")
        return
    policy, params, _ = models.load("science_base", compute_dtype=jnp.float32)
    prompts = 2 * count
    tensor = math.gcd(count, 2)
    fsdp = math.gcd(count // tensor, 4)
    with jax.default_matmul_precision("highest"):
        rollouts = sample(policy, params, prompts)
        batch = make_batch(rollouts, prompts)
        one = update(policy, params, batch, make_mesh(1, 1, 1, devices[:1]))
        mesh = make_mesh(-1, fsdp, tensor, devices, fast_within="all")
        whole = update(policy, params, batch, mesh)
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    yield Measured(name, _distance(whole, one), EXACT, sizes)


def sample(policy: Policy, params: Any, prompts: int) -> Rollouts:
    """Responses to contexts of random tokens, on one device."""
    sampler = Sampler(policy, max_new_tokens=_TIME)
    contexts, mask = _contexts(prompts)
    key = jax.random.key(3)
    return sampler.generate(params, contexts, mask, group_size=_GROUP, key=key)


def make_batch(rollouts: Rollouts, prompts: int) -> Batch:
    """The responses with made-up advantages; the teacher sees the next context."""
    rng = np.random.default_rng(4)
    contexts, mask = _contexts(prompts)
    rows = prompts * _GROUP
    return Batch(
        contexts=contexts,
        context_mask=mask,
        responses=rollouts.tokens,
        token_mask=rollouts.mask,
        loss_mask=rollouts.mask,
        sequence_mask=np.ones(rows, bool),
        advantages=rng.normal(size=rows).astype(np.float32),
        teacher_contexts=np.roll(contexts, 1, axis=0),
        teacher_context_mask=np.roll(mask, 1, axis=0),
        teacher_index=(np.arange(rows) // _GROUP).astype(np.int32),
        extras={
            "distilled": np.ones(rows, bool),
            "distillation_weight": np.ones(rows, np.float32),
        },
    )


def update(policy: Policy, params: Any, batch: Batch, mesh: jax.sharding.Mesh) -> Any:
    """Loss and gradient, as one step of plain gradient descent leaves them."""
    recipe = recipes.pgpo(policy_gradient_weight=0.5, truncated_importance=None)
    optimizer = optax.sgd(1.0)
    placed = shard(jax.device_get(params), policy.logical_axes, mesh)
    state = init_state(placed, optimizer, recipe, jax.random.key(0))
    step = make_update_step(policy, recipe, optimizer, mesh=mesh)
    state, metrics = step(state, batch)
    after = jax.device_get(state.trainable)
    grads = jax.tree.map(lambda a, b: np.asarray(a) - b, params, after)
    return {"loss": np.asarray(metrics["loss"]), "grads": grads}


def _contexts(prompts: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    mask = np.arange(_WIDTH)[::-1] < rng.integers(1, _WIDTH + 1, prompts)[:, None]
    tokens = rng.integers(2, 640, (prompts, _WIDTH)).astype(np.int32)
    return np.where(mask, tokens, 0), mask


def _decoder_layer(params, tokens, positions, segments) -> np.ndarray:
    """Hidden states ``[B, T, D]`` of the decoder `_ATTENTION`, in float64."""
    c = _ATTENTION
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layer = jax.tree.map(lambda x: x[0], params["layers"])

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * scale

    def rotate(x):
        half = c.head_dim // 2
        angles = positions[..., None] * c.rope_theta ** (-np.arange(half) / half)
        turn = np.exp(1j * angles)[:, :, None] * (x[..., :half] + 1j * x[..., half:])
        return np.concatenate([turn.real, turn.imag], axis=-1)

    x = params["embed"][tokens]
    attention, mlp = layer["attention"], layer["mlp"]
    normed = norm(x, layer["attention_norm"]["scale"])
    q, k, v = (
        np.einsum("btd,dhe->bthe", normed, attention[name]["kernel"]) for name in "qkv"
    )
    q, k = rotate(q), rotate(k)
    k, v = (np.repeat(y, c.num_heads // c.num_kv_heads, axis=2) for y in (k, v))
    scores = np.einsum("bthe,bshe->bhts", q, k) / np.sqrt(c.head_dim)
    seen = np.tril(np.ones(scores.shape[-2:], bool)) & (segments[:, None, None] > 0)
    scores = np.where(seen, scores, -1e30)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    weights = scores / scores.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshe->bthe", weights, v)
    x = x + np.einsum("bthe,hed->btd", out, attention["o"]["kernel"])
    normed = norm(x, layer["mlp_norm"]["scale"])
    gate = normed @ mlp["gate"]["kernel"]
    up = normed @ mlp["up"]["kernel"]
    x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down"]["kernel"]
    return norm(x, params["final_norm"]["scale"])


def _distance(found: Any, expected: Any) -> float:
    """Root of the mean squared difference over that of `expected`, the worst leaf's."""

    def relative(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.sqrt(((a - b) ** 2).sum()) / max(np.sqrt((b**2).sum()), 1e-30)

    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return float(np.max([relative(a, b) for a, b in leaves]))
