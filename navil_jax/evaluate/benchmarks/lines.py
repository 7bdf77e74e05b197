"""Files of predictions, one JSON object a line, and the report of their scores."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from navil_jax.config.plain import unique_keys
from navil_jax.errors import UserError
from navil_jax.evaluate.benchmarks.scoring import Benchmark, Line, Score


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    """Whether it is one; NaN and infinity are none."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


# What a value of a line may be.
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": _is_text,
    "number": _is_number,
    "text or number": lambda value: _is_text(value) or _is_number(value),
    "texts": lambda value: bool(value) and _are_texts(value),
    "texts, or []": _are_texts,
    "text or texts": lambda value: _is_text(value) or (bool(value) and _are_texts(value)),
    "options": lambda value: _are_texts(value) or (isinstance(value, dict) and _are_texts([*value, *value.values()])),
    "object": lambda value: isinstance(value, dict),
    "rows": lambda value: isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value),
}
NAMES = {"text": "a text", "texts": "a list of texts", "number": "a number", "object": "an object"}
NAMES |= {
    "options": "a list of texts, or letters and texts",
    "rows": "a list of objects",
    "texts, or []": "a list of texts, maybe empty",
}
ROW = {"index": "number", "answer": "text", "prediction": "text"}  # of a question with rotated options
ROW_OPTIONAL = {"judge_replies": "texts, or []", **dict.fromkeys("ABCDEFGHI", "text")}


def read_lines(path: Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    """The lines of a file, each checked; blank ones hold nothing.

    Raises:
      UserError: file, line and key of the first one that cannot be scored.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    lines: list[dict[str, Any]] = []
    first: dict[str | int | float, int] = {}  # id -> the line that has it
    for number, text in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text.decode(), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: is no JSON: {error}") from None
        if wrong := first_fault(line, benchmark):
            raise UserError(f"{path}: line {number}: {wrong}")
        if (before := first.setdefault(line["id"], number)) != number:
            raise UserError(
                f"{path}: line {number}: id: {_shown(line['id'])} stands in line {before} already; keep one"
            )
        lines.append(line)
    if not lines:
        raise UserError(f"{path}: holds no lines")
    return lines


def first_fault(line: Any, benchmark: Benchmark) -> str | None:
    """What keeps a line from being scored: its key, and what should stand there."""
    if not isinstance(line, dict):
        return f"must be a JSON object, not {_shown(line)}"
    rows = benchmark.keys.get("passes") == "rows"
    keys = {"id": "text or number", **({} if rows else {"prediction": "text"}), **benchmark.keys}
    return next(_faults(line, benchmark, keys), None)


def _faults(line: dict[str, Any], benchmark: Benchmark, keys: Mapping[str, str]) -> Iterator[str]:
    yield from _wrong(line, keys, benchmark.optional)
    yield from _wrong(line, benchmark.also(line), {})
    for place, row in enumerate(line.get("passes", ()) if "passes" in keys else ()):
        yield from (f"passes[{place}].{fault}" for fault in _wrong(row, ROW, ROW_OPTIONAL))


def _wrong(values: Mapping[str, Any], keys: Mapping[str, str], optional: Mapping[str, str]) -> Iterator[str]:
    for key, kind in keys.items():
        if key not in values:
            yield f"{key}: is missing"
        elif not KINDS[kind](values[key]):
            yield f"{key}: must be {NAMES.get(kind, f'a {kind}')}, not {_shown(values[key])}"
    for key, kind in optional.items():
        if values.get(key) is not None and not KINDS[kind](values[key]):
            yield f"{key}: must be {NAMES.get(kind, f'a {kind}')}, or null, not {_shown(values[key])}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def scores_of(benchmark: Benchmark, lines: Sequence[Line], protocol: str | None) -> list[Score]:
    """Scores in order.

    Args:
      protocol: full name; None: the primary one, judged where a line has replies of a judge.
    """
    score = benchmark.protocols[protocol].score if protocol else benchmark.expect
    return [score(line) for line in lines]


def report(benchmark: Benchmark, lines: Sequence[Line], protocol: str | None) -> dict[str, Any]:
    """The totals of lines: of one protocol, or, where none is named, of all that reports show."""
    shown = (protocol,) if protocol else benchmark.totals
    totals = {name: benchmark.protocols[name].total(lines, scores_of(benchmark, lines, name)) for name in shown}
    chosen = protocol or benchmark.primary
    found: dict[str, Any] = {"benchmark": benchmark.name, "lines": len(lines), "primary": benchmark.primary}
    found |= {"protocol": chosen, "scale": benchmark.scale, "total": totals[chosen], "totals": totals}
    if left_out := sum(map(benchmark.left_out, lines)):
        found["left_out_of_totals"] = left_out
    if not protocol and benchmark.extras:
        found |= benchmark.extras(lines, scores_of(benchmark, lines, None))
    return found
