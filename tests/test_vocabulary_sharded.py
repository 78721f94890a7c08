"""The pass over the vocabulary on eight devices equals the pass on one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_post.sharding import make_mesh
from jaxrl_post.vocabulary import Logits, map_logits

B, T, D, V, VALID = 8, 3, 4, 16, 13
SIZES = [(4, 1, 2), (1, 2, 4)]


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng([*shape]).normal(size=shape))


def scores(student: Logits, teacher: Logits, ids, weight, *, scale) -> dict:
    values, top_ids = student.top_k(5)
    partial = jnp.exp(teacher.log_softmax()) * student.log_softmax()
    return {
        "logps": scale * weight * student.log_probs(ids),
        "entropy": student.entropy(),
        "logsumexp": student.logsumexp(),
        "forward": teacher.expectation(lambda logps: logps - student.log_softmax()),
        "reverse": student.expectation(lambda logps: logps - teacher.log_softmax()),
        "cross_entropy": student.sum_shards(partial.sum(-1)),
        "top_values": values,
        "top_ids": top_ids,
        "teacher_top": teacher.log_probs(top_ids),
    }


def loss(parameters, data, mesh, chunk_size):
    """A scalar of every method's result; `scale` is closed over by `fn`."""
    result = map_logits(
        functools.partial(scores, scale=data["scale"]),
        parameters["hiddens"],
        parameters["unembeddings"],
        data["ids"],
        data["weight"],
        mask=data["mask"],
        temperature=parameters["temperature"],
        softcap=4.0,
        chunk_size=chunk_size,
        vocab_size=VALID,
        mesh=mesh,
    )
    numbers = [r for r in jax.tree.leaves(result) if jnp.issubdtype(r, jnp.floating)]
    return sum(jnp.sum(jnp.sin(i + r)) for i, r in enumerate(numbers)), result


@functools.cache
def inputs():
    mask = np.ones((B, T), bool)
    mask[2, 1:] = mask[5] = False
    parameters = {
        "hiddens": (draw(B, T, D), draw(B, T, D + 4)),
        "unembeddings": (draw(V, D), draw(V, D + 4)),
        "temperature": jnp.asarray(0.8),
    }
    data = {
        "scale": jnp.asarray(1.5),
        "ids": jnp.asarray(np.arange(B * T).reshape(B, T) % VALID),
        "weight": jnp.where(mask, draw(B, T), jnp.nan),
        "mask": jnp.asarray(mask),
    }
    return parameters, data


@functools.cache
def run(mesh, chunk_size):
    step = functools.partial(loss, mesh=mesh, chunk_size=chunk_size)
    return jax.jit(jax.value_and_grad(step, has_aux=True))(*inputs())


def assert_trees_close(got, want, tolerance):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, got, want)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_equal_the_plain_pass(sizes):
    with jax.enable_x64(True):
        inputs.cache_clear()
        assert_trees_close(run(make_mesh(*sizes), 4), run(None, None), 1e-11)
    run.cache_clear(), inputs.cache_clear()


def test_float32_to_rounding_and_sharded_where_it_lies():
    parameters, data = inputs()
    data = dict(data)
    mesh = make_mesh(2, 2, 2)
    place = {
        "hiddens": P(("data", "fsdp")),
        "unembeddings": P("tensor", "fsdp"),
        "temperature": P(),
    }
    placed = {
        name: jax.device_put(value, NamedSharding(mesh, place[name]))
        for name, value in parameters.items()
    }
    scale = data.pop("scale")
    data = jax.device_put(data, NamedSharding(mesh, P(("data", "fsdp"))))
    data["scale"] = jax.device_put(scale, NamedSharding(mesh, P()))

    @jax.jit
    def step(parameters, data):
        return jax.value_and_grad(loss, has_aux=True)(parameters, data, None, 4)

    with jax.set_mesh(mesh):
        (value, result), gradients = step(placed, data)
    (expected_value, expected), expected_gradients = run(None, None)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert_trees_close(result, expected, 2e-5)
    assert_trees_close(gradients, expected_gradients, 2e-4)
    assert result["logps"].sharding.spec[0] == ("data", "fsdp")


