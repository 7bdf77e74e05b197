"""How large an encoder an LLM can use: saturation, the paper's rule, the fitted surface, the line (section 3.4)."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from navil_jax.study import laws
from navil_jax.study.fitted import Fitted, by_llm, data_sizes
from navil_jax.study.laws import EncoderLine, Surface, TooFew, Value
from navil_jax.study.results import Curve, Row, size

RULE_SHARE = 0.01  # the paper's rule: of the loss with the smallest encoder
GRID_ERROR = float(np.log(2) / np.sqrt(12))  # standard deviation of ln(optimum) known on a grid of doublings


UNDETERMINED = 100.0  # an interval whose ends differ by more than this factor says nothing


def _optimum(value: Value) -> tuple[dict[str, Value], str]:
    """(values, note) of an optimal encoder, which is withheld where the data do not determine it."""
    if value.low > 0 and value.high <= UNDETERMINED * value.low:
        return {"encoder": value}, ""
    if value.low > 0 and not np.isfinite(value.high):
        return {}, f"not determined by these data: {size(value.low)} or larger"
    return {}, "not determined by these data, by orders of magnitude"


@dataclasses.dataclass(frozen=True)
class EncoderPoints:
    """Losses of one LLM at one data size, a point per encoder size (the best shape of each)."""

    samples: float
    encoder: np.ndarray  # rising
    losses: np.ndarray
    errors: np.ndarray


def encoder_points(group: Sequence[Curve]) -> EncoderPoints:
    """At the largest data size that the most curves have."""
    counts = {n: sum(curve.at(n) is not None for curve in group) for n in data_sizes(group)}
    samples = max(counts, key=lambda n: (counts[n], n))
    best: list[tuple[float, float, float]] = []
    for curve in sorted(group, key=lambda curve: curve.encoder):
        if (place := curve.at(samples)) is None:
            continue
        point = (curve.encoder, curve.losses[place], curve.errors[place])
        if best and point[0] / best[-1][0] < 1.25:
            best[-1] = min(best[-1], point, key=lambda p: p[1])
        else:
            best.append(point)
    return EncoderPoints(samples, *(np.array(column) for column in zip(*best, strict=True)))


def encoder_laws(of: str, members: Sequence[Curve]) -> Iterator[Fitted]:
    name = "loss saturates with encoder size"
    for llm, group in by_llm(members).items():
        points = encoder_points(group)
        where = f"{size(llm)} LLM, {of}, {size(points.samples)} samples"
        try:
            law = laws.fit_power_law(points.encoder, points.losses, points.errors)
        except TooFew as error:
            yield Fitted(name, where, {}, len(points.encoder), f"too few data: {error}", None, tuple(group), llm)
            continue
        smallest, largest = float(points.encoder[0]), float(points.encoder[-1])
        first, last = (law.loss(x) - law.loss(2 * x) for x in (smallest, largest / 2))
        values = {
            "exponent": Value.of(law.exponent),
            "ceiling (loss of an endless encoder)": Value.of(law.floor),
            "gain of the first doubling": Value.of(first),
            "of the last": Value.of(last),
            "first less last": Value.of(first - last),
        }
        yield Fitted(name, where, values, len(points.encoder), f"misfit {law.misfit:.2g}", law, tuple(group), llm)


def rule_optimum(points: EncoderPoints) -> np.ndarray:
    """The paper's rule: the smallest encoder whose loss differs from that of one twice its size by less than 1% of the
    loss with the smallest encoder. inf: none of the measured ones. [1 + DRAWS]

    Raises:
      TooFew: no encoder has one about twice its size.

    Example: encoders 1 2 4 8, losses 2 1.5 1.49 1.489 -> 2, since 1.5 - 1.49 < 0.02
    """
    ratio = points.encoder[None] / points.encoder[:, None]
    twice = np.where((ratio > 1.5) & (ratio < 2.8), np.abs(np.log2(ratio) - 1), np.inf)
    pairs = [(i, int(np.argmin(row))) for i, row in enumerate(twice) if np.isfinite(row).any()]
    if not pairs:
        raise TooFew("no encoder was measured beside one of about twice its size")
    noise = np.random.default_rng(0).standard_normal((1 + laws.DRAWS, len(points.losses))) * points.errors
    noise[0] = 0
    losses = points.losses + noise
    chosen = np.full(len(losses), np.inf)
    for small, large in reversed(pairs):
        close = np.abs(losses[:, small] - losses[:, large]) < RULE_SHARE * losses[:, 0]
        chosen[close] = points.encoder[small]
    return chosen


def given_optima(rows: Sequence[Row]) -> list[Fitted]:
    """Optima that stand in the results themselves, known on a grid of doublings."""
    name = "optimal encoder by the 1% rule"
    return [
        Fitted(
            name,
            f"{size(row.llm)} LLM, as published",
            {"encoder": Value(row.encoder, row.encoder / 2**0.5, row.encoder * 2**0.5)},
            1,
            "on a grid of doublings",
            llm=row.llm,
        )
        for row in rows
        if row.kind == "optimal_encoder" and row.encoder is not None
    ]


def ruled_optima(of: str, members: Sequence[Curve]) -> Iterator[Fitted]:
    name = "optimal encoder by the 1% rule"
    for llm, group in by_llm(members).items():
        points = encoder_points(group)
        where = f"{size(llm)} LLM, {of}, {size(points.samples)} samples"
        try:
            chosen = rule_optimum(points)
        except TooFew as error:
            yield Fitted(name, where, {}, len(points.encoder), f"too few data: {error}", None, tuple(group), llm)
            continue
        values, note = _optimum(Value.of(chosen))
        if not np.isfinite(chosen[0]):
            note = f"above the largest measured, {size(points.encoder[-1])}"
        yield Fitted(name, where, values, len(points.encoder), note, None, tuple(group), llm)


def fit_surface(of: str, members: Sequence[Curve]) -> Fitted:
    name = "loss over LLM and encoder size"
    rows = []
    for llm, group in by_llm(members).items():
        points = encoder_points(group)
        rows += [(llm, *point) for point in zip(points.encoder, points.losses, points.errors, strict=True)]
    try:
        surface = laws.fit_surface(*zip(*rows, strict=True))
    except TooFew as error:
        return Fitted(name, of, {}, len(rows), f"too few data: {error}", None, tuple(members))
    values = {
        "encoder exponent": Value.of(surface.encoder_exponent),
        "LLM exponent of the encoder's benefit": Value.of(surface.llm_exponent),
        "loss per doubling of the LLM": Value.of(surface.slope * np.log(2)),
    }
    return Fitted(name, of, values, len(rows), f"misfit {surface.misfit:.2g}", surface, tuple(members))


def surface_optimum(fit: Fitted, llm: float) -> np.ndarray:
    """Optimal encoder by a fitted surface. [1 + DRAWS]"""
    assert isinstance(fit.found, Surface)
    smallest = min(curve.encoder for curve in fit.curves)
    return fit.found.optimal_encoder(llm, smallest, RULE_SHARE)


def surface_optima(fit: Fitted) -> list[Fitted]:
    """The optimum of every LLM of a fitted surface."""
    if fit.found is None:
        return []
    name = "optimal encoder by the fitted surface"
    found = {llm: _optimum(Value.of(surface_optimum(fit, llm))) for llm in by_llm(fit.curves)}
    return [
        Fitted(name, f"{size(llm)} LLM, {fit.of}", values, fit.points, note, llm=llm)
        for llm, (values, note) in found.items()
    ]


def optimum_line(optimal: Sequence[Fitted]) -> list[Fitted]:
    """ln(optimal encoder) against ln(LLM), through all optima of the rule."""
    name, of = "log-log line of the optimal encoder", "optima by the 1% rule"
    if not optimal:
        return []
    known = [fit for fit in optimal if fit.values and np.isfinite(fit.values["encoder"].value)]
    llms = np.array([fit.llm for fit in known])
    values = [fit.values["encoder"] for fit in known]
    half_widths = [np.log(min(value.high, 1e15) / value.low) / 2 for value in values]
    try:
        unit = reference_llm(llms)
        errors = np.maximum(np.array(half_widths) / 1.96, GRID_ERROR)
        line = laws.fit_line(np.log(llms / unit), np.log([value.value for value in values]), errors)
    except TooFew as error:
        return [Fitted(name, of, {}, len(known), f"too few data: {error}")]
    return [_line_of(name, of, EncoderLine(np.exp(line.intercepts[:, 0]), line.slope, unit), len(known))]


def reference_llm(sizes: np.ndarray) -> float:
    """The size nearest to the geometric mean; raises TooFew where there is none."""
    if not len(sizes):
        raise TooFew("no optimum is known")
    logs = np.log(sizes)
    return float(sizes[np.argmin(np.abs(logs - logs.mean()))])


def _line_of(name: str, of: str, line: EncoderLine, points: int) -> Fitted:
    known, note = _optimum(Value.of(line.scale))
    values = {"exponent": Value.of(line.exponent)} | {f"encoder at {size(line.unit)}": v for v in known.values()}
    if known:
        note = f"V* = {size(float(line.scale[0]))} (L / {size(line.unit)})^{line.exponent[0]:.3f}"
    return Fitted(name, of, values, points, note, line)


def surface_line(fit: Fitted) -> Fitted:
    """The line through the optima of a fitted surface."""
    sizes = np.array(list(by_llm(fit.curves)))
    unit = reference_llm(sizes)
    x = np.log(sizes / unit)
    y = np.log(np.maximum([surface_optimum(fit, llm) for llm in sizes], 1e-30))  # [n, 1 + DRAWS]
    exponent = ((x - x.mean()) @ y) / np.sum((x - x.mean()) ** 2)
    line = EncoderLine(np.exp(y.mean(axis=0) - exponent * x.mean()), exponent, unit)
    return _line_of("log-log line of the optimal encoder", f"fitted surface, {fit.of}", line, fit.points)
