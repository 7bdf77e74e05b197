"""What Google Cloud calls the slices of `topology`: machines, images, zones, and the compiler flags of each generation.

Sources: Google Cloud's pages on TPU regions and zones, TPU versions, GKE and instance groups; the tables of xpk 1.16.0;
the flags are those of maxtext (benchmarks/xla_flags_library.py) and tpu-recipes (training/ironwood).
"""

import dataclasses
import math

from navil_jax.errors import UserError
from navil_jax.plan.topology import GENERATIONS, Generation, Slice, parse_topology

RECOMMENDED = "recommended"  # in the place of flags: those of the generation
# Chips; of larger slices some have another usual shape than `topology` takes, so they are named by shape.
_NAMED, _NAMED_V4 = 4096, 256


@dataclasses.dataclass(frozen=True)
class Cloud:
    """A generation of TPUs in Google Cloud. Empty names: not to be had there.

    Attributes:
      accelerator: prefix of its slices' names.
      machine: of Compute Engine and GKE, without the number of its chips.
      label: `cloud.google.com/gke-tpu-accelerator` of its nodes.
      runtime: system image of TPU VMs.
      image: family of system images of Compute Engine.
      disk: kind of boot disk that its machines need, where the usual one does not do.
      chips: of the smallest and of the largest slice.
      zones: where it is.
      vcpus: chips of a machine -> its virtual CPUs.
      flags: LIBTPU_INIT_ARGS that are recommended for dense models.
      more_flags: as well, for several slices.
    """

    accelerator: str
    machine: str
    label: str
    runtime: str
    image: str
    disk: str
    chips: tuple[int, int]
    zones: tuple[str, ...]
    vcpus: dict[int, int]
    flags: tuple[str, ...] = ()
    more_flags: tuple[str, ...] = ()

    def machine_type(self, place: Slice) -> str:
        """Example: v5p-128 -> ct5p-hightpu-4t"""
        return f"{self.machine}-{chips_per_host(place)}t"

    def sized_name(self, place: Slice) -> str:
        """One slice's name without its shape. Example: 2xv5e-256 -> v5litepod-256"""
        return f"{self.accelerator}-{place.name.rpartition('-')[2]}"

    def type_name(self, place: Slice) -> str:
        """One slice's name, with the shape where that is not the usual one: v5litepod-256, v5p-4x4x16."""
        return self.sized_name(place) if is_named(place) else f"{self.accelerator}-{shape_text(place)}"


_FUSION = "--xla_tpu_enable_async_collective_fusion"
_DENSE = (
    "--xla_tpu_scoped_vmem_limit_kib=98304",
    f"{_FUSION}=true",
    f"{_FUSION}_fuse_all_gather=true",
    f"{_FUSION}_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
)
_DENSE_SLICES = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
_IRONWOOD = (
    "--xla_tpu_scoped_vmem_limit_kib=61440",
    "--xla_tpu_bf16_emission_mode=NATIVE_EMISSION",
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
    "--xla_tpu_use_single_sparse_core_for_all_gather_offload=true",
)
_IMAGE = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"
CLOUDS = {
    "v4": Cloud(
        *("v4", "ct4p-hightpu", "tpu-v4-podslice", "tpu-ubuntu2204-base", "", ""),
        chips=(4, 4096),
        zones=("us-central2-b",),
        vcpus={4: 240},
    ),
    "v5e": Cloud(
        *("v5litepod", "ct5lp-hightpu", "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", "", ""),
        chips=(8, 256),
        zones=(
            *("us-central1-a", "us-east1-c", "us-east5-a", "us-east5-b", "us-east5-c", "us-south1-a"),
            *("us-west1-c", "us-west4-a", "us-west4-b", "europe-west4-b"),
        ),
        vcpus={1: 24, 4: 112, 8: 224},
    ),
    "v5p": Cloud(
        *("v5p", "ct5p-hightpu", "tpu-v5p-slice", "v2-alpha-tpuv5", _IMAGE, ""),
        chips=(4, 6144),
        zones=("us-central1-a", "us-east5-a", "us-east5-b", "us-east5-c", "us-south1-a", "europe-west4-b"),
        vcpus={4: 208},
        flags=_DENSE,
        more_flags=_DENSE_SLICES,
    ),
    "v6e": Cloud(
        *("v6e", "ct6e-standard", "tpu-v6e-slice", "v2-alpha-tpuv6e", _IMAGE, ""),
        chips=(1, 256),
        zones=(
            *("us-central1-b", "us-central1-ai1a", "us-east1-d", "us-east4-a", "us-east4-b", "us-east5-a"),
            *("us-east5-b", "us-east5-c", "us-south1-a", "us-south1-ai1b", "us-west1-c"),
            *("europe-west4-a", "asia-northeast1-b", "southamerica-west1-a"),
        ),
        vcpus={1: 44, 4: 180, 8: 180},
        flags=_DENSE,
        more_flags=_DENSE_SLICES,
    ),
    "tpu7x": Cloud(
        *("tpu7x", "tpu7x-standard", "tpu7x", "", "ubuntu-accel-2404-amd64-tpu-tpu7x", "hyperdisk-balanced"),
        chips=(1, 6144),
        zones=("us-central1-c", "us-central1-ai1a"),
        vcpus={4: 224},
        flags=_IRONWOOD,
    ),
}


