"""Operations against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import recipes
from jaxrl_post.models.adapters import Lora, add_adapter, split_adapter
from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.stack import decoder
from jaxrl_post.models.tensors import tensor_rules
from jaxrl_post.preflight.flops import count_flops
from jaxrl_post.training.flops import Lengths, ModelFlops

SIZES = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
BATCH, TIME = 2, 24


def products(time=TIME):
    """Of one layer, forward: projections, MLP, scores and their sums, per sequence."""
    d, heads, kv, dim = 32, 4, 2, 16
    weights = d * dim * (heads + 2 * kv) + heads * dim * d + 3 * d * 80
    return 2 * time * weights, 2 * 2 * heads * dim * time * time


def trace(fn, *shapes):
    return jax.jit(fn).trace(*shapes).jaxpr


def losses(remat):
    policy = decoder(SIZES, remat=remat, attention="plain")
    params = jax.eval_shape(policy.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32)

    def loss(params, tokens):
        ones = jnp.ones_like(tokens)
        positions = jnp.broadcast_to(jnp.arange(TIME), tokens.shape)
        return policy.hidden(params, tokens, positions, ones)[0].sum()

    return loss, params, tokens


def test_the_forward_pass_of_a_dense_decoder():
    loss, params, tokens = losses("none")
    flops, unknown = count_flops(trace(loss, params, tokens))
    assert flops == 3 * BATCH * sum(products())
    assert unknown == 0


@pytest.mark.parametrize("remat", ["none", "full"])
def test_forward_and_backward(remat):
    loss, params, tokens = losses(remat)
    flops, _ = count_flops(trace(jax.grad(loss), params, tokens))
    again = 0
    if remat == "full":
        # All but the last product, whose result no derivative reads.
        again = sum(products()) - 2 * TIME * 80 * 32
    by_hand = 3 * BATCH * (3 * sum(products()) + again)
    np.testing.assert_allclose(flops, by_hand, rtol=0.01)


def test_blocks_that_a_causal_mask_leaves_out_do_not_count():
    policy = decoder(SIZES, attention="chunked")
    params = jax.eval_shape(policy.init, jax.random.key(0))
    time = 1024  # 4 chunks of queries see 1, 2, 3 and 4 chunks of keys
    tokens = jax.ShapeDtypeStruct((1, time), jnp.int32)

    def hidden(params, tokens):
        ones = jnp.ones_like(tokens)
        return policy.hidden(params, tokens, ones, ones)[0]

    flops, unknown = count_flops(trace(hidden, params, tokens))
    matrices, attention = products(time)
    assert flops == 3 * (matrices + attention * 10 / 16)
    assert unknown == 0


def test_a_loop_that_ends_by_data_is_told():
    def fn(x):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x)

    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert count_flops(trace(fn, x)) == (2 * 4**3, 1)


def test_every_device_of_a_shard_map_counts():
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    fn = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    assert count_flops(trace(fn, x))[0] == 4 * 2 * (2 * 4 * 2)


def test_the_model_counts_what_the_causal_mask_leaves():
    policy = decoder(SIZES)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    model = ModelFlops(SIZES, params)
    matrices, attention = products()
    half = attention * (TIME + 1) / (2 * TIME)
    assert model.forward(1, TIME) == 3 * (matrices + half)
    whole = model.forward(1, 8) + model.forward(1, TIME - 8, 8)
    assert whole == model.forward(1, TIME)


@pytest.mark.parametrize("backward", [False, True])
def test_experts_count_as_often_as_they_are_chosen(backward):
    """As a dense MLP of the chosen ones' width, and the router."""

    def flops(**changes):
        sizes = dataclasses.replace(SIZES, **changes)
        policy = decoder(sizes, attention="plain")
        params = jax.eval_shape(policy.init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32)

        def loss(params, tokens):
            ones = jnp.ones_like(tokens)
            positions = jnp.broadcast_to(jnp.arange(TIME), tokens.shape)
            return policy.hidden(params, tokens, positions, ones)[0].sum()

        fn = jax.grad(loss) if backward else loss
        model = ModelFlops(sizes, params).forward(BATCH, TIME)
        return count_flops(trace(fn, params, tokens))[0], model

    experts = {"num_experts": 6, "experts_per_token": 2, "expert_size": 40}
    found, dense = flops(**experts), flops(intermediate_size=80)
    router = 3 * 2 * BATCH * TIME * 32 * 6
    assert found[0] - dense[0] == router * (3 if backward else 1)
    assert found[1] - dense[1] == router


