"""Report of a run as one HTML page: `python -m navil_jax.train report DIR`."""

import base64
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from navil_jax.config import Config
from navil_jax.config.flags import load_config
from navil_jax.config.plain import differences
from navil_jax.data.inspect.page import render
from navil_jax.errors import Parser, UserError
from navil_jax.paths import given_path, new_file
from navil_jax.train.goodput import PARTS, divide, duration, shares
from navil_jax.train.overview import Overview, Reader
from navil_jax.train.watch import facts

ABOUT = """Writes what there is to know of a run as one HTML page that needs nothing from outside.

  python -m navil_jax.train report runs/demo
  python -m navil_jax.train report gs://bucket/navil --out navil.html

Curves, held-out answers, samples by source, goodput, what the config changes of its recipe, and the hardware.

Exit status: 0 good, 2 bad input (one line says what), 130 after Ctrl-C."""
WIDTH, HEIGHT = 480, 200  # of a curve
POINTS = 400  # of a curve, at most
DOTS = 12  # so few points are marked, and one alone is seen
COLOURS = 8  # of the page's; curves behind them are dashed
ALONE = {
    "learning_rate": "learning rate",
    "gradient_norm": "norm of the gradient",
    "tokens_per_second": "tokens per second",
    "mfu": "share of the devices' peak (MFU)",
    "data_wait": "share of the time that waits for data",
    "checkpoint/blocked_seconds": "seconds that steps waited for a save",
    "goodput/productive": "share of the time that trains (goodput)",
}
FREE = ("workdir",)  # keys that every run sets


def report(argv: Sequence[str]) -> int:
    """The command."""
    parser = Parser(prog="python -m navil_jax.train report", description=ABOUT)
    parser.add_argument("folder", type=given_path, metavar="DIR", help="workdir of the run, local or gs://")
    parser.add_argument("--out", type=new_file, metavar="FILE", help="default: report.html in the workdir")
    text = "what the config is compared with (default: the one that the run was started with, if it is there)"
    parser.add_argument("--recipe", type=given_path, metavar="FILE", help=text)
    options = parser.parse_args(list(argv))
    run = Reader(options.folder).read()
    path = epath.Path(options.out) if options.out else run.folder / "report.html"
    path.write_text(page(run, options.recipe or _recipe(run)))
    print(path)
    return 0


def page(run: Overview, recipe: str = "", now: float | None = None) -> str:
    """The page. `recipe`: a file to compare the config with, if one is known."""
    now = time.time() if now is None else now
    spent, of_whole = divide(run.attempts), shares(run.attempts)
    counts = run.samples()
    kinds = sorted({kind for of_source in counts.values() for kind in of_source})
    return render(
        Path(__file__).with_name("report.html.jinja"),
        title=f"Run {run.folder.name}",
        alarms=run.alarms(now),
        facts=facts(run, now, drawn=True),
        curves=curves(run),
        evaluation=_blocks(_text(run.folder / "evaluation.md")),
        answers=_png(run.folder / "answers.png"),
        kinds=kinds,
        samples=[(name, *(f"{of_one.get(kind, 0):,}" for kind in kinds)) for name, of_one in counts.items()],
        goodput=[(duration(spent[part]), f"{of_whole[part]:.1%}", PARTS[part]) for part in PARTS] * bool(run.attempts),
        recipe=recipe,
        changed=_changed(run.config, recipe),
        hardware=[(key, str(value)) for key, value in run.about.items() if key != "config"],
    )


def _recipe(run: Overview) -> str:
    """The recipe that the run was started with, if it is there still."""
    command = [str(word) for word in run.about.get("command", ())]
    for number, word in enumerate(command):
        name = word.removeprefix("--config=") if word.startswith("--config=") else ""
        name = command[number + 1] if word == "--config" and number + 1 < len(command) else name
        if name and Path(name).is_file():
            return name
    return ""


