"""Rules that judge a sample by itself: a measure below its least or above its most."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from navil_jax.data.cleaning.settings import Settings
from navil_jax.data.cleaning.text import SCRIPTS
from navil_jax.errors import UserError

Columns = Mapping[str, np.ndarray]
ROWS = 2**20  # samples that are judged at a time


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a measure may be at least, or at most."""

    name: str
    step: str
    column: str
    setting: str
    said: str  # with {value} and {limit}
    least: bool = False

    def outside(self, columns: Columns, rows: np.ndarray, settings: Settings) -> np.ndarray:
        """[n] bool, which of the samples to leave out."""
        values, limit = self.values(columns, rows, settings), getattr(settings, self.setting)
        found = values < limit if self.least else values > limit
        return found & (columns["images"][rows] > 0) if self.step == "images" else found

    def values(self, columns: Columns, rows: np.ndarray, settings: Settings) -> np.ndarray:
        """[n], what is measured; nan where the rule says nothing."""
        if self.column != "scripts":
            return columns[self.column][rows]
        shares = columns["scripts"][rows].astype(np.float32)
        named = named_scripts(settings)
        of_named, total = shares[:, [list(SCRIPTS).index(name) for name in named]].sum(axis=1), shares.sum(axis=1)
        return np.where((total > 0) & bool(named), of_named / np.maximum(total, 1), np.nan)

    def reason(self, value: float, settings: Settings) -> str:
        return self.said.format(value=value, limit=getattr(settings, self.setting))


LIMITS = (
    Limit("few_words", "captions", "words", "min_words", "number of words {value:,}, below {limit:,}", least=True),
    Limit("many_words", "captions", "words", "max_words", "number of words {value:,}, above {limit:,}"),
    Limit("one_word", "captions", "word_share", "max_word_share", "{value:.0%} of the words are one, over {limit:.0%}"),
    Limit(
        "repeats",
        "captions",
        "repeated_share",
        "max_repeated_share",
        "{value:.0%} of the word triples stood before, over {limit:.0%}",
    ),
    Limit("run", "captions", "run", "max_run", "one character {value:,} times in a row, more than {limit:,}"),
    Limit("markup", "captions", "markup_share", "max_markup_share", "{value:.0%} is markup, over {limit:.0%}"),
    Limit(
        "boilerplate",
        "captions",
        "boilerplate_share",
        "max_boilerplate_share",
        "{value:.0%} is boilerplate, over {limit:.0%}",
    ),
    Limit(
        "scripts",
        "captions",
        "scripts",
        "min_script_share",
        "{value:.0%} of the letters are of the scripts asked for, below {limit:.0%}",
        least=True,
    ),
    Limit("small", "images", "least_side", "min_side", "a side of {value:,} pixels, below {limit:,}", least=True),
    Limit("large", "images", "most_side", "max_side", "a side of {value:,} pixels, over {limit:,}"),
    Limit("aspect", "images", "aspect", "max_aspect", "one side is {value:.1f} times the other, over {limit:g}"),
    Limit(
        "blank",
        "images",
        "deviation",
        "min_deviation",
        "colours deviate by {value:.1f}, below {limit:g}",
        least=True,
    ),
    Limit("text_image", "images", "text_area", "max_text_area", "{value:.0%} looks like text, over {limit:.0%}"),
)
BY_NAME = {limit.name: limit for limit in LIMITS}


def named_scripts(settings: Settings) -> list[str]:
    """Raises `UserError` for a script that is not one of SCRIPTS."""
    names = [name.strip().lower() for name in settings.scripts.split(",") if name.strip()]
    if unknown := [name for name in names if name not in SCRIPTS]:
        raise UserError(f"--scripts: no script named {unknown[0]!r}; all are {', '.join(SCRIPTS)}")
    return names


def judge(columns: Columns, samples: int, settings: Settings, off: frozenset[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(rule, [n] int64 samples that it leaves out), a number of samples at a time; a sample may come several times."""
    for start in range(0, samples, ROWS):
        rows = np.arange(start, min(samples, start + ROWS))
        bad = columns["bad"][rows]
        if "unreadable" not in off:
            yield "unreadable", rows[bad]
        for limit in LIMITS:
            if not {limit.name, limit.step} & off:
                yield limit.name, rows[limit.outside(columns, rows, settings) & ~bad]
