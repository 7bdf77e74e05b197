"""The input pipeline: every sample once and whole, resumable, and split over processes."""

import dataclasses
import io
import json
import logging
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_sources import CONTEXT, TOKENIZER, MadeSource, assert_equal, config, made, samples_of
from PIL import Image

from navil_jax.batch import Batch
from navil_jax.config import Config, DataConfig, ModelConfig, SourceConfig
from navil_jax.data.features import FeatureSource, sample_features
from navil_jax.data.mixture import Proportions, mix
from navil_jax.data.pipeline import batch_spec, evaluation_batches, make_dataset
from navil_jax.data.quarantine import Quarantine
from navil_jax.data.sample import Sample
from navil_jax.data.streams import sample_counts
from navil_jax.errors import UserError


def check_whole(batch: Batch, settings_: Config, sources: list[MadeSource]) -> None:
    """Every segment holds the features of the sample that it names, tokens and patches."""
    slots = settings_.data.visual_slots
    names = iter(samples_of(batch))
    for row in range(len(batch.tokens)):
        order = batch.reading_order[row]
        scales = 0
        for segment in range(1, batch.segment_ids[row].max() + 1):
            source, sample = next(names)
            expected = sample_features(sources[source][sample], settings_, TOKENIZER)
            places = order[batch.segment_ids[row, order] == segment]
            tokens = np.zeros(len(places), np.int32)
            tokens[expected["visual_positions"]] = expected["visual_tokens"]
            tokens[expected["text_positions"]] = expected["text_tokens"]
            np.testing.assert_array_equal(batch.tokens[row, places], tokens)
            np.testing.assert_array_equal(batch.positions[row, places], np.arange(len(places)))
            text = places[places >= slots]
            np.testing.assert_array_equal(batch.targets[row, text], expected["text_targets"])
            np.testing.assert_array_equal(batch.loss_weights[row, text], expected["text_weights"])

            context = places[tokens == CONTEXT]
            units = np.flatnonzero(np.isin(batch.unit_slots[row], context))
            np.testing.assert_array_equal(batch.unit_slots[row, units], context)
            here = (units[:, None] * 4 + np.arange(4)).reshape(-1)
            np.testing.assert_array_equal(batch.patches[row, here], expected["patches"])
            np.testing.assert_array_equal(batch.patch_coords[row, here], expected["patch_coords"])
            np.testing.assert_array_equal(batch.patch_blocks[row, here], expected["patch_blocks"] + scales)
            scales += expected["patch_blocks"].max(initial=0)
        used = np.count_nonzero(batch.unit_slots[row] < batch.tokens.shape[1])
        assert np.count_nonzero(batch.patch_blocks[row]) == 4 * used


sizes = st.tuples(st.sampled_from([0, 16, 40, 90]), st.integers(1, 90), st.integers(1, 60))


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(sizes, min_size=1, max_size=12), limit=st.integers(0, 12))
def test_evaluation_sees_every_sample_once(sizes: list[tuple[int, int, int]], limit: int) -> None:
    source, settings_ = MadeSource(tuple(sizes)), config()
    limit = min(limit, len(sizes))
    batches = list(evaluation_batches(settings_, source, TOKENIZER, limit=limit))
    for batch in batches:
        assert batch.tokens.shape == (2, 208)
        check_whole(batch, settings_, [source])
    seen = [number for batch in batches for number in samples_of(batch)]
    assert sorted(seen) == [(0, i) for i in range(limit or len(sizes))]


def stream_of(settings_: Config, sources: list[MadeSource], process: int = 0, processes: int = 1):
    """The samples of a process in the order of reading."""
    features = [
        FeatureSource(source, entry.name, i, settings_, TOKENIZER, batch_spec(settings_).budgets)
        for i, (source, entry) in enumerate(zip(sources, settings_.data.sources, strict=True))
    ]
    return mix(settings_.data, features, [f.read for f in features], Quarantine(), process, processes)


