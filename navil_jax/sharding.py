"""Start-up of several hosts, the device mesh, and the one table from logical axes to mesh axes."""

import math
import os
import socket
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from navil_jax.config import AxisRule, MeshConfig
from navil_jax.errors import UserError

# What joins a process to the others where no cluster says it; JAX reads the first one itself.
PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SHUTDOWN_SECONDS = 30  # a process that fails alone waits so long for the others, then all end

# Settings of JAX that change the random numbers of a seed, and what they are by default.
RANDOM_SETTINGS = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis of a parameter or activation -> the mesh axes that split it (none: kept whole).
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "slots": ("context",),  # of a row of tokens, outside attention
    "patches": ("context",),
    "positions": (),  # of a row inside attention, where heads are split instead
    "features": (),
    "layers": (),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vision_heads": (),  # 23 in NaViL-2B: not split outside attention
    "attention_heads": ("tensor", "context"),
    "head_dim": (),
    "qkv": (),
    "vocab": ("tensor",),
    "patch": (),
    "special": (),
    "norm": (),
}
_rules = dict(RULES)  # the table of this process, see `use_rules`


def start_hosts() -> None:
    """Joins this process to the others of its pod, if the environment says that there are some. Call it first of all.

    It says so by `PROCESS_VARIABLES`, or, on a machine with TPU chips, by several hosts in TPU_WORKER_HOSTNAMES (or
    TPU_PROCESS_ADDRESSES) or several slices in MEGASCALE_NUM_SLICES. Where none is set on such a machine, JAX asks
    Google Cloud's metadata server.

    Raises:
      UserError: a variable is missing or is not a number in its range.
    """
    given = [name for name in PROCESS_VARIABLES if os.environ.get(name)]
    if given:
        _require(PROCESS_VARIABLES, given[0])
        count, number = (_whole_number(name) for name in PROCESS_VARIABLES[1:])
        if number >= count:
            raise UserError(f"JAX_PROCESS_ID: {number}, but JAX_NUM_PROCESSES={count} numbers them from 0")
        address = os.environ[PROCESS_VARIABLES[0]]
        if number == 0:
            _check_port(address)
        print(
            f"process {number} of {count} joins the others at {address}, and waits for them up to 5 minutes", flush=True
        )
        jax.distributed.initialize(num_processes=count, process_id=number, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    elif "tpu" in (jax_setting("jax_platforms") or "") and _several_tpu_hosts():
        jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_SECONDS)


def _check_port(address: str) -> None:
    """Raises a `UserError` if another program of this machine listens at the port of an address HOST:PORT."""
    port = address.rpartition(":")[2]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{PROCESS_VARIABLES[0]}: must be HOST:PORT, not {address!r}")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(port)))
        except OSError as error:
            raise UserError(
                f"{PROCESS_VARIABLES[0]}: port {port} cannot be listened at ({error.strerror}); end what has it, or "
                "take another port in all processes"
            ) from error


def _several_tpu_hosts() -> bool:
    """Whether this machine is part of a TPU slice, or JAX must ask the metadata server to know."""
    slices = _whole_number("MEGASCALE_NUM_SLICES") if os.environ.get("MEGASCALE_NUM_SLICES") else 1
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in os.environ:
            several = "," in os.environ[name] or slices > 1  # a slice of one host names none but itself
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


def use_rules(overrides: Sequence[AxisRule]) -> None:
    """Puts a config's rows over RULES, for all of this process from now on.

    Raises:
      UserError: a logical axis that the table lacks, or a mesh axis that there is not.
    """
    for rule in overrides:
        if rule.axis not in RULES:
            raise UserError(f"config.mesh.rules: no logical axis {rule.axis}; there are {', '.join(RULES)}")
        for axis in rule.mesh_axes:
            if axis not in MESH_AXES:
                raise UserError(f"config.mesh.rules: no mesh axis {axis}; there are {', '.join(MESH_AXES)}")
    _rules.update(RULES | {rule.axis: rule.mesh_axes for rule in overrides})


def jax_setting(name: str) -> Any:
    """A flag of JAX, which makes its flags when it is imported."""
    return getattr(jax.config, name)


def check_jax_settings() -> None:
    """Raises a `UserError` if JAX has 64-bit types switched on, or other random numbers than usual for a seed."""
    if jax_setting("jax_enable_x64"):
        raise UserError("JAX_ENABLE_X64: 64-bit types are switched on, but attention needs 32-bit ones; unset it")
    for name, usual in RANDOM_SETTINGS.items():
        if (value := getattr(jax.config, name, usual)) != usual:
            raise UserError(
                f"{name.upper()}: with {value} a seed makes other parameters and tokens than elsewhere; unset it"
            )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with the axes data, fsdp, tensor, context over all devices (or those given).

    Of several slices each holds whole parts of the data axis, so that only the sum of gradients crosses between them.

    Raises:
      UserError: the axis sizes do not multiply to the number of devices, or data does not divide by the slices; or as
        `check_jax_settings`.
    """
    check_jax_settings()
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        axes = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(f"config.mesh: {axes} does not make {len(devices)} devices; set one axis to -1")
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.sharding.Mesh(_grid(tuple(sizes.values()), devices), tuple(sizes), axis_types=auto)
    if sizes["data"] % slices:
        raise UserError(
            f"config.mesh.data: {sizes['data']} does not divide by the {slices} slices; only this axis may cross them"
        )
    within = sizes | {"data": sizes["data"] // slices}
    grid = mesh_utils.create_hybrid_device_mesh(
        tuple(within.values()), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
    return jax.sharding.Mesh(grid, tuple(sizes), axis_types=auto)


def _grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices so that neighbours along an axis of the mesh are neighbours in the torus of one slice.

    An axis of the mesh takes whole axes of the torus if it can, else parts of them: 4 x 64 of 16 x 16 chips.
    """
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that split a logical axis.

    Raises:
      KeyError: the table has no row for it.
    """
    if axis not in _rules:
        raise KeyError(f"sharding.RULES has no row for the logical axis {axis!r}")
    return _rules[axis]


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes -> mesh axes; errors as in `mesh_axes`."""
    return PartitionSpec(*((mesh_axes(axis) or None) if axis else None for axis in axes))


def shards(axis: str) -> int:
    """Into how many parts the mesh in scope splits a logical axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else axis_size(mesh, axis)


def axis_size(mesh: AnyMesh, axis: str) -> int:
    """Into how many shards a mesh splits a logical axis."""
    return math.prod(mesh.shape[name] for name in mesh_axes(axis))


def named(mesh: AnyMesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(axes))


def row_place(mesh: jax.sharding.Mesh) -> int:
    """The number of this process in the order of the rows of a batch that the processes hold.

    Where the mesh has a process's devices side by side, processes so numbered hold the rows of a batch one after the
    other. Where it does not (some meshes over a torus), each holds shards between those of others.
    """
    rows = axis_size(mesh, "batch")
    indices = named(mesh, "batch").devices_indices_map((rows,))
    first: dict[int, int] = {}
    for device in mesh.devices.flat:
        row = range(rows)[indices[device][0]].start
        first[device.process_index] = min(row, first.get(device.process_index, row))
    return sorted(first, key=lambda process: first[process]).index(jax.process_index())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to split `x` by its logical axes; without a mesh in scope, `x` as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
