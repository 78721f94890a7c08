"""Checkpoints: whole states back, mismatches listed."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from jaxrl_post import recipes
from jaxrl_post.errors import InputError
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.state import init_state
from jaxrl_post.transforms import scale_by_information


def make_state(optimizer=None, **params):
    # scale_by_information without a delay keeps an empty array.
    optimizer = optimizer or optax.chain(optax.adam(1e-3), scale_by_information(1.0))
    params = params or {"w": jnp.arange(6.0).reshape(3, 2)}
    return init_state(params, optimizer, recipes.pgpo(), jax.random.key(3))


def test_a_state_comes_back_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    state = make_state()
    for step in (1, 2, 3):
        state = state.replace(step=jnp.asarray(step), cursor=jnp.asarray(16 * step))
        checkpoints.save(state)
        checkpoints.save(state)  # a second time is nothing
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 3
    restored = checkpoints.restore(make_state(w=jnp.zeros((3, 2))))
    assert jax.random.key_data(restored.rng).tolist() == [0, 3]
    chex.assert_trees_all_equal(
        restored.replace(rng=0), state.replace(rng=0), strict=True
    )
    assert int(checkpoints.restore(make_state(), step=2).cursor) == 32
    with pytest.raises(Exception, match="1"):
        checkpoints.restore(make_state(), step=1)  # only the last two stay
    checkpoints.close()


def test_every_mismatch_is_listed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state())
    checkpoints.wait()
    other = make_state(optax.sgd(1.0), w=jnp.zeros((3, 4)), v=jnp.zeros(2))
    with pytest.raises(InputError) as error:
        checkpoints.restore(other)
    checkpoints.close()
    message = str(error.value)
    assert ".trainable['w']: shape (3, 2), expected (3, 4)" in message
    assert "missing: .trainable['v']" in message
    assert "not expected: .opt_state[0]" in message
    assert "run.dir" in message


def test_no_checkpoint_is_an_input_error(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(InputError, match="no checkpoint yet"):
        checkpoints.arrays()
    checkpoints.close()
