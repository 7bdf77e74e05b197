"""Tensors of a PyTorch checkpoint -> parameters, and back, by the name table; every key and shape is accounted for.

Both directions go parameter by parameter: a tensor of one layer is a slice of a parameter that is stacked over layers,
so that whoever takes the results one after the other holds one parameter at a time (three for queries, keys, values),
or one layer of it with `iterate_layers`.
"""

from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping

import numpy as np

from navil_jax.config import ModelConfig
from navil_jax.convert.names import Entry, name_table
from navil_jax.convert.reader import TensorFolder
from navil_jax.convert.stored import TensorInfo, check_finite, listed
from navil_jax.errors import UserError
from navil_jax.model import params as model_params

STRIP = 32  # entries; that many cache lines are open at a time


def find_problems(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """What keeps these tensors from being the model's: all that is missing, unexpected or of a wrong shape or dtype.

    Args:
      config: of the model.
      tensors: name in the checkpoint -> shape and dtype.
    """
    shapes = model_params.flatten(model_params.shapes(config))
    table = name_table(config)
    problems = [f"{entry.tensor} is missing" for entry in table if entry.tensor not in tensors]
    problems += [f"{name} is not of this model" for name in sorted(set(tensors) - {entry.tensor for entry in table})]
    for entry in table:
        if entry.tensor in tensors and (shape := tensors[entry.tensor].shape) != (
            wanted := tensor_shape(entry, shapes)
        ):
            problems.append(f"{entry.tensor} has shape {list(shape)}, the config asks for {list(wanted)}")
    for entries in _by_params(config).values():
        dtypes = {tensors[entry.tensor].dtype: entry.tensor for entry in entries if entry.tensor in tensors}
        if len(dtypes) > 1:
            said = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
            problems.append(f"layers of one parameter differ in dtype: {said}")
    return problems


def iterate_params(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], skip: Container[str] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters one after the other, in the tensors' dtype.

    Args:
      config: of the model; `find_problems` found none.
      tensors: by name, may be read when asked for.
      skip: names of parameters that are not wanted.

    Yields:
      Name and value; parameters of layers have the leading `layers` axis.
    """
    shapes = model_params.flatten(model_params.shapes(config))
    for names, entries in _by_params(config).items():
        if all(name in skip for name in names):
            continue
        dtype = tensors[entries[0].tensor].dtype
        values = [np.empty(shapes[name].shape, dtype) for name in names]
        for entry in entries:
            for value, part in zip(values, entry.to_params(tensors[entry.tensor]), strict=True):
                assign(value if entry.layer is None else value[entry.layer], part)
        values.reverse()
        for name in names:
            yield name, values.pop()


def iterate_layers(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], skip: Container[str] = ()
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """The parameters layer by layer, as `param_files.ParamsWriter` takes them; arguments as in `iterate_params`.

    Yields:
      Name, layer (None: the parameter has none) and value, mostly a view on the tensor.

    Raises:
      UserError: a tensor has values that are infinite or no numbers.
    """
    for names, entries in _by_params(config).items():
        if all(name in skip for name in names):
            continue
        for entry in entries:
            for name, part in zip(names, entry.to_params(_finite(tensors, entry.tensor)), strict=True):
                yield name, entry.layer, part


def _finite(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A tensor. Raises `UserError` if it has values that are infinite or no numbers."""
    tensor = tensors[name]
    check_finite(f"{tensors.tensors[name].file}: {name}" if isinstance(tensors, TensorFolder) else name, tensor)
    return tensor


def param_info(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], dtype: str | None = None
) -> dict[str, TensorInfo]:
    """Shape and dtype of every parameter, the latter that of its tensors or `dtype`. The inverse of `tensor_info`."""
    shapes = model_params.flatten(model_params.shapes(config))
    return {
        name: TensorInfo(shapes[name].shape, np.dtype(dtype) if dtype else tensors[entries[0].tensor].dtype)
        for names, entries in _by_params(config).items()
        for name in names
    }


def params_from_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> model_params.Params:
    """All parameters from the tensors of a checkpoint, in the tensors' dtype.

    Raises:
      UserError: lists every missing, unexpected and wrongly shaped tensor at once.
    """
    info = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if problems := find_problems(config, info):
        raise UserError(f"the checkpoint does not fit the model: {listed(problems)}")
    return model_params.unflatten(dict(iterate_params(config, tensors)))


def tensor_shape(entry: Entry, shapes: Mapping) -> tuple[int, ...]:
    """The checkpoint's shape of a tensor, from the shapes of the parameters that it holds."""
    strip = 0 if entry.layer is None else 1
    parts = tuple(np.broadcast_to(np.zeros((), np.int8), shapes[name].shape[strip:]) for name in entry.params)
    return entry.to_tensor(parts).shape


class TensorView(Mapping[str, np.ndarray]):
    """Parameters seen as the tensors of a PyTorch checkpoint.
    Iterating goes from parameter to parameter, so that each is read once; in this order the last one read is kept.

    Args:
      config: of the model.
      read: name of a parameter -> its value.
    """

    def __init__(self, config: ModelConfig, read: Callable[[str], np.ndarray]) -> None:
        self._entries = {entry.tensor: entry for entries in _by_params(config).values() for entry in entries}
        self._read = read
        self._held: dict[str, np.ndarray] = {}

    def __getitem__(self, tensor: str) -> np.ndarray:
        entry = self._entries[tensor]
        if tuple(self._held) != entry.params:
            self._held = {}  # given up before the next ones are read
            for name in entry.params:
                self._held[name] = np.asarray(self._read(name))
        values = (value if entry.layer is None else value[entry.layer] for value in self._held.values())
        transposed = entry.to_tensor(tuple(values))
        result = np.empty(transposed.shape, transposed.dtype)
        assign(result, transposed)
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def tensors_from_params(config: ModelConfig, params: model_params.Params) -> TensorView:
    """The inverse of `params_from_tensors`."""
    return TensorView(config, model_params.flatten(params).__getitem__)


def tensor_info(config: ModelConfig, params: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor of `TensorView`, in its order, from those of the parameters."""
    return {
        entry.tensor: TensorInfo(tensor_shape(entry, params), params[entry.params[0]].dtype)
        for entries in _by_params(config).values()
        for entry in entries
    }


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`. In strips of the last axis a transposed source takes a tenth of NumPy's time."""
    bits = f"u{target.dtype.itemsize}"
    target, source = target.view(bits), source.view(bits)
    strip = STRIP if source.strides[-1] > source.itemsize else source.shape[-1]
    for start in range(0, source.shape[-1], strip):
        target[..., start : start + strip] = source[..., start : start + strip]


def _by_params(config: ModelConfig) -> dict[tuple[str, ...], list[Entry]]:
    groups = defaultdict(list)
    for entry in name_table(config):
        groups[entry.params].append(entry)
    return groups
