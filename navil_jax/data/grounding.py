"""Boxes in texts: `<ref>a cat</ref><box>[[x1, y1, x2, y2]]</box>`, in thousandths of the image's width and height.

This is how models of the InternVL family read and write them. Data have them in other coordinates too, which either the
source (`SourceConfig.boxes`) or the record (`bbox_type`) names; none are guessed.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from navil_jax.data.sample import Sample, Turn

Coordinates = Literal["", "0..1", "0..1000", "pixels"]  # "": nothing is said
Box = tuple[float, float, float, float]  # left, top, right, bottom
Size = tuple[int, int]  # width, height in pixels

MARKERS = re.compile(r"(</?(?:ref|box)>)")
_NUMBER = r"\s*([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*"
_ONE = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]|\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")
_CONTENT = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_WITH_NUMBERS = re.compile(r"<box>[^<]*\d[^<]*</box>")
_FILLED = re.compile("<ref-object>|<bbox>")  # marks of ms-swift, which `objects` fills
_BETWEEN = re.compile(r"[\[\],\s]*")
# What records say, and what that is here: ms-swift's words and those of `SourceConfig.boxes`.
_DECLARED: dict[Any, Coordinates] = {"real": "pixels", "norm1": "0..1", "norm1000": "0..1000"}
_DECLARED |= {"pixels": "pixels", "0..1": "0..1", "0..1000": "0..1000"}


def grounded_turns(
    record: Mapping[str, Any], turns: Sequence[Turn], of_source: Coordinates, sizes: Callable[[], Sequence[Size]]
) -> tuple[list[Turn], bool, list[str]]:
    """The turns with their boxes in thousandths, whether there are any names or boxes, and the fields used for it.

    Args:
      of_source: coordinates of its boxes; "": the record says, as `bbox_type` or in `objects`.
      sizes: gives (width, height) of the images; called where there are boxes.

    Raises:
      ValueError: nothing says which coordinates they are, or boxes are unreadable, outside, or without an image.

    Example: <box>[0.1, 0.2, 0.55, 1]</box> in "0..1" -> <box>[[100, 200, 550, 1000]]</box>
    """
    turns, objects = list(turns), record.get("objects")
    objects = (
        objects if isinstance(objects, Mapping) and any(_FILLED.search(text) for turn in turns for text in turn) else {}
    )
    if objects:
        turns = _with_objects(turns, objects)
    texts = [text for turn in turns for text in turn]
    declared = _declared(record, objects, of_source)
    if not declared:
        if any(map(_WITH_NUMBERS.search, texts)):
            raise ValueError(
                "its boxes may be in 0..1, 0..1000 or pixels; say which: the source's boxes, or the record's bbox_type"
            )
        return turns, False, []
    if not any(map(MARKERS.search, texts)):
        return turns, False, []
    for text in texts:
        _check_pairs(text)
    numbers = _numbers(texts)
    scale = _scale(declared, numbers, sizes() if numbers else ())
    turns = [(_converted(question, scale), _converted(answer, scale)) for question, answer in turns]
    return turns, True, ["bbox_type", *(["objects"] if objects else [])]


def map_boxes(sample: Sample, change: Callable[[Box], Box]) -> Sample:
    """The sample with each of its boxes changed, for transforms that flip or crop images.

    Args:
      change: from a box to a box, both as shares of the image (0 to 1); what lies outside is cut off.

    Example: map_boxes(sample, lambda box: (1 - box[2], box[1], 1 - box[0], box[3])) mirrors them
    """

    def changed(box: Box) -> Box:
        left, top, right, bottom = (min(1000, max(0, 1000 * side)) for side in change(_divided(box)))
        return left, top, right, bottom

    turns = tuple((_converted(question, changed), _converted(answer, changed)) for question, answer in sample.turns)
    return dataclasses.replace(sample, turns=turns) if sample.grounded else sample


def boxes_in(text: str) -> list[Box]:
    """All boxes of a text, in the coordinates that it has. ValueError: a `<box>` holds none."""
    return [box for content in _CONTENT.findall(text) for box in _read(content)]


def _divided(box: Box) -> Box:
    left, top, right, bottom = (side / 1000 for side in box)
    return left, top, right, bottom


def _with_objects(turns: Sequence[Turn], objects: Mapping[str, Any]) -> list[Turn]:
    """The turns with ms-swift's `<ref-object>` and `<bbox>` replaced by the names and boxes of `objects`, in order."""
    names, boxes = ([] if objects.get(key) is None else list(objects[key]) for key in ("ref", "bbox"))
    filled = {"<ref-object>": iter(names), "<bbox>": iter(boxes)}
    for mark, given in (("<ref-object>", names), ("<bbox>", boxes)):
        found = sum(text.count(mark) for turn in turns for text in turn)
        if found != len(given):
            raise ValueError(f"objects has {len(given)} for {mark}, which stands {found} times in the texts")

    def fill(match: re.Match[str]) -> str:
        value = next(filled[match[0]])
        if match[0] == "<ref-object>":
            return f"<ref>{value}</ref>"
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 4:
            raise ValueError(f"objects: {str(value)[:60]} is no box; it must be [x1, y1, x2, y2]")
        return f"<box>[[{', '.join(map(str, value))}]]</box>"

    return [(_FILLED.sub(fill, question), _FILLED.sub(fill, answer)) for question, answer in turns]


