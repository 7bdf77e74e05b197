"""The batch contract: layout, validation, and one spec for real, fake and abstract arrays."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SPECIAL_IDS, tiny_model

from navil_jax.batch import Batch, BatchSpec, validate

CONTEXT, IMG = SPECIAL_IDS[2], SPECIAL_IDS[4]
SPEC = BatchSpec(rows=2, visual_slots=24, text_slots=40, patch_slots=64)


def example_batch() -> Batch:
    """The example of the module's docstring: V = 4, T = 6, two samples in a row."""
    first = {
        "visual_tokens": [IMG, CONTEXT, CONTEXT],
        "visual_positions": [1, 2, 3],
        "text_tokens": [1, SPECIAL_IDS[3], 7],
        "text_positions": [0, 4, 5],
        "text_targets": [IMG, 7, -1],
        "text_weights": [0, 1, 0],
        "text_source_ids": [2] * 3,
        "text_sample_ids": [9] * 3,
        "patches": np.ones((8, 768)),
        "patch_coords": np.zeros((8, 2)),
        "patch_blocks": [1] * 4 + [2] * 4,
    }
    second = {key: np.zeros((0, *np.shape(value)[1:])) for key, value in first.items()}
    second |= {"text_tokens": [1, 8], "text_positions": [0, 1], "text_targets": [8, -1], "text_weights": [1, 0]}
    second |= {"text_source_ids": [0] * 2, "text_sample_ids": [4] * 2}
    return BatchSpec(rows=1, visual_slots=4, text_slots=6, patch_slots=12).build([[first, second]], CONTEXT)


def test_layout_of_the_documented_example():
    batch = example_batch()
    np.testing.assert_array_equal(batch.tokens[0], [IMG, CONTEXT, CONTEXT, 0, 1, SPECIAL_IDS[3], 7, 1, 8, 0])
    np.testing.assert_array_equal(batch.segment_ids[0], [1, 1, 1, 0, 1, 1, 1, 2, 2, 0])
    np.testing.assert_array_equal(batch.positions[0], [1, 2, 3, 0, 0, 4, 5, 0, 1, 0])
    np.testing.assert_array_equal(batch.reading_order[0], [4, 0, 1, 2, 5, 6, 7, 8, 3, 9])
    np.testing.assert_array_equal(batch.targets[0], [-1, -1, -1, -1, IMG, 7, -1, 8, -1, -1])
    np.testing.assert_array_equal(batch.loss_weights[0], [0, 0, 0, 0, 0, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(batch.source_ids[0], [2, 2, 2, 0, 2, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(batch.sample_ids[0], [9, 9, 9, 0, 9, 9, 9, 4, 4, 0])
    np.testing.assert_array_equal(batch.patch_blocks[0], [1] * 4 + [2] * 4 + [0] * 4)
    np.testing.assert_array_equal(batch.unit_slots[0], [1, 2, 10])
    validate(batch, tiny_model())


def test_fake_and_abstract_batches_have_the_same_form():
    fake, abstract = SPEC.fake(tiny_model()), SPEC.abstract()
    assert jax.tree.structure(fake) == jax.tree.structure(abstract)
    for ours, shape in zip(jax.tree.leaves(fake), jax.tree.leaves(abstract), strict=True):
        assert (ours.shape, ours.dtype) == (shape.shape, shape.dtype)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), visual=st.integers(1, 40), text=st.integers(20, 60), units=st.integers(1, 30))
def test_fake_batches_are_valid(seed: int, visual: int, text: int, units: int):
    spec = BatchSpec(rows=2, visual_slots=visual, text_slots=text, patch_slots=4 * units)
    batch = spec.fake(tiny_model(), seed)
    validate(batch, tiny_model())
    assert np.any(batch.segment_ids > 0)


@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("tokens", (0, 0), 5, "a text token in a visual slot"),
        ("tokens", (0, 4), IMG, "a visual token in a text slot"),
        ("tokens", (0, 4), 400, "outside the vocabulary"),
        ("reading_order", (0, 0), 5, "not a permutation"),
        ("positions", (0, 5), 3, "not 0, 1, 2"),
        ("loss_weights", (0, 1), 1, "a visual slot has a weight"),
        ("loss_weights", (0, 6), 1, "a weight without a target"),
        ("loss_weights", (0, 5), -1, "negative"),
        ("unit_slots", (0, 0), 2, "not the <IMG_CONTEXT> slots"),
        ("unit_slots", (0, 2), 3, "an empty unit fills a slot"),
        ("patch_blocks", (0, 3), 2, "two blocks"),
    ],
)
def test_validation_names_the_field(field: str, place: tuple[int, int], value: float, message: str):
    batch = example_batch()
    array = np.array(getattr(batch, field))
    array[place] = value
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(batch, **{field: array}), tiny_model())


def test_validation_names_a_wrong_dtype():
    batch = example_batch()
    with pytest.raises(ValueError, match=r"patches: float32\[1, 12, 768\], expected uint8"):
        validate(dataclasses.replace(batch, patches=batch.patches.astype(np.float32)), tiny_model())


def test_a_scale_larger_than_said_is_refused():
    """Attention would leave out blocks of it."""
    batch = SPEC.fake(tiny_model())
    with pytest.raises(ValueError, match=r"patch_blocks, row 0: a scale of .* patches, block_patches allows 3"):
        validate(dataclasses.replace(batch, block_patches=3), tiny_model())


def test_without_visual_slots_only_the_reading_order_is_taken():
    """Attention then moves nothing."""
    batch = BatchSpec(rows=1, visual_slots=0, text_slots=30, patch_slots=4).fake(tiny_model())
    validate(batch, tiny_model())
    names = ("tokens", "targets", "loss_weights", "positions", "segment_ids", "source_ids", "sample_ids")
    turned = {name: getattr(batch, name)[:, ::-1] for name in names}
    turned["reading_order"] = np.ascontiguousarray(29 - batch.reading_order)
    with pytest.raises(ValueError, match="reading_order, row 0: without visual slots the slots stand in reading order"):
        validate(dataclasses.replace(batch, **turned), tiny_model())


def test_too_much_for_a_row_is_refused():
    sample = {key: np.asarray(value) for key, value in zip(SPEC.budgets, [np.zeros(99)] * 11, strict=True)}
    sample |= {"patches": np.zeros((0, 768)), "patch_coords": np.zeros((0, 2)), "patch_blocks": np.zeros(0)}
    with pytest.raises(ValueError, match="visual_tokens: 99 do not fit the row's 24"):
        SPEC.build([[sample]], CONTEXT)


def test_images_and_context_tokens_must_agree():
    batch_spec = BatchSpec(rows=1, visual_slots=4, text_slots=6, patch_slots=12)
    sample = dict(BatchSpec(1, 24, 40, 64).budgets)
    sample = {key: np.zeros(1) for key in sample} | {
        "patches": np.zeros((4, 768)),
        "patch_coords": np.zeros((4, 2)),
        "patch_blocks": np.ones(4),
    }
    with pytest.raises(ValueError, match="0 <IMG_CONTEXT> tokens for 1 merged units"):
        batch_spec.build([[sample]], CONTEXT)
