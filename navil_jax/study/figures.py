"""The paper's figures, drawn from any results."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from navil_jax.study.analysis import Analysis
from navil_jax.study.fitted import data_sizes, label
from navil_jax.study.laws import EncoderLine, PowerLaw
from navil_jax.study.optima import encoder_points
from navil_jax.study.results import Curve, size

WIDTH, HEIGHT, LEGEND_LINE = 4.8, 3.6, 0.15  # inches of a panel, and of a line of its legend
GROUND = "#171b22"  # of dark pages
MOST_CURVES = 10  # in a panel, as many as there are colours


def draw(analysis: Analysis, folder: Path, dark: bool = False) -> tuple[dict[str, Path], dict[str, str]]:
    """Draws every figure that the results allow.

    Args:
      dark: light curves on the dark ground of pages.

    Returns:
      Title -> PNG file of those that were drawn, whose text "Description" says what is seen, and title -> what is
      missing of the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures: tuple[tuple[str, str, Callable[[Analysis, Path], str]], ...] = (
        ("Loss against data", "loss_data.png", draw_data),
        ("Loss against LLM size", "loss_llm.png", draw_llm),
        ("Loss against encoder size", "loss_encoder.png", draw_encoder),
        ("Optimal encoder against LLM", "optimal_encoder.png", draw_optimum),
        ("Depth against width", "depth_width.png", draw_shapes),
    )
    drawn, missing = {}, {}
    ground = {"figure.facecolor": GROUND, "axes.facecolor": GROUND, "savefig.facecolor": GROUND}
    with style.context(["dark_background", ground] if dark else "default"):
        for title, name, function in figures:
            if reason := function(analysis, folder / name):
                missing[title] = reason
            else:
                drawn[title] = folder / name
    return drawn, missing


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Panels below one another, as a phone shows them."""
    figure = Figure(figsize=(WIDTH, HEIGHT * count), dpi=160, layout="constrained")
    return figure, list(figure.subplots(count, squeeze=False).flat)


def _legend(axis: Axes) -> None:
    """Below the curves, which it must not hide."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=7, frameon=False)


def _finish(figure: Figure, path: Path) -> str:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        for scaled in (axis.xaxis, axis.yaxis):
            if scaled.get_scale() == "log":
                scaled.set_major_formatter(lambda number, _: size(number))
                scaled.set_minor_formatter(lambda number, _: size(number) if _is_labelled(number) else "")
                scaled.set_tick_params(which="minor", labelsize=8)
        axis.set_title("\n".join(textwrap.wrap(axis.get_title(), 52)), fontsize=10)
    lines = sum(len(legend.get_texts()) for axis in figure.axes if (legend := axis.get_legend()))
    figure.set_figheight(HEIGHT * len(figure.axes) + LEGEND_LINE * lines)
    figure.savefig(path, metadata={"Description": "; ".join(_seen(axis) for axis in figure.axes)})
    return ""


def _is_labelled(number: float) -> bool:
    """Whether a number between powers of ten stands at an axis: 2 and 5 times them."""
    return f"{number:.0e}"[0] in "25"


def _seen(axis: Axes) -> str:
    """What a panel shows, for those who cannot see it."""
    legend = axis.get_legend()
    names = [text.get_text() for text in legend.get_texts()] if legend else []
    title = " ".join(axis.get_title().split())
    return f"{title}: {axis.get_ylabel()} against {axis.get_xlabel()} of {', '.join(names)}"


def _measured(axis: Axes, curve: Curve, name: str) -> None:
    axis.errorbar(
        curve.samples, curve.losses, 1.96 * np.array(curve.errors), fmt="o-", markersize=4, capsize=2, label=name
    )


def draw_data(analysis: Analysis, path: Path) -> str:
    """A panel per comparison, and one of the LLM sizes; all curves together where there is neither.

    Returns what is missing; "" where it was drawn, as all functions below.
    """
    if not analysis.curves:
        return "no losses"
    panels: dict[str, list[Curve]] = {}
    for fit in (*analysis.comparisons, *analysis.llm):
        known = panels.setdefault(fit.law.removeprefix("data: "), [])
        known += [curve for curve in fit.curves if curve not in known]
    panels = panels or {"all runs": list(analysis.curves)}
    figure, axes = _panels(len(panels))
    for axis, (title, members) in zip(axes, panels.items(), strict=True):
        for curve in members[:MOST_CURVES]:
            _measured(axis, curve, label(curve.row))
        rest = f" (first {MOST_CURVES} of {len(members)} settings)" if len(members) > MOST_CURVES else ""
        axis.set(xscale="log", xlabel="samples seen", ylabel="held-out loss", title=f"Loss against data: {title}{rest}")
        _legend(axis)
    return _finish(figure, path)


