"""The device mesh, and the one table from logical axes to mesh axes."""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from navil_jax.config import MeshConfig
from navil_jax.errors import UserError

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
