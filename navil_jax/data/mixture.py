"""Sources -> one endless shuffled stream of samples with random access.

The sample at a place of the stream follows from config.data.seed, the sources' sizes, weights and repeats, and the
share of this process; nothing else. What is bad or too long keeps its place, as `Skipped`.
"""

import dataclasses
from collections.abc import Callable, Sequence, Set

import grain
import numpy as np

from navil_jax.config import DataConfig
from navil_jax.data.features import FeatureSource, Skipped, Usable
from navil_jax.data.quarantine import Quarantine


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One epoch of a source: `repeat` passes over its samples, below 1 the first part of one. Known bad are not read.

    Example: 3 samples, repeat 2.4 -> samples 0 1 2 0 1 2 0
    """

    source: FeatureSource
    repeat: float
    known: Set[int]
    read: Callable[[int], Usable | Skipped]

    def __len__(self) -> int:
        return max(1, round(len(self.source) * self.repeat))

    def __getitem__(self, place: int) -> Usable | Skipped:
        samples = len(self.source)
        index = place % samples
        if index in self.known:
            return Skipped(self.source.name, samples, index, f"{self.source.name}/{index}", "known", known=True)
        return self.read(index)


def mix(
    data: DataConfig,
    sources: Sequence[FeatureSource],
    readers: Sequence[Callable[[int], Usable | Skipped]],
    quarantine: Quarantine,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset[Usable | Skipped]:
    """The samples of one process.

    Every epoch of a source is shuffled as a whole and anew, and the processes take its samples in turns. How often a
    source is drawn follows from its weight alone. The stream has no end, so all processes have equally many samples
    however few a source has.

    Args:
      sources: one per entry of data.sources.
      readers: as many; make the features of a sample.
    """
    seeds = np.random.SeedSequence(data.seed).generate_state(len(sources) + 1).tolist()
    epochs = [
        Epoch(source, entry.repeat, quarantine.known(source.name, len(source)), read)
        for source, entry, read in zip(sources, data.sources, readers, strict=True)
    ]
    shares = [
        grain.MapDataset.source(epoch).shuffle(seed=seed).repeat()[process_index::process_count]
        for epoch, seed in zip(epochs, seeds[1:], strict=True)
    ]
    return grain.MapDataset.mix(shares, [entry.weight for entry in data.sources])
