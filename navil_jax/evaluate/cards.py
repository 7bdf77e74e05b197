"""Cards: what a score was measured with, one file for each, and the table made of those in a folder."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from navil_jax.console import table
from navil_jax.errors import UserError
from navil_jax.evaluate.benchmarks.catalogue import BENCHMARKS
from navil_jax.evaluate.paper import AVERAGES, FIGURES, average

Card = dict[str, Any]
PATTERN = "*/card-*.json"


def write_card(folder: Path, card: Card) -> Path:
    path = folder / f"card-{card['protocol']}.json"
    path.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return path


def read_cards(folder: Path) -> list[Card]:
    """All cards below a folder. Raises UserError for one that is damaged."""
    found = []
    for path in sorted(folder.glob(PATTERN)):
        try:
            card = json.loads(path.read_text())
            found.append({key: card[key] for key in ("benchmark", "split", "protocol", "score", "not_scored")} | card)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: is no card; remove it") from None
    order = list(BENCHMARKS)
    return sorted(found, key=lambda card: order.index(card["benchmark"]) if card["benchmark"] in order else len(order))


def shown(cards: Sequence[Card], checkpoint: str) -> str:
    """A table of the cards of a checkpoint beside the paper's figures, and the paper's averages where all is there.

    Args:
      checkpoint: its hash.
    """
    own = [card for card in cards if card["checkpoint"]["sha256"] == checkpoint]
    rows = [
        (card["benchmark"], card["split"], card["protocol"], _score(card), *_figures(card), _note(card)) for card in own
    ]
    lines = [table(("benchmark", "split", "protocol", "score", *FIGURES, ""), rows)]
    return "\n".join([*lines, *_averages(own)])


def is_comparable(card: Card) -> bool:
    """Whether the paper's figure is of the same questions, all of which were asked."""
    return bool(card["official"]) and not card["limit"]


def _score(card: Card) -> str:
    return "not scored" if card["score"] is None else f"{card['score']:.1f}"


def _figures(card: Card) -> tuple[str, ...]:
    said = (figures.get(card["benchmark"]) for figures in FIGURES.values())
    return tuple("-" if figure is None or not is_comparable(card) else f"{figure:g}" for figure in said)


def _note(card: Card) -> str:
    notes = []
    if card["not_scored"]:
        notes.append(card["not_scored"])
    if not card["official"]:
        notes.append("stand-in: the paper's figure is of another split")
    if card["limit"]:
        notes.append(f"the first {card['limit']} questions only")
    if card["judge"]:
        notes.append(f"judge {card['judge']['model']} with prompts of navil_jax")
    return "; ".join(notes)


def _averages(cards: Sequence[Card]) -> Iterator[str]:
    """The paper's averages, of scores that are comparable with its figures and by the protocol of reports."""
    scores: dict[str, float] = {}
    for card in cards:
        primary = BENCHMARKS[card["benchmark"]].primary
        if card["score"] is None or not is_comparable(card) or card["protocol"] not in (primary, f"{primary}_judge"):
            continue
        if card["benchmark"] not in scores or card["protocol"] != primary:  # a judged score goes before one that is not
            scores[card["benchmark"]] = card["score"]
    for name, of in AVERAGES.items():
        mean = average(scores, of)
        papers = [(model, average(figures, of)) for model, figures in FIGURES.items()]
        said = ", ".join(f"{model} {value:.1f}" for model, value in papers if value is not None)
        if mean is not None:
            yield f"average of the {name}: {mean:.1f} (paper: {said})"
