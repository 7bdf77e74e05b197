"""Tensors of a PyTorch checkpoint -> parameters, and back, by the name table; every key and shape is accounted for."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

from navil_jax.config import ModelConfig
from navil_jax.errors import UserError
from navil_jax.model import params as model_params
from navil_jax.weights.names import name_table


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the safetensors files in a folder.

    Raises:
      UserError: there is none, or one cannot be read.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no model*.safetensors file; give the folder of a checkpoint")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:  # the library raises its own kinds for truncated and foreign files
            raise UserError(f"{file}: not a readable safetensors file ({error})") from error
    return tensors


def params_from_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> model_params.Params:
    """Parameters from the tensors of a checkpoint, in the tensors' dtype.

    Raises:
      UserError: lists every missing, unexpected and wrongly shaped tensor at once.
    """
    shapes = model_params.flatten(model_params.shapes(config))
    table = name_table(config)
    missing = [entry.tensor for entry in table if entry.tensor not in tensors]
    unexpected = sorted(set(tensors) - {entry.tensor for entry in table})
    problems = [f"{name} is missing" for name in missing] + [f"{name} is not of this model" for name in unexpected]
    result: dict[str, np.ndarray] = {}
    for entry in table:
        if entry.tensor in missing:
            continue
        expected = tensor_shape(entry, shapes)
        tensor = tensors[entry.tensor]
        if tensor.shape != expected:
            problems.append(f"{entry.tensor} has shape {list(tensor.shape)}, the config asks for {list(expected)}")
            continue
        for name, value in zip(entry.params, entry.to_params(tensor), strict=True):
            if entry.layer is None:
                result[name] = value
            else:
                stacked = result.setdefault(name, np.empty(shapes[name].shape, value.dtype))
                stacked[entry.layer] = value
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"the checkpoint does not fit the model: {shown}")
    return model_params.unflatten(result)


def tensor_shape(entry, shapes: Mapping) -> tuple[int, ...]:
    """The checkpoint's shape of a tensor, from the shapes of the parameters that it holds."""
    strip = 0 if entry.layer is None else 1
    parts = tuple(np.broadcast_to(np.zeros((), np.int8), shapes[name].shape[strip:]) for name in entry.params)
    return entry.to_tensor(parts).shape


def tensors_from_params(config: ModelConfig, params: model_params.Params) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a checkpoint, one after the other. The inverse of `params_from_tensors`."""
    flat = model_params.flatten(params)
    for entry in name_table(config):
        values = (flat[name] if entry.layer is None else flat[name][entry.layer] for name in entry.params)
        yield entry.tensor, np.ascontiguousarray(entry.to_tensor(tuple(map(np.asarray, values))))
