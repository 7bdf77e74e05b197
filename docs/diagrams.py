"""Draws docs/images/architecture.svg and packed_row.svg: `python docs/diagrams.py`."""

from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).parent / "images"
VISUAL, TEXT, SHARED, EMPTY, PAPER = "#f6b26b", "#9fc5e8", "#d9d9d9", "#ffffff", "#fcfcfc"
FIRST, SECOND = "#b6d7a8", "#d5a6bd"  # two samples of a row
INK = "#222222"


def box(x: float, y: float, width: float, height: float, fill: str, lines: str, size: int = 15) -> str:
    """A box with centred lines of text, `\\n` between them."""
    rows = lines.split("\n")
    first = y + height / 2 - (len(rows) - 1) * (size + 3) / 2 + size * 0.35
    words = "".join(text(x + width / 2, first + i * (size + 3), row, size) for i, row in enumerate(rows))
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{INK}"/>'
    return frame + words


def text(x: float, y: float, words: str, size: int = 15, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" marker-end="url(#head)"/>'


def drawing(width: int, height: int, title: str, *parts: str) -> str:
    head = '<path d="M0 0L8 4L0 8z"/>'
    marker = f'<marker id="head" markerWidth="8" markerHeight="8" refX="8" refY="4" orient="auto">{head}</marker>'
    body = "\n".join(part for part in parts if part)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="DejaVu Sans, Verdana, sans-serif" fill="{INK}">\n<title>{escape(title)}</title>\n'
        f'<defs>{marker}</defs>\n<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


def architecture() -> str:
    """The model from an image and a text to the next token: visual weights left, text weights right."""
    left, right, side = 30, 340, 270  # x of the columns, their width
    visual, words = left + side / 2, right + side / 2
    rows = {"input": 20, "patches": 85, "encoder": 160, "embed": 235, "slots": 310}
    layer = 372  # top of the decoder layer's frame
    norm, qkv, attend, out, norm2, ffn = (layer + d for d in (14, 52, 124, 188, 252, 290))
    head = layer + 376
    parts = [
        box(left, rows["input"], side, 40, EMPTY, "image, any resolution"),
        arrow(visual, 60, visual, rows["patches"]),
        box(left, rows["patches"], side, 50, VISUAL, "several scales,\ncut into patches of 16 x 16"),
        arrow(visual, 135, visual, rows["encoder"]),
        box(
            left, rows["encoder"], side, 50, VISUAL, "vision encoder: attention within\none scale, 2-D rotary positions"
        ),
        arrow(visual, 210, visual, rows["embed"]),
        box(left, rows["embed"], side, 50, VISUAL, "2 x 2 patches are one unit;\nconnector (MLP)"),
        arrow(visual, 285, visual, rows["slots"]),
        box(right, rows["input"], side, 40, EMPTY, "text, and markers of images"),
        arrow(words, 60, words, rows["embed"]),
        box(right, rows["embed"], side, 50, TEXT, "token embeddings"),
        arrow(words, 285, words, rows["slots"]),
        box(left, rows["slots"], side, 36, VISUAL, "V visual slots"),
        box(right, rows["slots"], side, 36, TEXT, "T text slots"),
        f'<rect x="14" y="{layer}" width="612" height="350" rx="8" fill="none" stroke="{INK}" stroke-dasharray="6 4"/>',
        arrow(visual, 346, visual, norm),
        arrow(words, 346, words, norm),
        box(left, norm, 580, 26, SHARED, "norm", 14),
        arrow(visual, norm + 26, visual, qkv),
        arrow(words, norm + 26, words, qkv),
        box(left, qkv, side, 44, VISUAL, "visual queries, keys, values"),
        box(right, qkv, side, 44, TEXT, "text queries, keys, values"),
        arrow(visual, qkv + 44, visual, attend),
        arrow(words, qkv + 44, words, attend),
        box(left, attend, 580, 40, SHARED, "one causal attention over all tokens, in reading order"),
        arrow(visual, attend + 40, visual, out),
        arrow(words, attend + 40, words, out),
        box(left, out, side, 40, VISUAL, "visual output projection"),
        box(right, out, side, 40, TEXT, "text output projection"),
        arrow(visual, out + 40, visual, norm2),
        arrow(words, out + 40, words, norm2),
        box(left, norm2, 580, 26, SHARED, "norm", 14),
        arrow(visual, norm2 + 26, visual, ffn),
        arrow(words, norm2 + 26, words, ffn),
        box(left, ffn, side, 40, VISUAL, "visual feed-forward"),
        box(right, ffn, side, 40, TEXT, "text feed-forward"),
        text(left, layer + 343, "decoder layer, repeated; residual sums left out", 12, "start"),
        arrow(words, ffn + 40, words, head),
        box(right, head, side, 40, TEXT, "head: next token"),
        text(visual, head + 17, "visual slots end here:", 13),
        text(visual, head + 34, "the head runs on text slots alone", 13),
    ]
    return drawing(640, head + 58, "NaViL: an image and a text become the next token", *parts)


def packed_row() -> str:
    """The example of `navil_jax/batch.py`: two samples in one row, in slots and in reading order."""
    slots = ["<img>", "c", "c", "-", "<s>", "</img>", "a", "<s>", "b", "-"]
    order = [4, 0, 1, 2, 5, 6, 7, 8, 3, 9]
    sample = [FIRST, FIRST, FIRST, EMPTY, FIRST, FIRST, FIRST, SECOND, SECOND, EMPTY]
    cell, left, gap, patch = 60, 22, 16, 14
    patch_y, slot_y, read_y = 46, 128, 264
    x_of = [left + cell * i + (gap if i >= 4 else 0) for i in range(10)]
    parts = [text(left, 28, "patch slots: pixels, four patches for each unit", 14, "start")]
    for unit in range(1, 4):
        for i in range(4):
            fill = EMPTY if unit == 3 else FIRST
            parts.append(box(x_of[unit] + 2 + patch * i, patch_y, patch, patch * 2, fill, ""))
        if unit < 3:
            parts.append(arrow(x_of[unit] + cell / 2, patch_y + 2 * patch, x_of[unit] + cell / 2, slot_y - 4))
    parts.append(text(x_of[0], slot_y - 30, "visual", 14, "start"))
    parts.append(text(x_of[0], slot_y - 13, "slots", 14, "start"))
    parts.append(text(x_of[4], slot_y - 13, "text slots: the head and the loss are here", 14, "start"))
    for i, words in enumerate(slots):
        parts.append(box(x_of[i], slot_y, cell, 36, sample[i], words, 14))
        parts.append(text(x_of[i] + cell / 2, slot_y + 52, str(i), 11))
    frames = ((x_of[0], 4 * cell, VISUAL), (x_of[4], 6 * cell, TEXT))
    parts += [
        f'<rect x="{x - 4}" y="{slot_y - 4}" width="{width + 8}" height="44" rx="7" fill="none" stroke="{colour}" '
        'stroke-width="4"/>'
        for x, width, colour in frames
    ]
    for place, slot in enumerate(order[:8]):
        colour = "#38761d" if sample[slot] == FIRST else "#a64d79"
        x1, x2 = x_of[slot] + cell / 2, left + cell * place + cell / 2
        parts.append(
            f'<line x1="{x1}" y1="{slot_y + 58}" x2="{x2}" y2="{read_y}" stroke="{colour}" stroke-width="1.5"/>'
        )
    for place, slot in enumerate(order[:8]):
        parts.append(box(left + cell * place, read_y, cell, 36, sample[slot], slots[slot], 14))
    parts.append(text(left, read_y + 58, "reading order: attention alone sees it, each sample by itself", 14, "start"))
    return drawing(660, read_y + 76, "A packed row: two samples in slots and in reading order", *parts)


DRAWINGS = {"architecture.svg": architecture, "packed_row.svg": packed_row}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (IMAGES / name).write_text(draw())
