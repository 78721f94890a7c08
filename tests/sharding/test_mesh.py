from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

from jaxrl_post.sharding import auto_axes, make_mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"tensor": 2}, (4, 1, 2)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 1, "tensor": 8}, (1, 1, 8)),
    ],
)
def test_minus_one_is_the_rest(sizes, shape):
    mesh = make_mesh(**sizes)
    assert tuple(mesh.shape.items()) == tuple(
        zip(("data", "fsdp", "tensor"), shape, strict=True)
    )
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.size == 8


def test_only_the_given_devices_are_used():
    devices = jax.devices()[2:4]
    assert list(make_mesh(devices=devices).devices.flat) == devices


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3}, r"data=-1, fsdp=1, tensor=3 does not fit 8 device"),
        ({"data": 2}, r"data=2, fsdp=1, tensor=1 does not fit 8 device"),
        ({"data": 16}, r"does not fit 8 device"),
        ({"tensor": 16}, r"does not fit 8 device"),
        ({"fsdp": -1}, r"at most one of them -1 .*data=-1, fsdp=-1"),
        ({"fsdp": 0}, r"must be positive.*fsdp=0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_auto_axes_come_from_the_argument_or_the_context():
    assert dict(auto_axes()) == {}
    mesh = make_mesh(2, 2, 2)
    assert dict(auto_axes(mesh)) == {"data": 2, "fsdp": 2, "tensor": 2}
    with jax.set_mesh(mesh):
        assert dict(auto_axes()) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_explicit_axes_are_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"\['data'\] are Explicit.*make_mesh"):
        auto_axes(mesh)
