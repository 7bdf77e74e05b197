"""Configs as plain values and as JSON: what a field may hold, keys as flags address them, and how configs differ."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from navil_jax.config import Config
from navil_jax.errors import UserError

_LONGEST_KEY = 120  # characters of a key that are shown


def keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a config's leaves, as flags address them."""
    if dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            yield from keys(getattr(node, field.name), f"{prefix}.{field.name}" if prefix else field.name)
    elif isinstance(node, tuple) and node and dataclasses.is_dataclass(node[0]):
        for index, entry in enumerate(node):
            yield from keys(entry, f"{prefix}.{index}")
    else:
        yield prefix


def typed(value: Any, hint: Any, key: str) -> Any:
    """Checks a plain value (dicts, lists, numbers, text) against `hint` and gives it the types of `config`."""
    bare = required(hint)
    if value is None and bare is not hint:
        return None
    if isinstance(bare, type) and dataclasses.is_dataclass(bare) and isinstance(value, dict):
        hints = typing.get_type_hints(bare)
        prefix = f"{key}." if key else ""
        if unknown := [name for name in value if name not in hints]:
            near = difflib.get_close_matches(unknown[0], list(hints), n=1, cutoff=0.0)[0]
            raise UserError(f"config.{prefix}{unknown[0]}: no such key, the nearest one is config.{prefix}{near}")
        for field in dataclasses.fields(bare):
            if field.default is dataclasses.MISSING and field.name not in value:
                raise UserError(f"config.{prefix}{field.name}: no value given")
        return bare(**{name: typed(v, hints[name], prefix + name) for name, v in value.items()})
    if typing.get_origin(bare) is tuple and isinstance(value, list):
        entry_hint = typing.get_args(bare)[0]
        return tuple(typed(entry, entry_hint, f"{key}.{i}") for i, entry in enumerate(value))
    good = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
        str: isinstance(value, str),
    }.get(bare, typing.get_origin(bare) is Literal and value in typing.get_args(bare))
    if not good:
        raise UserError(f"config.{key}: {value!r} is not {type_name(hint)}")
    return float(value) if bare is float else value


def plain(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, as JSON has them."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def to_json(config: Config) -> str:
    """The config as JSON text with every field, for checkpoints."""
    return json.dumps(plain(config), indent=2)


def from_json(text: str) -> Config:
    """The config that `to_json` wrote; a missing field takes its default. Raises `UserError` for an unknown one."""
    try:
        return typed(json.loads(text, object_pairs_hook=unique_keys), Config, "")
    except DoubleKey as error:
        raise UserError(f"config: {error}") from error


class DoubleKey(ValueError):
    """A key stands twice in one object, and it is not said which one counts."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `json.loads(..., object_pairs_hook=unique_keys)`. Raises `DoubleKey`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DoubleKey(f"{twice[:_LONGEST_KEY]!r} stands twice in one object")
    return found


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ -> (value in a, value in b); None where one of them has no such key."""
    left, right = ({key: _get(config, key) for key in keys(config)} for config in (a, b))
    return {k: (left.get(k), right.get(k)) for k in left | right if left.get(k) != right.get(k)}


def _get(node: Any, key: str) -> Any:
    for name in key.split("."):
        node = node[int(name)] if isinstance(node, tuple) else getattr(node, name)
    return node


def entry_class(hint: Any) -> type | None:
    """The dataclass that a field holds, alone or in a tuple."""
    bare = required(hint)
    bare = typing.get_args(bare)[0] if typing.get_origin(bare) is tuple else bare
    return bare if isinstance(bare, type) and dataclasses.is_dataclass(bare) else None


def required(hint: Any) -> Any:
    """`X` for `X | None`, anything else unchanged."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (h for h in typing.get_args(hint) if h is not types.NoneType)
    return hint


def type_name(hint: Any) -> str:
    """A type as `--help` has it. Example: "int or none" """
    bare = required(hint)
    if bare is not hint:
        return f"{type_name(bare)} or none"
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        entry = type_name(typing.get_args(hint)[0])
        return f"{entry},{entry},..."
    return {bool: "true | false"}.get(hint, hint.__name__)
