"""Meta files of InternVL and Mono-InternVL: one JSON file that names several sources with their settings."""

import dataclasses
import difflib
import logging
import os
from collections.abc import Mapping
from typing import Any

from navil_jax.config import SourceConfig
from navil_jax.config.ranges import Count, Passes, check
from navil_jax.data.formats import files, open_format
from navil_jax.data.formats.records import parse_json, reason
from navil_jax.data.formats.scan_json import check_text
from navil_jax.errors import UserError
from navil_jax.paths import at_home

DATA_AUGMENT = ("jpeg",)  # transforms that data_augment means, as in InternVL
TILE_PIXELS = 448**2  # of a tile, in which max_dynamic_patch counts
_TYPES = {
    "root": str,
    "annotation": str,
    "repeat_time": int | float,
    "length": int,
    "data_augment": bool,
    "max_dynamic_patch": int,
}
_NEEDED = ("annotation",)
_log = logging.getLogger(__name__)


def read_meta(path: str) -> dict[str, dict[str, Any]]:
    """Name of a source -> its settings, with checked types.

    Raises:
      UserError: not such a JSON file; names the source and the key.
    """
    try:
        text = files.read_file(path)
        check_text(path, text[:4])
        content = parse_json(text)
    except OSError as error:
        raise UserError(f"{path}: no such meta file") from error
    except ValueError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: must be an object of sources, {{name: {{root, annotation, ...}}}}")
    for name, settings in content.items():
        _check(path, name, settings)
    return content


def _check(path: str, name: str, settings: Any) -> None:
    if not name.strip():
        raise UserError(f"{path}: a source has no name; call it something, logs tell sources apart by their names")
    if not isinstance(settings, Mapping):
        raise UserError(f"{path}: {name}: must be an object with {', '.join(_TYPES)}")
    for key in _NEEDED:
        if key not in settings:
            raise UserError(f"{path}: {name}: {key} is missing")
    for key, value in settings.items():
        if key in _TYPES and (not isinstance(value, _TYPES[key]) or isinstance(value, bool) != (_TYPES[key] is bool)):
            raise UserError(f"{path}: {name}.{key}: {value!r} is of the wrong type")
    for key in ("length", "max_dynamic_patch"):
        check(settings.get(key, 1), Count, f"{path}: {name}.{key}")
    check(settings.get("repeat_time", 1), Passes, f"{path}: {name}.repeat_time")
    ignored = sorted(set(settings) - set(_TYPES))
    for key in ignored:
        if nearest := difflib.get_close_matches(key, _TYPES, n=1, cutoff=0.8):
            raise UserError(f"{path}: {name}.{key}: no such setting; nearest is {nearest[0]}")
    if ignored:
        _log.warning("%s: %s: %s not used", path, name, ", ".join(ignored))


def meta_sources(entry: SourceConfig, max_patches: int, patch_size: int) -> tuple[SourceConfig, ...]:
    """A source of kind "meta" as its parts, whose weights share its own by their samples times repeats.

    Paths in the file are taken from the working folder, or from that of the meta file where they do not exist there.
    max_dynamic_patch counts tiles of 448 x 448 pixels, here in patches of `patch_size`, at most `max_patches`.
    data_augment switches the transforms of `entry` on and off, or those of `DATA_AUGMENT` where it has none. What the
    file does not say is as in `entry`.

    Raises:
      UserError: the file says something else, or `entry` has held-out samples, which no part would use.

    Example: {"a": {"annotation": "a.jsonl", "root": "img", }, "b": {"annotation": "b.jsonl"}}, of 30 and 10 samples,
      with weight 2 -> a with weight 1.5 and b with weight 0.5
    """
    if entry.held_out:
        raise UserError(
            f"source {entry.name}: held_out has no effect on a source of kind meta; name each file that has held-out "
            "samples as a source of its own, of kind llava"
        )
    parts, sizes = [], []
    for name, settings in read_meta(entry.path).items():
        path = _find(entry.path, settings["annotation"])
        root = _find(entry.path, settings["root"]) if settings.get("root") else entry.root
        repeat = float(settings.get("repeat_time", 1)) * entry.repeat
        length = _length(f"{entry.path}: {name}", path, settings.get("length"))
        tiles = settings.get("max_dynamic_patch")
        part = dataclasses.replace(
            entry,
            name=name,
            kind="llava",
            path=path,
            root=root,
            repeat=repeat,
            max_patches=min(tiles * TILE_PIXELS // patch_size**2, max_patches) if tiles else entry.max_patches,
            transforms=_transforms(settings, entry),
        )
        parts.append(part)
        sizes.append(length * repeat)
    shares = (size / sum(sizes) for size in sizes)
    return tuple(part.weighted(share) for part, share in zip(parts, shares, strict=True))


def _length(where: str, path: str, given: int | None) -> int:
    """The number of samples at `path`; where they cannot be read (when a study is planned), the given one counts."""
    try:
        found = len(open_format("llava", path))
    except UserError:
        if given is None:
            raise
        return given
    if given not in (None, found):
        _log.warning("%s.length: %d, but %s has %d samples, which count", where, given, path, found)
    return found


def _transforms(settings: Mapping[str, Any], entry: SourceConfig) -> tuple[str, ...]:
    if "data_augment" not in settings:
        return entry.transforms
    return (entry.transforms or DATA_AUGMENT) if settings["data_augment"] else ()


def _find(meta: str, path: str) -> str:
    path = at_home(path)
    if files.is_remote(path) or (not files.is_remote(meta) and os.path.exists(path)):
        return path
    return files.join(files.folder_of(meta), path)
