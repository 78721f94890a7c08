"""The mesh of a config, and models opened on it."""

from __future__ import annotations

import jax
import pytest

from jaxrl_post.errors import InputError
from jaxrl_post.training.setup import open_mesh, open_model


def test_rules_of_the_config_lay_out_the_model(tiny_config):
    """One key-value head on two devices: an error, until the rule says otherwise."""
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    config = tiny_config(mesh=sizes)
    with pytest.raises(InputError) as caught:
        open_model(config, open_mesh(config))
    message = str(caught.value)
    assert "kv_heads=1 is not divisible by 2" in message
    assert "mesh.rules.kv_heads=null" in message

    rules = {"kv_heads": None, "embed": ["data", "fsdp"]}
    config = tiny_config(mesh={**sizes, "rules": rules})
    assert type(config).from_dict(config.to_dict()) == config
    _, params, _ = open_model(config, open_mesh(config))
    attention = params["layers"]["attention"]
    assert list(attention["k"]["kernel"].sharding.spec)[2] is None
    assert attention["k"]["kernel"].addressable_shards[0].data.shape == (2, 4, 1, 8)
    assert attention["q"]["kernel"].addressable_shards[0].data.shape == (2, 4, 1, 8)
    assert jax.tree.leaves(params)[0].sharding.mesh.size == 8
