"""Start-up of several hosts, the device mesh, and the one table from logical axes to mesh axes."""

import math
import os

import jax
from jax.sharding import NamedSharding, PartitionSpec

from navil_jax.config import MeshConfig
from navil_jax.errors import UserError

# What joins a process to the others where no cluster says it; JAX reads the first one itself.
PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SHUTDOWN_SECONDS = 30  # a process that fails alone waits so long for the others, then all end

# Logical axis of a parameter or activation -> the mesh axes that split it (None: kept whole).
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "slots": None,
    "patches": None,
    "features": None,
    "layers": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "qkv": None,
    "vocab": "tensor",
    "patch": None,
    "special": None,
    "norm": None,
}


def start_hosts() -> None:
    """Joins this process to the others of its pod, if the environment says that there are some. Call it first of all.

    It says so by `PROCESS_VARIABLES`, or, on a machine with TPU chips, by several hosts in TPU_WORKER_HOSTNAMES (or
    TPU_PROCESS_ADDRESSES). Where neither is set on such a machine, JAX asks Google Cloud's metadata server.

    Raises:
      UserError: a variable is missing or is not a number in its range.
    """
    given = [name for name in PROCESS_VARIABLES if os.environ.get(name)]
    if given:
        _require(PROCESS_VARIABLES, given[0])
        count, number = (_whole_number(name) for name in PROCESS_VARIABLES[1:])
        if number >= count:
            raise UserError(f"JAX_PROCESS_ID: {number}, but JAX_NUM_PROCESSES={count} numbers them from 0")
        jax.distributed.initialize(num_processes=count, process_id=number, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    elif "tpu" in (jax.config.jax_platforms or "") and _several_tpu_hosts():
        jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_SECONDS)


def _several_tpu_hosts() -> bool:
    """Whether this machine is part of a TPU slice, or JAX must ask the metadata server to know."""
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in os.environ:
            several = "," in os.environ[name]
            if several:
                _require(("TPU_WORKER_ID",), name)
            return several
    return "TPU_SKIP_MDS_QUERY" not in os.environ


def _require(names: tuple[str, ...], given: str) -> None:
    for name in names:
        if not os.environ.get(name):
            raise UserError(f"{name}: is not set in the environment, but {given} is; set both or neither")


def _whole_number(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise UserError(f"{name}: must be a whole number, not {value!r}")
    return int(value)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with the axes data, fsdp, tensor over all devices (or those given).

    Raises:
      UserError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        axes = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(f"config.mesh: {axes} does not make {len(devices)} devices; set one axis to -1")
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes -> mesh axes. A logical axis that the table lacks is an error (KeyError names it)."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def named(mesh: jax.sharding.Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to split `x` by its logical axes; without a mesh in scope, `x` as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
