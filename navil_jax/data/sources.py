"""Sources by name or by kind of file, and what a recipe says of each.

To add a source, put a function from the split to a `sample.Source` into `SOURCES` and name it in the recipe's
`data.sources`.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import Any, cast

from navil_jax.config import Config, SourceConfig, VisionConfig, validate
from navil_jax.data import formats
from navil_jax.data.engine import Engine
from navil_jax.data.formats.meta import meta_sources
from navil_jax.data.formats.record_videos import Frames
from navil_jax.data.left_out import without
from navil_jax.data.sample import SPLITS, Source, Split
from navil_jax.data.transforms import find_transform
from navil_jax.errors import UserError


def fingerprints(sources: Sequence[Source]) -> dict[str, str]:
    """What the samples of sources are known by, where a source tells with a method `fingerprint() -> str`.

    A run does not go on with other ones, see `config.continuing.check_continues`.

    Returns:
      Place in config.data.sources as a key -> fingerprint. Example: {"data.sources.1.fingerprint": "5c0fe6..."}
    """
    telling = {number: source for number, source in enumerate(sources) if hasattr(source, "fingerprint")}
    return {f"data.sources.{number}.fingerprint": source.fingerprint() for number, source in telling.items()}


def held_out_fingerprints(config: Config) -> dict[str, str]:
    """The same of held-out files. Example: {"data.sources.1.held_out.fingerprint": "5c0fe6..."}

    Raises:
      UserError: they cannot be opened.
    """
    given = {number: entry for number, entry in enumerate(config.data.sources) if entry.held_out}
    opened = {number: open_source(entry, "test") for number, entry in given.items()}
    return {
        f"data.sources.{number}.held_out.fingerprint": source.fingerprint()
        for number, source in opened.items()
        if hasattr(source, "fingerprint")
    }


def _lazily(module: str, name: str, **options: Any) -> Callable[[Split], Source]:
    """A class or function of `data.toy`, imported when it is opened: nobody needs the data packages of the others."""

    def opened(split: Split) -> Source:
        return getattr(importlib.import_module(f"navil_jax.data.toy.{module}"), name)(split, **options)

    return opened


SOURCES: dict[str, Callable[[Split], Source]] = {
    "easy_vqa": _lazily("easy_vqa", "EasyVqa"),
    "easy_vqa_captions": _lazily("easy_vqa", "EasyVqaCaptions"),
    "drawings": _lazily("drawings", "Drawings"),
    "drawings_looks": _lazily("drawings", "Drawings", about="look"),
    "drawings_shapes": _lazily("drawings", "Drawings", about="shape", questions=1),
    "pages": _lazily("pages", "Pages"),
    "scenes": _lazily("scenes", "Scenes"),
    "scenes_captions": _lazily("scenes", "captions"),
}


def open_source(entry: SourceConfig | str, split: Split, engine: Engine | None = None) -> Source:
    """The source of an entry of config.data.sources, or of a name of `SOURCES`; split "test" for held-out samples.

    Args:
      engine: as of `formats.open_format`.

    Raises:
      UserError: the name, the kind, a transform or the split is unknown, there are no such files, the list of samples
        to leave out does not fit them, or the package that holds or reads the data is not installed.
    """
    entry = SourceConfig(entry) if isinstance(entry, str) else entry
    if split not in SPLITS:
        raise UserError(f"source {entry.name}: no split named {split!r}; use one of {list(SPLITS)}")
    for name in entry.transforms:
        find_transform(name)
    if entry.kind == formats.META and split == "train":
        parts = (open_source(part, split, engine) for part in expand_meta(entry))
        return formats.Concatenated.of(cast(Any, part) for part in parts)
    source = _open_files(entry, split, engine) if entry.kind else _open_built_in(entry, split)
    return without(source, entry.leave_out, entry.name) if entry.leave_out and split == "train" else source


def _open_built_in(entry: SourceConfig, split: Split) -> Source:
    if entry.name not in SOURCES:
        nearest = difflib.get_close_matches(entry.name, SOURCES, n=1, cutoff=0)[0]
        raise UserError(
            f"data.sources: no source named {entry.name!r}; nearest is {nearest!r}, all are {sorted(SOURCES)}; "
            "data in files need a kind and a path, and a source that a recipe adds needs --config with that recipe"
        )
    try:
        return SOURCES[entry.name](split)
    except ModuleNotFoundError as error:
        raise UserError(
            f"source {entry.name}: Python package {error.name!r} is missing; install it with pip"
        ) from error


def _open_files(entry: SourceConfig, split: Split, engine: Engine | None) -> Source:
    formats.check_kind(entry.kind)
    if not has_split(entry, split):
        raise UserError(f"source {entry.name}: no held-out samples; give their path as held_out")
    path = entry.path if split == "train" else entry.held_out
    frames = Frames(entry.video_frames, entry.video_fps)
    return formats.open_format(entry.kind, path, entry.root, entry.prompt, entry.boxes, engine, frames)


def has_split(entry: SourceConfig, split: Split) -> bool:
    """Whether `open_source` would find such samples."""
    return split == "train" or not entry.kind or bool(entry.held_out)


def expand_meta(entry: SourceConfig, config: Config | None = None) -> tuple[SourceConfig, ...]:
    """The parts of a source of kind "meta" in a config, any other source as it is.

    With `data.temperature` each part has the weights of `entry`: their sizes count when they are mixed.

    Raises:
      UserError: a bad meta file.
    """
    if entry.kind != "meta":
        return (entry,)
    config = config or Config()
    patch_size = (config.model.vision or VisionConfig()).patch_size
    parts = meta_sources(entry, config.images.max_patches, patch_size)
    if not config.data.temperature:
        return parts
    weight, points = entry.weight, entry.weight_points
    return tuple(dataclasses.replace(part, weight=weight, weight_points=points) for part in parts)


def expand_sources(config: Config) -> Config:
    """The config with each source of kind "meta" replaced by its parts; done before sources are opened or numbered.

    Raises:
      UserError: a bad meta file, a part whose settings do not fit the config, or two sources of one name.
    """
    parts = tuple(part for entry in config.data.sources for part in expand_meta(entry, config))
    _check_names(parts)
    if parts == config.data.sources:
        return config
    expanded = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=parts))
    try:
        validate(expanded)
    except UserError as error:
        names = ", ".join(part.name for part in parts)
        raise UserError(f"{error} (sources with the parts of meta files: {names})") from error
    return expanded


def _check_names(entries: Sequence[SourceConfig]) -> None:
    """Raises `UserError` if two sources have one name, by which logs and lists of bad samples tell them apart."""
    numbers: dict[str, int] = {}
    for number, entry in enumerate(entries):
        first = numbers.setdefault(entry.name, number)
        if first != number:
            what = " and ".join(f"{n} ({entries[n].path or 'built in'})" for n in (first, number))
            raise UserError(f"config.data.sources: {what} are both called {entry.name!r}; give them different names")


def for_source(config: Config, number: int) -> Config:
    """The config as it holds for one source: its own max_patches, system message and loss weight where it has them.

    Example: data.sources.1.loss_weight "token" -> for_source(config, 1).data.loss_weight "token"
    """
    if number >= len(config.data.sources):
        return config
    entry = config.data.sources[number]
    own = {key: value for key in ("system_message", "loss_weight") if (value := getattr(entry, key)) is not None}
    images = config.images
    if entry.max_patches is not None:
        images = dataclasses.replace(images, max_patches=entry.max_patches)
    return dataclasses.replace(config, images=images, data=dataclasses.replace(config.data, **own))
