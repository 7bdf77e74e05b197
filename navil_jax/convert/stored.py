"""Tensors as they lie in files: what is known of them before their data is read."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from navil_jax.config.plain import unique_keys
from navil_jax.errors import UserError

ParamDtype = Literal["float32", "bfloat16"]  # what parameters may be stored as
PARAM_DTYPES: tuple[ParamDtype, ...] = get_args(ParamDtype)
SHARD_BYTES = 5_000_000_000  # most bytes of one file that is written

# The codes of the safetensors format, in the order in which its library lays tensors out.
DTYPES: dict[str, np.dtype] = {
    code: np.dtype(dtype)
    for code, dtype in {
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
        "C64": np.complex64,
        "F32": np.float32,
        "U32": np.uint32,
        "I32": np.int32,
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "U16": np.uint16,
        "I16": np.int16,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I8": np.int8,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor; bfloat16 and float8 are the dtypes of ml_dtypes."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor in a file.

    Attributes:
      file: the file that holds it.
      offset: of its first element, in bytes from the start of the file.
      strides: in bytes; None where the elements follow each other in C order.
    """

    file: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def span(self) -> int:
        """Bytes from its first element to the end of its last one."""
        if self.strides is None or self.nbytes == 0:
            return self.nbytes
        steps = zip(self.shape, self.strides, strict=True)
        return sum((size - 1) * stride for size, stride in steps) + self.dtype.itemsize


def count_not_finite(value: np.ndarray) -> int:
    """How many elements are infinite or nan; of 8-bit types, which mark them otherwise, 0."""
    if value.dtype.itemsize < 2:
        return 0
    bits = f"u{value.dtype.itemsize}"
    infinity = np.array(np.inf, value.dtype).view(bits)
    return int(np.count_nonzero((value.view(bits) & infinity) == infinity))


def check_finite(name: str, value: np.ndarray) -> None:
    """Raises `UserError` for values that are infinite or no numbers, with which nothing can be computed."""
    if bad := count_not_finite(value):
        raise UserError(f"{name}: {bad:,} of {value.size:,} values are infinite or no numbers; take a whole checkpoint")


def cast(name: str, value: np.ndarray, dtype: np.dtype | str) -> np.ndarray:
    """The value in another floating dtype.

    Raises:
      UserError: a finite element is beyond the range of `dtype`.
    """
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        result = value.astype(dtype)
    if (lost := count_not_finite(result)) and (lost := lost - count_not_finite(value)) > 0:
        raise UserError(f"{name}: {lost} values of {value.dtype} are beyond the range of {dtype}; choose a wider dtype")
    return result


def parsed(content: str | bytes) -> Any:
    """What JSON says. Raises `ValueError` for whatever is wrong with it; it may come from anywhere."""
    try:
        return json.loads(content, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def are_counts(*numbers: Any) -> bool:
    """Whether all are integers from 0 on, as sizes and offsets in a file must be."""
    return all(type(number) is int and number >= 0 for number in numbers)


def listed(items: Sequence[str], separator: str = "; ", limit: int = 20) -> str:
    """`a; b; c`, and how many more where there are more than `limit`."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])
