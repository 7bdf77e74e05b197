"""Sample and Source: what data of every format is read as."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
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
    """One conversation about some images (none: text only).

    Example:
      Sample("scenes/test/5", images=(image,), turns=(("Is there a red star?", "yes"),), kind="presence")
    """

    key: str  # where it comes from: names the sample in messages and quarantine files
    images: tuple[Image.Image | bytes | Path, ...]  # decoded, encoded, or a file
    turns: tuple[Turn, ...]
    kind: str = ""  # question kind, a row of accuracy tables; "" where the turns are of several kinds
    system: str | None = None  # the system message that came with it; None: that of the source
    grounded: bool = False  # <ref>, <box> and what closes them are tokens in its turns, see `grounding`
    unused: tuple[str, ...] = dataclasses.field(
        default=(), compare=False
    )  # fields of its record that it is not made of


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


def check_index(index: int, length: int) -> None:
    """Raises IndexError outside 0..length-1, which also ends plain iteration over a source."""
    if not 0 <= index < length:
        raise IndexError(f"index {index} outside 0..{length - 1}")


def stamp(source: Source) -> str:
    """What the files of a source are known by, from its method `stamp() -> str`; empty where it has none."""
    return source.stamp() if hasattr(source, "stamp") else ""


def usable_samples(source: Source) -> Iterator[Sample]:
    """The samples of a source in its order, without the bad ones."""
    for index in range(len(source)):
        with contextlib.suppress(BadSample):
            yield source[index]


def content_hash(sample: Sample) -> int:
    """64 bits of the images (bytes of a file, pixels of a decoded one) and texts, that tell a sample from others."""
    digest = hashlib.blake2b(digest_size=8)
    texts = (text.encode() for turn in sample.turns for text in turn)
    for content in (*map(_content, sample.images), *texts):
        digest.update(len(content).to_bytes(8, "big"))  # so that no two lists of contents are added alike
        digest.update(content)
    return int.from_bytes(digest.digest(), "big")


def _content(image: Image.Image | bytes | Path) -> bytes:
    if isinstance(image, Image.Image):
        return b"%d %d %b" % (*image.size, image.tobytes())
    return image if isinstance(image, bytes) else Path(image).read_bytes()
