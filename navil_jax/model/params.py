"""Parameters as plain nested dicts of arrays, and their names."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from navil_jax import sharding
from navil_jax.config import ModelConfig
from navil_jax.errors import UserError
from navil_jax.model import int8
from navil_jax.model.linear import Linear
from navil_jax.model.navil import NaViL
from navil_jax.sharding import AnyMesh

Params = dict[str, Any]  # nested dict of arrays; the name of a parameter is its path joined by "/"


@functools.cache
def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure, and its parameters as shapes with logical axes; nothing is computed."""
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), ())
    ):  # Flax looks up axis names in a mesh in scope
        return nnx.split(nnx.eval_shape(lambda: NaViL(config, nnx.Rngs(0))))


def shapes(config: ModelConfig) -> Params:
    """Every parameter as a ShapeDtypeStruct."""
    return nnx.to_pure_dict(abstract(config)[1])


def shardings(config: ModelConfig, mesh: AnyMesh) -> Params:
    """How every parameter lies on the mesh, by its logical axes.

    Raises:
      KeyError: a logical axis that sharding.RULES lacks.
      UserError: a mesh axis does not divide what it is to split.
    """
    logical = nnx.to_pure_dict(nnx.get_partition_spec(abstract(config)[1]))
    names = flatten(logical)
    for name, leaf in flatten(shapes(config)).items():
        _check_divides(name, leaf.shape, tuple(names[name]), mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, sharding.partition_spec(tuple(spec))), logical)


def abstract_on(config: ModelConfig, mesh: Mesh, dtypes: Mapping[str, DTypeLike] | None = None) -> Params:
    """Every parameter as a ShapeDtypeStruct with its sharding, in its own dtype or that of `dtypes`, by name."""
    placed, changed = flatten(shardings(config, mesh)), dtypes or {}
    return unflatten(
        {
            name: jax.ShapeDtypeStruct(leaf.shape, changed.get(name, leaf.dtype), sharding=placed[name])
            for name, leaf in flatten(shapes(config)).items()
        }
    )


def computed_dtypes(config: ModelConfig) -> dict[str, str]:
    """Matrices in the dtype that every product casts them to anyway, so that having them in it changes nothing."""
    return {name: config.compute_dtype for name in flatten(shapes(config)) if name.endswith(("kernel", "embedding"))}


def _check_divides(name: str, shape: tuple[int, ...], logical: tuple[str | None, ...], mesh: AnyMesh) -> None:
    for size, axis in zip(shape, logical, strict=False):
        split = [mesh_axis for mesh_axis in (sharding.mesh_axes(axis) if axis else ()) if mesh.shape[mesh_axis] > 1]
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in split)
        if size % parts:
            raise UserError(f"config.mesh.{' x '.join(split)}: {parts} does not divide {axis} = {size} of {name}")


def initialise(config: ModelConfig, seed: int) -> Params:
    """Fresh parameters; the same for the same seed, whatever the devices."""
    return nnx.to_pure_dict(nnx.state(NaViL(config, nnx.Rngs(seed)), nnx.Param))


def with_int8(config: ModelConfig, params: Params) -> Params:
    """Matrices of the decoder's layers as `int8.Int8`, the rest as it is; `params` is emptied on the way."""
    flat = flatten(params)
    params.clear()
    rounded = jax.jit(int8.rounded, static_argnums=(1, 2))
    for path, module in nnx.iter_modules(nnx.merge(*abstract(config))):
        name = "/".join(map(str, (*path, "kernel")))
        if isinstance(module, Linear) and name.startswith("decoder/layers/"):
            flat[name] = rounded(flat[name], len(module.in_features), True)
    return unflatten(flat)


def put(config: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """The parameters on the mesh, as `shardings` says."""

    def placed(value: Any, own: NamedSharding) -> Any:
        return int8.put(value, own) if isinstance(value, int8.Int8) else jax.device_put(value, own)

    is_int8 = lambda value: isinstance(value, int8.Int8)  # noqa: E731
    return jax.tree.map(placed, params, shardings(config, mesh), is_leaf=is_int8)


def bind(config: ModelConfig, params: Params) -> NaViL:
    """The model with these parameters."""
    return nnx.merge(abstract(config)[0], params)


def flatten(params: Params) -> dict[str, Any]:
    """Nested dict -> {"decoder/final_norm/scale": array, ...}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(params: dict[str, Any]) -> Params:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(params, sep="/")
