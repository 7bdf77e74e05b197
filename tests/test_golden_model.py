"""Parity with the released code, in float32, of every intermediate of every model case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import (
    FOLDER,
    PICTURE_CASES,
    TEXT_CASES,
    TOLERANCE,
    Case,
    build_batch,
    in_order,
    load_case,
    picture_batch,
    sample_features,
    to_slots,
)

from navil_jax.batch import Batch
from navil_jax.data.images import window_order
from navil_jax.model import params as model_params
from navil_jax.model import rope
from navil_jax.model.layers import scan_layers
from navil_jax.training.loss import feature_scale, token_scores, weighted_mean
from navil_jax.weights.convert import read_safetensors, tensors_from_params

IGNORED = -100


def assert_close(ours: jax.Array, golden: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == golden.shape
    np.testing.assert_allclose(ours, golden, rtol=0, atol=tolerance)


@functools.cache
def run(name: str) -> tuple[Batch, dict[str, np.ndarray]]:
    """Every intermediate of a picture case, in reading order."""
    case = load_case(name)
    batch = picture_batch(case)
    patches = len(case.arrays["inputs.pixel_u8"])
    units = patches // case.config.vision.unit_patches

    @jax.jit
    def compute(params, batch: Batch):
        model = model_params.bind(case.config, params)
        vision = model.vision
        embedded = vision.embed(batch.patches)
        layout = vision.layout(batch.patch_coords, batch.patch_blocks)

        def body(layer, x, windowed):
            x = layer(x, layout, windowed)
            return x, x

        last, vision_layers = scan_layers(vision.layers, body, embedded, vision.windowed_layers())
        features = vision(batch.patches, batch.patch_coords, batch.patch_blocks)
        x, (hidden, attention) = model(batch, keep=lambda x, outputs: (x, outputs.attention))
        return {
            "embedded": embedded,
            "vision_layers": vision_layers,
            "last": last,
            "features": features,
            "connected": model.connector(features),
            "angles": rope.vision_angles(case.config.vision, batch.patch_coords),
            "input_embeds": model.embed(batch),
            "hidden": hidden,
            "attention": attention,
            "final_norm": model.decoder.final_norm(x),
            "logits": model.logits(x),
        }

    out = compute(case.params, batch)
    result = {key: np.asarray(out[key])[0, :patches] for key in ("embedded", "angles", "last")}
    result |= {key: np.asarray(out[key])[0, :units] for key in ("features", "connected")}
    result["vision_layers"] = np.asarray(out["vision_layers"])[:, 0, :patches]
    result |= {key: in_order(batch, out[key]) for key in ("input_embeds", "final_norm", "logits")}
    result |= {key: np.stack([in_order(batch, x) for x in out[key]]) for key in ("hidden", "attention")}
    return batch, result


def window_index(case: Case) -> np.ndarray:
    """Order of the merged units of all scales."""
    vision, parts, start = case.config.vision, [], 0
    for rows, cols in case.grids:
        parts.append(start + window_order(rows // 2, cols // 2, vision.window_size // vision.merge_size))
        start += rows * cols // 4
    return np.concatenate(parts)


@pytest.mark.parametrize("name", PICTURE_CASES)
class TestPictures:
    def test_window_order(self, name: str):
        np.testing.assert_array_equal(window_index(load_case(name)), load_case(name).arrays["vision.window_index"])

    def test_patch_embedding(self, name: str):
        golden, ours = load_case(name).arrays, run(name)[1]
        assert_close(ours["embedded"], golden["vision.layer_input"])
        raster = np.empty_like(ours["embedded"]).reshape(-1, 4, ours["embedded"].shape[-1])
        raster[golden["vision.window_index"]] = ours["embedded"].reshape(raster.shape)
        assert_close(raster.reshape(ours["embedded"].shape), golden["vision.patch_embeds"])

    def test_rotary_angles(self, name: str):
        golden, ours = load_case(name).arrays, run(name)[1]
        assert_close(ours["angles"], golden["vision.rotary_windowed"])
        raster = np.empty_like(ours["angles"]).reshape(-1, 4, ours["angles"].shape[-1])
        raster[golden["vision.window_index"]] = ours["angles"].reshape(raster.shape)
        assert_close(raster.reshape(ours["angles"].shape), golden["vision.rotary_angles"])

    def test_attention_limits(self, name: str):
        """The patches where the attention segment changes are the limits that the released layers used."""
        case, (batch, _) = load_case(name), run(name)
        vision = model_params.bind(case.config, case.params).vision
        layout = vision.layout(jnp.asarray(batch.patch_coords), jnp.asarray(batch.patch_blocks))
        patches = len(case.arrays["inputs.pixel_u8"])
        for layer, windowed in enumerate(np.asarray(vision.windowed_layers())):
            segments = np.asarray(layout.windows if windowed else layout.blocks)[0, :patches]
            limits = [0, *(np.flatnonzero(np.diff(segments)) + 1), patches]
            np.testing.assert_array_equal(limits, case.arrays[f"vision.cu_seqlens_used_{layer}"])

    def test_vision_layers(self, name: str):
        golden, ours = load_case(name).arrays, run(name)[1]
        for layer, x in enumerate(ours["vision_layers"]):
            assert_close(x, golden[f"vision.layer_{layer}"])
        assert_close(ours["last"].reshape(golden["vision.last_hidden_state"].shape), golden["vision.last_hidden_state"])
        assert_close(ours["features"][:, None], golden["vision.pixel_shuffle"])

    def test_connector(self, name: str):
        assert_close(run(name)[1]["connected"][:, None], load_case(name).arrays["vision.mlp1"])

    def test_embeddings_and_visual_mask(self, name: str):
        case, (batch, ours) = load_case(name), run(name)
        assert_close(ours["input_embeds"], case.arrays["llm.input_embeds"][0])
        is_visual = np.arange(batch.tokens.shape[1])[None] < batch.visual_slots
        np.testing.assert_array_equal(in_order(batch, is_visual), case.arrays["llm.visual_token_mask"][0])

    def test_decoder_layers(self, name: str):
        golden, ours = load_case(name).arrays, run(name)[1]
        for layer in range(load_case(name).config.decoder.depth):
            assert_close(ours["attention"][layer], golden[f"llm.attn_out_{layer}"][0])
            assert_close(ours["hidden"][layer], golden[f"llm.layer_{layer}"][0])
        assert_close(ours["final_norm"], golden["llm.final_norm"][0])

    def test_logits(self, name: str):
        assert_close(run(name)[1]["logits"], load_case(name).arrays["logits"][0])

    def test_feature_scale(self, name: str):
        case, ours = load_case(name), run(name)[1]
        mask = case.arrays["llm.visual_token_mask"]
        last = jnp.asarray(ours["hidden"][-1])[None]
        for kind, chosen in (("image", mask), ("text", ~mask)):
            assert abs(float(feature_scale(last, jnp.asarray(chosen))) - case.info["feature_scale"][kind]) < 1e-4

    @pytest.mark.parametrize(
        "variant", ["plain", "plain_labels_all", "weighted_answer", "weighted_all", "weighted_all_labels_all"]
    )
    def test_loss(self, name: str, variant: str):
        case = load_case(name)
        loss, accuracy = jax.jit(functools.partial(loss_of, name, variant))(case.params)
        golden = case.info["loss"][variant]
        assert abs(float(loss) - golden["loss"]) < 2e-5
        assert abs(float(accuracy) - golden["text_acc1"]) < 1e-4

    @pytest.mark.parametrize("variant", ["plain", "weighted_all_labels_all"])
    def test_gradients(self, name: str, variant: str):
        case = load_case(name)
        gradients = jax.jit(jax.grad(lambda params: loss_of(name, variant, params)[0]))(case.params)
        check_gradients(case, gradients, case.info[f"grad_{variant}"])

    def test_text_only_sample_through_the_same_model(self, name: str):
        case = load_case(name)
        tokens = case.arrays["textonly.input_ids"][0]
        batch = build_batch(case.config, [[sample_features(case.config, tokens)]])
        model = model_params.bind(case.config, case.params)
        assert_close(in_order(batch, model.logits(model(batch)[0])), case.arrays["textonly.logits"][0])


def loss_of(name: str, variant: str, params) -> tuple[jax.Array, jax.Array]:
    """The released loss of a variant, and its text accuracy in percent.

    Unweighted, positions whose input is `<IMG_CONTEXT>` are left out; weighted, they count like all others, and the
    weights of positions without a label stay in the sum that divides.
    """
    case, batch = load_case(name), picture_batch(load_case(name))
    arrays = case.arrays
    tokens = arrays["inputs.input_ids"][0]
    labels_all = "labels_all" in variant
    labels = arrays["inputs.labels_all" if labels_all else "inputs.labels"][0]
    targets = np.append(labels[1:], IGNORED)
    has_target = targets != IGNORED
    if variant.startswith("plain"):
        weights = (has_target & (tokens != case.config.special_id("<IMG_CONTEXT>"))).astype(np.float32)
    else:
        weight = arrays["inputs.loss_weight_answer" if variant == "weighted_answer" else "inputs.loss_weight_all"][0]
        weights = np.append(weight[1:], 0).astype(np.float32)
    targets = to_slots(batch, np.where(has_target, targets, -1), -1)
    model = model_params.bind(case.config, params)
    x, _ = model(batch)
    scores = token_scores(model.logits, x, jnp.asarray(targets), case.config.decoder.vocab_size)
    loss = weighted_mean(scores.cross_entropy, to_slots(batch, weights, 0))
    counted = (targets >= 0) & (to_slots(batch, weights, 0) > 0 if variant.startswith("plain") else True)
    return loss, 100 * jnp.sum((scores.predictions == targets) & counted) / np.sum(counted)


def check_gradients(case: Case, gradients, golden: dict[str, list[float]]) -> None:
    """Norm and projection of every tensor's gradient in the checkpoint's layout."""
    tensors = dict(tensors_from_params(case.config, gradients))
    assert set(tensors) == set(golden)
    for tensor, (norm, projection) in golden.items():
        values = tensors[tensor].astype(np.float64).ravel()
        tolerance = 1e-4 * norm + 1e-6
        assert abs(np.linalg.norm(values) - norm) <= tolerance, tensor
        assert abs(values @ np.cos(0.37 * np.arange(values.size)) - projection) <= tolerance, tensor


@pytest.mark.parametrize("name", TEXT_CASES)
class TestTexts:
    @pytest.mark.parametrize("text", ["text0", "text1", "long"])
    def test_forward(self, name: str, text: str):
        case = load_case(name)
        tokens = case.arrays[f"{text}.input_ids"][0]
        batch = build_batch(case.config, [[sample_features(case.config, tokens)]])
        model = model_params.bind(case.config, case.params)
        x, hidden = model(batch, keep=lambda x, outputs: x)
        assert_close(in_order(batch, model.embed(batch)), case.arrays[f"{text}.input_embeds"][0])
        for layer, output in enumerate(hidden):
            assert_close(in_order(batch, output), case.arrays[f"{text}.layer_{layer}"][0])
        assert_close(in_order(batch, model.decoder.final_norm(x)), case.arrays[f"{text}.final_norm"][0])
        assert_close(in_order(batch, model.logits(x)), case.arrays[f"{text}.logits"][0])

    def test_both_texts_packed_in_one_row_after_a_long_one(self, name: str):
        """Neither the neighbours in the row nor a long text before it move a text's logits."""
        case = load_case(name)
        texts = ("long", "text0", "text1")
        samples = [sample_features(case.config, case.arrays[f"{text}.input_ids"][0]) for text in texts]
        batch = build_batch(case.config, [samples])
        model = model_params.bind(case.config, case.params)
        logits = model.logits(model(batch)[0])
        for number, text in enumerate(texts):
            assert_close(in_order(batch, logits, segment=number + 1), case.arrays[f"{text}.logits"][0])

    def test_loss_and_gradients(self, name: str):
        case = load_case(name)
        tokens = case.arrays["text1.input_ids"][0]
        batch = build_batch(case.config, [[sample_features(case.config, tokens)]])
        targets = jnp.asarray(to_slots(batch, np.append(tokens[1:], -1), -1))

        def loss_of_text(params):
            model = model_params.bind(case.config, params)
            scores = token_scores(model.logits, model(batch)[0], targets, case.config.decoder.vocab_size)
            return weighted_mean(scores.cross_entropy, targets >= 0)

        loss, gradients = jax.value_and_grad(loss_of_text)(case.params)
        assert abs(float(loss) - case.info["loss"]["text1"]) < 2e-5
        check_gradients(case, gradients, case.info["grad_text1"])


@pytest.mark.parametrize("name", PICTURE_CASES + TEXT_CASES)
def test_tensors_survive_both_directions(name: str):
    """Checkpoint -> parameters -> checkpoint gives every tensor back, byte for byte."""
    case = load_case(name)
    original = read_safetensors(FOLDER / name)
    back = dict(tensors_from_params(case.config, case.params))
    assert set(back) == set(original)
    for tensor, values in original.items():
        assert back[tensor].dtype == values.dtype
        np.testing.assert_array_equal(back[tensor], values)
