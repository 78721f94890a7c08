"""The mesh of a config, and models opened on it."""

from __future__ import annotations

import jax
import pytest

from jaxrl_post.errors import InputError
from jaxrl_post.training.setup import (
    micro_batch_bound,
    open_mesh,
    open_model,
    slots_bound,
)


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


def test_bounds_over_all_devices_and_for_each_shard_both_hold(tiny_config):
    """`tensor` shares a shard's sequences: it adds none."""
    config = tiny_config(
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        training={"micro_batch_tokens": 100, "micro_batch_tokens_per_shard": 30},
        sampling={"slots_per_shard": 3},
    )
    mesh = open_mesh(config)
    assert micro_batch_bound(config.training, mesh) == 100
    assert micro_batch_bound(config.training, None) == 30
    assert slots_bound(config.sampling, mesh) == 12


@pytest.mark.parametrize(
    ("groups", "data", "shape"),
    [(4, 1, (1, 4, 2)), (16, 1, (1, 8, 1)), (4, 2, (2, 2, 2)), (1, 1, (1, 1, 8))],
)
def test_fsdp_takes_what_groups_divide_by_and_tensor_the_rest(
    tiny_config, groups, data, shape
):
    config = tiny_config(
        mesh={"data": data, "fsdp": -1, "tensor": -1},
        training={"prompts_per_step": groups},
    )
    mesh = open_mesh(config)
    assert tuple(mesh.shape.values()) == shape


def test_groups_that_do_not_divide_by_the_shards_name_the_remedies(tiny_config):
    config = tiny_config(mesh={"data": 1, "fsdp": -1})
    with pytest.raises(InputError, match="multiple of 8, or set mesh.data=1 mesh.fsdp"):
        open_mesh(config)
