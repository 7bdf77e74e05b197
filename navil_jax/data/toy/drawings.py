"""Plain drawings as a person makes them first, with questions in everyday words.

A sample is a pure function of (split, index): `drawing` says what is in it and draws it, `everyday` speaks about it.

Held out: training draws in the style `TRAIN` alone. Half of the test split is of that style and half of `OTHER`, whose
shades, fonts and canvases training never uses (kinds "..., other style").
"""

import dataclasses
import random
from collections.abc import Iterator
from typing import Literal

from navil_jax.data.sample import Sample, Split, check_index
from navil_jax.data.toy.drawing import OTHER, TRAIN, WORDS, Drawing, plan, render
from navil_jax.data.toy.everyday import Asked, turns

TOKENIZER_DRAWINGS = 3000


@dataclasses.dataclass(frozen=True)
class Drawings:
    """Drawings of a split: 200,000 with `questions` turns each to train on, 1,600 with one to test.

    Attributes:
      about: what an encoder learns first, of one shape each: "shape", which one it is; "look", its name and colour.
        Of these 400 are to test. Empty: everything.
    """

    split: Split
    questions: int = 2
    about: Literal["", "shape", "look"] = ""

    def __len__(self) -> int:
        return 200_000 if self.split == "train" else 400 if self.about else 1600

    def drawing(self, index: int) -> tuple[Drawing, list[Asked]]:
        """The drawing of an index, with its turns as (kind, question, answer)."""
        check_index(index, len(self))
        rng = random.Random(f"drawings/{self.split}/{index}")
        train = self.split == "train"
        drawing = plan(rng, TRAIN if train or index % 2 else OTHER, alone=bool(self.about))
        asked = [turn for turn in turns(rng, drawing) if self._wants(turn, drawing)]
        return drawing, rng.sample(asked, min(self.questions if train else 1, len(asked)))

    def _wants(self, turn: Asked, drawing: Drawing) -> bool:
        kind, _, answer = turn
        if self.about == "shape":
            return answer == drawing.things[0].name
        return not self.about or (kind in ("caption", "color", "shape") and answer not in ("yes", "no"))

    def __getitem__(self, index: int) -> Sample:
        drawing, asked = self.drawing(index)
        kind = ""
        if self.split == "test":
            kind = asked[0][0] + ("" if index % 2 else ", other style")
        key = f"drawings{self.about and f'_{self.about}s'}/{self.split}/{index}"
        return Sample(key, (render(drawing),), tuple((question, answer) for _, question, answer in asked), kind)

    def texts(self) -> Iterator[str]:
        for index in range(min(len(self), TOKENIZER_DRAWINGS)):
            for _, question, answer in self.drawing(index)[1]:
                yield from (question, answer)
        for word in WORDS:
            yield from (word, word.upper(), word.capitalize())