def _declared(record: Mapping[str, Any], objects: Mapping[str, Any], of_source: Coordinates) -> Coordinates:
    """The coordinates that source and record agree on."""
    given = (record.get("bbox_type"), objects.get("bbox_type"))
    texts = (value.decode() if isinstance(value, bytes) else str(value) for value in given if value is not None)
    said = {text for text in texts if text not in ("", "nan")}
    if unknown := [text for text in said if text not in _DECLARED]:
        raise ValueError(f"bbox_type {unknown[0][:40]!r} is unknown; it may be {', '.join(_DECLARED)}")
    found = {_DECLARED[value] for value in said} | ({of_source} if of_source else set())
    if len(found) > 1:
        raise ValueError(f"its boxes are said to be in {' and in '.join(sorted(found))}; which is right?")
    return found.pop() if found else ""


def _check_pairs(text: str) -> None:
    """Raises ValueError unless each marker that opens is followed by the one that closes it."""
    marks = MARKERS.findall(text)
    for opening, closing in zip(marks[::2], [*marks[1::2], ""], strict=False):
        if closing != opening.replace("<", "</"):
            raise ValueError(f"{opening} is not followed by {opening.replace('<', '</')}")


def _read(content: str) -> list[Box]:
    boxes = [tuple(float(number) for number in match.groups() if number) for match in _ONE.finditer(content)]
    if not boxes or not _BETWEEN.fullmatch(_ONE.sub("", content)):
        raise ValueError(f"<box>{content[:60]}</box> is no box; it must hold [[x1, y1, x2, y2]]")
    return [(left, top, right, bottom) for left, top, right, bottom in boxes]


def _numbers(texts: Sequence[str]) -> list[float]:
    return [number for text in texts for box in boxes_in(text) for number in box]


def _scale(coordinates: Coordinates, numbers: Sequence[float], sizes: Sequence[Size]) -> Callable[[Box], Box]:
    """From boxes in these coordinates to thousandths, both checked."""
    if numbers and not sizes:
        raise ValueError("has boxes and no image")
    if coordinates != "0..1" and any(number % 1 for number in numbers) and max(numbers) <= 1:
        raise ValueError(f"its boxes are said to be in {coordinates}, and all numbers are from 0 to 1; which is right?")
    if coordinates == "pixels" and len(set(sizes)) > 1:
        raise ValueError("its boxes are in pixels, and its images have different sizes; give them in 0..1 or 0..1000")
    width, height = {"0..1": (1, 1), "0..1000": (1000, 1000)}.get(coordinates) or (sizes[0] if sizes else (1, 1))

    def scaled(box: Box) -> Box:
        left, top, right, bottom = box
        if not (0 <= left <= right <= width and 0 <= top <= bottom <= height):
            sides = ", ".join(f"{side:g}" for side in box)
            where = f"in the image ({coordinates}, {width} x {height}) as left, top, right, bottom"
            raise ValueError(f"box [{sides}] does not lie {where}")
        return 1000 * left / width, 1000 * top / height, 1000 * right / width, 1000 * bottom / height

    return scaled


def _converted(text: str, change: Callable[[Box], Box]) -> str:
    def written(match: re.Match[str]) -> str:
        boxes = (", ".join(str(round(side)) for side in change(box)) for box in _read(match[1]))
        return f"<box>[{', '.join(f'[{box}]' for box in boxes)}]</box>"

    return _CONTENT.sub(written, text)
