"""Checkpoints: whole states back, mismatches listed."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from jaxrl_post import recipes
from jaxrl_post.errors import InputError
from jaxrl_post.training.checkpoints import FOLDER, Checkpoints
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
    # Else a run that resumes would compile all of its programs anew.
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored))
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


def large_state():
    """Noise enough that the largest file of a checkpoint is that of an array."""
    return make_state(w=jax.random.normal(jax.random.key(0), (64, 64)))


def saved_states(folder, steps, **options):
    checkpoints = Checkpoints(folder, **options)
    for step, score in steps.items():
        state = large_state().replace(step=jnp.asarray(step))
        checkpoints.save(state, {"eval/held/avg@2": score})
    checkpoints.close()
    return folder / FOLDER


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "a flipped bit": lambda step: flip(largest(step)),
    "a truncated file": lambda step: truncate(largest(step)),
    "a missing file": lambda step: largest(step).unlink(),
    "a missing index": lambda step: (step / "default" / "manifest.ocdbt").unlink(),
    "missing metadata": lambda step: (step / "default" / "_METADATA").unlink(),
    "no checksums": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
}


def largest(step):
    return max(step.rglob("d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.usefixtures("orbax_fails")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, damage):
    folder = saved_states(tmp_path, {1: 0.5, 2: 0.5, 3: 0.5}, keep=3)
    DAMAGES[damage](folder / "3")
    reports = []
    checkpoints = Checkpoints(tmp_path, keep=3)
    state = checkpoints.resume(lambda step: large_state(), reports.append)
    assert int(state.step) == 2
    (report,) = reports
    assert str(folder / "3") in report and "damaged" in report
    assert checkpoints.latest() == 2 and (folder / "damaged-3").is_dir()
    checkpoints.save(state.replace(step=jnp.asarray(3)))  # done again
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert int(checkpoints.resume(lambda step: large_state()).step) == 3
    checkpoints.close()


def test_nothing_is_begun_again_where_all_checkpoints_are_damaged(tmp_path):
    folder = saved_states(tmp_path, {1: 0.5, 2: 0.5})
    for step in ("1", "2"):
        (folder / step / "_CHECKPOINT_METADATA").unlink()
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(InputError, match=r"none of the checkpoints \[1, 2\] is whole"):
        checkpoints.resume(lambda step: large_state(), lambda line: None)
    checkpoints.close()
    assert {"1", "2"} <= {path.name for path in folder.iterdir()}


def test_what_a_killed_process_left_unfinished_is_no_checkpoint(tmp_path):
    folder = saved_states(tmp_path, {1: 0.5})
    (folder / "2.orbax-checkpoint-tmp").mkdir()
    (folder / "2.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").write_text("{}")
    checkpoints = Checkpoints(tmp_path)
    assert int(checkpoints.resume(lambda step: large_state()).step) == 1
    checkpoints.close()
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    scores = {1: 0.3, 2: 0.9, 3: None, 4: 0.9, 5: float("nan"), 6: 0.4}
    folder = saved_states(tmp_path, scores, keep=1, best="eval/held/avg@2")
    assert {path.name for path in folder.iterdir()} == {"2", "6"}
    # The scores are remembered with the checkpoints.
    saved_states(tmp_path, {7: 0.5}, keep=1, best="eval/held/avg@2")
    assert {path.name for path in folder.iterdir()} == {"2", "7"}
    saved_states(tmp_path, {8: 0.95}, keep=1, best="eval/held/avg@2")
    assert {path.name for path in folder.iterdir()} == {"8"}


def test_no_checkpoint_is_an_input_error(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(InputError, match="no checkpoint yet"):
        checkpoints.arrays()
    checkpoints.close()
