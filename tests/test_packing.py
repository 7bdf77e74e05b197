"""Rows are within their budgets, full, and hold every sample once; packing changes nothing that the model computes."""

import dataclasses
import functools
import json
import re
from collections import Counter
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import summed_loss, tiny_model, tiny_params

from benchmarks.packing import main as packing_benchmark
from navil_jax.batch import BatchSpec, fake_sample
from navil_jax.config import Config, DataConfig, ImageConfig, ModelConfig, SourceConfig
from navil_jax.convert.verify.golden import in_order
from navil_jax.data.features import FeatureSource, Skipped, TooLong, Usable, fitting_features, sample_features
from navil_jax.data.packing import MAX_WAITING, PackedRows, advise_slots, best_fill, choose_row, sizes_of
from navil_jax.data.pipeline import evaluation_batches, make_dataset
from navil_jax.data.prompt import encode_conversation, image_tokens
from navil_jax.data.quarantine import Quarantine, SampleWatch
from navil_jax.data.sample import Sample
from navil_jax.data.streams import sample_counts
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.errors import UserError

TOKENIZER = load_tokenizer(Path(__file__).parent / "golden" / "prompts" / "tokenizer")
SPEC = BatchSpec(rows=1, visual_slots=20, text_slots=30, patch_slots=64)
BUDGETS = np.array([20, 30, 64])
sizes_strategy = st.tuples(st.integers(0, 20), st.integers(1, 30), st.integers(0, 64))


@settings(max_examples=200, deadline=None)
@given(st.lists(sizes_strategy, min_size=1, max_size=30))
def test_a_row_is_within_its_budgets_and_nothing_else_fits(sizes: list[tuple[int, int, int]]) -> None:
    array = np.array(sizes)
    row = choose_row(array, BUDGETS)
    assert row[0] == 0
    assert len(set(row)) == len(row)
    left = BUDGETS - array[row].sum(axis=0)
    assert np.all(left >= 0)
    others = np.delete(array, row, axis=0)
    assert not np.any(np.all(others <= left, axis=1))


def test_documented_choice() -> None:
    sizes = np.array([(2, 5, 8), (3, 3, 12), (1, 1, 4), (1, 4, 4)])
    assert choose_row(sizes, np.array([4, 10, 16])) == [0, 3, 2]


def test_a_second_sample_that_fills_the_row_is_found() -> None:
    """The best fitting one, 60 of the 64 patches that are left, would leave the row at 94%."""
    sizes = np.array([(1, 1, 0), (1, 1, 60), (1, 1, 32), (1, 1, 32)])
    assert sorted(choose_row(sizes, BUDGETS)) == [0, 2, 3]


def made(size: tuple[int, int, int], number: int) -> Usable:
    visual, text, patches = size
    features = {name: np.zeros(visual, np.int32) for name in ("visual_tokens", "visual_positions")}
    features |= {name: np.zeros(text, np.int32) for name in SPEC.budgets if name.startswith("text_")}
    features |= {"text_sample_ids": np.full(text, number, np.int32), "patches": np.zeros((patches, 768), np.uint8)}
    return Usable("made", features)


def numbers(row: list) -> list[int]:
    return [int(sample["text_sample_ids"][0]) for sample in row]


def packed(samples: list[Usable | Skipped], bins: int = 2, threads: int = 0, spec: BatchSpec = SPEC) -> PackedRows:
    return PackedRows(grain.MapDataset.source(samples), spec, bins, threads, SampleWatch(Quarantine()))


@settings(max_examples=60, deadline=None)
@given(st.lists(sizes_strategy, max_size=40), st.integers(1, 5), st.sampled_from([0, 2]), st.integers(0, 20))
def test_every_sample_comes_once_and_none_waits_for_a_later_one(
    sizes: list[tuple[int, int, int]], bins: int, threads: int, cut: int
) -> None:
    samples = [made(size, number) for number, size in enumerate(sizes)]
    dataset = packed(samples, bins, threads)
    iterator = iter(dataset)
    rows, states = [], []
    for row in iterator:
        rows.append(numbers(row))
        states.append(json.loads(json.dumps(iterator.get_state())))
    came = [number for row in rows for number in row]
    assert sorted(came) == list(range(len(sizes)))
    for place, row in enumerate(rows):
        assert row[0] == min(number for later in rows[place:] for number in later)
    if rows:
        cut = min(cut, len(rows) - 1)
        resumed = iter(dataset)
        resumed.set_state(states[cut])
        assert resumed.get_state() == states[cut]
        assert [numbers(row) for row in resumed] == rows[cut + 1 :]


