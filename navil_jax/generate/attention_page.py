"""Looking inside: attention over the image, shares and feature scales, as PNG files and one page."""

import argparse
import base64
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from navil_jax.console import table
from navil_jax.data.images import Scale, load_image, plan_scales
from navil_jax.data.inspect import page
from navil_jax.errors import Parser, UserError
from navil_jax.generate.assistant import Assistant, Question
from navil_jax.generate.attention import Looks, look
from navil_jax.generate.heat_maps import Units, curves, grids, heat_map, ramp, units_of
from navil_jax.generate.programs import length_of
from navil_jax.paths import given_path, new_folder

ABOUT = """Shows what tokens of a prompt look at: attention over the image at every scale, as drawings and one page.

  python -m navil_jax.generate attention --checkpoint runs/x --image cat.png --prompt "What is this?" --out look
  python -m navil_jax.generate attention --checkpoint runs/x --image cat.png --prompt "What is this?" --out look \\
    --layers 0,5,11 --heads mean,3 --tokens=-1,40

Weights are computed anew, exactly: softmax(q k / sqrt(D)) in float32 with the model's mask, layer by layer. Beside
them the page has the share of attention on visual and on text tokens, and the norms of both kinds, of every layer. The
token -1 is the last one of the prompt, of which the answer's first token is made; the page numbers all tokens.

Exit status: 0 good, 2 bad input (one line says what), 130 after Ctrl-C."""
MEAN = "mean"  # of all heads


class Shown(NamedTuple):
    """An image at one scale; all of a prompt's images, one after the other."""

    name: str
    image: Image.Image
    scale: Scale


def run(argv: Sequence[str], load: Callable[[str], Assistant]) -> int:
    """The command. Args: load: gives the model of a checkpoint."""
    options = _parser().parse_args(list(argv))
    images = [load_image(path) for path in options.image]
    assistant = load(options.checkpoint)
    prompt = assistant.prompt((), options.prompt, [assistant.read_image(image) for image in images])
    decoder, length = assistant.config.model.decoder, length_of(prompt)
    assistant.check(Question(prompt, max_new_tokens=1))
    layers = _numbers(options.layers, decoder.depth, "--layers", "layer") or _spread(decoder.depth, 4)
    heads = _heads(options.heads, decoder.num_heads)
    tokens = [token % length for token in _numbers(options.tokens, length, "--tokens", "token", negative=True)]
    looks = look(assistant.engine.programs, prompt, layers, tokens)
    shown = list(_scales(assistant, list(zip(options.image, images, strict=True))))
    units, texts = units_of(prompt, assistant.config.model), list(_texts(assistant, prompt, tokens))
    options.out.mkdir(parents=True, exist_ok=True)
    rows = list(_rows(looks, heads, tokens, units, shown, assistant, options.out))
    charts = [(_saved(drawing, options.out / name), said) for name, drawing, said in _charts(looks)]
    head = ("layer", "attention on visual tokens", "on text tokens", "norm of visual tokens", "of text tokens")
    values = list(_layer_rows(looks))
    text = page.render(
        Path(__file__).parent / "attention.html.jinja",
        title="Attention",
        checkpoint=options.checkpoint,
        prompt=options.prompt,
        rows=rows,
        ramp=page.data_uri(ramp()),
        charts=charts,
        head=head,
        layers=values,
        tokens=texts,
    )
    path = options.out / "index.html"
    path.write_text(text, encoding="utf-8")
    print(table(("layer", "on visual", "on text", "norm visual", "norm text"), values))
    print(f"{len(rows)} rows of drawings and their page: {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m navil_jax.generate attention", description=ABOUT)
    add = parser.add_argument
    add("--checkpoint", required=True, type=given_path, metavar="DIR", help="as for generate")
    add("--image", action="append", required=True, type=given_path, metavar="FILE", help="may be given several times")
    add("--prompt", required=True, metavar="TEXT", help="the question")
    add("--out", required=True, type=new_folder, metavar="DIR", help="folder for the drawings and index.html")
    add("--layers", default="", metavar="A,B", help="numbers from 0 (default: four, evenly spread)")
    add("--heads", default=MEAN, metavar="A,B", help="numbers from 0, or mean of all (default)")
    add("--tokens", default="-1", metavar="A,B", help="of the prompt, from 0, or from its end (default: -1)")
    return parser


