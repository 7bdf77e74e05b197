"""Sources -> shuffled mixture -> features -> packed rows -> batches, with Grain.

The order of samples follows from config.data.seed alone. The state of an iterator is a few numbers: where the group of
rows that is being handed out began, and how many of its rows are out. Restoring reads that group again.
"""

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from navil_jax.batch import Batch, BatchSpec, SampleFeatures
from navil_jax.config import Config
from navil_jax.data.features import FeatureSource, Skipped
from navil_jax.data.sources import Source
from navil_jax.data.tokenizer import Tokenizer
from navil_jax.errors import UserError

# More skipped samples than this share, once that many were read, mean a wrong recipe: the run stops.
MAX_SKIPPED_SHARE, SKIPPED_CHECKED_FROM = 0.5, 100
_SKIPPED_LOGGED = 20  # different samples of each iterator
_log = logging.getLogger(__name__)


def batch_spec(config: Config, process_count: int = 1) -> BatchSpec:
    """The shapes of a batch, of the part of one process where there are several.

    Raises:
      UserError: the rows do not divide by the processes.
    """
    if config.data.rows % process_count:
        raise UserError(f"config.data.rows: {config.data.rows} rows do not divide by {process_count} processes")
    vision = config.model.vision
    return BatchSpec(
        rows=config.data.rows // process_count,
        visual_slots=config.data.visual_slots,
        text_slots=config.data.text_slots,
        patch_slots=config.data.patch_slots,
        patch_dim=vision.patch_dim if vision else 0,
        unit_patches=vision.unit_patches if vision else 1,
    )


