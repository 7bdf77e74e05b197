"""Sources -> shuffled mixture -> features -> packed rows -> batches, with Grain.

The order of samples follows from config.data.seed and the number of streams alone, whatever the number of hosts,
threads and worker processes. The state of an iterator is small: for each stream the place in its samples, the places of
those that wait to be packed, and counts. Restoring reads the waiting ones again (and packs the rows again that wait for
their step), which takes as long at step 10,000 as at step 10.
"""

import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import grain

from navil_jax.batch import Batch, BatchSpec
from navil_jax.config import Config, SourceConfig
from navil_jax.data.features import FeatureSource, Skipped, Usable
from navil_jax.data.grouping import GroupedRows, row_cost
from navil_jax.data.images import largest_scale
from navil_jax.data.mixture import Reader, mix
from navil_jax.data.packing import PackedRows
from navil_jax.data.quarantine import Quarantine, SampleWatch
from navil_jax.data.sample import Sample, Source
from navil_jax.data.sources import for_source
from navil_jax.data.streams import Steps, streams_of
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.data.workers import Workers
from navil_jax.errors import UserError
from navil_jax.paths import is_remote

LOOKED_AT = 1000  # held-out samples, to find one that can be used
BATCHES_AHEAD = 2  # packed in the background while a step runs
READS = 64  # samples of a host that are fetched at a time from an address: 640 a second where each takes 100 ms
Maker = Callable[[Sample, int, int], Usable | Skipped]  # (sample, index in the source, place) -> features


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
        block_patches=_largest_scale(config) if vision else None,
    )


def _largest_scale(config: Config) -> int:
    """The most patches that one scale of an image of any source can have."""
    limits = [source.max_patches or config.images.max_patches for source in config.data.sources]
    images = dataclasses.replace(config.images, max_patches=max(limits, default=config.images.max_patches))
    return min(config.data.patch_slots, largest_scale(images, config.model.encoder))


def make_dataset(
    config: Config,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    process_index: int = 0,
    process_count: int = 1,
    quarantine: Quarantine | None = None,
) -> grain.IterDataset[Batch]:
    """Endless training batches.

    Sources are mixed by their weights, each shuffled anew in every epoch. The streams take turns on every source, so
    that no sample is read twice, and each mixes and packs its own rows; a process serves its part of them. Bad and
    over-long samples are skipped, logged and counted, see `streams.sample_counts`.

    Args:
      sources: one per entry of config.data.sources.
      process_index: of this process, in the order of the rows that the processes hold.
      quarantine: samples that are not read, and where bad ones are noted; None: none and nowhere.

    Returns:
      Batches of NumPy arrays with this process's rows. Its iterators have get_state and set_state; what they say of a
      stream is the same whichever process serves it.

    Raises:
      UserError: tokenizer and model, or sources and config, do not belong together; the streams do not divide by the
        processes. While reading: too many samples of a stream are bad (config.data.max_bad_share) or too long, or a
        too long one is an error (config.data.oversize).
      RuntimeError: while reading: a source failed otherwise, or a worker process died.
    """
    data, own = config.data, streams_of(config, process_index, process_count)
    spec, count = batch_spec(config, process_count), len(own) * process_count
    quarantine = quarantine or Quarantine()
    samples = sample_streams(config, sources, tokenizer, own, count, quarantine)
    watch = SampleWatch(quarantine, data.max_bad_share, data.oversize == "error")
    threads = reading_threads(config, len(own))
    rows, cost = data.rows // count, functools.partial(row_cost, config.model)
    packed = (PackedRows(stream, spec, data.packing_lookahead, threads, watch) for stream in samples)
    grouped = (GroupedRows(stream, rows, data.balance_window, data.seed, cost) for stream in packed)
    steps = Steps(dict(zip(own, grouped, strict=True)), rows, count)
    batches = steps.map(functools.partial(spec.build, context_id=_context_id(config)))
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_AHEAD)


