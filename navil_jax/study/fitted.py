"""What a law or comparison found, in words, and the groups of curves that laws are fitted to."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

from navil_jax.study.laws import EncoderLine, Line, PowerLaw, Ratio, Surface, Value
from navil_jax.study.results import Curve, Row, size

TAIL = 16  # laws across runs use the points from the largest data size down to this part of it


@dataclasses.dataclass(frozen=True)
class Fitted:
    """One law or comparison, for tables.

    Attributes:
      law: which.
      of: which runs.
      values: what was found, by name.
      points: measured points that were used.
      note: why nothing was found, or what to keep in mind.
      found: the fitted object, for figures.
      curves: the curves that were used.
      llm: the one that it is about, where it is about one.
    """

    law: str
    of: str
    values: Mapping[str, Value]
    points: int
    note: str = ""
    found: PowerLaw | Line | Surface | EncoderLine | Ratio | None = None
    curves: tuple[Curve, ...] = ()
    llm: float | None = None

    def text(self) -> str:
        """The values, or why there are none."""
        found = [(name, *shown(name, value)) for name, value in self.values.items()]
        text = ", ".join(f"{name} {estimate} ({interval})" for name, estimate, interval in found)
        return "; ".join(part for part in (text, self.note) if part)


def shown(name: str, value: Value) -> tuple[str, str]:
    """(estimate, interval): sizes as sizes, anything else as a number."""
    is_size = name.startswith("encoder") and "exponent" not in name
    estimate, low, high = (size(part) if is_size else f"{part:.3g}" for part in value)
    return estimate, f"{low} to {high}"


def label(row: Row, encoder: bool = True) -> str:
    """Example: "1.8B LLM, 600M encoder (24 x 1472), attention + FFN experts, initialised"."""
    parts = [f"{size(row.llm)} LLM"]
    if encoder and row.encoder is not None:
        shape = f" ({row.depth} x {row.width})" if row.depth else ""
        parts.append(f"{size(row.encoder)} encoder{shape}")
    return ", ".join([*parts, *treatment_names(row)])


def treatment_names(row: Row) -> list[str]:
    parts = []
    if row.ffn_experts is not None:
        kinds = [name for name, used in (("attention", row.attention_experts), ("FFN", row.ffn_experts)) if used]
        parts.append(f"{' + '.join(kinds)} experts" if kinds else "no experts")
    if row.initialised is not None:
        parts.append("initialised" if row.initialised else "from scratch")
    if row.data_share != 1:
        parts.append(f"{row.data_share:.3g} of the data")
    return parts


def treatments(found: Sequence[Curve]) -> list[tuple[str, list[Curve]]]:
    """Curves with a known encoder that differ in LLM and encoder alone, by what they have in common."""
    groups: dict[tuple, list[Curve]] = defaultdict(list)
    for curve in found:
        row = curve.row
        if row.encoder is not None:
            groups[row.ffn_experts, row.attention_experts, row.initialised, row.data_share].append(curve)
    return [(", ".join(treatment_names(members[0].row)) or "all", members) for members in groups.values()]


def by_llm(members: Sequence[Curve]) -> dict[float, list[Curve]]:
    found: dict[float, list[Curve]] = defaultdict(list)
    for curve in members:
        found[curve.row.llm].append(curve)
    return dict(sorted(found.items()))


def data_sizes(members: Sequence[Curve]) -> list[float]:
    """Samples at which curves have a point, each once, from the largest down to a `TAIL`th of it."""
    sizes: list[float] = []
    for samples in sorted(n for curve in members for n in curve.samples):
        if not sizes or samples / sizes[-1] >= 1.02:
            sizes.append(samples)
    return [samples for samples in sizes if samples * TAIL >= sizes[-1]]
