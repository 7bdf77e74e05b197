"""TPU slices by the names that Google Cloud gives them, and what their hardware can do."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from navil_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of TPU. Figures of a device are those of what JAX calls one.

    Sources: Google Cloud's page of each version (peak, HBM, ICI and DCN bandwidth; the stated bidirectional ICI
    bandwidth of a chip is split over its links). The HBM that a program may use is what the compiler enforces, and the
    clock is the one that turns its cycle estimates into the time of a matrix product at peak.
    """

    name: str
    libtpu: str  # its name in a topology
    aliases: tuple[str, ...]  # other spellings of users
    dimensions: int  # of the torus: 2 or 3
    cores_in_name: int  # the N of `name-N` counts this many for each chip
    devices_per_chip: int
    peak: float  # dense bfloat16 FLOP/s of a device
    hbm: float  # bytes of a device that a program may use
    clock: float  # Hz
    link: float  # bytes/s of one ICI link in one direction
    dcn: float  # bytes/s of a chip to other slices
    bandwidth: float  # bytes/s of a device's HBM
    cores: int  # of a device
    kernel_factor: float  # measured over static time of kernels, at this clock (sources: docs/tpu.md)
    chip_config: str = "default"  # v4: megacore joins the two cores of a chip to one device, as JAX has them


GIB = 2**30
GENERATIONS = (
    Generation("v4", "v4", (), 3, 2, 1, 275e12, 30.75 * GIB, 1.05e9, 50e9, 3.125e9, 1.2e12, 2, 1.03, "megacore"),
    Generation(
        *("v5e", "v5e", ("v5litepod", "v5lite"), 2, 1, 1, 197e12, 15.75 * GIB, 1.5e9),
        *(50e9, 3.125e9, 0.82e12, 1, 1.03),
    ),
    Generation("v5p", "v5p", ("v5",), 3, 2, 1, 459e12, 95.74 * GIB, 1.75e9, 100e9, 6.25e9, 2.765e12, 2, 1.03),
    Generation("v6e", "v6e", ("v6", "trillium"), 2, 1, 1, 918e12, 31.25 * GIB, 1.75e9, 100e9, 12.5e9, 1.64e12, 1, 1.05),
    Generation(
        *("tpu7x", "tpu7x", ("v7x", "tpu7", "ironwood"), 3, 2, 2, 1153.5e12, 94.75 * GIB, 1.9e9),
        *(100e9, 12.5e9, 3.69e12, 1, 1.02),
    ),
)
_LARGEST_CUBE = (16, 16, 24)  # chips; the largest 3-D slice, and the most of each side


