"""Tokens: what images cost in tokens, scale by scale, printed and drawn."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from navil_jax.config import Config
from navil_jax.console import say, table
from navil_jax.data.images import load_image
from navil_jax.data.inspect.token_map import draw_tokens, row_budgets
from navil_jax.data.prompt import ImageTokens, image_tokens
from navil_jax.errors import UserError
from navil_jax.paths import given_path, new_drawing

ABOUT = """Shows what images cost in tokens: each scale's size, its grid of patches, its tokens and its padding.

what an image costs in the first stage of NaViL-9B, and a drawing of where its tokens sit:
  python -m navil_jax.data tokens --image cat.png --config configs/navil_9b.py --out cat_tokens.png

the same for smaller images, and for a row with less room:
  python -m navil_jax.data tokens --image cat.png --config.images.max_patches=4096 --config.data.visual_slots=2048

several images, for a program:
  python -m navil_jax.data tokens --image a.jpg --image b.jpg --json

How to read it: an image is taken at its own size unless that has too few or too many patches (images.min_patches,
images.max_patches) and, with images.multiscale, again in smaller copies. Each copy is padded with black at the right
and the bottom to whole merged units, and each unit of 2 x 2 patches is one visual token. Every row of units ends in a
line break and every scale in a frame break, which are text tokens as </img> is; <img> is a visual one. A packed row has
room for data.visual_slots, data.text_slots (the prompt and the answer need some, too) and data.patch_slots.

Without --config the defaults of the paper hold. Exit status: 0 good, 2 bad input (one line says what)."""
SCALE_COLUMNS = ("scale", "resized", "patches", "visual tokens", "line breaks", "frame breaks", "padding")
ORIENTATION = 0x0112  # EXIF tag; 1 is upright


def run(config: Config, options: argparse.Namespace) -> int:
    """Prints what the images cost, and draws them if asked to."""
    if not options.image:
        raise UserError("--image: no image given; --help shows how")
    images = {file: load_image(file) for file in options.image}
    counts = {file: image_tokens(*image.size, config) for file, image in images.items()}
    turned = {file: image.getexif().get(ORIENTATION) for file, image in images.items()}
    if options.json:
        print(json.dumps([{"image": file, **_values(count, config)} for file, count in counts.items()], indent=2))
    else:
        say("\n\n".join(_table(file, count, config, turned[file]) for file, count in counts.items()))
    if options.out:
        draw_tokens(options.out, images, config)
        print(f"drawn: {options.out}", file=sys.stderr)
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--image",
        action="append",
        type=given_path,
        default=[],
        metavar="FILE",
        help="an image; may be given several times",
    )
    add(
        "--out",
        type=new_drawing,
        metavar="FILE",
        help="PNG with each scale, its patches, merged units, windows and token numbers",
    )
    add("--json", action="store_true", help="prints one JSON array with an object per image")


def _room(count: ImageTokens, config: Config) -> dict[str, tuple[int, int]]:
    """What the image needs -> how much, and how much a row has."""
    return {name: (getattr(count, name), budget) for name, budget in row_budgets(config).items()}


def _fits(count: ImageTokens, config: Config) -> bool:
    return all(needed <= budget for needed, budget in _room(count, config).values())


def _scale_rows(count: ImageTokens, config: Config) -> list[dict[str, int]]:
    merge = config.model.encoder.merge_size
    return [
        scale._asdict()
        | {
            "visual_tokens": scale.rows * scale.cols // merge**2,
            "line_breaks": scale.rows // merge,
            "frame_breaks": 1,
        }
        for scale in count.scales
    ]


def _values(count: ImageTokens, config: Config) -> dict[str, Any]:
    """All numbers of an image, for JSON."""
    return {
        **dataclasses.asdict(count),
        "scales": _scale_rows(count, config),
        "total_tokens": count.visual_tokens + count.text_tokens,
        "fits": _fits(count, config),
        "row": row_budgets(config),
    }


def _table(file: str, count: ImageTokens, config: Config, orientation: object) -> str:
    """The text for one image."""
    area = config.model.encoder.patch_size**2
    lines = [f"{file}: {count.width} x {count.height} pixels"]
    if orientation in range(2, 9):
        lines.append(f"  its EXIF orientation {orientation} is not applied: it is seen as its pixels are stored")
    rows = [
        (
            f"{number}",
            f"{row['width']} x {row['height']}",
            f"{row['cols']} x {row['rows']}",
            f"{row['visual_tokens']:,}",
            f"{row['line_breaks']:,}",
            f"{row['frame_breaks']:,}",
            f"{1 - row['height'] * row['width'] / (row['rows'] * row['cols'] * area):.1%}",
        )
        for number, row in enumerate(_scale_rows(count, config), start=1)
    ]
    lines.append(table(SCALE_COLUMNS, rows, indent=2))
    lines.append(
        f"  together {count.visual_tokens + count.text_tokens:,} tokens with <img> and </img>, "
        f"{count.padding:.1%} of the pixels are padding"
    )
    room = ", ".join(
        f"{name.replace('_', ' ')} {needed:,} of {budget:,} ({needed / budget:.0%})"
        for name, (needed, budget) in _room(count, config).items()
    )
    return "\n".join([*lines, f"  {'fits a row' if _fits(count, config) else 'DOES NOT FIT A ROW'}: {room}"])
