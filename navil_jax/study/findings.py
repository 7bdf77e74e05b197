"""The paper's five findings, each beside what given results say of it."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from navil_jax.study.analysis import Analysis
from navil_jax.study.fitted import Fitted, shown

Verdict = Literal["holds", "in part", "does not hold", "not decided", "no data"]
MARKS: dict[Verdict, str] = {"holds": "✓", "in part": "◐", "does not hold": "✗", "not decided": "?", "no data": "-"}
CLAIMED_RATIO = 10.0  # of data for equal loss, of findings 1 and 2
SMALL_EXCESS = 0.01  # of the loss: what counts as no difference between shapes


@dataclasses.dataclass(frozen=True)
class Finding:
    """One of the five."""

    number: int
    claim: str  # of the paper
    fits: tuple[Fitted, ...]  # what the results say
    verdict: Verdict

    @property
    def measured(self) -> tuple[str, ...]:
        """In words, with 95% intervals."""
        return tuple(f"{fit.law}, {fit.of}: {fit.text()}" for fit in self.fits)

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """(of what, quantity, estimate, 95% interval or note)."""
        found = []
        for fit in self.fits:
            of = f"{fit.law}, {fit.of}"
            found += [(of, name, *shown(name, value)) for name, value in fit.values.items()]
            found += [] if fit.values else [(of, "", "withheld", fit.note)]
        return found


def findings(analysis: Analysis) -> tuple[Finding, ...]:
    """All five. `holds` means that every interval lies on the paper's side, `in part` that the effect is smaller."""
    ratios = {fit.law: [f for f in analysis.comparisons if f.law == fit.law] for fit in analysis.comparisons}
    initialised = ratios.get("data: from scratch / initialised", [])
    both = ratios.get("data: no experts / attention + FFN experts", [])
    sizes = (*analysis.llm, *analysis.encoder)
    return (
        Finding(
            1,
            "An initialised LLM needs less than a tenth of the data for equal loss.",
            _said(initialised),
            _above_one(initialised),
        ),
        Finding(2, "With modality experts a tenth of the data gives equal loss.", _said(both), _above_one(both)),
        Finding(3, "Only extreme depth or width hurts.", _said(analysis.shapes), _extremes_hurt(analysis.shapes)),
        Finding(
            4,
            "Loss falls log-linearly with LLM size, and saturates with encoder size.",
            _said(sizes),
            _all_of(_below_zero(analysis.llm), _saturates(analysis.encoder)),
        ),
        Finding(
            5,
            "log(optimal encoder) grows linearly with log(LLM).",
            _said((*analysis.optimal, *analysis.line)),
            _side([fit.values["exponent"] for fit in analysis.line if fit.values], 0.0),
        ),
    )


def _said(fits: Sequence[Fitted]) -> tuple[Fitted, ...]:
    """The fits that found something, or found that nothing is determined."""
    return tuple(fit for fit in fits if fit.values or "not determined" in fit.note or "above the largest" in fit.note)


def _side(values: Sequence[tuple[float, float, float]], border: float, above: bool = True) -> Verdict:
    """Whether all intervals lie on one side of a border."""
    if not values:
        return "no data"
    good = [low > border if above else high < border for _, low, high in values]
    bad = [high < border if above else low > border for _, low, high in values]
    return "holds" if all(good) else "does not hold" if any(bad) else "not decided"


def _above_one(fits: Sequence[Fitted]) -> Verdict:
    """Holds at `CLAIMED_RATIO` or more, in part where the ratio is smaller but above 1."""
    values = [value for fit in fits for value in fit.values.values()]
    verdict = _side(values, 1.0)
    return "in part" if verdict == "holds" and any(value.low < CLAIMED_RATIO for value in values) else verdict


def _below_zero(fits: Sequence[Fitted]) -> Verdict:
    return _side([value for fit in fits for value in fit.values.values()], 0.0, above=False)


def _saturates(fits: Sequence[Fitted]) -> Verdict:
    return _side([fit.values["first less last"] for fit in fits if fit.values], 0.0)


def _all_of(*verdicts: Verdict) -> Verdict:
    """Parts without data leave the whole open unless another part fails."""
    if set(verdicts) == {"no data"}:
        return "no data"
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if set(verdicts) == {"holds"} else "not decided"


def _extremes_hurt(fits: Sequence[Fitted]) -> Verdict:
    """The shallowest or the deepest is worse than the best, and the shapes between are not, by more than a little."""
    verdicts: list[Verdict] = []
    for fit in fits:
        first, *middle, last = fit.values.values()
        least = min(min(curve.losses) for curve in fit.curves) * SMALL_EXCESS
        hurts, between = max(first.low, last.low) > 0, all(value.low < least for value in middle)
        same = max(first.high, last.high) < least
        verdicts.append("holds" if hurts and between else "does not hold" if same or not between else "not decided")
    return _all_of(*verdicts) if verdicts else "no data"


def markdown(analysis: Analysis) -> str:
    """The five findings as a Markdown table."""
    lines = ["| finding of the paper | measured here (95% intervals) | verdict |", "|---|---|---|"]
    for finding in findings(analysis):
        measured = "<br>".join(finding.measured) or "-"
        lines.append(f"| ({finding.number}) {finding.claim} | {measured} | {finding.verdict} |")
    return "\n".join(lines) + "\n"