def test_windows_leave_fewer_pairs():
    params = jax.eval_shape(decoder(SIZES).init, jax.random.key(0))
    windows = dataclasses.replace(SIZES, window=5, local_layers=(0, 2))
    for time, before in ((TIME, 0), (TIME, 3), (1, 9), (2, 4)):
        pairs = [before + t + 1 for t in range(time)]
        fewer = 2 * sum(n - min(n, 5) for n in pairs)
        full, less = (
            ModelFlops(c, params).forward(BATCH, time, before) for c in (SIZES, windows)
        )
        assert full - less == pytest.approx(4 * BATCH * 4 * 16 * fewer)


# Adapters: what is frozen has no gradients of weights ---------------------------------

RANK = 4


def adapted():
    """The policy, and shapes of its adapter and of what is frozen."""
    policy = decoder(SIZES, attention="plain", remat="none")
    adapter = Lora(rank=RANK)
    chosen = adapter.select(tensor_rules(SIZES))
    own, params = add_adapter(policy, policy.init(jax.random.key(0)), adapter, chosen)
    return own, *split_adapter(params)


def adapter_weights():
    """Of one layer: rank times inputs and outputs of each of its seven maps."""
    d, q, kv, mlp = 32, 4 * 16, 2 * 16, 80
    maps = [(d, q), (d, kv), (d, kv), (q, d), (d, mlp), (d, mlp), (mlp, d)]
    return sum(RANK * (i + o) for i, o in maps)


def test_an_update_of_an_adapter_by_hand():
    _, adapter, frozen = adapted()
    model = ModelFlops(SIZES, adapter, frozen)
    matrices, attention = products()  # of one sequence and layer
    adapters = 2 * TIME * adapter_weights()
    # Frozen: forward and the inputs' gradient. The adapter's: its own gradient besides.
    half = attention * (TIME + 1) / (2 * TIME)
    layer = 2 * matrices + 3 * adapters + 3 * half
    contexts, seen = Lengths.full((1, TIME), (1, 0)), Lengths.full((1, 0), (1, TIME))
    recipe = recipes.grpo()
    assert model.update(recipe, contexts, None) == 3 * layer
    head = 2 * TIME * 96 * 32
    assert model.update(recipe, seen, None) == 3 * layer + 2 * head
    # The reference is the base alone, read once.
    base = 3 * (matrices + half) + head
    with_reference = model.update(recipes.grpo(kl_weight=0.1), seen, None)
    assert with_reference == 3 * layer + 2 * head + base
    whole = ModelFlops(SIZES, jax.eval_shape(decoder(SIZES).init, jax.random.key(0)))
    assert whole.update(recipe, seen, None) == 3 * (3 * (matrices + half) + head)


def test_the_program_of_an_adapter_does_what_is_counted():
    policy, adapter, frozen = adapted()
    tokens = jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32)

    def loss(adapter, frozen, tokens):
        from jaxrl_post.training.state import merge_params

        ones = jnp.ones_like(tokens)
        positions = jnp.broadcast_to(jnp.arange(TIME), tokens.shape)
        params = merge_params(adapter, frozen)
        return policy.hidden(params, tokens, positions, ones)[0].sum()

    found, _ = count_flops(trace(jax.grad(loss), adapter, frozen, tokens))
    matrices, attention = products()
    adapters = 2 * TIME * adapter_weights()
    by_hand = 3 * BATCH * (2 * matrices + 3 * adapters + 3 * attention)
    np.testing.assert_allclose(found, by_hand, rtol=0.01)
