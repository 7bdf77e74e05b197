"""Pictures of a run, as PNG: the loss curve, and held-out images with the model's answers."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from navil_jax.train.metrics import Answer

MOST_POINTS = 2000  # training losses that are drawn one by one
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa3377", "#8a6d00", "#56a0d3")  # told apart by the colour-blind, too
LINES = ("-", "--", ":")
RIGHT, WRONG = "#1a7f37", "#b3261e"


def plot_losses(path: str | Path, lines: Iterable[Mapping[str, Any]], title: str) -> None:
    """Draws the training loss (raw and smoothed) and every held-out loss of a log into a PNG.

    Losses stand on a logarithmic axis where the largest is over ten times the smallest.

    Args:
      path: file to write.
      lines: of `read_log`: `loss` is the training loss, keys that start with `eval/` and end with `loss` are held out.
      title: stands above the curves.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name == "loss" or (name.startswith("eval/") and name.endswith("loss")):
                curves.setdefault(name, []).append((line["step"], value))
    figure = _figure(10, 5)
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    if training := curves.pop("loss", None):
        _draw_training(axis, *np.array(training).T)
    for number, (name, points) in enumerate(sorted(curves.items(), key=lambda curve: -curve[1][-1][1])):
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": LINES[number // len(COLOURS) % len(LINES)],
        }
        label = f"held out: {name.removeprefix('eval/').removesuffix('loss').rstrip('/_') or 'all'}"
        axis.plot(
            *zip(*points, strict=True), marker="o" if len(points) <= 40 else "", markersize=4, label=label, **style
        )
    axis.set(xlabel="step", ylabel="loss", title=title)
    values = [value for points in (*curves.values(), training or []) for _, value in points]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(alpha=0.3, which="both")
    if values:
        figure.legend(loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(path)


def _draw_training(axis: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """The losses, or of many the range of neighbours, and their running mean."""
    if len(steps) <= MOST_POINTS:
        axis.plot(steps, values, color="0.72", linewidth=0.8, label="training, each step")
    else:
        starts = np.linspace(0, len(steps), MOST_POINTS // 4, endpoint=False).astype(int)
        low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        axis.fill_between(steps[starts], low, high, color="0.8", label=f"training, range of {starts[1]} steps")
    axis.plot(steps, running_mean(values), label="training, smoothed", color="0.15")


def running_mean(values: np.ndarray) -> np.ndarray:
    """Running mean with a window of a fiftieth of the run, shorter at the start. [n] -> [n]"""
    window = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_answers(path: str | Path, answers: Sequence[Answer], columns: int = 4) -> None:
    """Draws a grid of images into a PNG: above each its question, below it the answer, marked as right or wrong."""
    rows = max(1, -(-len(answers) // columns))
    figure = _figure(3 * columns, 3.6 * rows, dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, shown in zip(axes.flat, answers, strict=False):
        if shown.image is not None:
            axis.imshow(shown.image)
        axis.set_title(_wrap(shown.question), fontsize=9, parse_math=False)
        said = shown.answer or "(nothing)"
        said = f"\u2713 {said}" if shown.right else f"\u2717 {said}\ntruth: {shown.truth}"
        text = "\n".join(_wrap(line) for line in said.split("\n"))
        axis.text(
            0.5, -0.03, text, transform=axis.transAxes, ha="center", va="top", fontsize=9,
            color=RIGHT if shown.right else WRONG, fontweight="normal" if shown.right else "bold", parse_math=False,
        )  # fmt: skip
    if any(shown.answer.endswith(" ...") for shown in answers):
        figure.supxlabel("... stands where an answer goes on behind its first wrong token", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 36, max_lines=3)) or " "


def _figure(width: float, height: float, dpi: int = 120) -> Figure:
    """A figure of so many inches that belongs to no window system."""
    figure = Figure(figsize=(width, height), dpi=dpi)
    FigureCanvasAgg(figure)
    return figure
