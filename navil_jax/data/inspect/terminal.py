"""Packed rows as text for a terminal or a file."""

import re
from collections.abc import Mapping

from navil_jax.data.inspect.page import shortened
from navil_jax.data.inspect.reading import RowView, SampleView, Span

TEXT_LIMIT = 1500  # characters of a stretch that are shown
LEGEND = "{weight|text} is trained with this loss weight per token, all other text is only read"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_GREEN, _BLUE, _DIM, _BOLD, _PLAIN = "\033[32m", "\033[36m", "\033[2m", "\033[1m", "\033[0m"
_BAR = 20


def row_text(number: int, row: RowView, titles: Mapping[tuple[int, int], str], colour: bool) -> str:
    """A row and its samples.

    Args:
      titles: (source, sample) -> name of the sample.
      colour: whether ANSI codes are written.
    """
    lines = [_paint(f"row {number}: {len(row.samples)} samples", _BOLD, colour)]
    for name, (used, most) in row.fill.items():
        share = used / most if most else 0.0
        full = round(_BAR * share)
        lines.append(f"  {name:<13}{'#' * full}{'.' * (_BAR - full)} {used:,} of {most:,} ({share:.0%})")
    for place, view in enumerate(row.samples, start=1):
        counts = f"{view.visual_tokens:,} visual and {view.text_tokens:,} text tokens, {view.patches:,} patches"
        lines.append(_paint(f"  sample {place}: {titles[view.source, view.sample]}", _BOLD, colour) + f", {counts}")
        lines += [f"    {line}" for line in sample_text(view, colour).split("\n")]
    return "\n".join(lines)


def sample_text(view: SampleView, colour: bool) -> str:
    """The text of a sample, with what is trained in braces behind its weight, and a note where an image stands."""
    return "".join(_span(span, view, colour) for span in view.spans)


def _span(span: Span, view: SampleView, colour: bool) -> str:
    if span.image is not None:
        image = view.images[span.image]
        note = f"[image {span.image + 1}: {image.width} x {image.height} pixels, {span.tokens:,} tokens]"
        return _paint(note, _BLUE, colour)
    text = _CONTROL.sub("\ufffd", shortened(span.text, TEXT_LIMIT))  # no text may steer the terminal
    if not span.weight:
        return _paint(text, _DIM, colour)
    return _paint(f"{{{span.weight:.4g}|{text}}}", _GREEN, colour)


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_PLAIN}" if colour else text