def _changed(config: Config | None, recipe: str) -> list[tuple[str, str, str]]:
    """Key, value of the recipe, value of the run; none if there is nothing to compare."""
    if config is None or not recipe:
        return []
    try:
        of_recipe = load_config(recipe)
    except UserError as error:
        return [("recipe", str(error), "")]
    return [(k, str(a), str(b)) for k, (a, b) in differences(of_recipe, config).items() if k not in FREE]


def curves(run: Overview) -> list[dict[str, Any]]:
    """The curves of the logs: losses in one drawing, the held-out scores of a source in one, others alone."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in (*run.metrics, *run.timings):
        for name, value in line.items():
            if name != "step" and math.isfinite(value):
                points.setdefault(name, []).append((line["step"], value))
    drawings: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name in sorted(points):
        if name == "loss" or (name.startswith("eval/") and name.endswith("/loss")):
            said = "training" if name == "loss" else f"held out: {name.removeprefix('eval/').removesuffix('/loss')}"
            drawings.setdefault("loss", {})[said] = points[name]
    for name in sorted(name for name in points if name.startswith("eval/") and not name.endswith("/loss")):
        _, source, *rest = name.split("/")
        drawings.setdefault(f"held-out scores: {source}", {})["/".join(rest) or source] = points[name]
    drawings |= {title: {title: points[name]} for name, title in ALONE.items() if name in points}
    return [drawing(title, named) for title, named in drawings.items()]


def drawing(title: str, named: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """What the template of a curve shows; long curves as means of equal stretches, wide ranges logarithmic."""
    thinned = {name: _thinned(np.array(points, float)) for name, points in named.items()}
    everything = np.concatenate(list(thinned.values()))
    (left, low), (right, high) = everything.min(0), everything.max(0)
    logarithmic = title == "loss" and 0 < low * 8 < high
    scaled = np.log if logarithmic else np.array
    across, up = (right - left) or 1.0, (scaled(high) - scaled(low)) or 1.0
    lines = []
    for number, (name, points) in enumerate(thinned.items()):
        x, y = (points[:, 0] - left) / across * WIDTH, HEIGHT - (scaled(points[:, 1]) - scaled(low)) / up * HEIGHT
        placed = [(f"{a:.1f}", f"{b:.1f}") for a, b in zip(x, y, strict=True)]
        lines.append(
            {
                "name": "" if name == title else name,
                "path": " ".join(map(",".join, placed)),
                "dots": placed if len(placed) <= DOTS else [],
                "colour": number % COLOURS,
                "dashes": "dashed" if number >= COLOURS else "",
                "last": _said(points[-1, 1]),
            }
        )
    ends = "; ".join(f"{name} {_said(points[0, 1])} to {_said(points[-1, 1])}" for name, points in thinned.items())
    return {
        "title": title,
        "said": f"{title} from step {left:,.0f} to {right:,.0f}: {ends}",
        "logarithmic": logarithmic,
        "lines": lines,
        "low": _said(low),
        "high": _said(high),
        "left": f"{left:,.0f}",
        "right": f"{right:,.0f}",
        "width": WIDTH,
        "height": HEIGHT,
    }


def _said(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _thinned(points: np.ndarray) -> np.ndarray:
    """[n, 2] -> [at most POINTS, 2]"""
    if len(points) <= POINTS:
        return points
    return np.stack([stretch.mean(0) for stretch in np.array_split(points, POINTS)])


def _text(path: epath.Path) -> str:
    return path.read_text() if path.exists() else ""


def _blocks(markdown: str) -> list[tuple[list[str], Any]]:
    """Head and rows of each table in a text, and no head where there is other text."""
    blocks: list[tuple[list[str], Any]] = []
    for is_table, lines in itertools.groupby(markdown.splitlines(), lambda line: line.startswith("|")):
        text = "\n".join(lines).strip()
        rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
        if is_table and len(rows) > 1 and not set(rows[1][0]) - set(":-"):
            blocks.append((rows[0], rows[2:]))
        elif text:
            blocks.append(([], text))
    return blocks


def _png(path: epath.Path) -> str:
    """A drawing of the run, as an address that holds it; empty if there is none."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.exists() else ""
