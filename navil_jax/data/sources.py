"""What a data source is, and the sources by name.

A source is any random-access collection of `Sample`s. To add one, put a function from the split to a `Source` into
`SOURCES` and name it in the recipe's `data.sources`.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from navil_jax.config import Config, ImageConfig, SourceConfig
from navil_jax.errors import UserError

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
Turn = tuple[str, str]  # question, answer
CAPTION_PROMPT = "Describe the picture."


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation about some images (none: text only).

    Example:
      Sample("scenes/test/5", images=(image,), turns=(("Is there a red star?", "yes"),), kind="presence")
    """

    key: str  # where it comes from: names the sample in messages and quarantine files
    images: tuple[Image.Image | bytes | Path, ...]  # decoded, encoded, or a file
    turns: tuple[Turn, ...]
    kind: str = ""  # question kind, a row of accuracy tables; "" where the turns are of several kinds
    system: str | None = None  # the system message that came with it; None: that of the source


class BadSample(UserError):
    """A sample that cannot be used. Others of its source can: what reads them goes on, and tells."""

    def __init__(self, source: str, key: str, reason: str) -> None:
        """Args: source: file or folder; key: names the sample in it; reason: one line."""
        super().__init__(source, key, reason)
        self.source, self.key, self.reason = source, key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason} ({self.source})"


class Source(Protocol):
    """Random access to samples: the same index always gives an equal sample. Must be picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; IndexError outside 0..len-1."""
        ...

    def texts(self) -> Iterable[str]:
        """Questions and answers to train a tokenizer on: enough to show every word, without decoding images."""
        ...


def fingerprints(sources: Sequence[Source]) -> dict[str, str]:
    """What the samples of sources are known by, where a source tells with a method `fingerprint() -> str`.

    A run does not go on with other ones, see `training.checkpoint.check_continues`.

    Returns:
      Place in config.data.sources as a key -> fingerprint. Example: {"data.sources.1.fingerprint": "5c0fe6..."}
    """
    telling = {number: source for number, source in enumerate(sources) if hasattr(source, "fingerprint")}
    return {f"data.sources.{number}.fingerprint": source.fingerprint() for number, source in telling.items()}


def check_index(index: int, length: int) -> None:
    """Raises IndexError outside 0..length-1, which also ends plain iteration over a source."""
    if not 0 <= index < length:
        raise IndexError(f"index {index} outside 0..{length - 1}")


# The data packages of a source are imported when it is opened: nobody needs those of the others.
def _easy_vqa(split: Split) -> Source:
    from navil_jax.data.toy.easy_vqa import EasyVqa

    return EasyVqa(split)


def _easy_vqa_captions(split: Split) -> Source:
    from navil_jax.data.toy.easy_vqa import EasyVqaCaptions

    return EasyVqaCaptions(split)


def _scenes(split: Split) -> Source:
    from navil_jax.data.toy.scenes import Scenes

    return Scenes(split)


def _scenes_captions(split: Split) -> Source:
    from navil_jax.data.toy.scenes import Scenes

    return Scenes(split, length=None if split == "train" else 400, questions=0)


def _pages(split: Split) -> Source:
    from navil_jax.data.toy.pages import Pages

    return Pages(split)


SOURCES: dict[str, Callable[[Split], Source]] = {
    "easy_vqa": _easy_vqa,
    "easy_vqa_captions": _easy_vqa_captions,
    "pages": _pages,
    "scenes": _scenes,
    "scenes_captions": _scenes_captions,
}


def open_source(entry: SourceConfig | str, split: Split) -> Source:
    """The source of an entry of config.data.sources, or of a name of `SOURCES`; split "test" for held-out samples.

    Raises:
      UserError: the name, the kind or the split is unknown, there are no such files, or the package that holds or
        reads the data is not installed.
    """
    entry = SourceConfig(entry) if isinstance(entry, str) else entry
    if split not in SPLITS:
        raise UserError(f"source {entry.name}: no split named {split!r}; use one of {list(SPLITS)}")
    if entry.kind:
        return _open_files(entry, split)
    if entry.name not in SOURCES:
        nearest = difflib.get_close_matches(entry.name, SOURCES, n=1, cutoff=0)[0]
        raise UserError(
            f"data.sources: no source named {entry.name!r}; nearest is {nearest!r}, all are {sorted(SOURCES)}; "
            "data in files need a kind and a path"
        )
    try:
        return SOURCES[entry.name](split)
    except ModuleNotFoundError as error:
        raise UserError(
            f"source {entry.name}: Python package {error.name!r} is missing; install it with pip"
        ) from error


def _open_files(entry: SourceConfig, split: Split) -> Source:
    from navil_jax.data import formats  # imports this module for `Sample`

    formats.check_kind(entry.kind)
    if not has_split(entry, split):
        raise UserError(f"source {entry.name}: no held-out samples; give their path as held_out")
    path = entry.path if split == "train" else entry.held_out
    if entry.kind == formats.META:
        parts = expand_meta(dataclasses.replace(entry, path=path))
        return formats.Concatenated.of(open_source(part, "train") for part in parts)
    return formats.open_format(entry.kind, path, entry.root, entry.prompt)


def has_split(entry: SourceConfig, split: Split) -> bool:
    """Whether `open_source` would find such samples."""
    return split == "train" or not entry.kind or bool(entry.held_out)


def expand_meta(entry: SourceConfig, max_patches: int = ImageConfig.max_patches) -> tuple[SourceConfig, ...]:
    """The parts of a source of kind "meta", any other as it is. Raises `UserError` for a bad meta file."""
    if entry.kind != "meta":
        return (entry,)
    from navil_jax.data.formats.meta import meta_sources

    return meta_sources(entry, max_patches)


def expand_sources(config: Config) -> Config:
    """The config with each source of kind "meta" replaced by its parts; done before sources are opened or numbered."""
    parts = [part for entry in config.data.sources for part in expand_meta(entry, config.images.max_patches)]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=tuple(parts)))


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


def usable_samples(source: Source) -> Iterator[Sample]:
    """The samples of a source in its order, without the bad ones."""
    for index in range(len(source)):
        with contextlib.suppress(BadSample):
            yield source[index]
