"""Sums whose gradients are made in the forward pass equal those of `map_logits`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.sharding import make_mesh
from jaxrl_post.vocabulary import Logits, map_logits, sum_logits

B, T, D, V, VALID = 4, 6, 5, 24, 21


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng([*shape]).normal(size=shape))


def loss(student: Logits, teacher: Logits, ids, weight):
    """What SDPO and GRPO need between them."""
    values, top = student.top_k(4)
    gap = (values - teacher.log_probs(top)).sum(-1)
    reverse = student.expectation(lambda logps: logps - teacher.log_softmax())
    logps = student.log_probs(ids)
    return weight * (gap + reverse * student.entropy() - logps), {"logps": logps}


def arguments() -> tuple:
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VALID, (B, T)))
    return (draw(B, T, D), draw(V, D)), draw(B, T, D) * 2, (ids, draw(B, T) ** 2)


def by_map(trained, teacher, per_token, **options):
    hidden, unembedding = trained
    fixed = jax.lax.stop_gradient((teacher, unembedding))
    values, scores = map_logits(
        loss, (hidden, fixed[0]), (unembedding, fixed[1]), *per_token, **options
    )
    return values.sum(), scores


def by_sum(trained, teacher, per_token, **options):
    hidden, unembedding = trained
    return sum_logits(loss, (hidden, teacher), unembedding, *per_token, **options)


def both(trained, teacher, per_token, **options):
    results = []
    for total in (by_map, by_sum):

        def scaled(trained, total=total):
            value, scores = total(trained, teacher, per_token, **options)
            return 3 * value, scores

        results.append(jax.jit(jax.value_and_grad(scaled, has_aux=True))(trained))
    return results


@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_value_scores_and_gradients(chunk_size):
    with jax.enable_x64(True):
        trained, teacher, per_token = arguments()
        mask = jnp.asarray(np.random.default_rng(1).random((B, T)) < 0.7)
        options = {
            "mask": mask,
            "temperature": 0.7,
            "softcap": 3.0,
            "vocab_size": VALID,
            "chunk_size": chunk_size,
        }
        garbage = [
            jnp.where(mask[..., None], x, jnp.nan) for x in (trained[0], teacher)
        ]
        plain, summed = both((garbage[0], trained[1]), garbage[1], per_token, **options)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(summed), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-13)
        only_value, _ = by_sum(trained, teacher, per_token, **options)
        np.testing.assert_allclose(3 * only_value, plain[0][0], rtol=1e-12)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 4), (4, 1, 1)])
def test_on_a_mesh(sizes):
    options = {"vocab_size": VALID, "chunk_size": 2}
    with jax.enable_x64(True):
        trained, teacher, per_token = arguments()
        mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        plain, _ = both(trained, teacher, per_token, **options)
        with jax.set_mesh(mesh):
            _, summed = both(trained, teacher, per_token, **options)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(summed), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-13)


def compiled(total, n: int, d: int, v: int, chunk_size: int):
    """XLA's program for the value and the gradients of both arguments."""
    shape = jax.ShapeDtypeStruct
    tokens = shape((n, d), "float32")
    program = jax.value_and_grad(
        lambda trained, teacher, per_token: total(
            trained, teacher, per_token, chunk_size=chunk_size
        )[0]
    )
    per_token = (shape((n,), "int32"), shape((n,), "float32"))
    arguments = ((tokens, shape((v, d), "float32")), tokens, per_token)
    return jax.jit(program).lower(*arguments).compile()


def test_one_product_less_for_each_model():
    """Student: logits and two gradients, not the logits again. Teacher: logits once."""
    n, d, v = 64, 32, 512
    product = 2 * n * d * v
    # XLA counts a loop's body once: one chunk.
    plain, summed = (
        compiled(total, 2 * n, d, v, n).cost_analysis()["flops"]
        for total in (by_map, by_sum)
    )
    elementwise = 150 * n * v
    assert 4 * product <= summed <= 4 * product + elementwise
    assert 6 * product <= plain <= 6 * product + 2 * elementwise


def test_memory_per_token_does_not_depend_on_the_vocabulary():
    d, chunk_size, few, many = 16, 8, 64, 1024
    slopes = []
    for v in (256, 1024):
        few_bytes, many_bytes = (
            compiled(by_sum, n, d, v, chunk_size).memory_analysis().temp_size_in_bytes
            for n in (few, many)
        )
        slopes.append((many_bytes - few_bytes) / (many - few))
    assert max(slopes) <= 4 * d * 4
    assert abs(slopes[0] - slopes[1]) <= 1


def test_half_precision_gradients_add_up_in_float32():
    hidden = draw(512, D).astype(jnp.bfloat16)
    unembedding = draw(V, D).astype(jnp.bfloat16)
    ids = jnp.zeros(512, jnp.int32)

    def total(unembedding, chunk_size):
        return sum_logits(
            lambda z, ids: (-z.log_probs(ids), ()),
            hidden,
            unembedding,
            ids,
            chunk_size=chunk_size,
        )[0]

    whole, cut = (jax.grad(total)(unembedding, size) for size in (512, 4))
    assert whole.dtype == jnp.bfloat16
    # One rounding, at the end; 128 roundings would be off by more than one unit.
    np.testing.assert_allclose(
        cut.astype(np.float32), whole.astype(np.float32), rtol=2**-7
    )


def test_a_loss_that_is_not_per_token_is_refused():
    trained, teacher, per_token = arguments()
    with pytest.raises(
        ValueError, match=r"fn's loss has shape \(\); it must be \[24\]"
    ):
        sum_logits(
            lambda z, *_: (z.entropy().sum(), ()), trained[0], trained[1], *per_token
        )
    del teacher
