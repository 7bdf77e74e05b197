"""Packed rows as text for a terminal or a file."""

import re
from collections.abc import Mapping

from rich.text import Text

from navil_jax.data.inspect.page import shortened
from navil_jax.data.inspect.reading import RowView, SampleView, Span

TEXT_LIMIT = 1500  # characters of a stretch that are shown
LEGEND = "{weight|text} is trained with this loss weight per token, all other text is only read"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BAR = 20


def row_text(number: int, row: RowView, titles: Mapping[tuple[int, int], str]) -> Text:
    """A row and its samples; titles: (source, sample) -> name of the sample."""
    text = Text()
    text.append(f"row {number}: {len(row.samples)} samples", "bold")
    for name, (used, most) in row.fill.items():
        share = used / most if most else 0.0
        full = round(_BAR * share)
        text.append(f"\n  {name:<13}{'#' * full}{'.' * (_BAR - full)} {used:,} of {most:,} ({share:.0%})")
    for place, view in enumerate(row.samples, start=1):
        counts = f"{view.visual_tokens:,} visual and {view.text_tokens:,} text tokens, {view.patches:,} patches"
        text.append(f"\n  sample {place}: {titles[view.source, view.sample]}", "bold").append(f", {counts}")
        for line in sample_text(view).split("\n", allow_blank=True):
            text.append("\n    ").append(line)
    return text


def sample_text(view: SampleView) -> Text:
    """The text of a sample, with what is trained in braces behind its weight, and a note where an image stands."""
    return Text.assemble(*(_span(span, view) for span in view.spans))


def _span(span: Span, view: SampleView) -> tuple[str, str]:
    """Text and style."""
    if span.image is not None:
        image = view.images[span.image]
        return f"[image {span.image + 1}: {image.width} x {image.height} pixels, {span.tokens:,} tokens]", "cyan"
    text = _CONTROL.sub("\ufffd", shortened(span.text, TEXT_LIMIT))  # no text may steer the terminal
    return (f"{{{span.weight:.4g}|{text}}}", "green") if span.weight else (text, "dim")