@dataclasses.dataclass(frozen=True)
class Slice:
    """One or several equal TPU slices."""

    generation: Generation
    shape: tuple[int, ...]  # chips along each axis of one slice
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.generation.devices_per_chip

    @property
    def name(self) -> str:
        """As users type it, such as 2xv5e-256."""
        count = math.prod(self.shape) * self.generation.cores_in_name
        return ("" if self.slices == 1 else f"{self.slices}x") + f"{self.generation.name}-{count}"

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Along which axes the links close to a ring: whole 4 x 4 x 4 cubes, and the sides of 16 of flat slices."""
        if self.generation.dimensions == 2:
            return tuple(side == 16 for side in self.shape)
        return (all(side % 4 == 0 for side in self.shape),) * 3

    @property
    def host_shape(self) -> tuple[int, int, int]:
        """Chips of one host along each axis: 4 of a larger slice, all of a small one."""
        if self.generation.dimensions == 2 and math.prod(self.shape) <= 8:
            return self.shape[0], self.shape[1], 1
        return min(2, self.shape[0]), min(2, self.shape[1]), 1

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return self.chips // math.prod(self.host_shape)

    @property
    def libtpu_options(self) -> dict[str, Any]:
        """Keyword arguments of `jax.experimental.topologies.get_topology_desc`."""
        options: dict[str, Any] = {
            "topology_name": f"{self.generation.libtpu}:{'x'.join(map(str, self.shape))}",
            "chips_per_host_bounds": self.host_shape,
        }
        if self.generation.chip_config != "default":
            options["chip_config_name"] = self.generation.chip_config
        if any(self.wrap):
            options["wrap"] = (*self.wrap, False)[:3]
        if self.slices > 1:
            options["num_slices"] = self.slices
        return options


def parse_topology(name: str, slices: int = 1) -> Slice:
    """Reads a slice's name.

    Args:
      name: `v5p-128` (v4, v5p and tpu7x count TensorCores, two for each chip), `v5e-256` or `v5litepod-256`, `v6e-64`
        (these count chips), or with its shape in chips, `v5p:4x4x8`; several slices: `2xv5e-256`.
      slices: number of slices where the name does not say it.

    Raises:
      UserError: no such slice; names the nearest one.

    Example: v5p-128 -> 64 chips as 4 x 4 x 4; v6e-64 -> 64 chips as 8 x 8
    """
    text = name.strip().lower()
    if several := re.fullmatch(r"(\d+)x(.*-\d+|.*:.*)", text):
        slices, text = int(several[1]), several[2]
    by_name = {alias: gen for gen in GENERATIONS for alias in (gen.name, *gen.aliases)}
    found = re.fullmatch(r"([a-z0-9]+)-(\d+)", text)
    shaped = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+){1,2})", text)
    match = shaped or found
    if (dashed := re.fullmatch(r"([a-z0-9]+)-(\d+(?:x\d+)+)", text)) and dashed[1] in by_name:
        raise UserError(f"--topology: no TPU slice {name!r}; a shape is written {dashed[1]}:{dashed[2]}")
    if slices < 1:
        raise UserError(f"--slices: {slices} is not a number of slices")
    if not match or match[1] not in by_name:
        raise UserError(f"--topology: no TPU slice {name!r}, the nearest name is {_nearest(text)}; see docs/tpu.md")
    generation = by_name[match[1]]
    if shaped:
        shape = tuple(int(side) for side in shaped[2].split("x"))
        good = len(shape) == generation.dimensions and tuple(sorted(shape)) in slice_shapes(generation)
        if not good:
            raise UserError(f"--topology: no {generation.name} slice has the shape {shaped[2]}; see docs/tpu.md")
        return Slice(generation, shape, slices)
    chips, rest = divmod(int(match[2]), generation.cores_in_name)
    sizes = {math.prod(shape): shape for shape in reversed(list(slice_shapes(generation)))}
    if rest or chips not in sizes:
        raise UserError(f"--topology: no TPU slice {name!r}, the nearest one is {_nearest_size(generation, chips)}")
    return Slice(generation, sizes[chips], slices)


def slice_shapes(generation: Generation) -> Iterator[tuple[int, ...]]:
    """Shapes of slices, sides ascending; of the shapes with the same number of chips the nearest to a cube first."""
    if generation.dimensions == 2:
        yield from ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
        return
    yield from ((1, 1, 1), (2, 2, 1), (1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))
    a, b, c = (side // 4 for side in _LARGEST_CUBE)
    cubes = [
        (x, y, z)
        for x in range(1, a + 1)
        for y in range(x, b + 1)
        for z in range(y, c * b + 1)
        if x * y * z <= a * b * c
    ]
    yield from ((4 * x, 4 * y, 4 * z) for x, y, z in sorted(cubes, key=sum))


def _nearest_size(generation: Generation, chips: int) -> str:
    shape = min(slice_shapes(generation), key=lambda shape: abs(math.log(math.prod(shape) / max(chips, 1))))
    return Slice(generation, shape).name


def _nearest(text: str) -> str:
    """A valid name like `text`."""
    names = [
        f"{alias}-{_count(gen, shape)}"
        for gen in GENERATIONS
        for alias in (gen.name, *gen.aliases)
        for shape in slice_shapes(gen)
    ]
    return difflib.get_close_matches(text, names, n=1, cutoff=0.0)[0]


def _count(generation: Generation, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * generation.cores_in_name
