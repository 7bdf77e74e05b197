"""How a config lies on a slice: its table of axes, and every parameter and state array, without compiling anything."""

import math

import jax
from jax.sharding import AbstractMesh

from navil_jax import sharding
from navil_jax.config import Config
from navil_jax.console import markdown_table
from navil_jax.model import params as model_params
from navil_jax.plan.planner import mesh_sizes
from navil_jax.plan.topology import GIB, Slice
from navil_jax.train.optimizer import split_trainable
from navil_jax.train.step import abstract_state


def text(config: Config, place: Slice) -> str:
    """Two tables: logical axis -> mesh axes, and each parameter with its parts; then the bytes of a device.

    Raises:
      UserError: the mesh does not make the slice's devices, or an axis does not divide what it is to split.
      KeyError: a parameter has a logical axis without a rule.
    """
    sharding.use_rules(config.mesh.rules)
    sizes = mesh_sizes(config.mesh, place)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    rules = [
        {"logical axis": axis, "mesh axes": " x ".join(sharding.mesh_axes(axis)) or "whole"} for axis in sharding.RULES
    ]
    state = abstract_state(config, mesh)
    trained = set(model_params.flatten(split_trainable(config.optimizer, model_params.shapes(config.model))[0]))
    arrays = model_params.flatten(state.trainable) | model_params.flatten(state.frozen)
    lines = [
        {
            "parameter": name,
            "shape": " x ".join(f"{size:,}" for size in leaf.shape) or "scalar",
            "split": _split(leaf, sizes),
            "a device": " x ".join(f"{size:,}" for size in leaf.sharding.shard_shape(leaf.shape)) or "scalar",
            "MiB": f"{_bytes(leaf) / 2**20:,.2f}",
            "trained": "yes" if name in trained else "no",
        }
        for name, leaf in sorted(arrays.items())
    ]
    parts = {"trained": state.trainable, "frozen": state.frozen, "optimizer": state.optimizer, "averages": state.ema}
    held = {name: sum(map(_bytes, jax.tree.leaves(part))) / GIB for name, part in parts.items()}
    axes = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    total = ", ".join(f"{name} {size:.2f} GiB" for name, size in held.items() if size)
    tables = f"{markdown_table(rules)}\n\n{markdown_table(lines)}"
    return f"mesh {axes} on {place.name}\n\n{tables}\n\nEach device holds: {total}."


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _split(leaf: jax.ShapeDtypeStruct, sizes: dict[str, int]) -> str:
    """Example: [4096, 16384] over fsdp=64 and tensor=2 -> "fsdp 64, tensor 2"; mesh axes of one device are left out."""
    named = [axis if isinstance(axis, tuple) else (axis,) for axis in leaf.sharding.spec]
    used = [axis for axes in named for axis in axes if axis and sizes[axis] > 1]
    return ", ".join(f"{axis} {sizes[axis]}" for axis in used) or "whole"
