"""Sources -> one endless shuffled stream of samples with random access.

The sample at a place of a stream follows from config.data.seed, the sources' sizes, weights and repeats, and the
number of this stream and of all; nothing else. So do the random changes of its images: each source has an endless
stream of its own, which all streams of the run share, and they follow from the place in there. What is bad or too long
keeps its place, as `Skipped`.
"""

import bisect
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
      weights: not all 0, taken as the decimal numbers that they are written as.
      lengths: of the datasets; the mixture ends with the first of them.

    Example: weights 0.2, 0.1 -> (0, 0) (0, 1) (1, 0) (0, 2) (0, 3) (1, 1) ...
    """

    def __init__(self, weights: Sequence[float], lengths: Sequence[int]) -> None:
        fractions = [Fraction(str(weight)) for weight in weights]
        whole = math.lcm(*(fraction.denominator for fraction in fractions))
        self._weights = [int(fraction * whole) for fraction in fractions]
        self._sum = sum(self._weights)
        shares = zip(self._weights, lengths, strict=True)
        self._length = min(sys.maxsize, *(length * self._sum // weight for weight, length in shares if weight))

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

    def counts(self, places: int) -> list[int]:
        """How many of the first places are drawn from each dataset."""
        found, weight = [], self._sum
        for own in self._weights:
            rest = weight - own
            left = places * rest // weight if weight else 0
            found.append(places - left)
            places, weight = left, rest
        return found


class Scheduled(grain.transforms.DatasetSelectionMap):
    """`Proportions` whose weights change at some places; from there on each dataset goes on where it was.

    Args:
      weights: of every stretch, as many as there are datasets.
      starts: the first place of every stretch; the first is 0.
      lengths: of the datasets.

    Example: weights 1 1 from 0 and 0 1 from 4 on -> (0, 0) (1, 0) (0, 1) (1, 1) (1, 2) (1, 3) ...
    """

    def __init__(self, weights: Sequence[Sequence[float]], starts: Sequence[int], lengths: Sequence[int]) -> None:
        self._stretches = [Proportions(own, lengths) for own in weights]
        self._starts = list(starts)
        self._before = [[0] * len(lengths)]  # drawn of each dataset before each stretch
        for stretch, start, end in zip(self._stretches, starts, starts[1:], strict=False):
            drawn = stretch.counts(end - start)
            self._before.append([sum(pair) for pair in zip(self._before[-1], drawn, strict=True)])
        self._length = min(sys.maxsize, self._starts[-1] + len(self._stretches[-1]))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> tuple[int, int]:
        stretch = bisect.bisect_right(self._starts, place) - 1
        number, index = self._stretches[stretch][place - self._starts[stretch]]
        return number, self._before[stretch][number] + index

    def counts(self, places: int) -> list[int]:
        """As of `Proportions`."""
        stretch = max(0, bisect.bisect_left(self._starts, places) - 1)
        drawn = self._stretches[stretch].counts(places - self._starts[stretch])
        return [sum(pair) for pair in zip(self._before[stretch], drawn, strict=True)]


def proportions(
    data: DataConfig,
    batch_samples: int,
    sizes: Sequence[int],
    lengths: Sequence[int],
    stream: int = 0,
    streams: int = 1,
) -> Scheduled:
    """Which source each place of a stream is drawn from.

    Args:
      batch_samples: of a step, in which `weight_points` count.
      sizes: samples of an epoch of each source, of which `data.temperature` makes weights.
      lengths: of what the stream has of each source.
    """
    steps = sorted({0, *(point.step for entry in data.sources for point in entry.weight_points)})
    powers = [size ** (1 / data.temperature) if data.temperature else 1 for size in sizes]
    weights = [
        [entry.weight_at(step) * power for entry, power in zip(data.sources, powers, strict=True)] for step in steps
    ]
    starts = [-(-max(0, step * batch_samples - stream) // streams) for step in steps]
    return Scheduled(weights, starts, lengths)


def mix(
    data: DataConfig,
    sources: Sequence[FeatureSource],
    readers: Sequence[Reader],
    quarantine: Quarantine,
    stream: int = 0,
    streams: int = 1,
    batch_samples: int = 0,
) -> grain.MapDataset[Usable | Skipped]:
    """The samples of one of the run's streams (`data.streams`).

    Every epoch of a source is shuffled as a whole and anew, and the streams take its samples in turns. How often a
    source is drawn follows from the weights alone. A stream has no end, so all have equally many samples however few a
    source has.

    Args:
      sources: one per entry of data.sources.
      readers: as many; make the features of a sample from its index and its place.
      batch_samples: samples of a step, in which schedules of weights count.
    """
    seeds = np.random.SeedSequence(data.seed).generate_state(len(sources) + 1).tolist()
    shares = []
    for source, entry, read, seed in zip(sources, data.sources, readers, seeds[1:], strict=True):
        indices = grain.MapDataset.source(Epoch(len(source), entry.repeat)).shuffle(seed=seed).repeat()
        reading = Reading(source, quarantine.known(source.name, len(source), stamp(source.source)), read)
        shares.append(indices.map_with_index(reading)[stream::streams])  # counted over all streams
    sizes = [len(Epoch(len(source), entry.repeat)) for source, entry in zip(sources, data.sources, strict=True)]
    lengths = [len(share) for share in shares]
    chosen = proportions(data, batch_samples, sizes, lengths, stream, streams)
    return grain.MapDataset.select_from_datasets(shares, chosen)
