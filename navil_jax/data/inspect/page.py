"""Parts of HTML pages that need nothing from outside: frame, coloured samples, images, histograms."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from navil_jax.data.inspect.reading import SampleView, Span

THUMBNAIL = 240  # pixels, the longer side
TEXT_LIMIT = 20_000  # characters of a stretch that are shown
LEGEND = (
    'Text on <span class="learnt">this ground</span> is trained, and the small number behind it is the loss weight of '
    "each of its tokens. All other text is only read. Of images you see the largest scale as the model gets it, with "
    "its padding."
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --ground: #fff; --soft: #eef1f6; --line: #ccd3df; --learnt: #bfe8c5;
  --bar: #4673c4; --warn: #b3361e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8f0; --ground: #171b22; --soft: #222834; --line: #3b4556;
  --learnt: #1f5a2d; --bar: #7ba3ea; --warn: #ff8d75; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 1100px;
  margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15em 1em .15em 0; vertical-align: top; }
.sample { border: 1px solid var(--line); border-radius: 6px; margin: 1em 0; padding: .6em .9em; }
.sample h4 { margin: 0 0 .4em; font-weight: 600; } .sample h4 small { font-weight: 400; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .5em; border-radius: 4px; }
.learnt { background: var(--learnt); border-radius: 3px; } .learnt sub { font-size: 70%; margin-left: .2em; }
figure { display: inline-block; margin: .3em; vertical-align: middle; } figure img { display: block; max-width: 240px; }
figcaption { font-size: 75%; } .charts { display: flex; flex-wrap: wrap; gap: 1.5em; } .warn { color: var(--warn); }
svg rect.bar { fill: var(--bar); } svg text { fill: var(--ink); font-size: 11px; } svg line { stroke: var(--warn); }
.fill { display: inline-block; width: 160px; height: .8em; background: var(--soft); border: 1px solid var(--line); }
.fill i { display: block; height: 100%; background: var(--bar); }
"""


def document(title: str, body: Iterable[str]) -> str:
    """A whole page."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of plain text; the first cell of each is its heading."""
    cells = ((html.escape(head), "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)) for head, *rest in rows)
    return "<table>" + "".join(f"<tr><th>{head}</th>{rest}</tr>" for head, rest in cells) + "</table>"


def sample(view: SampleView, title: str) -> str:
    """A sample with its text coloured by what is trained."""
    counts = f"{view.visual_tokens:,} visual and {view.text_tokens:,} text tokens, {view.patches:,} patches"
    spans = "".join(_span(span, view.images) for span in view.spans)
    head = f"<h4>{html.escape(title)} <small>{counts}</small></h4>"
    return f'<div class="sample">{head}<div class="text">{spans}</div></div>'


def _span(span: Span, images: Sequence[Image.Image]) -> str:
    if span.image is not None:
        image = images[span.image]
        caption = f"{image.width} x {image.height} pixels, {span.tokens:,} tokens"
        return f'<figure><img src="{data_uri(image)}" alt="image"><figcaption>{caption}</figcaption></figure>'
    text = html.escape(shortened(span.text))
    if not span.weight:
        return f"<span>{text}</span>"
    return f'<span class="learnt" title="{span.tokens:,} tokens">{text}<sub>{span.weight:.4g}</sub></span>'


def shortened(text: str, limit: int = TEXT_LIMIT) -> str:
    """The text's beginning, and how much is left out."""
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit:,} more characters)"


def data_uri(image: Image.Image) -> str:
    """A small copy, as an address that holds the image itself."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def fill_bars(fill: Mapping[str, tuple[int, int]]) -> str:
    """How far each budget of a row is used."""
    return "".join(
        f'<div><span class="fill"><i style="width:{used / most if most else 0:.1%}"></i></span> '
        f"{html.escape(name)}: {used:,} of {most:,}</div>"
        for name, (used, most) in fill.items()
    )


def histogram(title: str, values: np.ndarray, limit: float | None = None, bins: int = 40) -> str:
    """An SVG drawing; logarithmic where the largest value is over 50 times the smallest.

    Args:
      limit: is marked by a line where it lies inside, such as the room of a row.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    logarithmic = low > 0 and high > 50 * low
    edges = np.geomspace(low, high, bins + 1) if logarithmic else np.linspace(low, high, bins + 1)
    edges[0], edges[-1] = low, high
    counts = np.histogram(values, edges)[0]
    width, height, step, most = 320, 120, 320 / bins, counts.max()
    bars = "".join(
        f'<rect class="bar" x="{i * step:.1f}" y="{height - count / most * height:.1f}" width="{step - 1:.1f}" '
        f'height="{count / most * height:.1f}"><title>{edges[i]:.4g} to {edges[i + 1]:.4g}: {count:,}</title></rect>'
        for i, count in enumerate(counts.tolist())
        if count
    )
    mark = ""
    if limit is not None and low < limit < high:
        share = np.log(limit / low) / np.log(high / low) if logarithmic else (limit - low) / (high - low)
        mark = f'<line x1="{share * width:.1f}" x2="{share * width:.1f}" y1="0" y2="{height}" stroke-dasharray="4"/>'
    places = ((0, low, "start"), (width / 2, edges[bins // 2], "middle"), (width, high, "end"))
    labels = "".join(
        f'<text x="{x}" y="{height + 14}" text-anchor="{at}">{number:.4g}</text>' for x, number, at in places
    )
    scale = ", logarithmic" if logarithmic else ""
    return (
        f"<figure><figcaption>{html.escape(title)}{scale}; highest bar {most:,}</figcaption>"
        f'<svg role="img" width="{width}" height="{height + 20}" viewBox="0 0 {width} {height + 20}">'
        f"{bars}{mark}{labels}</svg></figure>"
    )