def make_dataset(
    config: Config,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[Batch]:
    """Endless training batches.

    Sources are mixed by their weights, each shuffled anew in every epoch. The processes take turns on every source, so
    that no sample is read twice, and each mixes and packs its own rows. Broken and over-long samples are skipped,
    logged and counted, see `skipped_samples`.

    Args:
      sources: one per entry of config.data.sources.

    Returns:
      Batches of NumPy arrays with this process's rows. Its iterators have get_state and set_state and work with
      grain.checkpoint.CheckpointSave and CheckpointRestore.

    Raises:
      UserError: tokenizer and model, or sources and config, do not belong together. While reading: more than half of
        the samples are skipped.
    """
    _check_sources(config, sources)
    _check_tokenizer(config, tokenizer)
    spec = batch_spec(config, process_count)
    seeds = np.random.SeedSequence(config.data.seed).generate_state(len(sources) + 1).tolist()
    shuffled = [
        grain.MapDataset.source(FeatureSource(source, entry.name, number, config, tokenizer, spec.budgets))
        .shuffle(seed=seed)
        .repeat()[process_index::process_count]
        for number, (source, entry, seed) in enumerate(zip(sources, config.data.sources, seeds[1:], strict=True))
    ]
    mixture = grain.MapDataset.mix(shuffled, [entry.weight for entry in config.data.sources])
    rows = _packed_rows(mixture, config, spec, seed=seeds[0])
    batches = rows.batch(spec.rows, drop_remainder=True)
    return batches.map(functools.partial(spec.from_packed, context_id=_context_id(config)))


def evaluation_batches(
    config: Config,
    source: Source,
    tokenizer: Tokenizer,
    source_id: int = 0,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[Batch]:
    """One pass over a source in its own order: every sample exactly once, in batches of the training shapes.

    The last batch is filled up with empty rows. Every process packs all samples alike and hands out its own rows, so
    that all have the same number of batches. `Batch.sample_ids` says which sample a token belongs to (see
    `segment_ids` for where there is one); samples that cannot be used are logged and do not appear.

    Args:
      source_id: what `Batch.source_ids` shall hold.
      limit: take only so many samples from the start; 0 takes all.

    Raises:
      UserError: as `make_dataset`.
    """
    _check_tokenizer(config, tokenizer)
    spec = batch_spec(config)
    features = grain.MapDataset.source(FeatureSource(source, "evaluation", source_id, config, tokenizer, spec.budgets))
    rows = _packed_rows(features[: limit or len(source)], config, spec, seed=None)
    local = batch_spec(config, process_count)
    start = process_index * local.rows

    def to_batch(packed: Mapping[str, np.ndarray]) -> Batch:
        filled = {name: _fill_rows(array, spec.rows)[start : start + local.rows] for name, array in packed.items()}
        return local.from_packed(filled, _context_id(config))

    return rows.batch(spec.rows, drop_remainder=False).map(to_batch)


def skipped_samples(iterator: grain.DatasetIterator) -> dict[str, int]:
    """Samples skipped so far by source name, as of the start of the group of rows that is being handed out.

    It is a part of the iterator's state, so a resumed run counts on.
    """
    state = iterator.get_state()
    while "skipped" not in state:
        state = state["parent"]
    return dict(state["skipped"])


def _check_sources(config: Config, sources: Sequence[Source]) -> None:
    if not sources or len(sources) != len(config.data.sources):
        raise UserError(f"config.data.sources: {len(config.data.sources)} entries for {len(sources)} opened sources")
    for source, entry in zip(sources, config.data.sources, strict=True):
        if not len(source):
            raise UserError(f"config.data.sources: source {entry.name} has no samples")
        if entry.weight <= 0:
            raise UserError(f"config.data.sources: the weight of {entry.name} must be positive, not {entry.weight}")


def _check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.decoder.vocab_size:
        raise UserError(
            f"config.model.decoder.vocab_size: {config.model.decoder.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size} ids"
        )
    if config.model.special_token_ids and config.model.special_token_ids != tokenizer.special_token_ids:
        raise UserError(
            f"config.model.special_token_ids: {config.model.special_token_ids} are not those of the tokenizer, "
            f"{tokenizer.special_token_ids}"
        )


def _context_id(config: Config) -> int:
    return config.model.special_id("<IMG_CONTEXT>") if config.model.special_token_ids else -1


def _packed_rows(
    samples: grain.MapDataset, config: Config, spec: BatchSpec, seed: int | None
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Rows of whole samples in the form that `BatchSpec.from_packed` takes; shuffled within a group if seeded."""
    threads = config.data.threads
    read = samples.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads))
    return grain.experimental.FirstFitPackIterDataset(
        _UsableSamples(read),
        length_struct=spec.budgets,
        num_packing_bins=config.data.packing_bins,
        shuffle_bins=seed is not None,
        seed=seed or 0,
    )


def _fill_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """Appends rows of zeros (empty, by their segment ids) up to `rows`."""
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


class _UsableSamples(grain.IterDataset[SampleFeatures]):
    """Takes `Skipped` samples out, and counts them in the iterator's state."""

    def __iter__(self) -> grain.DatasetIterator[SampleFeatures]:
        return _UsableSamplesIterator(iter(self._parent))


class _UsableSamplesIterator(grain.DatasetIterator[SampleFeatures]):
    def __init__(self, parent: grain.DatasetIterator[SampleFeatures | Skipped]) -> None:
        super().__init__(parent)
        self._read = 0
        self._skipped: Counter[str] = Counter()
        self._logged: set[Skipped] = set()

    def __next__(self) -> SampleFeatures:
        while True:
            element = next(self._parent)
            self._read += 1
            if not isinstance(element, Skipped):
                return element
            self._skipped[element.source] += 1
            self._report(element)

    def _report(self, sample: Skipped) -> None:
        count = self._skipped.total()
        if len(self._logged) < _SKIPPED_LOGGED and sample not in self._logged:
            self._logged.add(sample)
            _log.warning("skipped %s of %s: %s", sample.key, sample.source, sample.reason)
        if self._read >= SKIPPED_CHECKED_FROM and count > MAX_SKIPPED_SHARE * self._read:
            raise UserError(
                f"{count} of {self._read} samples had to be skipped, the last was {sample.key} of {sample.source}: "
                f"{sample.reason}"
            )

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "read": self._read, "skipped": dict(self._skipped)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._read = state["read"]
        self._skipped = Counter(state["skipped"])
