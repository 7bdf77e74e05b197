"""HTML pages that need nothing from outside, from the templates beside this file: samples, images, histograms."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
THUMBNAIL = 240  # pixels, the longer side
TEXT_LIMIT = 20_000  # characters of a stretch that are shown
WIDTH, HEIGHT, EDGE = 320, 120, 50  # of a histogram; a label so near to its side does not stand in the middle


def render(template: Path, **values: Any) -> str:
    """The page of a template, which may extend `page.html.jinja` and use `parts.html.jinja`; values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"commas": "{:,}".format, "data_uri": data_uri, "shortened": shortened}
    return environment.get_template(template.name).render(values)


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


def histogram(
    title: str, values: np.ndarray, limit: float | None = None, bins: int = 40, mark: str = "a row's room"
) -> dict[str, Any]:
    """What the template of a histogram shows; logarithmic where the largest value is over 50 times the smallest.

    Of values that are all alike nothing is drawn, and the caption says which it is.

    Args:
      limit: is marked by a line where it lies inside, such as the room of a row.
      mark: what stands at that line.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return {"caption": f"{title}: {low:,.4g}, the same in all {len(values):,}", "bars": []}
    logarithmic = low > 0 and high > 50 * low
    edges = np.geomspace(low, high, bins + 1) if logarithmic else np.linspace(low, high, bins + 1)
    edges[0], edges[-1] = low, high
    counts = np.histogram(values, edges)[0]
    step, most = WIDTH / bins, counts.max()
    at = None
    if limit is not None and low < limit < high:
        share = np.log(limit / low) / np.log(high / low) if logarithmic else (limit - low) / (high - low)
        at = round(share * WIDTH, 1)
    labels = ((0, low, "start"), (WIDTH / 2, edges[bins // 2], "middle"), (WIDTH, high, "end"))
    return {
        "caption": f"{title}{', logarithmic' if logarithmic else ''}; upwards: how many",
        "said": f"histogram: {title}, {len(values):,} values from {low:,.4g} to {high:,.4g}, "
        f"median {float(np.median(values)):,.4g}",
        "most": most.item(),
        "bars": [
            (round(i * step, 1), round(count / most * HEIGHT, 1), f"{edges[i]:.4g} to {edges[i + 1]:.4g}: {count:,}")
            for i, count in enumerate(counts.tolist())
            if count
        ],
        "bar_width": step - 1,
        "mark": at,
        "mark_label": mark,
        "mark_anchor": "middle" if at is None or EDGE < at < WIDTH - EDGE else "start" if at <= EDGE else "end",
        "labels": [(x, anchor, f"{number:,.4g}") for x, number, anchor in labels],
    }
