"""Results files: JSON lines, one per run and measured point.

Every line is an object with the fields of `Row`; fields that are missing take their defaults. Two kinds of line:

    {"kind": "loss", "run": "...", "llm": 1.8e9, "encoder": 6e8, "samples": 1.16e8, "loss": 0.796, ...}
    {"kind": "optimal_encoder", "llm": 1.8e9, "encoder": 6e8, ...}    an optimum that is known without its losses
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from navil_jax.errors import UserError

PUBLISHED = Path(__file__).with_name("published.jsonl")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured point. None: not known."""

    llm: float  # parameters of the language model, without visual experts
    kind: Literal["loss", "optimal_encoder"] = "loss"
    run: str = ""  # which run it belongs to
    study: str = ""
    source: str = ""  # where it was read, for published points
    encoder: float | None = None  # parameters of the vision encoder's layers, 12 * depth * width^2
    depth: int | None = None  # of the encoder
    width: int | None = None
    ffn_experts: bool | None = None
    attention_experts: bool | None = None
    initialised: bool | None = None  # whether the language model was pre-trained on text
    data_share: float = 1.0  # of the training samples that the run may read; below 1 they repeat sooner
    seed: int = 0
    step: int = 0
    samples: float = 0.0  # trained on so far
    tokens: float = 0.0  # trained on so far; 0: not known
    loss: float | None = None  # held out, teacher-forced
    error: float = 0.0  # reading error: the true loss lies within +- this
    losses: dict[str, float] = dataclasses.field(default_factory=dict)  # by source


Setting = tuple[float, float | None, int | None, int | None, bool | None, bool | None, bool | None, float]


def setting(row: Row) -> Setting:
    """What makes runs repetitions of each other: everything but the seed."""
    experts = row.ffn_experts, row.attention_experts
    return row.llm, row.encoder, row.depth, row.width, *experts, row.initialised, row.data_share


def read_results(path: str | Path) -> list[Row]:
    """The rows of a results file.

    Raises:
      UserError: no such file, no JSON, unknown field, or a value that cannot be; names file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such results file; `study run` writes one")
    lines = enumerate(path.read_text().splitlines(), 1)
    rows = [_row(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path}: holds no results yet")
    return rows


def _row(line: str, place: str) -> Row:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg}; a results file has one object per line") from error
    if not isinstance(values, dict):
        raise UserError(f"{place}: not an object; a results file has one object per line")
    known = {field.name for field in dataclasses.fields(Row)}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"{place}: no field {unknown[0]!r}; known are {', '.join(sorted(known))}")
    kind = values.get("kind", "loss")
    needed = {"loss": ("llm", "samples", "loss"), "optimal_encoder": ("llm", "encoder")}
    if kind not in needed:
        raise UserError(f"{place}: kind: {kind!r} is neither 'loss' nor 'optimal_encoder'")
    for field in needed[kind]:
        _require_positive(values, field, place)
    return Row(**values)


def _require_positive(values: dict[str, Any], field: str, place: str) -> None:
    value = values.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{place}: {field}: must be a positive number, not {value!r}")


def write_results(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes a results file; a reader sees the old one or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(_plain(row)) + "\n" for row in rows))
    temporary.replace(path)


def _plain(row: Row) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(Row)}
    return {k: v for k, v in dataclasses.asdict(row).items() if v != defaults[k] and v != {}}


@dataclasses.dataclass(frozen=True)
class Curve:
    """Runs of one setting that differ in their seed alone, averaged."""

    row: Row  # one of them: what it says of the setting holds for all
    samples: tuple[float, ...]  # rising
    losses: tuple[float, ...]  # means over seeds
    errors: tuple[float, ...]  # standard deviations of these means: reading error and spread over seeds
    seeds: int

    @property
    def encoder(self) -> float:
        """Parameters of the encoder; of a curve that has one."""
        assert self.row.encoder is not None
        return self.row.encoder

    def at(self, samples: float) -> int | None:
        """Index of the point with so many samples, within 2%."""
        near = [i for i, n in enumerate(self.samples) if abs(n / samples - 1) < 0.02]
        return near[0] if near else None


def curves(rows: Sequence[Row]) -> list[Curve]:
    """Loss rows -> one curve per setting, in the order of the rows.

    Points of several seeds that are less than 2% apart in samples count as one. Where at least two seeds of any setting
    are there, the spread over seeds is pooled over all settings, relative to the loss: a single setting has too few.
    """
    groups: dict[Setting, list[Row]] = defaultdict(list)
    for row in rows:
        if row.kind == "loss":
            groups[setting(row)].append(row)
    points = {key: _points(group) for key, group in groups.items()}
    spread = _pooled_spread([point for found in points.values() for point in found])
    return [_curve(groups[key][0], points[key], spread) for key in groups]


def _points(group: Sequence[Row]) -> list[list[Row]]:
    found: list[list[Row]] = []
    for row in sorted(group, key=lambda row: row.samples):
        same = found and row.samples / found[-1][0].samples < 1.02
        if same and row.seed not in {other.seed for other in found[-1]}:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _pooled_spread(points: Sequence[Sequence[Row]]) -> float:
    """Standard deviation over seeds, relative to the loss; 0 where no point has two seeds."""
    squares, freedom = 0.0, 0
    for point in points:
        mean = _mean_loss(point)
        squares += sum((loss / mean - 1) ** 2 for loss in _losses(point))
        freedom += len(point) - 1
    return (squares / freedom) ** 0.5 if freedom else 0.0


def _losses(point: Sequence[Row]) -> list[float]:
    return [row.loss for row in point if row.loss is not None]


def _mean_loss(point: Sequence[Row]) -> float:
    return sum(_losses(point)) / len(point)


def _curve(row: Row, points: Sequence[Sequence[Row]], spread: float) -> Curve:
    most = max(len(point) for point in points)
    whole = [point for point in points if len(point) == most]  # a point that some seeds have not reached would jump
    means = [_mean_loss(point) for point in whole]
    errors = [
        ((spread * mean) ** 2 / len(point) + point[0].error ** 2 / 3) ** 0.5  # +-e all alike: variance e^2 / 3
        for point, mean in zip(whole, means, strict=True)
    ]
    samples = (sum(row.samples for row in point) / len(point) for point in whole)
    return Curve(row, tuple(samples), tuple(means), tuple(errors), most)


def size(parameters: float | None) -> str:
    """Example: 6.24e8 -> "624M", 1.8e9 -> "1.8B", 41_000 -> "41K", None -> "-"; beyond all models "none", "larger"."""
    if parameters is None:
        return "-"
    if not 1 <= parameters < 1e13:
        return "none" if parameters < 1 else "larger"
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit * 0.9995:
            return f"{parameters / unit:.3g}{name}"
    return f"{parameters:.3g}"


def parse_size(text: str, option: str) -> float:
    """ "1.8B" -> 1.8e9, "500M" -> 5e8. Raises `UserError` that names the option."""
    number, factor = text.strip(), 1.0
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    if number[-1:].upper() in units:
        number, factor = number[:-1], units[number[-1].upper()]
    try:
        value = float(number) * factor
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{option}: {text!r} is no positive size; write it as 1.8B, 600M or 20000")
    return value