def test_places_of_all_waiting_samples_stay_small() -> None:
    """A row of one sample, of which very many would have to wait."""
    samples = [made((1, 1, 0), 0)] * 3
    spec = BatchSpec(rows=1, visual_slots=1, text_slots=9, patch_slots=8)
    endless = grain.MapDataset.source(samples).repeat()
    iterator = iter(PackedRows(endless, spec, 100_000, 0, SampleWatch(Quarantine())))
    iterator.set_state({"reader": {"next_index": 10**12}, "waiting": [], "counts": {}})
    assert len(next(iterator)) == 1
    state = iterator.get_state()
    assert len(state["waiting"]) == MAX_WAITING - 1
    assert len(json.dumps(state, indent=4)) < 300_000


def test_a_waiting_sample_that_became_bad_is_left_out_on_resume() -> None:
    samples: list = [made((1, 9, 4), number) for number in range(12)]
    first = iter(packed(samples))
    next(first)
    state = first.get_state()
    lost = state["waiting"][1]
    samples[lost] = Skipped("made", 12, lost, "made/x", "gone")
    resumed = iter(packed(samples))
    resumed.set_state(state)
    came = [number for row in resumed for number in numbers(row)]
    expected = [number for row in first for number in numbers(row) if number != lost]
    assert sorted(came) == sorted(expected)


def test_slots_for_a_mixture() -> None:
    sizes = np.array([[500, 100, 2000]] * 99 + [[500, 4000, 2000]])
    assert advise_slots(sizes[:99], 24_576) == (6144, 1280, 24_576)
    assert advise_slots(sizes, 24_576).text_slots == 4096
    assert advise_slots(sizes, 24_576, keep=0.98).text_slots == 1792
    np.testing.assert_allclose(best_fill(sizes[:99], np.array([8192, 8192, 24_576])), [0.75, 0.15, 1.0])


MODEL = tiny_model()
ROOM = BatchSpec(rows=6, visual_slots=48, text_slots=64, patch_slots=160)


@functools.cache
def step():
    return summed_loss("internlm2"), tiny_params("internlm2")


@pytest.mark.slow
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20), with_image=st.lists(st.booleans(), min_size=2, max_size=6))
def test_packed_rows_compute_what_their_samples_compute_alone(seed: int, with_image: list[bool]) -> None:
    """Logits of every token, the loss and all gradients, for random mixtures of text and images."""
    rng = np.random.default_rng(seed)
    samples = [fake_sample(rng, MODEL, with_image=flag) for flag in with_image]
    budgets = np.array([ROOM.visual_slots, ROOM.text_slots, ROOM.patch_slots])
    waiting, rows = list(range(len(samples))), []
    while waiting:
        chosen = choose_row(np.array([sizes_of(samples[i]) for i in waiting]), budgets)
        rows.append([waiting[i] for i in chosen])
        waiting = [place for place in waiting if place not in rows[-1]]
    context = MODEL.special_id("<IMG_CONTEXT>")
    together = ROOM.build([[samples[i] for i in row] for row in rows], context)
    alone = ROOM.build([[sample] for sample in samples], context)
    loss_of, params = step()
    (loss, logits), gradients = loss_of(params, together)
    (loss_alone, logits_alone), gradients_alone = loss_of(params, alone)
    for place, row in enumerate(rows):
        for segment, number in enumerate(row, 1):
            ours = in_order(together, logits, row=place, segment=segment)
            np.testing.assert_allclose(ours, in_order(alone, logits_alone, row=number), atol=1e-4)
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-3), gradients, gradients_alone)


@dataclasses.dataclass(frozen=True)
class Images:
    """One sample per list of (width, height), with an answer of so many letters."""

    entries: tuple[tuple[tuple[tuple[int, int], ...], int], ...]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        sizes, letters = self.entries[index]
        return Sample(f"p/{index}", tuple(Image.new("RGB", size) for size in sizes), (("q", "a" * letters),))

    def texts(self) -> list[str]:
        return []