def names_of(stream, places: list[int]) -> Counter:
    arrays = (stream[place].features for place in places)
    return Counter((int(a["text_source_ids"][0]), int(a["text_sample_ids"][0])) for a in arrays)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(sizes, min_size=1, max_size=9),
    processes=st.sampled_from([1, 2]),
    bins=st.integers(1, 4),
    repeat=st.sampled_from([0.5, 1.0, 2.3]),
)
def test_training_loses_and_doubles_no_sample(
    sizes: list[tuple[int, int, int]], processes: int, bins: int, repeat: float
) -> None:
    """What was read either came out once or waits."""
    sources, settings_ = [MadeSource(tuple(sizes)), made(5)], config(2, packing_lookahead=bins)
    entries = tuple(dataclasses.replace(entry, repeat=repeat) for entry in settings_.data.sources)
    settings_ = dataclasses.replace(settings_, data=dataclasses.replace(settings_.data, sources=entries))
    for process in range(processes):
        stream = stream_of(settings_, sources, process, processes)
        iterator = iter(make_dataset(settings_, sources, TOKENIZER, process, processes))
        seen: Counter = Counter()
        for _ in range(4):
            batch = next(iterator)
            seen.update(samples_of(batch))
            check_whole(batch, settings_, sources)
            state = iterator.get_state()["streams"][str(process)]["parent"]
            read = state["reader"]["next_index"]
            assert seen + names_of(stream, state["waiting"]) == names_of(stream, range(read))
            assert sum(sample_counts(iterator).values()) == read
        by_source = Counter(source for source, _ in names_of(stream, range(read)).elements())
        assert abs(by_source[1] - 2 * by_source[0]) <= 2  # the weights are 1 and 2
        iterator.close()


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.4, 1.0, 1.5, 3.0])), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.5, 2), min_size=4, max_size=4),
    processes=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_an_epoch_holds_every_sample_as_often_as_it_repeats(
    lengths: list[tuple[int, float]], weights: list[float], processes: int, seed: int
) -> None:
    """All processes together, whatever the weights: also a source with fewer samples than processes."""
    entries = tuple(
        SourceConfig(f"s{i}", weight, repeat=repeat)
        for i, ((_, repeat), weight) in enumerate(zip(lengths, weights, strict=False))
    )
    sources = [
        FeatureSource(MadeSource(((0, 0, 1),) * n), f"s{i}", i, config(), None, {}) for i, (n, _) in enumerate(lengths)
    ]
    readers = [lambda index, place, i=i: (i, index) for i in range(len(sources))]
    data = DataConfig(entries, seed=seed)
    epochs = [max(1, round(length * repeat)) for length, repeat in lengths]
    read = [[[] for _ in range(processes)] for _ in sources]  # by source and process
    for process in range(processes):
        share = mix(data, sources, readers, Quarantine(), process, processes)
        place = 0
        while any(len(read[i][process]) < -(-2 * epoch // processes) for i, epoch in enumerate(epochs)):
            source, index = share[place]
            read[source][process].append(index)
            place += 1
    for number, (length, epoch) in enumerate(zip([length for length, _ in lengths], epochs, strict=True)):
        merged = [index for turn in zip(*read[number], strict=False) for index in turn]
        for start in (0, epoch):
            assert Counter(merged[start : start + epoch]) == Counter(i % length for i in range(epoch))


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 7.0]), min_size=1, max_size=5))
def test_a_mixture_has_the_order_of_grain_where_its_weights_are_exact(weights: list[float]) -> None:
    assume(all(100 * weight % min(weights) == 0 for weight in weights))  # Grain counts in hundredths of the least
    proportions = Proportions(weights, [1000] * len(weights))
    ranges = [grain.MapDataset.range(1000).map(lambda index, i=i: (i, index)) for i in range(len(weights))]
    theirs = grain.MapDataset.mix(ranges, weights)
    assert len(proportions) == len(theirs)
    assert [proportions[place] for place in range(500)] == [theirs[place] for place in range(500)]


@pytest.mark.parametrize("weights", [(1.0, 1.0099), (0.3, 0.1), (1 / 3, 1e-6, 123.456789), (5e-324, 1e300)])
def test_weights_are_drawn_exactly(weights: tuple[float, ...]) -> None:
    proportions = Proportions(weights, [sys.maxsize] * len(weights))
    total = sum(map(Fraction, weights))
    for count in (100, 10**6, 10**12):
        drawn: dict[int, int] = {}
        for place in range(count - 1, -1, -1):  # the last of each source tells how many came before
            source, index = proportions[place]
            drawn.setdefault(source, index + 1)
            if len(drawn) == len(weights) or place < count - 100:
                break
        for source, times in drawn.items():
            assert abs(times - count * Fraction(weights[source]) / total) <= len(weights)


def test_order_depends_on_the_seed_and_the_epoch() -> None:
    def first(seed: int) -> list[tuple[int, int]]:
        stream = stream_of(config(seed=seed), [made(30)])
        return [name for place in range(60) for name in names_of(stream, [place])]

    assert first(0) == first(0) != first(1)
    assert sorted(first(0)[:30]) == sorted(first(0)[30:])
    assert first(0)[:30] != first(0)[30:]


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_do_not_depend_on_threads(threads: int) -> None:
    sources = [made(20), made(7, seed=1)]
    plain, other = (iter(make_dataset(config(2, threads=n), sources, TOKENIZER)) for n in (0, threads))
    for _ in range(6):
        assert_equal(next(plain), next(other))
        assert plain.get_state() == other.get_state()


@pytest.mark.slow
def test_batches_do_not_depend_on_worker_processes() -> None:
    sources = [made(20), MadeSource(((40, 0, 5), (0, 0, 9), (16, 40, 5)))]
    plain, other = (iter(make_dataset(config(2, workers=n), sources, TOKENIZER)) for n in (0, 2))
    for _ in range(6):
        assert_equal(next(plain), next(other))
        assert plain.get_state() == other.get_state()