def cloud_of(generation: Generation) -> Cloud:
    return CLOUDS[generation.name]


def shape_text(place: Slice) -> str:
    """Chips along each axis of one slice. Example: v5p-128 -> 4x4x4"""
    return "x".join(map(str, place.shape))


def chips_per_host(place: Slice) -> int:
    """Of machines of GKE and of instance groups, which have 4 chips; TPU VMs with v5e-8 or v6e-8 are one host of 8."""
    return min(4, place.chips // place.slices)


def hosts_per_slice(place: Slice) -> int:
    """On GKE and in an instance group."""
    return place.chips // place.slices // chips_per_host(place)


def host_vcpus(place: Slice) -> int | None:
    """Virtual CPUs of a host of a slice; None: of a machine that is not known here. Example: v5p-128 -> 208"""
    return cloud_of(place.generation).vcpus.get(math.prod(place.host_shape))


def is_named(place: Slice) -> bool:
    """Whether Google Cloud takes the name with the size for this shape."""
    one = dataclasses.replace(place, slices=1)
    most = _NAMED_V4 if place.generation.name == "v4" else _NAMED
    return one == parse_topology(one.name) and one.chips <= most


def check_slice(place: Slice) -> None:
    """Raises a `UserError` if Google Cloud has no such slice, though one could plan for it."""
    least, most = cloud_of(place.generation).chips
    if not least <= place.chips // place.slices <= most:
        sizes = [f"{place.generation.name}-{chips * place.generation.cores_in_name}" for chips in (least, most)]
        raise UserError(f"{place.name}: Google Cloud has no such slice, they go from {sizes[0]} to {sizes[1]}")


def check_zone(generation: Generation, zone: str) -> None:
    """Raises a `UserError` if there is no TPU of this generation in a zone."""
    zones = cloud_of(generation).zones
    if zone not in zones:
        others = [name for name in (gen.name for gen in GENERATIONS) if zone in CLOUDS[name].zones]
        there = f"{zone} has {', '.join(others)}" if others else f"{zone} has no TPUs"
        raise UserError(f"{there}, and {generation.name} is in {', '.join(zones)} (navil_jax/plan/cloud.py)")


def libtpu_init_args(text: str, place: Slice) -> str:
    """LIBTPU_INIT_ARGS as given, or those of the generation where `text` is "recommended".

    Raises:
      UserError: something that is no flag, or a generation that none are recommended for.
    """
    if text == RECOMMENDED:
        cloud = cloud_of(place.generation)
        if not cloud.flags:
            raise UserError(f"{text}: no flags are recommended for {place.generation.name}; leave it empty")
        return " ".join((*cloud.flags, *(cloud.more_flags if place.slices > 1 else ())))
    if wrong := [word for word in text.split() if not word.startswith("--")]:
        raise UserError(f"{wrong[0]}: is no flag; they begin with --, or say {RECOMMENDED}")
    return " ".join(text.split())