def _numbers(text: str, count: int, option: str, what: str, negative: bool = False) -> list[int]:
    """Numbers of an option, each of which there is."""
    found: list[int] = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            number = int(part)
        except ValueError:
            raise UserError(f"{option}: {part!r} is no number; write some such as 0,3") from None
        if not (-count if negative else 0) <= number < count:
            raise UserError(f"{option}: there is no {what} {number}; the model and prompt have {count}, from 0")
        found.append(number)
    if text and not found:
        raise UserError(f"{option}: {text!r} names none; write some such as 0,3")
    return list(dict.fromkeys(found))


def _heads(text: str, count: int) -> list[str | int]:
    found: list[str | int] = []
    for part in map(str.strip, text.split(",")):
        found += [MEAN] if part == MEAN else _numbers(part or ",", count, "--heads", "head")
    return list(dict.fromkeys(found))


def _spread(count: int, wanted: int) -> list[int]:
    """Example: 12 layers, 4 wanted -> 0 4 7 11"""
    return sorted({round(value) for value in np.linspace(0, count - 1, wanted)})


def _scales(assistant: Assistant, images: Sequence[tuple[str, Image.Image]]) -> Iterator[Shown]:
    config = assistant.config
    for name, image in images:
        for scale in plan_scales(image.height, image.width, config.images, config.model.encoder):
            yield Shown(name, image, scale)


def _rows(
    looks: Looks,
    heads: Sequence[str | int],
    tokens: Sequence[int],
    units: Units,
    shown: Sequence[Shown],
    assistant: Assistant,
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """A row of drawings for each layer, head and token: the image at all scales, with one range of colours."""
    patch = assistant.config.model.encoder.patch_size
    for layer, weights in looks.weights.items():
        for head in heads:
            of_head = weights.mean(axis=0) if isinstance(head, str) else weights[head]
            for token, own in zip(tokens, of_head, strict=True):
                found = grids(units, own)
                most = max(float(grid.max()) for grid in found)
                figures = []
                for number, (grid, (name, image, scale)) in enumerate(zip(found, shown, strict=True), 1):
                    file = folder / f"layer-{layer:02}-head-{head}-token-{token}-scale-{number}.png"
                    size = f"{Path(name).name}, {grid.shape[1]} x {grid.shape[0]} tokens, share {grid.sum():.1%}"
                    uri = _saved(heat_map(image, scale, grid, most, patch), file)
                    figures.append({"uri": uri, "caption": size})
                yield {"title": f"layer {layer}, head {head}, token {token}", "most": most, "figures": figures}


def _charts(looks: Looks) -> Iterator[tuple[str, Image.Image, str]]:
    """Name of the file, drawing, and what is seen in it."""
    found = [("norms.png", "mean norm of tokens in front of each layer, and behind the last", looks.norms)]
    if looks.shares is not None:
        found.insert(0, ("shares.png", "share of attention of text tokens behind the image, by layer", looks.shares))
    for name, title, values in found:
        lines = dict(zip(("visual tokens", "text tokens"), values.T, strict=True))
        ends = (f"{kind} {of[0]:.3g} in layer 0, {of[-1]:.3g} at the end" for kind, of in lines.items())
        yield name, curves(title, lines), f"{title}: {'; '.join(ends)}"


def _layer_rows(looks: Looks) -> Iterator[tuple[str, ...]]:
    shares = looks.shares if looks.shares is not None else np.full((len(looks.norms) - 1, 2), np.nan)
    for number, (norm, share) in enumerate(zip(looks.norms, [*shares, (np.nan, np.nan)], strict=True)):
        shown = [f"{value:.1%}" if np.isfinite(value) else "-" for value in share]
        yield str(number), *shown, *(f"{value:.4g}" for value in norm)


def _texts(assistant: Assistant, prompt: Any, chosen: Sequence[int]) -> Iterator[tuple[str, str, bool]]:
    """Number, text and whether it is chosen, of every token; runs of visual ones as one."""
    placed = dict(zip(prompt["text_positions"].tolist(), prompt["text_tokens"].tolist(), strict=True))
    run = 0
    for position in range(length_of(prompt) + 1):
        if position not in placed and position < length_of(prompt):
            run += 1
            continue
        if run:
            start, end = position - run, position - 1
            yield f"{start}-{end}", f"{run} visual", any(start <= token <= end for token in chosen)
            run = 0
        if position in placed:
            yield str(position), assistant.token_text(placed[position]), position in chosen


def _saved(drawing: Image.Image, path: Path) -> str:
    """Writes a PNG; gives it as an address that holds the image itself."""
    buffer = io.BytesIO()
    drawing.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
