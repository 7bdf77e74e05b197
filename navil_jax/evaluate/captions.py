"""Evaluator "captions": one sentence for each image, scored by CIDEr-D against several references."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from navil_jax.config.plain import unique_keys
from navil_jax.errors import UserError
from navil_jax.evaluate.answers import Ask
from navil_jax.evaluate.asking import Asking, Said, faults_of
from navil_jax.evaluate.benchmarks.cider import cider
from navil_jax.model.params import Params

PROMPT = "Provide a one-sentence caption for the provided image."
MOST_TOKENS = 30


class Captioned(NamedTuple):
    """An image with its references."""

    id: str | int
    image: Path
    captions: tuple[str, ...]


class Scored(NamedTuple):
    """Images, what was said of each, and its CIDEr-D."""

    images: Sequence[Captioned]
    said: Sequence[Said]
    scores: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Captions(Asking):
    """Captions the images of its entry's `data`, see `read_captions`."""

    def __post_init__(self) -> None:
        self.images  # noqa: B018  # faults of the file are told before the first step

    @functools.cached_property
    def images(self) -> list[Captioned]:
        (entry,) = self.config.evaluators
        if not entry.data:
            raise UserError("config.evaluators: captions: its entry needs `data`, a file of images and captions")
        return read_captions(Path(entry.data))

    def score(self, params: Params, limit: int = 0) -> Scored:
        """Captions the first `limit` images (0: all), whose references are then the corpus."""
        images = self.images[:limit] if limit else self.images
        said = self.answers(params, images, lambda one: Ask(one.id, PROMPT, (one.image,)), MOST_TOKENS)
        return Scored(images, said, cider([one.text for one in said], [one.captions for one in images]))

    def metrics(self, scores: Scored) -> dict[str, float]:
        """eval/<file>/cider: the mean, from 0 to 10; tables often have 100 times of it."""
        return {f"eval/{self._name}/cider": sum(scores.scores) / len(scores.scores)}

    @property
    def _name(self) -> str:
        return Path(self.config.evaluators[0].data).stem

    def report(self, scores: Scored, folder: Path, final: bool) -> str:
        """Writes <file>-cider.jsonl: each image with its caption and score."""
        lines = [
            {"id": one.id, "prediction": said.text, "captions": one.captions, "score": score}
            for one, said, score in zip(*scores, strict=True)
        ]
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        (folder / f"{self._name}-cider.jsonl").write_text(text, errors="replace")
        return "\n".join([super().report(scores, folder, final), *faults_of(scores.said)])


def read_captions(path: Path) -> list[Captioned]:
    """Images with their captions, of a file in one of two forms.

    JSON lines: {"id": 7, "image": "cat.jpg", "captions": ["A cat.", "A cat sits."]}, without an id the line's number.
    COCO's JSON: `images` with id and file_name, `annotations` with image_id and caption. Images lie at their path from
    the file's folder, or in a folder of it.

    Raises:
      UserError: file and line or image of the first one that cannot be used.
    """
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"config.evaluators: captions: {path}: no such file") from None
    found = list(_of_coco(path, text) if path.suffix == ".json" else _of_lines(path, text))
    if not found:
        raise UserError(f"{path}: holds no captions")
    if len({json.dumps(one.id) for one in found}) < len(found):
        raise UserError(f"{path}: an id stands twice; give each image one")
    return found


def _of_lines(path: Path, text: str) -> Iterator[Captioned]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            entry = _loaded(line, where)
            yield _captioned(where, path.parent, entry.get("id", number), entry.get("image"), entry.get("captions"))


def _of_coco(path: Path, text: str) -> Iterator[Captioned]:
    entry = _loaded(text, str(path))
    try:
        captions: dict[Any, list[Any]] = {}
        for annotation in entry["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        images = [(image["id"], image["file_name"]) for image in entry["images"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: is no file of COCO's captions: {error!r}; give one, or JSON lines (.jsonl)") from None
    if strange := set(captions) - {number for number, _ in images}:
        raise UserError(f"{path}: captions of image {min(map(str, strange))}, which `images` lacks")
    for number, name in images:
        yield _captioned(f"{path}: image {number}", path.parent, number, name, captions.get(number))


def _loaded(text: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON: {error}") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be a JSON object")
    return entry


def _captioned(where: str, folder: Path, key: Any, image: Any, captions: Any) -> Captioned:
    if not isinstance(key, str | int):
        raise UserError(f"{where}: id: must be a text or a whole number")
    if not isinstance(image, str) or not image:
        raise UserError(f"{where}: image: must be the name of a file")
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise UserError(f"{where}: captions: must be a list of texts, one at least")
    places = [folder / image, *(inner / image for inner in sorted(folder.iterdir()) if inner.is_dir())]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise UserError(f"{where}: {folder / image}: no such file, nor in a folder beside it")
    return Captioned(key, place, tuple(captions))
