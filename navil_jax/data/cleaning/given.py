"""Given: the sources that are cleaned, and the benchmarks that they are compared with, in one numbering."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from navil_jax.config import SourceConfig
from navil_jax.data.sample import Source


@dataclasses.dataclass(frozen=True)
class Given:
    """What is cleaned, and what it is compared with."""

    entries: Sequence[SourceConfig]
    sources: Sequence[Source]
    references: Mapping[str, Source]  # by name

    @property
    def names(self) -> list[str]:
        """Of sources and references."""
        return [*(entry.name for entry in self.entries), *self.references]

    @property
    def all_sources(self) -> list[Source]:
        return [*self.sources, *self.references.values()]

    @property
    def bounds(self) -> list[int]:
        """Where each source and each reference begins, and the end of the last."""
        return [0, *np.cumsum([len(source) for source in self.all_sources]).tolist()]
