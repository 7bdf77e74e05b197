"""Report of a run as one HTML page: `python -m navil_jax.train report DIR`."""

import base64
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
        facts=facts(run, now),
        curves=curves(run),
        evaluation=_text(run.folder / "evaluation.md"),
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
    """The curves of the logs, those of one unit in one drawing."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in (*run.metrics, *run.timings):
        for name, value in line.items():
            if name != "step" and math.isfinite(value):
                points.setdefault(name, []).append((line["step"], value))
    losses = ["loss", *sorted(name for name in points if name.startswith("eval/") and name.endswith("loss"))]
    scores = sorted(name for name in points if name.startswith("eval/") and name not in losses)
    drawings = [("loss", losses), ("held-out scores", scores)]
    drawings += [(name, [name]) for name in ("learning_rate", "gradient_norm", "tokens_per_second", "mfu", "data_wait")]
    drawings += [("seconds that steps waited for a save", ["checkpoint/blocked_seconds"])]
    drawings += [("goodput", ["goodput/productive"])]
    return [
        drawing(title, {name: points[name] for name in names if name in points})
        for title, names in drawings
        if any(name in points for name in names)
    ]


def drawing(title: str, named: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """What the template of a curve shows; long curves as means of equal stretches."""
    thinned = {name: _thinned(np.array(points, float)) for name, points in named.items()}
    everything = np.concatenate(list(thinned.values()))
    (left, low), (right, high) = everything.min(0), everything.max(0)
    across, up = (right - left) or 1.0, (high - low) or 1.0
    lines = []
    for number, (name, points) in enumerate(thinned.items()):
        x, y = (points[:, 0] - left) / across * WIDTH, HEIGHT - (points[:, 1] - low) / up * HEIGHT
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        lines.append({"name": name, "path": path, "hue": number * 137 % 360, "last": f"{points[-1, 1]:.4g}"})
    return {
        "title": title,
        "lines": lines,
        "low": f"{low:.4g}",
        "high": f"{high:.4g}",
        "left": f"{left:,.0f}",
        "right": f"{right:,.0f}",
        "width": WIDTH,
        "height": HEIGHT,
    }


def _thinned(points: np.ndarray) -> np.ndarray:
    """[n, 2] -> [at most POINTS, 2]"""
    if len(points) <= POINTS:
        return points
    return np.stack([stretch.mean(0) for stretch in np.array_split(points, POINTS)])


def _text(path: epath.Path) -> str:
    return path.read_text() if path.exists() else ""


def _png(path: epath.Path) -> str:
    """A drawing of the run, as an address that holds it; empty if there is none."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.exists() else ""
