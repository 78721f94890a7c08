from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from jaxrl_post.errors import InputError
from jaxrl_post.sharding import auto_axes, make_mesh
from jaxrl_post.sharding.mesh import arrange


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


def device(number: int, island: int, attribute: str = "slice_index"):
    other = {"slice_index": 0, "process_index": 0}
    return SimpleNamespace(
        id=number,
        platform="gpu",
        device_kind="a GPU",
        **{**other, attribute: island},
    )


def devices(islands: int, each: int, **options):
    """In an order that says nothing: devices of the islands take turns."""
    numbers = range(islands * each)
    return [device(i, i % islands, **options) for i in numbers]


@pytest.mark.parametrize("attribute", ["slice_index", "process_index"])
@pytest.mark.parametrize(
    ("sizes", "crossing"),
    [
        ((2, 2, 2), {"data": 2}),
        ((8, 1, 1), {"data": 2}),
        ((1, 4, 2), {"fsdp": 2}),
        ((3, 4, 1), {"fsdp": 2}),
        ((4, 2, 2), {"data": 4}),
        ((2, 4, 2), {"data": 2, "fsdp": 2}),
    ],
)
def test_data_then_fsdp_cross_the_slow_network(sizes, crossing, attribute):
    islands = np.prod([*crossing.values()])
    each = np.prod(sizes) // islands
    fast = {"slice_index": "slice", "process_index": "process"}[attribute]
    placed = arrange(sizes, devices(islands, each, attribute=attribute), fast)
    assert placed.shape == sizes
    assert len({d.id for d in placed.flat}) == placed.size
    island = np.vectorize(lambda d: getattr(d, attribute))(placed)
    for axis, name in enumerate(("data", "fsdp", "tensor")):
        met = {
            len({*line})
            for line in np.moveaxis(island, axis, -1).reshape(-1, sizes[axis])
        }
        assert met == {crossing.get(name, 1)}, name
        # An island is one block: the axis crosses as seldom as it can.
        changes = (np.diff(island, axis=axis) != 0).sum(axis=axis)
        assert (changes == crossing.get(name, 1) - 1).all()


def test_tensor_does_not_cross_unless_told():
    found = devices(2, 4)
    with pytest.raises(InputError) as caught:
        arrange((1, 1, 8), found)
    message = str(caught.value)
    assert "data=1, fsdp=1, tensor=8 on 2 slices or nodes" in message
    assert "mesh.tensor=8" in message and "mesh.fast_within=all" in message
    assert arrange((1, 1, 8), found, "all").shape == (1, 1, 8)
    assert arrange((1, 1, 8), found, "process").shape == (1, 1, 8)


def test_two_slices_of_a_tpu_pod():
    """As libtpu describes them, without a TPU."""
    pytest.importorskip("libtpu")
    pod = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:4x4", num_slices=2
    )
    mesh = make_mesh(2, 4, 4, devices=pod.devices)
    assert {d.slice_index for d in mesh.devices[0].flat} == {0}
    assert {d.slice_index for d in mesh.devices[1].flat} == {1}
    # `tensor` runs over neighbours on the torus.
    for line in mesh.devices.reshape(-1, 4):
        steps = np.diff([d.coords for d in line], axis=0)
        assert (np.abs(steps).sum(1) == 1).all()