def sample_streams(
    config: Config,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    wanted: Sequence[int] = (0,),
    count: int = 1,
    quarantine: Quarantine | None = None,
) -> list[grain.MapDataset[Usable | Skipped]]:
    """The endless mixtures of samples that `make_dataset` packs, with random access; errors as there.

    Args:
      wanted: numbers of the streams asked for.
      count: streams of the run.
    """
    _check_sources(config, sources)
    _check_tokenizer(config, tokenizer)
    data, budgets = config.data, batch_spec(config).budgets
    features = [
        FeatureSource(source, entry.name, number, for_source(config, number), tokenizer, budgets, training=True)
        for number, (source, entry) in enumerate(zip(sources, data.sources, strict=True))
    ]
    readers: list[Reader] = [source.read for source in features]
    makers: list[Maker] = [_few_at_a_time(source.make, data.threads) for source in features]
    if data.workers:
        workers = Workers(features, data.workers)
        readers = [functools.partial(workers.read, number) for number in range(len(features))]
        makers = [functools.partial(workers.make, number) for number in range(len(features))]
    for number, entry in enumerate(data.sources):
        if _is_at_address(entry):
            readers[number] = _fetched_here(features[number], makers[number])
    quarantine = quarantine or Quarantine()
    return [mix(data, features, readers, quarantine, stream, count, config.batch_samples) for stream in wanted]


def reading_threads(config: Config, streams: int = 1) -> int:
    """Threads of a process that read for each of its streams: where data are at an address, most wait for it."""
    data = config.data
    least = READS if any(map(_is_at_address, data.sources)) else 0
    return -(-max(data.threads, 2 * data.workers, least) // streams)


def _is_at_address(entry: SourceConfig) -> bool:
    return any(map(is_remote, (entry.path, entry.root, entry.held_out)))


def _fetched_here(source: FeatureSource, make: Maker) -> Reader:
    """Reads a sample in the thread that asks for it, so that a maker of features never waits for the network."""

    def read(index: int, place: int) -> Usable | Skipped:
        sample = source.fetch(index)
        return sample if isinstance(sample, Skipped) else make(sample, index, place)

    return read


def _few_at_a_time(make: Maker, threads: int) -> Maker:
    """The same of which only so many calls run at a time; more would take the GIL from each other."""
    turns = threading.BoundedSemaphore(max(1, threads))

    def made(sample: Sample, index: int, place: int) -> Usable | Skipped:
        with turns:
            return make(sample, index, place)

    return made


def evaluation_batches(
    config: Config,
    source: Source,
    tokenizer: Tokenizer,
    source_id: int = 0,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[Batch]:
    """One pass over a source: every sample exactly once, in batches of the training shapes.

    The last batch is filled up with empty rows. Every process packs all samples alike and hands out its own rows, so
    that all have the same number of batches. `Batch.sample_ids` says which sample a token belongs to (see
    `segment_ids` for where there is one); samples that cannot be used are logged and do not appear.

    Args:
      source_id: what `Batch.source_ids` shall hold.
      limit: take only so many samples from the start; 0 takes all.

    Raises:
      UserError: as `make_dataset`, but no number of samples that cannot be used is too many.
    """
    _check_tokenizer(config, tokenizer)
    spec, local = batch_spec(config), batch_spec(config, process_count)
    own = for_source(config, source_id)
    features = grain.MapDataset.source(FeatureSource(source, "evaluation", source_id, own, tokenizer, spec.budgets))
    watch = SampleWatch(Quarantine(), max_skipped_share=1.0)
    threads = reading_threads(config)
    rows = PackedRows(features[: limit or len(source)], spec, config.data.packing_lookahead, threads, watch)
    start = process_index * local.rows
    batches = rows.batch(
        spec.rows, batch_fn=lambda rows: local.build(rows[start : start + local.rows], _context_id(config))
    )
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_AHEAD)


def check_held_out(config: Config, sources: Mapping[int, Source], tokenizer: Tokenizer) -> None:
    """Looks for a held-out sample of every source that can be evaluated, among its first `LOOKED_AT`.

    Args:
      sources: the held-out splits, by their number in `config.data.sources`.

    Raises:
      UserError: a source has none.
    """
    budgets = batch_spec(config).budgets
    for number, source in sources.items():
        name = config.data.sources[number].name
        features = FeatureSource(source, name, number, for_source(config, number), tokenizer, budgets)
        looked = (features[index] for index in range(min(len(source), LOOKED_AT)))
        reasons = Counter[str]()
        for found in looked:
            if isinstance(found, Usable):
                break
            reasons[f"{found.reason} (first {found.key})"] += 1
        else:
            why = f"none of {reasons.total():,} can be used: {next(iter(reasons))}" if reasons else "there are none"
            raise UserError(f"config.data.sources.{number}: held-out samples of {name}: {why}; mend or remove them")


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
