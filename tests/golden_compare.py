"""Our numbers beside the released ones, tensor by tensor; shared by the golden tests and benchmarks/parity.py."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import (
    PICTURE_CASES,
    TOLERANCE,
    Case,
    build_batch,
    in_order,
    load_case,
    patch_features,
    picture_batch,
    sample_features,
    to_slots,
)

from navil_jax.batch import Batch
from navil_jax.inference.engine import Engine
from navil_jax.inference.sampling import Sampler
from navil_jax.model import params as model_params
from navil_jax.model import rope
from navil_jax.model.layers import scan_layers
from navil_jax.model.params import Params
from navil_jax.training.loss import feature_scale, token_scores, weighted_mean
from navil_jax.weights.convert import tensors_from_params

# Group of tensors -> the largest difference allowed.
TOLERANCES = {
    "patch embeddings": TOLERANCE,
    "rotary angles": TOLERANCE,
    "vision layers": TOLERANCE,
    "connector": TOLERANCE,
    "merged embeddings": TOLERANCE,
    "attention outputs": TOLERANCE,
    "decoder layers": TOLERANCE,
    "final norm": TOLERANCE,
    "logits": TOLERANCE,
    "text-only logits": TOLERANCE,  # of a text through a model with vision
    "feature scale": 1e-4,
    "losses": 2e-5,
    "text accuracy": 1e-4,  # in percent
    "gradients": 1e-4,  # relative to norm + 0.01, which is 1e-4 of the norm plus 1e-6
    "generated tokens": 0.0,
    "generation logits": TOLERANCE,
}
TEXTS = ("text0", "text1", "long")
PICTURE_GENERATIONS, TEXT_GENERATIONS = ("gen", "gen_forced"), ("gen", "gen_cross", "gen_long")
LOSSES = ("plain", "plain_labels_all", "weighted_answer", "weighted_all", "weighted_all_labels_all")
GRADIENTS = ("plain", "weighted_all_labels_all")
IGNORED = -100
NO_STOP = -1


class Pair(NamedTuple):
    """One tensor or number as computed here and by the released code."""

    group: str
    tensor: str
    ours: Any
    golden: Any
    scale: float = 1.0  # what the difference is divided by

    @property
    def difference(self) -> float:
        """The largest absolute difference."""
        ours, golden = np.asarray(self.ours, np.float64), np.asarray(self.golden, np.float64)
        assert ours.shape == golden.shape, f"{self.tensor}: {ours.shape}, the released code has {golden.shape}"
        return float(np.abs(ours - golden).max()) / self.scale

    @property
    def within_tolerance(self) -> bool:
        """False for nan, too."""
        return self.difference <= TOLERANCES[self.group]


def check(pairs: list[Pair]) -> None:
    """Every difference is within the tolerance of its group; those that are not are named."""
    assert pairs
    assert {pair.tensor: pair.difference for pair in pairs if not pair.within_tolerance} == {}


def all_pairs(name: str) -> Iterator[Pair]:
    """Everything that is compared of a case."""
    if name in PICTURE_CASES:
        yield from forward_pairs(name)
        for variant in LOSSES:
            yield from loss_pairs(name, variant)
        for variant in GRADIENTS:
            yield from gradient_pairs(name, variant)
    else:
        for text in TEXTS:
            yield from text_pairs(name, text)
        yield from text_training_pairs(name)
    for key in PICTURE_GENERATIONS if name in PICTURE_CASES else TEXT_GENERATIONS:
        yield from generation_pairs(name, key)


@functools.cache
def forward_pairs(name: str) -> list[Pair]:
    """Every intermediate of a picture case."""
    case = load_case(name)
    golden, ours = case.arrays, _forward(case)
    groups = {
        "patch embeddings": ("vision.layer_input", "vision.patch_embeds"),
        "rotary angles": ("vision.rotary_windowed", "vision.rotary_angles"),
        "vision layers": (
            *(f"vision.layer_{layer}" for layer in range(case.config.vision.depth)),
            "vision.last_hidden_state",
            "vision.pixel_shuffle",
        ),
        "connector": ("vision.mlp1",),
        "merged embeddings": ("llm.input_embeds",),
        "attention outputs": tuple(f"llm.attn_out_{layer}" for layer in range(case.config.decoder.depth)),
        "decoder layers": tuple(f"llm.layer_{layer}" for layer in range(case.config.decoder.depth)),
        "final norm": ("llm.final_norm",),
        "logits": ("logits",),
        "text-only logits": ("textonly.logits",),
    }
    pairs = [Pair(group, tensor, ours[tensor], golden[tensor]) for group, names in groups.items() for tensor in names]
    mask = golden["llm.visual_token_mask"]
    last = jnp.asarray(ours[f"llm.layer_{case.config.decoder.depth - 1}"])
    for kind, chosen in (("image", mask), ("text", ~mask)):
        scale = feature_scale(last, jnp.asarray(chosen))
        pairs.append(Pair("feature scale", f"feature_scale.{kind}", scale, case.info["feature_scale"][kind]))
    return pairs


def _forward(case: Case) -> dict[str, np.ndarray]:
    """Ours by the name of the golden tensor, in its shape."""
    batch = picture_batch(case)
    patches = len(case.arrays["inputs.pixel_u8"])
    units = patches // case.config.vision.unit_patches
    out = jax.jit(functools.partial(_intermediates, case))(case.params, batch)
    embedded, angles = (np.asarray(out[key])[0, :patches] for key in ("embedded", "angles"))
    result = {
        "vision.layer_input": embedded,
        "vision.patch_embeds": _raster(case, embedded),
        "vision.rotary_windowed": angles,
        "vision.rotary_angles": _raster(case, angles),
        "vision.last_hidden_state": np.asarray(out["last"])[0, :patches].reshape(units, 2, 2, -1),
        "vision.pixel_shuffle": np.asarray(out["features"])[0, :units, None],
        "vision.mlp1": np.asarray(out["connected"])[0, :units, None],
        "llm.input_embeds": in_order(batch, out["input_embeds"])[None],
        "llm.final_norm": in_order(batch, out["final_norm"])[None],
        "logits": in_order(batch, out["logits"])[None],
        "textonly.logits": text_logits(case, case.arrays["textonly.input_ids"][0]),
    }
    result |= {f"vision.layer_{i}": np.asarray(x)[0, :patches] for i, x in enumerate(out["vision_layers"])}
    result |= {f"llm.attn_out_{i}": in_order(batch, x)[None] for i, x in enumerate(out["attention"])}
    return result | {f"llm.layer_{i}": in_order(batch, x)[None] for i, x in enumerate(out["hidden"])}


def _intermediates(case: Case, params: Params, batch: Batch) -> dict[str, jax.Array]:
    model = model_params.bind(case.config, params)
    vision = model.vision
    embedded = vision.embed(batch.patches)
    layout = vision.layout(batch.patch_coords, batch.patch_blocks)

    def body(layer, x: jax.Array, windowed: jax.Array) -> tuple[jax.Array, jax.Array]:
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


def _raster(case: Case, x: np.ndarray) -> np.ndarray:
    """Values of patches in window order -> in raster order."""
    units = x.reshape(-1, 4, x.shape[-1])
    result = np.empty_like(units)
    result[case.arrays["vision.window_index"]] = units
    return result.reshape(x.shape)


def text_logits(case: Case, tokens: np.ndarray) -> np.ndarray:
    """[1, n, vocab] of one text."""
    batch = build_batch(case.config, [[sample_features(case.config, tokens)]])
    model = model_params.bind(case.config, case.params)
    return in_order(batch, model.logits(model(batch)[0]))[None]


@functools.cache
def _training_program(name: str) -> Callable:
    """(targets, weights, counted), each [B, L] -> (loss, accuracy in percent), gradients."""
    case = load_case(name)
    batch = picture_batch(case)

    def loss(params: Params, targets: jax.Array, weights: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = model_params.bind(case.config, params)
        scores = token_scores(model.logits, model(batch)[0], targets, case.config.decoder.vocab_size)
        right = jnp.sum((scores.predictions == targets) & counted)
        return weighted_mean(scores.cross_entropy, weights), 100 * right / jnp.sum(counted)

    return functools.partial(jax.jit(jax.value_and_grad(loss, has_aux=True)), case.params)


@functools.cache
def train(name: str, variant: str) -> tuple[tuple[jax.Array, jax.Array], Params]:
    """The released loss of a variant of a picture case with its text accuracy in percent, and the gradients.

    Unweighted, positions whose input is `<IMG_CONTEXT>` are left out; weighted, they count like all others, and the
    weights of positions without a label stay in the sum that divides.
    """
    case, batch = load_case(name), picture_batch(load_case(name))
    arrays = case.arrays
    tokens = arrays["inputs.input_ids"][0]
    labels = arrays["inputs.labels_all" if "labels_all" in variant else "inputs.labels"][0]
    targets = np.append(labels[1:], IGNORED)
    has_target = targets != IGNORED
    if variant.startswith("plain"):
        counted = has_target & (tokens != case.config.special_id("<IMG_CONTEXT>"))
        weights = counted.astype(np.float32)
    else:
        counted = has_target
        weight = arrays["inputs.loss_weight_answer" if variant == "weighted_answer" else "inputs.loss_weight_all"][0]
        weights = np.append(weight[1:], 0).astype(np.float32)
    targets = to_slots(batch, np.where(has_target, targets, -1), -1)
    return _training_program(name)(targets, to_slots(batch, weights, 0), to_slots(batch, counted, False))


def loss_pairs(name: str, variant: str) -> list[Pair]:
    golden = load_case(name).info["loss"][variant]
    (loss, accuracy), _ = train(name, variant)
    return [
        Pair("losses", variant, loss, golden["loss"]),
        Pair("text accuracy", variant, accuracy, golden["text_acc1"]),
    ]


def gradient_pairs(name: str, variant: str) -> list[Pair]:
    case = load_case(name)
    return _compare_gradients(case, train(name, variant)[1], case.info[f"grad_{variant}"])


def _compare_gradients(case: Case, gradients: Params, golden: dict[str, list[float]]) -> list[Pair]:
    """Norm and projection of every tensor's gradient in the checkpoint's layout."""
    tensors = dict(tensors_from_params(case.config, gradients))
    assert set(tensors) == set(golden)
    pairs = []
    for tensor, (norm, projection) in golden.items():
        values = tensors[tensor].astype(np.float64).ravel()
        ours = (np.linalg.norm(values), values @ np.cos(0.37 * np.arange(values.size)))
        pairs.append(Pair("gradients", tensor, ours, (norm, projection), scale=norm + 0.01))
    return pairs


def text_pairs(name: str, text: str) -> list[Pair]:
    """Every intermediate of one text of a text case."""
    case = load_case(name)
    batch = build_batch(case.config, [[sample_features(case.config, case.arrays[f"{text}.input_ids"][0])]])

    def run(params: Params, batch: Batch) -> tuple[jax.Array, ...]:
        model = model_params.bind(case.config, params)
        x, hidden = model(batch, keep=lambda x, outputs: x)
        return model.embed(batch), hidden, model.decoder.final_norm(x), model.logits(x)

    embeds, hidden, final_norm, logits = jax.jit(run)(case.params, batch)
    tensors = [("merged embeddings", "input_embeds", embeds)]
    tensors += [("decoder layers", f"layer_{layer}", x) for layer, x in enumerate(hidden)]
    tensors += [("final norm", "final_norm", final_norm), ("logits", "logits", logits)]
    return [
        Pair(group, f"{text}.{tensor}", in_order(batch, x)[None], case.arrays[f"{text}.{tensor}"])
        for group, tensor, x in tensors
    ]


def text_training_pairs(name: str) -> list[Pair]:
    """Loss and gradients of the second text of a text case."""
    case = load_case(name)
    tokens = case.arrays["text1.input_ids"][0]
    batch = build_batch(case.config, [[sample_features(case.config, tokens)]])
    targets = jnp.asarray(to_slots(batch, np.append(tokens[1:], -1), -1))

    def loss_of_text(params: Params) -> jax.Array:
        model = model_params.bind(case.config, params)
        scores = token_scores(model.logits, model(batch)[0], targets, case.config.decoder.vocab_size)
        return weighted_mean(scores.cross_entropy, targets >= 0)

    loss, gradients = jax.jit(jax.value_and_grad(loss_of_text))(case.params)
    pairs = _compare_gradients(case, gradients, case.info["grad_text1"])
    return [Pair("losses", "text1", loss, case.info["loss"]["text1"]), *pairs]


@functools.cache
def engine(name: str) -> Engine:
    case = load_case(name)
    return Engine(case.config, case.params)


def picture_prompt(case: Case) -> dict[str, np.ndarray]:
    return sample_features(case.config, case.arrays["gen.input_ids"][0], patch_features(case))


class Recorder:
    """Chooses the likeliest tokens, or those dictated, and keeps the logits of each step."""

    def __init__(self, dictated: list[int] | None = None):
        self.dictated, self.logits = dictated, []

    def __call__(self, logits: jax.Array, step: int) -> jax.Array:
        self.logits.append(np.asarray(logits[0]))
        if self.dictated is None:
            return Sampler()(logits, step)
        return np.full(len(logits), self.dictated[step], np.int32)


def generation_pairs(name: str, key: str) -> list[Pair]:
    """Tokens and step logits of one golden generation; those of gen_forced are dictated."""
    case = load_case(name)
    golden = case.arrays
    if name in PICTURE_CASES:
        prompt = picture_prompt(case)
    else:
        prompt = sample_features(case.config, golden[f"{key}.input_ids"][0])
    recorder = Recorder(golden[f"{key}.tokens"][0].tolist() if key == "gen_forced" else None)
    tokens = engine(name).generate([prompt], recorder, golden[f"{key}.tokens"].shape[1], NO_STOP)
    return [
        Pair("generated tokens", f"{key}.tokens", tokens, golden[f"{key}.tokens"]),
        Pair("generation logits", f"{key}.logits", np.stack(recorder.logits)[None], golden[f"{key}.logits"]),
    ]
