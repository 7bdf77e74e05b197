"""What a data source is, and the sources by name.

A source is any random-access collection of `Sample`s. To add one, put a function from the split to a `Source` into
`SOURCES` and name it in the recipe's `data.sources`.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from navil_jax.errors import UserError

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
Turn = tuple[str, str]  # question, answer
CAPTION_PROMPT = "Describe the picture."


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation about some pictures (none: text only).

    Example:
      Sample("scenes/test/5", images=(picture,), turns=(("Is there a red star?", "yes"),), kind="presence")
    """

    key: str  # where it comes from: names the sample in messages and quarantine files
    images: tuple[Image.Image | bytes | Path, ...]  # decoded, encoded, or a file
    turns: tuple[Turn, ...]
    kind: str = ""  # question kind, a row of accuracy tables; "" where the turns are of several kinds


class Source(Protocol):
    """Random access to samples: the same index always gives an equal sample. Must be picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; IndexError outside 0..len-1."""
        ...

    def texts(self) -> Iterable[str]:
        """Questions and answers to train a tokenizer on: enough to show every word, without decoding pictures."""
        ...


def check_index(index: int, length: int) -> None:
    """Raises IndexError outside 0..length-1, which also ends plain iteration over a source."""
    if not 0 <= index < length:
        raise IndexError(f"index {index} outside 0..{length - 1}")


# The data packages of a source are imported when it is opened: nobody needs those of the others.
def _easy_vqa(split: Split) -> Source:
    from navil_jax.data.easy_vqa import EasyVqa

    return EasyVqa(split)


def _easy_vqa_captions(split: Split) -> Source:
    from navil_jax.data.easy_vqa import EasyVqaCaptions

    return EasyVqaCaptions(split)


def _scenes(split: Split) -> Source:
    from navil_jax.data.scenes import Scenes

    return Scenes(split)


def _scenes_captions(split: Split) -> Source:
    from navil_jax.data.scenes import Scenes

    return Scenes(split, questions=0)


SOURCES: dict[str, Callable[[Split], Source]] = {
    "easy_vqa": _easy_vqa,
    "easy_vqa_captions": _easy_vqa_captions,
    "scenes": _scenes,
    "scenes_captions": _scenes_captions,
}


def open_source(name: str, split: Split) -> Source:
    """The source `name` of `SOURCES`; split "train", or "test" for its held-out samples.

    Raises:
      UserError: the name or the split is unknown, or the package that holds the data is not installed.
    """
    if name not in SOURCES:
        nearest = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0)[0]
        raise UserError(f"data.sources: no source named {name!r}; nearest is {nearest!r}, all are {sorted(SOURCES)}")
    if split not in SPLITS:
        raise UserError(f"source {name}: no split named {split!r}; use one of {list(SPLITS)}")
    try:
        return SOURCES[name](split)
    except ModuleNotFoundError as error:
        raise UserError(f"source {name}: Python package {error.name!r} is missing; install it with pip") from error