@pytest.mark.parametrize("threads", [0, 2])
def test_resume_is_bit_equal(threads: int) -> None:
    settings_ = config(2, threads=threads)
    dataset = make_dataset(settings_, [made(20), made(7, seed=1)], TOKENIZER)
    iterator = iter(dataset)
    states, batches = [], []
    for _ in range(9):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    assert max(map(len, states)) < 1000
    for start in (0, 3, 4, 7):
        resumed = iter(dataset)
        resumed.set_state(json.loads(states[start]))
        for expected in batches[start:]:
            assert_equal(next(resumed), expected)


def test_resume_through_orbax(tmp_path: Path) -> None:
    dataset = make_dataset(config(), [made(20)], TOKENIZER)
    iterator = iter(dataset)
    for _ in range(5):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        resumed = iter(dataset)
        next(resumed)
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    for _ in range(4):
        assert_equal(next(resumed), next(iterator))


def test_processes_share_out_the_samples() -> None:
    def read(process: int, processes: int) -> list[tuple[int, int]]:
        iterator = iter(make_dataset(config(packing_lookahead=2), [made(40)], TOKENIZER, process, processes))
        batches = [next(iterator) for _ in range(2 * processes)]
        assert {len(batch.tokens) for batch in batches} == {2 // processes}
        return [number for batch in batches for number in samples_of(batch)]

    assert not set(read(0, 2)) & set(read(1, 2))
    with pytest.raises(UserError, match="rows"):
        make_dataset(config(), [made(4)], TOKENIZER, 0, 3)


def test_processes_share_out_evaluation_rows() -> None:
    settings_, source = config(), made(11)
    whole = list(evaluation_batches(settings_, source, TOKENIZER))
    parts = [list(evaluation_batches(settings_, source, TOKENIZER, 0, 0, i, 2)) for i in range(2)]
    for batch, *local in zip(whole, *parts, strict=True):
        assert_equal(batch, jax.tree.map(lambda *rows: np.concatenate(rows), *local))


def test_bad_and_long_samples_are_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    sizes = [(40, 40, 5)] * 8 + [(40, 0, 5), (40, 40, 500)]
    settings_ = config(packing_lookahead=1, rows=1)
    sources = [MadeSource(tuple(sizes))]
    iterator = iter(make_dataset(settings_, sources, TOKENIZER))
    with caplog.at_level(logging.WARNING):
        seen = Counter(number for _ in range(40) for number in samples_of(next(iterator)))
    assert set(seen) == {(0, i) for i in range(8)}
    state, counts = iterator.get_state(), sample_counts(iterator)
    assert set(counts) == {"source0/good", "source0/bad", "source0/too_long"}
    assert sorted(record.args[0] for record in caplog.records) == ["made/8", "made/9"]
    assert "text_tokens do not fit a row's 160" in caplog.text
    resumed = iter(make_dataset(settings_, sources, TOKENIZER))
    resumed.set_state(json.loads(json.dumps(state)))
    assert sample_counts(resumed) == counts
    for _ in range(10):
        assert_equal(next(resumed), next(iterator))
    assert sample_counts(resumed) == sample_counts(iterator)
    assert sample_counts(iterator)["source0/bad"] > counts["source0/bad"]


def test_text_only() -> None:
    settings_ = config()
    settings_ = dataclasses.replace(settings_, model=dataclasses.replace(settings_.model, vision=None))
    source = MadeSource(((0, 0, 9), (0, 0, 20)))
    (batch,) = evaluation_batches(settings_, source, TOKENIZER)
    assert samples_of(batch) == [(0, 0), (0, 1)]
    assert not (batch.segment_ids[:, :48] > 0).any()
    assert jax.tree.map(np.shape, batch) == jax.tree.map(lambda x: x.shape, batch_spec(settings_).abstract())


def test_several_images_number_their_scales_on() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    sample = Sample("two", (Image.new("RGB", (32, 32)), buffer.getvalue()), (("<image> and <image>", "same"),))
    features = sample_features(sample, config(), TOKENIZER, source_id=3, sample_id=5)
    blocks = features["patch_blocks"]
    assert blocks[0] == 1
    assert set(np.diff(blocks)) == {0, 1}
    assert np.count_nonzero(features["visual_tokens"] == CONTEXT) * 4 == len(blocks)
    assert set(features["text_source_ids"]) == {3}
    assert set(features["text_sample_ids"]) == {5}


def test_mismatches_are_named() -> None:
    with pytest.raises(UserError, match=r"data\.sources"):
        make_dataset(config(2), [made(3)], TOKENIZER)
    with pytest.raises(UserError, match="no samples"):
        make_dataset(config(), [MadeSource(())], TOKENIZER)
    with pytest.raises(UserError, match="weight"):
        make_dataset(config(sources=(SourceConfig("a", 0.0),)), [made(3)], TOKENIZER)
    other = dataclasses.replace(config(), model=ModelConfig())
    with pytest.raises(UserError, match="special_token_ids"):
        make_dataset(other, [made(3)], TOKENIZER)
    small = dataclasses.replace(other.model, decoder=dataclasses.replace(other.model.decoder, vocab_size=100))
    with pytest.raises(UserError, match="vocab_size"):
        make_dataset(dataclasses.replace(other, model=small), [made(3)], TOKENIZER)
