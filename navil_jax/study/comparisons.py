"""Pairs of runs that differ in one thing: data for equal loss (paper, findings 1 and 2), depth against width (3)."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from navil_jax.study import laws
from navil_jax.study.fitted import Fitted, by_llm, label
from navil_jax.study.laws import Ratio, TooFew, Value
from navil_jax.study.results import Curve, Row, size

SHOWN_EARLIER = 3  # losses besides the lowest


def _was(initialised: bool) -> Callable[[Row], bool]:
    return lambda row: row.initialised is initialised


def _is(ffn: bool, attention: bool) -> Callable[[Row], bool]:
    return lambda row: (row.ffn_experts, row.attention_experts) == (ffn, attention)


_EXPERTS = ("ffn_experts", "attention_experts")
# (law, what a run must be to be the slower of a pair, to be the faster one, what the pair may differ in)
_PAIRS: tuple[tuple[str, Callable[[Row], bool], Callable[[Row], bool], tuple[str, ...]], ...] = (
    ("data: from scratch / initialised", _was(False), _was(True), ("initialised",)),
    ("data: no experts / attention + FFN experts", _is(False, False), _is(True, True), _EXPERTS),
    ("data: no experts / FFN experts", _is(False, False), _is(True, False), _EXPERTS),
    ("data: FFN experts / attention + FFN experts", _is(True, False), _is(True, True), _EXPERTS),
)


def comparisons(found: Sequence[Curve]) -> Iterator[Fitted]:
    for law, is_slow, is_fast, differing in _PAIRS:
        free = {*differing, "run", "seed", "step", "samples", "tokens", "loss", "losses", "error"}
        for slow in (curve for curve in found if is_slow(curve.row)):
            for fast in (curve for curve in found if is_fast(curve.row)):
                if _without(slow.row, free) == _without(fast.row, free):
                    yield _compared(law, slow, fast, differing)


def _without(row: Row, free: Collection[str]) -> dict[str, object]:
    return {name: value for name, value in vars(row).items() if name not in free}


def _compared(law: str, slow: Curve, fast: Curve, differing: tuple[str, ...]) -> Fitted:
    unknown: dict[str, Any] = dict.fromkeys(differing)
    of = label(dataclasses.replace(fast.row, **unknown))
    points = len(slow.samples) + len(fast.samples)
    curves = _points(slow), _points(fast)
    try:
        end = laws.data_ratio(*curves)
    except TooFew as error:
        return Fitted(law, of, {}, points, f"cannot be compared: {error}", None, (slow, fast))
    values = {f"at loss {end.loss:.3g}": Value.of(end.ratio)}
    values |= {f"at loss {loss:.3g}": Value.of(ratio.ratio) for loss, ratio in _earlier(curves, end.loss)}
    note = "at least, the better one starts below" if end.bound else ""
    return Fitted(law, of, values, points, note, end, (slow, fast))


def _points(curve: Curve) -> laws.Points:
    return curve.samples, curve.losses, curve.errors


def _earlier(curves: tuple[laws.Points, laws.Points], end: float) -> Iterator[tuple[float, Ratio]]:
    """Ratios at some losses of the slower curve above `end` that both reach, from the lowest to the highest."""
    found = []
    for loss in reversed([loss for loss in curves[0][1] if loss > end * 1.001]):
        with contextlib.suppress(TooFew):
            ratio = laws.data_ratio(*curves, loss)
            found += [] if ratio.bound else [(loss, ratio)]
    places = np.linspace(0, len(found) - 1, min(len(found), SHOWN_EARLIER))
    yield from (found[round(place)] for place in places)


def shapes(of: str, members: Sequence[Curve]) -> Iterator[Fitted]:
    """Loss of each depth x width against the best one, of encoders of about equal size."""
    for llm, group in by_llm(members).items():
        for same in _equal_sizes([curve for curve in group if curve.row.depth]):
            samples = min(curve.samples[-1] for curve in same)
            places = [(curve, curve.at(samples)) for curve in same]
            ends = [(c, c.losses[i], c.errors[i]) for c, i in places if i is not None]
            _, best, best_error = min(ends, key=lambda end: end[1])
            rng = np.random.default_rng(0)
            values = {}
            for curve, loss, error in ends:
                draws = loss - best + rng.standard_normal(1 + laws.DRAWS) * np.hypot(error, best_error)
                draws[0] = loss - best
                values[f"{curve.row.depth} x {curve.row.width}"] = Value.of(draws)
            where = f"{size(llm)} LLM, about {size(same[0].row.encoder)} encoder, {of}, {size(samples)} samples"
            yield Fitted("depth x width: loss above the best", where, values, len(ends), "", None, tuple(same))


def _equal_sizes(group: Sequence[Curve]) -> Iterator[list[Curve]]:
    """Sets of at least three shapes of about the same size, by depth."""
    rest = sorted(group, key=lambda curve: curve.encoder)
    while rest:
        same = [curve for curve in rest if curve.encoder / rest[0].encoder < 1.25]
        rest = rest[len(same) :]
        if len(same) > 2:
            yield sorted(same, key=lambda curve: curve.row.depth or 0)
