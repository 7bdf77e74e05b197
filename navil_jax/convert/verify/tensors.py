"""Two checkpoints against each other, tensor by tensor; a tensor is compared a chunk at a time."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from navil_jax.convert.groups import GROUPS, UNKNOWN, tensor_groups
from navil_jax.convert.opened import OpenCheckpoint

CHUNK = 2**22  # elements that are held in float64 at a time


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """How far a tensor of the second checkpoint is from the first one's.

    Attributes:
      absolute: largest |a - b|; nan if only one of them has a nan there.
      relative: largest |a - b| / max(|a|, |b|).
      equal: same dtype and the same bytes.
      within: every element is in the tolerance.
    """

    name: str
    group: str
    absolute: float
    relative: float
    equal: bool
    within: bool


def compare_tensor(name: str, group: str, a: np.ndarray, b: np.ndarray, tolerance: float | None) -> TensorDifference:
    """Compares two tensors of one shape.

    Args:
      name, group: what the result is called.
      a, b: of any dtypes.
      tolerance: largest |a - b| allowed; None: equal bytes for one dtype, the rounding of the coarser one for two.
    """
    same_dtype, equal, within = a.dtype == b.dtype, a.dtype == b.dtype, True
    absolute = relative = 0.0
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.size, CHUNK):
        chunk_a, chunk_b = (np.ascontiguousarray(x[start : start + CHUNK]) for x in (flat_a, flat_b))
        if same_dtype and np.array_equal(chunk_a.view(np.uint8), chunk_b.view(np.uint8)):
            continue
        equal = False
        with np.errstate(invalid="ignore"):
            wide_a, wide_b = chunk_a.astype(np.float64), chunk_b.astype(np.float64)
            difference = np.where(wide_a == wide_b, 0.0, np.abs(wide_a - wide_b))
            size = np.maximum(np.abs(wide_a), np.abs(wide_b))
            ratio = np.divide(difference, size, out=np.zeros_like(difference), where=difference != 0)
        absolute, relative = np.maximum(absolute, difference.max()), np.maximum(relative, ratio.max())
        if tolerance is not None:
            within &= bool(np.all(difference <= tolerance))
        elif same_dtype:
            within = False
        else:
            within &= bool(np.all(difference <= rounding(a.dtype, b.dtype) * size + _smallest(a.dtype, b.dtype)))
    return TensorDifference(name, group, float(absolute), float(relative), equal, within)


def rounding(*dtypes: np.dtype) -> float:
    """The largest relative error of rounding to the coarsest of these dtypes. Example: bfloat16 -> 2**-8"""
    return max((float(jnp.finfo(dtype).eps) / 2 for dtype in dtypes if jnp.issubdtype(dtype, np.floating)), default=0.0)


def _smallest(*dtypes: np.dtype) -> float:
    """The spacing of the coarsest dtype around zero."""
    floats = (dtype for dtype in dtypes if jnp.issubdtype(dtype, np.floating))
    return max((float(jnp.finfo(dtype).smallest_subnormal) for dtype in floats), default=0.0)


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """All tensors of two checkpoints.

    Attributes:
      tensors: of the tensors that both have in one shape.
      only_first, only_second: names of tensors that the other lacks.
      shapes: tensors whose shapes differ, and how.
      dtypes: pair of dtypes -> number of tensors that have the first one in the first checkpoint, the second one in
        the second; pairs of equal ones are left out.
      tolerance: in words.
    """

    tensors: tuple[TensorDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    shapes: tuple[str, ...]
    dtypes: dict[str, int]
    tolerance: str

    @property
    def ok(self) -> bool:
        return self.complete and all(tensor.within for tensor in self.tensors)

    @property
    def complete(self) -> bool:
        """Both have the same tensors in the same shapes."""
        return bool(self.tensors) and not (self.only_first or self.only_second or self.shapes)

    @property
    def worst(self) -> list[TensorDifference]:
        """Tensors out of tolerance, the largest difference first."""
        return sorted((t for t in self.tensors if not t.within), key=_badness)

    def groups(self) -> dict[str, list[TensorDifference]]:
        """Group -> its tensors, the largest difference first; groups without tensors are left out."""
        found = {group: [t for t in self.tensors if t.group == group] for group in (*GROUPS, UNKNOWN)}
        return {group: sorted(tensors, key=_badness) for group, tensors in found.items() if tensors}

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "tolerance": self.tolerance,
            "tensors": len(self.tensors),
            "byte_equal": sum(tensor.equal for tensor in self.tensors),
            "largest_absolute": largest([tensor.absolute for tensor in self.tensors]),
            "largest_relative": largest([tensor.relative for tensor in self.tensors]),
            "groups": {
                group: {
                    "tensors": len(tensors),
                    "byte_equal": sum(tensor.equal for tensor in tensors),
                    "absolute": tensors[0].absolute,
                    "relative": largest([tensor.relative for tensor in tensors]),
                    "worst": tensors[0].name,
                    "ok": all(tensor.within for tensor in tensors),
                }
                for group, tensors in self.groups().items()
            },
            "out_of_tolerance": [tensor.name for tensor in self.worst],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "shapes": list(self.shapes),
            "dtypes": self.dtypes,
        }


def _badness(tensor: TensorDifference) -> tuple[bool, bool, float]:
    return tensor.within, not np.isnan(tensor.absolute), -tensor.absolute


def largest(values: Sequence[float]) -> float:
    """The largest value, 0 for none, nan if there is one."""
    return float(np.max(values, initial=0.0))


def compare_weights(first: OpenCheckpoint, second: OpenCheckpoint, tolerance: float | None) -> WeightReport:
    """Reads both checkpoints tensor by tensor.

    Args:
      first, second: of either format.
      tolerance: as in `compare_tensor`.
    """
    groups = tensor_groups(second.config.model) | tensor_groups(first.config.model)
    order = second.info if second.kind == "orbax" else first.info  # the one that is slow to read out of order
    both = [name for name in order if name in first.info and name in second.info]
    shapes = {name: (first.info[name].shape, second.info[name].shape) for name in both}
    wrong = {name for name, (a, b) in shapes.items() if a != b}
    dtypes = Counter(f"{a} and {b}" for name in both if (a := first.info[name].dtype) != (b := second.info[name].dtype))
    tensors = tuple(
        compare_tensor(name, groups.get(name, UNKNOWN), first.tensors[name], second.tensors[name], tolerance)
        for name in tqdm(both, desc="tensors", disable=None, leave=False)
        if name not in wrong
    )
    return WeightReport(
        tensors,
        only_first=tuple(name for name in first.info if name not in second.info),
        only_second=tuple(name for name in second.info if name not in first.info),
        shapes=tuple(f"{name} is {list(shapes[name][0])} and {list(shapes[name][1])}" for name in sorted(wrong)),
        dtypes=dict(dtypes),
        tolerance=_words(tolerance, dtypes),
    )


def _words(tolerance: float | None, dtypes: Counter[str]) -> str:
    if tolerance is not None:
        return f"{tolerance:g}"
    same = "equal bytes"
    return f"rounding to the coarser dtype ({', '.join(dtypes)}), otherwise {same}" if dtypes else same
