"""Ranges: what a number of a config or of a command may be, stated in its type and checked by name.

A field says it where it stands, `depth: Count = 24`; so does an option of a command, `type=read_as(Count)`.
"""

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

from navil_jax.errors import UserError

MOST = 2**31 - 1  # sizes and steps are int32 on devices


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, which belong to it unless they are open; no range holds nan or an infinity."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    also: tuple[int, ...] = ()  # numbers outside that have a meaning of their own

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return value in self.also or (abs(value) <= sys.float_info.max and above and below)

    def wanted(self, value: float) -> str:
        """What a number outside should be. Example: "above 0 and at most 1" """
        said = [f"{'above' if self.low_open else 'at least'} {self.low:,}"]
        if self.high < MOST or self.high < value < math.inf:
            said.append(f"{'below' if self.high_open else 'at most'} {self.high:,}")
        return " and ".join(said) + "".join(f", or {value}" for value in self.also)


Count = Annotated[int, Range(1, MOST)]
Amount = Annotated[int, Range(0, MOST)]  # 0: none, or all
Seed = Annotated[int, Range(0, 2**32 - 1)]  # JAX takes a seed's lower 32 bits, so that -1 would be another one's twin
Processes = Annotated[int, Range(0, 1024)]
Threads = Annotated[int, Range(1, 1024)]
Axis = Annotated[int, Range(1, MOST, also=(-1,))]  # of a mesh
Bytes = Annotated[int, Range(1, 2**63 - 1)]
Positive = Annotated[float, Range(0, low_open=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, low_open=True)]
Decay = Annotated[float, Range(0, 1, high_open=True)]
Between = Annotated[float, Range(0, 1, low_open=True, high_open=True)]
Factor = Annotated[float, Range(1)]
Temperature = Annotated[float, Range(1, also=(0,))]  # 0: none
Passes = Annotated[float, Range(0, 1e6, low_open=True)]


def check_ranges(node: Any, prefix: str = "config", of: str = "") -> None:
    """Checks every number of a config, or of a part of it at the key `prefix`, of an entry that `of` names.

    Raises:
      UserError: names the key of a number out of its range, and the entry it stands in where that has a name.
    """
    for name, hint in typing.get_type_hints(type(node), include_extras=True).items():
        check(getattr(node, name), hint, f"{prefix}.{name}", of)


def check(value: Any, hint: Any, key: str, of: str = "") -> None:
    """Checks a value of one of the kinds above, or of what holds some; arguments and errors as in `check_ranges`."""
    if value is None:
        return
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    if dataclasses.is_dataclass(value):
        check_ranges(value, key, of)
    elif typing.get_origin(hint) is tuple:
        for number, entry in enumerate(value):
            name = getattr(entry, "name", "")
            check(entry, typing.get_args(hint)[0], f"{key}.{number}", f" of {name!r}" if name else of)
    elif (limits := _range(hint)) is not None and value not in limits:
        raise UserError(f"{key}{of}: must be {limits.wanted(value)}, not {value}")


def _range(hint: Any) -> Range | None:
    marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, Range)), None)


def read_as(kind: Any) -> Callable[[str], Any]:
    """What reads an option's text as one of the kinds above, such as `Count`; `argparse` names the option."""
    base, limits = typing.get_args(kind)[0], _range(kind)

    def read(text: str) -> Any:
        try:
            value = base(text if text.isascii() else "")
        except ValueError as error:
            what = "a whole number" if base is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from error
        if limits is not None and value not in limits:
            raise argparse.ArgumentTypeError(f"must be {limits.wanted(value)}, not {text}")
        return value

    return read