@pytest.mark.parametrize("tensor", [2, 8])
def test_top_k_breaks_ties_like_one_device(tensor):
    # Equal logits in every shard, and more of them wanted than one shard holds.
    unembedding = jnp.asarray([[1.0], [2.0], [2.0], [1.0]] * 4)
    hidden = jnp.ones((8, 1))
    _, ids = map_logits(
        lambda z: z.top_k(11), hidden, unembedding, mesh=make_mesh(tensor=tensor)
    )
    expected = jax.lax.top_k((hidden @ unembedding.T), 11)[1]
    np.testing.assert_array_equal(ids, expected)


def test_micro_batches_accumulate_in_a_loop_under_the_mesh():
    unembedding, hidden = draw(V, D), draw(3, B, T, D)

    def entropy(unembedding, hidden):
        return map_logits(
            lambda z: z.entropy(), hidden, unembedding, chunk_size=4
        ).sum()

    @jax.jit
    def accumulate(unembedding, hidden):
        def add(total, hidden):
            return total + jax.grad(entropy)(unembedding, hidden), None

        return jax.lax.scan(add, jnp.zeros_like(unembedding), hidden)[0]

    with jax.set_mesh(make_mesh(2, 2, 2)):
        looped = accumulate(unembedding, hidden)
    whole = jax.grad(entropy)(unembedding, hidden.reshape(-1, T, D))
    np.testing.assert_allclose(looped, whole, rtol=1e-4, atol=1e-5)


def test_weights_gradient_is_added_up_once_not_per_chunk():
    mesh = make_mesh(4, 1, 2)

    def step(unembedding, hidden):
        entropy = map_logits(
            lambda z: z.entropy(), hidden, unembedding, chunk_size=2, mesh=mesh
        )
        return entropy.sum()

    jaxpr = jax.make_jaxpr(jax.grad(step))(draw(V, D), draw(B, T, D))
    (loop,) = [eqn for eqn in loops(jaxpr.jaxpr) if eqn.params["reverse"]]
    inside = str(loop.params["jaxpr"])
    assert f"f32[{V // 2},{D}]" in inside  # the loop does carry that gradient ...
    for line in inside.splitlines():  # ... and no reduction over data touches it
        assert not ("psum" in line and "'data'" in line), line


def loops(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for sub in jaxprs_in_params(eqn.params):
            yield from loops(sub)


def test_inside_a_shard_map_arrays_are_the_devices_own():
    mesh = make_mesh(data=8)
    unembedding, hidden = draw(V, D), draw(B, T, D)
    run = functools.partial(map_logits, lambda z: z.entropy(), chunk_size=2)
    inside = jax.shard_map(
        run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )(hidden, unembedding)
    np.testing.assert_allclose(inside, run(hidden, unembedding), rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "hidden", "unembedding", "message"),
    [
        (
            (8, 1, 1),
            draw(6, D),
            draw(V, D),
            r"leading axis \(6\).*data=8.*multiple of 8",
        ),
        ((2, 1, 4), draw(8, D), draw(14, D), r"rows \(14\).*tensor=4.*multiple of 4"),
    ],
)
def test_what_does_not_divide_is_refused(sizes, hidden, unembedding, message):
    with pytest.raises(ValueError, match=message):
        map_logits(lambda z: z.entropy(), hidden, unembedding, mesh=make_mesh(*sizes))


def test_a_slice_of_the_vocabulary_may_not_leave():
    with pytest.raises(ValueError):
        map_logits(
            lambda z: z.log_softmax().sum(-1),
            draw(8, D),
            draw(V, D),
            mesh=make_mesh(tensor=2),
        )
