"""Parity with the released code, in float32, of every intermediate of every model case."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER, IMAGE_CASES, TEXT_CASES, check, computed, load_case

from navil_jax.convert.params import tensors_from_params
from navil_jax.convert.reader import TensorFolder
from navil_jax.convert.verify.compare import (
    TOLERANCE,
    forward_pairs,
    gradient_pairs,
    loss_pairs,
    text_pairs,
    text_training_pairs,
)
from navil_jax.convert.verify.golden import build_batch, image_batch, in_order, sample_features, window_index
from navil_jax.model import params as model_params

LOSSES = ("plain", "plain_labels_all", "weighted_answer", "weighted_all", "weighted_all_labels_all")
GRADIENTS = ("plain", "weighted_all_labels_all")
TEXTS = ("text0", "text1", "long")
every_case = pytest.mark.parametrize("name", IMAGE_CASES)
every_computed_case = pytest.mark.parametrize("name", computed(IMAGE_CASES))


class TestImages:
    @every_case
    def test_window_order(self, name: str):
        np.testing.assert_array_equal(window_index(load_case(name)), load_case(name).arrays["vision.window_index"])

    @every_case
    def test_attention_limits(self, name: str):
        """The patches where the attention segment changes are the limits that the released layers used."""
        case, batch = load_case(name), image_batch(load_case(name))
        vision = model_params.bind(case.config, case.params).vision
        layout = vision.layout(jnp.asarray(batch.patch_coords), jnp.asarray(batch.patch_blocks))
        patches = len(case.arrays["inputs.pixel_u8"])
        for layer, windowed in enumerate(np.asarray(vision.windowed_layers())):
            segments = np.asarray((layout.windows if windowed else layout.scales).ids)[0, :patches]
            limits = [0, *(np.flatnonzero(np.diff(segments)) + 1), patches]
            np.testing.assert_array_equal(limits, case.arrays[f"vision.cu_seqlens_used_{layer}"])

    @every_case
    def test_visual_mask(self, name: str):
        case, batch = load_case(name), image_batch(load_case(name))
        is_visual = np.arange(batch.tokens.shape[1])[None] < batch.visual_slots
        np.testing.assert_array_equal(in_order(batch, is_visual), case.arrays["llm.visual_token_mask"][0])

    @every_computed_case
    def test_every_intermediate(self, name: str):
        check(forward_pairs(load_case(name)))

    @every_computed_case
    @pytest.mark.parametrize("variant", LOSSES)
    def test_loss(self, name: str, variant: str):
        check(loss_pairs(load_case(name), variant))

    @every_computed_case
    @pytest.mark.parametrize("variant", GRADIENTS)
    def test_gradients(self, name: str, variant: str):
        check(gradient_pairs(load_case(name), variant))


@pytest.mark.parametrize("name", TEXT_CASES)
class TestTexts:
    @pytest.mark.parametrize("text", TEXTS)
    def test_forward(self, name: str, text: str):
        check(text_pairs(load_case(name), text))

    def test_both_texts_packed_in_one_row_after_a_long_one(self, name: str):
        """Neither the neighbours in the row nor a long text before it move a text's logits."""
        case = load_case(name)
        texts = ("long", "text0", "text1")
        samples = [sample_features(case.config, case.arrays[f"{text}.input_ids"][0]) for text in texts]
        batch = build_batch(case.config, [samples])
        model = model_params.bind(case.config, case.params)
        logits = model.logits(model(batch)[0])
        for number, text in enumerate(texts):
            ours = in_order(batch, logits, segment=number + 1)
            np.testing.assert_allclose(ours, case.arrays[f"{text}.logits"][0], rtol=0, atol=TOLERANCE)

    def test_loss_and_gradients(self, name: str):
        check(text_training_pairs(load_case(name), "text1"))


@pytest.mark.parametrize("name", IMAGE_CASES + TEXT_CASES)
def test_tensors_survive_both_directions(name: str):
    """Checkpoint -> parameters -> checkpoint gives every tensor back, byte for byte."""
    case = load_case(name)
    original = TensorFolder(FOLDER / name)
    back = tensors_from_params(case.config, case.params)
    assert set(back) == set(original)
    for tensor, values in original.items():
        assert back[tensor].dtype == values.dtype
        np.testing.assert_array_equal(back[tensor], values)