def config(**changes: object) -> Config:
    data = DataConfig((SourceConfig("images"),), rows=1, visual_slots=48, text_slots=160, patch_slots=160)
    return Config(
        model=ModelConfig(special_token_ids=TOKENIZER.special_token_ids),
        images=ImageConfig(min_patches=4, max_patches=400),
        data=dataclasses.replace(data, packing_lookahead=2, system_message="S", **changes),
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(8, 700), st.integers(8, 700)), min_size=1, max_size=3), st.booleans())
def test_images_shrink_as_little_as_the_row_asks(sizes: list[tuple[int, int]], multiscale: bool) -> None:
    changed = config(oversize="resize")
    changed = dataclasses.replace(changed, images=dataclasses.replace(changed.images, multiscale=multiscale))
    budgets = {"visual_tokens": 48, "text_tokens": 160, "patches": 160}
    sample = Images(((tuple(sizes), 5),))[0]
    whole = sample_features(sample, changed, TOKENIZER)
    features, resized = fitting_features(sample, changed, TOKENIZER, budgets)
    fitted = all(len(whole[name]) <= budget for name, budget in budgets.items())
    assert resized != fitted
    assert all(len(features[name]) <= budget for name, budget in budgets.items())
    assert 4 * np.count_nonzero(features["visual_tokens"] == TOKENIZER.token_id("<IMG_CONTEXT>")) == len(
        features["patches"]
    )
    words = lambda f: Counter(f["text_tokens"].tolist())  # noqa: E731
    breaks = {TOKENIZER.token_id("<IMG_LINE_BREAK>"), TOKENIZER.token_id("<IMG_FRAME_BREAK>")}
    lost = words(whole) - words(features)
    assert set(lost) <= breaks
    if len(sizes) == 1 and not multiscale and resized:
        assert len(features["patches"]) > 0.6 * 160


def test_image_tokens_are_those_that_the_prompt_holds() -> None:
    for width, height in ((64, 32), (300, 200)):
        cost = image_tokens(width, height, config())
        parts = [
            encode_conversation(TOKENIZER, "qwen3-chat", "", [("q", "a")], grids, "token")
            for grids in ([cost.grids], [])
        ]
        found = [len(parts[0][f"{kind}_tokens"]) - len(parts[1][f"{kind}_tokens"]) for kind in ("visual", "text")]
        newline = len(TOKENIZER.encode("user\n\nq", allow_special=False)) - len(
            TOKENIZER.encode("user\nq", allow_special=False)
        )
        assert found[1] == pytest.approx(cost.text_tokens, abs=abs(newline) + 2)
        assert found[0] == cost.visual_tokens


LONG = Images(((((64, 64),), 5), (((640, 640),), 5), (((64, 64),), 900)))


def counts_after(settings_: Config, batches: int) -> tuple[dict[str, int], set[int]]:
    iterator = iter(make_dataset(settings_, [LONG], TOKENIZER))
    seen: set[int] = set()
    for _ in range(batches):
        batch = next(iterator)
        seen |= set(batch.sample_ids[batch.segment_ids > 0].tolist())
    return sample_counts(iterator), seen


def test_over_long_samples_are_dropped_shrunk_or_refused() -> None:
    counts, seen = counts_after(config(), 6)
    assert seen == {0}
    assert set(counts) == {"images/good", "images/too_long"}
    counts, seen = counts_after(config(oversize="resize"), 6)
    assert seen == {0, 1}
    assert set(counts) == {"images/good", "images/resized", "images/too_long"}  # text is never cut
    with pytest.raises(UserError, match=r"p/[12] of images: .* do not fit a row's 160.*config\.data\.oversize"):
        counts_after(config(oversize="error"), 6)


def test_what_fits_no_row_is_named() -> None:
    budgets = {"visual_tokens": 48, "text_tokens": 160, "patches": 160}
    with pytest.raises(TooLong, match=r"patches|visual_tokens"):
        fitting_features(LONG[1], config(), TOKENIZER, budgets)
    source = FeatureSource(LONG, "images", 0, config(), TOKENIZER, budgets)
    assert [isinstance(source[i], Usable) for i in range(3)] == [True, False, False]
    assert source[2].too_long
    (batch,) = evaluation_batches(config(oversize="resize"), Images(LONG.entries[:2]), TOKENIZER)
    assert set(batch.sample_ids[batch.segment_ids > 0].tolist()) == {0, 1}


@pytest.mark.slow
def test_the_scarcest_slots_of_made_mixtures_are_full(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of 24,576 patches: at least 97% of what no packer can exceed, and more than Grain's packers reach."""
    assert packing_benchmark(["--samples", "600", "--bins", "16"]) == 0
    shares = re.findall(r"(here|more than|first-fit|best-fit).*?((?: +[\d.]+%){4})", capsys.readouterr().out)
    found = [(name, np.array([float(number) for number in re.findall(r"[\d.]+", text)])) for name, text in shares]
    assert len(found) == 24
    for start in range(0, len(found), 4):
        (_, here), (_, limit), *others = found[start : start + 4]
        scarce = int(np.argmax(limit[:3]))
        assert limit[scarce] == 100.0
        assert here[scarce] >= 97.0
        assert all(here[scarce] > other[scarce] for _, other in others)