def draw_llm(analysis: Analysis, path: Path) -> str:
    """Loss against log(LLM size): a line per data size, or per encoder at the largest one where LLMs share encoders."""
    fits = [fit for fit in analysis.llm if fit.found]
    if not fits:
        return next((fit.note for fit in analysis.llm), "one LLM size only")
    figure, axes = _panels(len(fits))
    for axis, fit in zip(axes, fits, strict=True):
        shared = "best encoder" not in fit.of
        groups: dict[str, list[tuple[float, float, float]]] = {}
        for samples in data_sizes(fit.curves)[-1:] if shared else data_sizes(fit.curves):
            for curve in fit.curves:
                if (place := curve.at(samples)) is not None:
                    row = curve.row
                    encoder = f", {size(row.encoder)} encoder ({row.depth} x {row.width})" if shared else ""
                    point = row.llm, curve.losses[place], curve.errors[place]
                    groups.setdefault(f"{size(samples)} samples{encoder}", []).append(point)
        for name, points in groups.items():
            if len(points) > 1:
                x, y, errors = np.array(sorted(points)).T
                axis.errorbar(x, y, 1.96 * errors, fmt="o-", markersize=4, capsize=2, label=name)
        axis.set(xscale="log", xlabel="LLM parameters", ylabel="held-out loss", title=f"Loss against LLM: {fit.of}")
        _legend(axis)
    return _finish(figure, path)


def draw_encoder(analysis: Analysis, path: Path) -> str:
    """Loss against log(encoder size) with the saturating law and its ceiling, a curve per LLM."""
    fits = [fit for fit in analysis.encoder if len(encoder_points(fit.curves).encoder) > 1]
    if not fits:
        return next((fit.note for fit in analysis.encoder), "no encoder sizes are known")
    figure, (axis,) = _panels(1)
    for number, fit in enumerate(fits):
        points, color = encoder_points(fit.curves), f"C{number}"
        axis.errorbar(
            points.encoder, points.losses, 1.96 * points.errors, fmt="o", color=color, capsize=2, label=fit.of
        )
        if isinstance(fit.found, PowerLaw):
            _band(axis, fit.found.loss, points.encoder[0], points.encoder[-1] * 2, color)
    axis.set(xscale="log", xlabel="encoder parameters", ylabel="held-out loss", title="Loss against encoder")
    _legend(axis)
    return _finish(figure, path)


def _band(axis: Axes, law: Callable[[float], np.ndarray], low: float, high: float, color: str) -> None:
    x = np.geomspace(low, high, 50)
    draws = np.array([law(place) for place in x])  # [50, 1 + DRAWS]
    axis.plot(x, draws[:, 0], color=color)
    axis.fill_between(x, *np.quantile(draws[:, 1:], [0.025, 0.975], axis=1), color=color, alpha=0.15)


def draw_optimum(analysis: Analysis, path: Path) -> str:
    """Optimal encoder against LLM on logarithmic axes, with the line and its 95% band."""
    lines = [(fit, fit.found) for fit in analysis.line if isinstance(fit.found, EncoderLine) and len(fit.values) > 1]
    known = [fit for fit in analysis.optimal if fit.values and np.isfinite(fit.values["encoder"].value)]
    if not known or not lines:
        return next((fit.note for fit in analysis.line), "no optimal encoders are known")
    figure, (axis,) = _panels(1)
    for number, law in enumerate(dict.fromkeys(fit.law for fit in known)):
        points = [(fit.llm, *fit.values["encoder"]) for fit in known if fit.law == law]
        llm, value, low, high = np.array(points).T
        sides = np.maximum([value - low, np.minimum(high, 4 * value) - value], 0)
        axis.errorbar(llm, value, sides, fmt="os"[number], color=f"C{number}", capsize=3, label=law)
    llms = [fit.llm for fit in known if fit.llm]
    for number, (fit, line) in enumerate(lines):
        color = f"C{number + 2}"  # behind those of the points
        _band(axis, line.encoder, min(llms) / 2, max(llms) * 2, color)
        axis.plot([], [], color=color, label=f"{fit.note} ({fit.of})")
    axis.set(xscale="log", yscale="log", xlabel="LLM parameters", ylabel="optimal encoder parameters")
    axis.set_title("Optimal encoder against LLM")
    _legend(axis)
    return _finish(figure, path)


def draw_shapes(analysis: Analysis, path: Path) -> str:
    """Loss against data per depth x width, a panel per LLM and encoder size."""
    if not analysis.shapes:
        return "needs at least three shapes of about the same encoder size"
    figure, axes = _panels(len(analysis.shapes))
    for axis, fit in zip(axes, analysis.shapes, strict=True):
        for curve in fit.curves:
            _measured(axis, curve, f"{curve.row.depth} x {curve.row.width}")
        axis.set(
            xscale="log",
            xlabel="samples seen",
            ylabel="held-out loss",
            title=f"Loss against data by depth x width, {fit.of.split(',')[0]}",
        )
        _legend(axis)
    return _finish(figure, path)
