from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.sharding import (
    batch_sharding,
    batch_shards,
    make_mesh,
    param_shardings,
    shard,
    shard_batch,
)

LOGICAL_AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {
        "query": ("layers", "embed", "heads", "head_dim"),
        "key": ("layers", "embed", "kv_heads", "head_dim"),
        "up": ("layers", "embed", "mlp"),
        "norm": ("layers", "norm"),
    },
}


def shapes(**sizes: int):
    sizes = {
        "vocab": 16,
        "embed": 4,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 5,
        "mlp": 8,
        "norm": 4,
        **sizes,
    }
    return jax.tree.map(
        lambda names: jax.ShapeDtypeStruct([sizes[name] for name in names], "float32"),
        LOGICAL_AXES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def test_default_layout():
    shardings = param_shardings(shapes(), LOGICAL_AXES, make_mesh(2, 2, 2))
    assert list(shardings["embedding"].spec) == ["tensor", "fsdp"]
    layers = {name: list(s.spec) for name, s in shardings["layers"].items()}
    assert layers == {
        "query": [None, "fsdp", "tensor", None],
        "key": [None, "fsdp", "tensor", None],
        "up": [None, "fsdp", "tensor"],
        "norm": [None, None],
    }


def test_rules_replace_entries_of_the_table():
    rules = {"kv_heads": None, "embed": ("data", "fsdp")}
    shardings = param_shardings(
        shapes(kv_heads=3), LOGICAL_AXES, make_mesh(2, 2, 2), rules
    )
    assert list(shardings["layers"]["key"].spec) == [
        None,
        ("data", "fsdp"),
        None,
        None,
    ]


def test_every_dimension_that_does_not_divide_is_in_one_error():
    with pytest.raises(ValueError) as caught:
        param_shardings(shapes(vocab=15, kv_heads=3), LOGICAL_AXES, make_mesh(2, 1, 4))
    message = str(caught.value)
    assert "['embedding']: vocab=15 is not divisible by 4" in message
    assert "['layers']['key']: kv_heads=3 is not divisible by 4" in message
    assert message.count("divisible") == 2


@pytest.mark.parametrize(
    ("names", "rules", "message"),
    [
        (("vocab",), None, r"shape \(4, 4\) has logical axes \('vocab',\)"),
        (("vocab", "hidden"), None, "no rule for logical axis 'hidden'"),
        (("vocab", None), {"vocab": "tensro"}, "'vocab' -> 'tensro', not a mesh axis"),
        (("heads", "mlp"), None, "'tensor' splits two dimensions"),
    ],
)
def test_wrong_names_are_refused(names, rules, message):
    with pytest.raises(ValueError, match=message):
        param_shardings(
            {"w": jnp.zeros((4, 4))}, {"w": names}, make_mesh(tensor=2), rules
        )


def test_shard_places_parameters_and_batches():
    mesh = make_mesh(2, 2, 2)
    weights = np.arange(64.0).reshape(16, 4)
    placed = shard({"w": weights}, {"w": ("vocab", "embed")}, mesh)["w"]
    assert placed.addressable_shards[0].data.shape == (8, 2)
    np.testing.assert_array_equal(placed, weights)

    batch = shard_batch({"tokens": np.arange(8), "rows": np.ones((4, 3))}, mesh)
    assert batch_shards(mesh) == 4
    assert batch["rows"].sharding == batch_sharding(mesh)
    assert batch["rows"].addressable_shards[0].data.shape == (1, 3)


def test_batches_that_do_not_divide_are_refused_together():
    batch = {"a": np.ones(6), "b": np.ones((8, 2)), "c": np.float32(0)}
    with pytest.raises(ValueError) as caught:
        shard_batch(batch, make_mesh(2, 2, 2))
    message = str(caught.value)
    assert "multiple of 4" in message
    assert "['a']: shape (6,)" in message and "['c']: shape ()" in message
    assert "['b']" not in message
