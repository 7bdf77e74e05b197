"""Results -> laws, optimal encoders and comparisons; whatever there are too few data for says so."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from navil_jax.study import laws
from navil_jax.study.comparisons import comparisons, shapes
from navil_jax.study.fitted import Fitted, by_llm, data_sizes, label, treatments
from navil_jax.study.laws import TooFew, Value
from navil_jax.study.optima import (
    encoder_laws,
    fit_surface,
    given_optima,
    optimum_line,
    ruled_optima,
    surface_line,
    surface_optima,
)
from navil_jax.study.results import Curve, Row, curves


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Everything that results say."""

    curves: tuple[Curve, ...]
    data: tuple[Fitted, ...]  # power law in data, per curve
    llm: tuple[Fitted, ...]  # log-linear in LLM size
    encoder: tuple[Fitted, ...]  # saturating in encoder size, per LLM
    surface: tuple[Fitted, ...]
    optimal: tuple[Fitted, ...]  # optimal encoder per LLM, by rule and by surface
    line: tuple[Fitted, ...]  # of optimal encoder against LLM
    comparisons: tuple[Fitted, ...]  # data for equal loss: initialised, experts
    shapes: tuple[Fitted, ...]  # depth against width

    def all(self) -> tuple[Fitted, ...]:
        """Every law, in the order of the paper's findings."""
        return sum((getattr(self, field.name) for field in dataclasses.fields(self)[1:]), ())


def analyse(rows: Sequence[Row]) -> Analysis:
    """Fits everything that the rows allow."""
    found = curves(rows)
    sets = treatments(found)
    optimal = [*given_optima(rows), *(fit for of, members in sets for fit in ruled_optima(of, members))]
    surfaces = [fit_surface(of, members) for of, members in sets if len(by_llm(members)) > 1]
    return Analysis(
        curves=tuple(found),
        data=tuple(_data_law(curve) for curve in found),
        llm=tuple(_llm_law(of, members) for of, members in sets if len(by_llm(members)) > 1),
        encoder=tuple(fit for of, members in sets for fit in encoder_laws(of, members)),
        surface=tuple(surfaces),
        optimal=(*optimal, *(fit for surface in surfaces for fit in surface_optima(surface))),
        line=(*optimum_line(optimal), *(surface_line(surface) for surface in surfaces if surface.found)),
        comparisons=tuple(comparisons(found)),
        shapes=tuple(fit for of, members in sets for fit in shapes(of, members)),
    )


def _data_law(curve: Curve) -> Fitted:
    name, of = "power law in data", label(curve.row)
    try:
        law = laws.fit_power_law(curve.samples, curve.losses, curve.errors)
    except TooFew as error:
        return Fitted(name, of, {}, len(curve.samples), f"too few data: {error}", None, (curve,))
    values = {"exponent": Value.of(law.exponent), "irreducible loss": Value.of(law.floor)}
    notes = []
    if law.misfit > 3 * np.mean(curve.errors) and law.misfit > 0.01 * np.mean(curve.losses):
        notes.append(f"the points miss the law by {law.misfit:.2g} on average: not one power law over this range")
    if values["irreducible loss"].low == 0:
        notes.append("no irreducible loss can be told from these points")
    return Fitted(name, of, values, len(curve.samples), "; ".join(notes), law, (curve,))


def _llm_law(of: str, members: Sequence[Curve]) -> Fitted:
    """Loss against ln(LLM) with a common slope; each data size, and each encoder where LLMs share them, has its own
    intercept."""
    name = "loss is linear in log(LLM size)"
    shared = len({c.row.llm for c in members if len({d.row.llm for d in members if _same_encoder(c, d)}) > 1}) > 1
    chosen = list(members) if shared else [_best(group) for group in by_llm(members).values()]
    of = f"{of}; {'equal encoders' if shared else 'each LLM with its best encoder'}"
    points: list[tuple[float, float, float, int]] = []
    groups: dict[tuple, int] = {}
    for samples in data_sizes(chosen):
        for curve in chosen:
            if (place := curve.at(samples)) is not None:
                key = samples, (curve.row.depth, curve.row.width, curve.row.encoder) if shared else None
                group = groups.setdefault(key, len(groups))
                points.append((np.log(curve.row.llm), curve.losses[place], curve.errors[place], group))
    try:
        if not points:
            raise TooFew("no two LLMs were measured at the same data size")
        x, y, errors, numbers = zip(*points, strict=True)
        line = laws.fit_line(x, y, errors, numbers)
    except TooFew as error:
        return Fitted(name, of, {}, len(points), f"too few data: {error}", None, tuple(chosen))
    values = {"loss per doubling of the LLM": Value.of(line.slope * np.log(2))}
    note = f"misfit {line.misfit:.2g}, over {len(groups)} intercepts"
    return Fitted(name, of, values, len(points), note, line, tuple(chosen))


def _same_encoder(a: Curve, b: Curve) -> bool:
    return (a.row.encoder, a.row.depth, a.row.width) == (b.row.encoder, b.row.depth, b.row.width)


def _best(group: Sequence[Curve]) -> Curve:
    return min(group, key=lambda curve: curve.losses[-1])


def table(analysis: Analysis) -> str:
    """All laws as text, by law."""
    lines: list[str] = []
    law = ""
    for fit in analysis.all():
        if fit.law != law:
            law = fit.law
            lines.append(f"\n{law}")
        lines.append(f"  {fit.of} [{fit.points} points]\n      {fit.text()}")
    return "\n".join(lines).strip()


def as_json(analysis: Analysis) -> list[dict]:
    """All laws as plain values; null for what is not finite."""
    return [
        {
            "law": fit.law,
            "of": fit.of,
            "points": fit.points,
            "values": {name: _finite(value) for name, value in fit.values.items()},
            "note": fit.note,
        }
        for fit in analysis.all()
    ]


def _finite(value: Value) -> dict[str, float | None]:
    return {name: part if np.isfinite(part) else None for name, part in value._asdict().items()}
