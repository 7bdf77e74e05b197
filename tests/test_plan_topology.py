"""Names of TPU slices."""

import dataclasses
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from navil_jax.config import MeshConfig
from navil_jax.errors import UserError
from navil_jax.model.flops import peak_flops
from navil_jax.plan.topology import GENERATIONS, Slice, parse_topology, slice_shapes
from navil_jax.sharding import make_mesh


@pytest.mark.parametrize(
    ("name", "shape", "chips", "devices", "hosts"),
    [
        ("v5p-8", (2, 2, 1), 4, 4, 1),
        ("v5p-32", (2, 2, 4), 16, 16, 4),
        ("v5p-128", (4, 4, 4), 64, 64, 16),
        ("v5p-256", (4, 4, 8), 128, 128, 32),
        ("v5p-1280", (4, 8, 20), 640, 640, 160),
        ("v4-4096", (8, 16, 16), 2048, 2048, 512),
        ("v5e-1", (1, 1), 1, 1, 1),
        ("v5e-8", (2, 4), 8, 8, 1),
        ("v5litepod-256", (16, 16), 256, 256, 64),
        ("v6e-64", (8, 8), 64, 64, 16),
        ("tpu7x-128", (4, 4, 4), 64, 128, 16),
        ("V5P-128 ", (4, 4, 4), 64, 64, 16),
        ("v5p:2x4x4", (2, 4, 4), 32, 32, 8),
        ("2xv5e-256", (16, 16), 512, 512, 128),
        ("4xv6e:4x4", (4, 4), 64, 64, 16),
    ],
)
def test_names(name: str, shape: tuple[int, ...], chips: int, devices: int, hosts: int):
    place = parse_topology(name)
    assert (place.shape, place.chips, place.devices, place.hosts) == (shape, chips, devices, hosts)


def test_several_slices_by_option():
    assert parse_topology("v5e-256", slices=2) == parse_topology("2xv5e-256")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p-100", "no TPU slice 'v5p-100', the nearest one is v5p-128"),
        ("v5e-250", "the nearest one is v5e-256"),
        ("v6-64x", "the nearest name is v6-64"),
        ("v5pp-128", "the nearest name is v5p-128"),
        ("h100-8", "no TPU slice 'h100-8'"),
        ("v5e:3x4", "no v5e slice has the shape 3x4"),
        ("v5p:4x4", "no v5p slice has the shape 4x4"),
        ("v5p-7", "the nearest one is v5p-8"),
        ("v5p-4x4x8", "a shape is written v5p:4x4x8"),
        ("", "no TPU slice ''"),
    ],
)
def test_unknown_names_are_one_line_with_the_nearest(name: str, said: str):
    with pytest.raises(UserError, match="--topology") as error:
        parse_topology(name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@hypothesis.given(data=st.data())
def test_every_slice_has_a_name_that_leads_back(data: st.DataObject):
    generation = data.draw(st.sampled_from(GENERATIONS))
    shape = data.draw(st.sampled_from(sorted(set(slice_shapes(generation)))))
    slices = data.draw(st.integers(1, 4))
    place = Slice(generation, shape, slices)
    read = parse_topology(place.name)
    assert math.prod(read.shape) == math.prod(shape)
    assert sum(read.shape) <= sum(shape)
    assert (read.generation, read.slices) == (generation, slices)
    assert place.hosts * math.prod(place.host_shape) == place.chips


def test_rings():
    assert parse_topology("v5p-128").wrap == (True, True, True)
    assert parse_topology("v5p-64").wrap == (False, False, False)
    assert parse_topology("v5e-256").wrap == (True, True)
    assert parse_topology("v5e-128").wrap == (False, True)
    assert parse_topology("v6e-64").libtpu_options == {"topology_name": "v6e:8x8", "chips_per_host_bounds": (2, 2, 1)}


@pytest.mark.parametrize(
    ("generation", "kind"),
    [("v4", "TPU v4"), ("v5e", "TPU v5 lite"), ("v5p", "TPU v5"), ("v6e", "TPU v6 lite"), ("tpu7x", "TPU7x")],
)
def test_planner_and_training_log_use_the_same_peaks(generation: str, kind: str):
    (found,) = (one for one in GENERATIONS if one.name == generation)
    assert peak_flops(kind) == found.peak


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as far as its place in the torus goes."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize(("shape", "spans"), [((4, 64, 1, 1), (16, 4)), ((1, 256, 1, 1), (16, 16))])
def test_an_axis_of_the_mesh_may_take_a_part_of_one_of_the_torus(
    kind: str, shape: tuple[int, ...], spans: tuple[int, int]
):
    chips = [Chip(16 * x + y, (x, y, 0), kind) for x in range(16) for y in range(16)]
    grid = make_mesh(MeshConfig(*shape), chips).devices
    assert grid.shape == shape
    for group in grid.reshape(shape[0], -1):
        assert sorted(len({chip.coords[axis] for chip in group}) for axis in (0, 1)) == sorted(spans)
