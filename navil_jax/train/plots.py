"""Pictures of a run, as PNG: the loss curve, and held-out images with the model's answers."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from navil_jax.train.metrics import Answer


def plot_losses(path: str | Path, lines: Iterable[Mapping[str, Any]], title: str) -> None:
    """Draws the training loss (raw and smoothed) and every held-out loss of a log into a PNG.

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
    figure = _figure(8, 4.5)
    axis = figure.subplots()
    for name, points in curves.items():
        steps, values = np.array(points).T
        if name == "loss":
            axis.plot(steps, values, color="0.8", linewidth=0.8)
            axis.plot(steps, running_mean(values), label="training (smoothed)", color="0.3")
        else:
            axis.plot(steps, values, "o-", markersize=4, label=name.removeprefix("eval/"))
    axis.set(xlabel="step", ylabel="loss", title=title)
    axis.grid(alpha=0.3)
    if curves:
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Running mean with a window of a fiftieth of the run, shorter at the start. [n] -> [n]"""
    window = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_answers(path: str | Path, answers: Sequence[Answer], columns: int = 4) -> None:
    """Draws a grid of images with question, answer (green: right, red: wrong) and truth into a PNG."""
    rows = max(1, -(-len(answers) // columns))
    figure = _figure(3 * columns, 3.6 * rows, dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, shown in zip(axes.flat, answers, strict=False):
        if shown.image is not None:
            axis.imshow(shown.image)
        axis.set_title(_wrap(shown.question), fontsize=8, parse_math=False)
        said = shown.answer if shown.right else f"{shown.answer or '(nothing)'}  (truth: {shown.truth})"
        colour = "tab:green" if shown.right else "tab:red"
        axis.text(
            0.5, -0.03, _wrap(said), transform=axis.transAxes, ha="center", va="top", fontsize=8, color=colour,
            parse_math=False,
        )  # fmt: skip
    figure.tight_layout()
    figure.savefig(path)


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 36, max_lines=3)) or " "


def _figure(width: float, height: float, dpi: int = 120) -> Figure:
    """A figure of so many inches that belongs to no window system."""
    figure = Figure(figsize=(width, height), dpi=dpi)
    FigureCanvasAgg(figure)
    return figure
