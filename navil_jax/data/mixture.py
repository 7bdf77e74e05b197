"""Sources -> one endless shuffled stream of samples with random access.

The sample at a place of a stream follows from config.data.seed, the sources' sizes, weights and repeats, and the
number of this stream and of all; nothing else. So do the random changes of its images: each source has an endless
stream of its own, which all streams of the run share, and they follow from the place in there. What is bad or too long
keeps its place, as `Skipped`.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence, Set
from fractions import Fraction

import grain
import numpy as np

from navil_jax.config import DataConfig
from navil_jax.data.features import FeatureSource, Skipped, Usable
from navil_jax.data.quarantine import Quarantine
from navil_jax.data.sample import stamp

Reader = Callable[[int, int], Usable | Skipped]  # (index in the source, place in its endless stream) -> features


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One epoch of a source as numbers of samples: `repeat` passes over all, below 1 the first part of one.

    Example: 3 samples, repeat 2.4 -> 0 1 2 0 1 2 0
    """

    samples: int
    repeat: float

    def __len__(self) -> int:
        return max(1, round(self.samples * self.repeat))

    def __getitem__(self, place: int) -> int:
        return place % self.samples


@dataclasses.dataclass(frozen=True)
class Reading:
    """Makes the features of a sample, by its place in its source's endless stream. Known bad ones are not read."""

    source: FeatureSource
    known: Set[int]
    read: Reader

    def __call__(self, place: int, index: int) -> Usable | Skipped:
        if index in self.known:
            name = self.source.name
            return Skipped(name, len(self.source), index, f"{name}/{index}", "known", known=True)
        return self.read(index, place)


class Proportions(grain.transforms.DatasetSelectionMap):
    """Which dataset a place of a mixture is drawn from, and its place there; exact for every weight.

    `grain.MapDataset.mix` has the same order, but cuts weights to whole hundredths of the smallest.

    Args:
      weights: positive, taken as the decimal numbers that they are written as.
      lengths: of the datasets; the mixture ends with the first of them.

    Example: weights 0.2, 0.1 -> (0, 0) (0, 1) (1, 0) (0, 2) (0, 3) (1, 1) ...
    """

    def __init__(self, weights: Sequence[float], lengths: Sequence[int]) -> None:
        fractions = [Fraction(str(weight)) for weight in weights]
        whole = math.lcm(*(fraction.denominator for fraction in fractions))
        self._weights = [int(fraction * whole) for fraction in fractions]
        self._sum = sum(self._weights)
        shares = zip(self._weights, lengths, strict=True)
        self._length = min(sys.maxsize, *(length * self._sum // weight for weight, length in shares))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> tuple[int, int]:
        """Takes the datasets in turn: each leaves to the later ones their share of the places, rounded down."""
        weight = self._sum
        for number, own in enumerate(self._weights):
            rest = weight - own
            left = place * rest // weight
            if left == (place + 1) * rest // weight:
                return number, place - left
            place, weight = left, rest
        raise AssertionError("the last dataset takes what is left")


def mix(
    data: DataConfig,
    sources: Sequence[FeatureSource],
    readers: Sequence[Reader],
    quarantine: Quarantine,
    stream: int = 0,
    streams: int = 1,
) -> grain.MapDataset[Usable | Skipped]:
    """The samples of one of the run's streams (`data.streams`).

    Every epoch of a source is shuffled as a whole and anew, and the streams take its samples in turns. How often a
    source is drawn follows from its weight alone. A stream has no end, so all have equally many samples however few a
    source has.

    Args:
      sources: one per entry of data.sources.
      readers: as many; make the features of a sample from its index and its place.
    """
    seeds = np.random.SeedSequence(data.seed).generate_state(len(sources) + 1).tolist()
    shares = []
    for source, entry, read, seed in zip(sources, data.sources, readers, seeds[1:], strict=True):
        indices = grain.MapDataset.source(Epoch(len(source), entry.repeat)).shuffle(seed=seed).repeat()
        reading = Reading(source, quarantine.known(source.name, len(source), stamp(source.source)), read)
        shares.append(indices.map_with_index(reading)[stream::streams])  # counted over all streams
    proportions = Proportions([entry.weight for entry in data.sources], [len(share) for share in shares])
    return grain.MapDataset.select_from_datasets(shares, proportions)
