# ruff: noqa: RUF001
"""Makes captions/golden.json: words and CIDEr scores by pycocoevalcap 1.2 (needs Java, `pip install pycocoevalcap`).

python tests/golden/make_captions.py

Captions and references are invented. `made` are captions for which references are drawn from a small grammar.
"""

import json
import random
from pathlib import Path

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

MARKS = [
    "A man's dog doesn't run.",
    "Two black/white cats -- one sleeping, one awake!",
    'It\'s a t-shirt (red) with "STOP" on it.',
    "Mr. Smith can't go at 10:30 a.m. to the U.S.",
    "50% off: $5,000 & #1 rated.",
    "She said 'hello' to the dogs' owner.",
    "A 3.5-inch 1/2 cup... of tea; and coffee?",
    "We're gonna cannot they've I'm you'll he'd",
    "A café naïve façade",
    "a dog,a cat.a bird",
    "Runs at 5 p.m.",
    "rock 'n' roll",
    "A man on a cell phone, etc.",
    "[brackets] {curly} <angle>",
    "A well-known, high-rise e-mail",
    "2 x 4 = 8 + 1",
    "é…–—’s it’s",
    "A red  bus\tparked",
    "The end.",
    "dr. jones at st. james jr.",
    "No. 5 bus",
    "an apple; a pear: a plum - a fig",
    "“smart” ‘quotes’",
    "O'Neill's pub",
    "1990s and '90s",
    "He is 5'11\" tall",
    "A & B",
    "A+ grade",
    "What?! No...",
    "cats, dogs, and birds . . .",
    "a 12-year-old boy's 1st b-day",
    "",
    "!!",
    "a man, a man and a man",
]
WHO = ["a man", "the woman's dog", "two cats", "a boy in a red t-shirt", "three people"]
DOES = ["is riding", "doesn't watch", "stands near", "holds", "runs after"]
WHAT = ["a horse.", "the old bus", "a plate of food, and a cup", "an umbrella", "a 2-story house!"]


def made(draw: random.Random) -> str:
    return " ".join(draw.choice(part) for part in (WHO, DOES, WHAT)).capitalize()


if __name__ == "__main__":
    draw = random.Random(0)
    captions = [made(draw) for _ in range(20)] + MARKS
    references = [[made(draw) for _ in range(draw.randint(1, 5))] for _ in range(20)]
    references += [[mark or "Nothing.", made(draw)] for mark in MARKS]
    captions[20 + len(MARKS) - 1] = "a man"  # another length than its reference
    tokenize = PTBTokenizer().tokenize
    by_image = {n: [{"caption": text} for text in of] for n, of in enumerate(references)}
    of_captions = tokenize({n: [{"caption": text}] for n, text in enumerate(captions)})
    total, scores = Cider().compute_score(tokenize(by_image), of_captions)
    words = [of_captions[n][0] for n in range(len(captions))]
    golden = {"captions": captions, "references": references, "words": words}
    golden |= {"scores": scores.tolist(), "total": float(total)}
    path = Path(__file__).parent / "captions" / "golden.json"
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
