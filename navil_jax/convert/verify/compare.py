"""A model's numbers beside those of a golden folder, tensor by tensor, and how far apart they may lie."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from navil_jax.batch import Batch
from navil_jax.convert.params import tensors_from_params
from navil_jax.convert.verify.golden import Case, image_batch, in_rows, text_batch, to_slots, window_index
from navil_jax.errors import UserError
from navil_jax.generate.programs import Programs
from navil_jax.model import params as model_params
from navil_jax.model import rope
from navil_jax.model.layers import scan_layers
from navil_jax.model.params import Params
from navil_jax.train.loss import feature_scale, token_scores, weighted_mean

TOLERANCE = 1e-4
# Group of tensors -> the largest difference allowed in float32.
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
LOGITS = ("logits", "text-only logits", "generation logits")
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
        """The largest absolute difference; nan if a number is nan. Raises `UserError` for another shape."""
        ours, golden = np.asarray(self.ours, np.float64), np.asarray(self.golden, np.float64)
        if ours.shape != golden.shape:
            raise UserError(f"{self.tensor}: golden has shape {list(golden.shape)}, the model gives {list(ours.shape)}")
        return float(np.abs(ours - golden).max()) / self.scale

    @property
    def within_tolerance(self) -> bool:
        """False for nan, too."""
        return self.difference <= TOLERANCES[self.group]


class Group(NamedTuple):
    """What is said of the pairs of one group."""

    difference: float  # the largest one, nan if one is
    tensors: int
    worst: str  # the tensor of the largest difference
    within: bool


def all_pairs(case: Case, follow: bool = False) -> Iterator[Pair]:
    """Everything that a golden folder holds and that can be computed here; `follow` as in `generation_pairs`."""
    if case.has_images:
        yield from forward_pairs(case)
        for variant in losses(case):
            yield from loss_pairs(case, variant)
        for variant in gradients(case):
            yield from gradient_pairs(case, variant)
    else:
        for text in case.texts:
            yield from text_pairs(case, text)
        for text in gradients(case):
            yield from text_training_pairs(case, text)
    for name in case.generations:
        yield from generation_pairs(case, name, follow)


def by_group(
    pairs: Iterable[Pair], within: Callable[[Pair], bool] = lambda pair: pair.within_tolerance
) -> dict[str, Group]:
    """Group -> `Group`, in the order of TOLERANCES. `within` says whether a pair is good."""
    members = defaultdict(list)
    for pair in pairs:
        members[pair.group].append((pair.difference, pair.tensor, within(pair)))
    result: dict[str, Group] = {}
    for group in TOLERANCES:
        if found := members.get(group):
            difference, worst, _ = max(found, key=lambda entry: np.nan_to_num(entry[0], nan=np.inf))
            result[group] = Group(difference, len(found), worst, all(good for _, _, good in found))
    return result


def losses(case: Case) -> list[str]:
    """Variants of the loss of a case with images."""
    return list(case.info.get("loss", {}))


def gradients(case: Case) -> list[str]:
    """Variants of the loss, or texts of a case without images, whose gradients are known."""
    return [name for name in losses(case) if f"grad_{name}" in case.info]


@functools.cache
def forward_pairs(case: Case) -> list[Pair]:
    """Every intermediate of a case with images that its folder holds."""
    golden, ours = case.arrays, _forward(case)
    layers = range(case.config.decoder.depth)
    groups = {
        "patch embeddings": ("vision.layer_input", "vision.patch_embeds"),
        "rotary angles": ("vision.rotary_windowed", "vision.rotary_angles"),
        "vision layers": (
            *(f"vision.layer_{layer}" for layer in range(case.config.encoder.depth)),
            "vision.last_hidden_state",
            "vision.pixel_shuffle",
        ),
        "connector": ("vision.mlp1",),
        "merged embeddings": ("llm.input_embeds",),
        "attention outputs": tuple(f"llm.attn_out_{layer}" for layer in layers),
        "decoder layers": tuple(f"llm.layer_{layer}" for layer in layers),
        "final norm": ("llm.final_norm",),
        "logits": ("logits",),
        "text-only logits": tuple(f"{text}.logits" for text in case.texts),
    }
    pairs = [
        Pair(group, tensor, ours[tensor], golden[tensor])
        for group, names in groups.items()
        for tensor in names
        if tensor in golden
    ]
    last = jnp.asarray(ours[f"llm.layer_{layers[-1]}"])
    visual = np.isin(golden["inputs.input_ids"], case.config.visual_token_ids)
    for kind, chosen in (("image", visual), ("text", ~visual)):
        if kind in case.info.get("feature_scale", {}):
            scale = feature_scale(last, jnp.asarray(chosen))
            pairs.append(Pair("feature scale", f"feature_scale.{kind}", scale, case.info["feature_scale"][kind]))
    return pairs


def _forward(case: Case) -> dict[str, np.ndarray]:
    """Ours by the name of the golden tensor, in its shape."""
    batch, side = image_batch(case), case.config.encoder.merge_size
    real, golden = case.real("inputs"), case.arrays
    out = jax.jit(functools.partial(_intermediates, case))(case.params, batch)
    patches = [len(sample["patches"]) for sample in case.samples("inputs", images=True)]

    def of_patches(x: jax.Array, each: int = 1) -> np.ndarray:
        """[B, slots, ...] -> those of all rows, of units of `each` patches."""
        return np.concatenate([np.asarray(x)[row, : count // each] for row, count in enumerate(patches)])

    def of_tokens(name: str, x: jax.Array) -> np.ndarray:
        return in_rows(batch, x, real, golden.get(name))

    embedded, angles = of_patches(out["embedded"]), of_patches(out["angles"])
    last = of_patches(out["last"])
    result = {
        "vision.layer_input": embedded,
        "vision.patch_embeds": _raster(case, embedded),
        "vision.rotary_windowed": angles,
        "vision.rotary_angles": _raster(case, angles),
        "vision.last_hidden_state": last.reshape(-1, side, side, last.shape[-1]),
        "vision.pixel_shuffle": of_patches(out["features"], side**2)[:, None],
        "vision.mlp1": of_patches(out["connected"], side**2)[:, None],
    }
    result |= {f"{text}.logits": text_logits(case, text) for text in case.texts}
    result |= {f"vision.layer_{i}": of_patches(x) for i, x in enumerate(out["vision_layers"])}
    named = {"llm.input_embeds": out["input_embeds"], "llm.final_norm": out["final_norm"], "logits": out["logits"]}
    named |= {f"llm.attn_out_{i}": x for i, x in enumerate(out["attention"])}
    named |= {f"llm.layer_{i}": x for i, x in enumerate(out["hidden"])}
    return result | {name: of_tokens(name, x) for name, x in named.items()}


def _intermediates(case: Case, params: Params, batch: Batch) -> dict[str, jax.Array]:
    model = model_params.bind(case.config, params)
    vision, connector = model.vision, model.connector
    assert vision is not None and connector is not None
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
        "connected": connector(features),
        "angles": rope.vision_angles(case.config.encoder, batch.patch_coords),
        "input_embeds": model.embed(batch),
        "hidden": hidden,
        "attention": attention,
        "final_norm": model.decoder.final_norm(x),
        "logits": model.logits(x),
    }


def _raster(case: Case, x: np.ndarray) -> np.ndarray:
    """Values of patches in window order -> in raster order."""
    units = x.reshape(-1, case.config.encoder.unit_patches, x.shape[-1])
    result = np.empty_like(units)
    result[window_index(case)] = units
    return result.reshape(x.shape)


def text_logits(case: Case, text: str) -> np.ndarray:
    """[rows, n, vocab] of one text."""
    batch = text_batch(case, text)
    model = model_params.bind(case.config, case.params)
    return in_rows(batch, model.logits(model(batch)[0]), case.real(text), case.arrays.get(f"{text}.logits"))


@functools.cache
def _training_program(case: Case) -> Callable:
    """(targets, weights, counted), each [B, L] -> (loss, accuracy in percent), gradients."""
    batch = image_batch(case)

    def loss(params: Params, targets: jax.Array, weights: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = model_params.bind(case.config, params)
        scores = token_scores(*model.head_inputs(model(batch)[0]), targets)
        right = jnp.sum((scores.predictions == targets) & counted)
        return weighted_mean(scores.cross_entropy, weights), 100 * right / jnp.sum(counted)

    return functools.partial(jax.jit(jax.value_and_grad(loss, has_aux=True)), case.params)


@functools.cache
def train(case: Case, variant: str) -> tuple[tuple[jax.Array, jax.Array], Params]:
    """The released loss of a variant of a case with images with its text accuracy in percent, and the gradients.

    Unweighted, positions whose input is `<IMG_CONTEXT>` are left out; weighted, they count like all others, and the
    weights of positions without a label stay in the sum that divides.
    """
    batch, arrays, real = image_batch(case), case.arrays, case.real("inputs")
    tokens = arrays["inputs.input_ids"]
    targets = _next(arrays["inputs.labels_all" if "labels_all" in variant else "inputs.labels"], IGNORED)
    has_target = targets != IGNORED
    if variant.startswith("plain"):
        counted = has_target & (tokens != case.config.special_id("<IMG_CONTEXT>"))
        weights = counted.astype(np.float32)
    else:
        counted = has_target
        weight = arrays["inputs.loss_weight_answer" if variant == "weighted_answer" else "inputs.loss_weight_all"]
        weights = _next(weight, 0).astype(np.float32)
    slots = functools.partial(to_slots, batch, real=real)
    targets = slots(np.where(has_target, targets, -1), -1)
    return _training_program(case)(targets, slots(weights, 0), slots(counted, False))


def _next(values: np.ndarray, last: float) -> np.ndarray:
    """Values [rows, n] of the position after, `last` for the last one."""
    return np.concatenate([values[:, 1:], np.full_like(values[:, :1], last)], axis=1)


def loss_pairs(case: Case, variant: str) -> list[Pair]:
    golden = case.info["loss"][variant]
    (loss, accuracy), _ = train(case, variant)
    return [
        Pair("losses", variant, loss, golden["loss"]),
        Pair("text accuracy", variant, accuracy, golden["text_acc1"]),
    ]


def gradient_pairs(case: Case, variant: str) -> list[Pair]:
    return _compare_gradients(case, train(case, variant)[1], case.info[f"grad_{variant}"])


def gradient_numbers(case: Case, gradients: Params) -> dict[str, tuple[float, float]]:
    """Norm and projection of every tensor's gradient in the checkpoint's layout."""
    numbers = {}
    for tensor, gradient in tensors_from_params(case.config, gradients).items():
        values = gradient.astype(np.float64).ravel()
        numbers[tensor] = float(np.linalg.norm(values)), float(values @ np.cos(0.37 * np.arange(values.size)))
    return numbers


def _compare_gradients(case: Case, gradients: Params, golden: dict[str, list[float]]) -> list[Pair]:
    ours = gradient_numbers(case, gradients)
    if set(ours) != set(golden):
        raise UserError(f"{case.name}: golden has gradients of other tensors: {sorted(set(ours) ^ set(golden))[:3]}")
    return [
        Pair("gradients", tensor, ours[tensor], (norm, projection), scale=norm + 0.01)
        for tensor, (norm, projection) in golden.items()
    ]


def text_pairs(case: Case, text: str) -> list[Pair]:
    """Every intermediate of one text of a case without images that its folder holds."""
    batch = text_batch(case, text)

    def run(params: Params, batch: Batch) -> tuple[jax.Array, ...]:
        model = model_params.bind(case.config, params)
        x, hidden = model(batch, keep=lambda x, outputs: x)
        return model.embed(batch), hidden, model.decoder.final_norm(x), model.logits(x)

    embeds, hidden, final_norm, logits = jax.jit(run)(case.params, batch)
    tensors = [("merged embeddings", "input_embeds", embeds)]
    tensors += [("decoder layers", f"layer_{layer}", x) for layer, x in enumerate(hidden)]
    tensors += [("final norm", "final_norm", final_norm), ("logits", "logits", logits)]
    return [
        Pair(group, f"{text}.{tensor}", in_rows(batch, x, case.real(text), golden), golden)
        for group, tensor, x in tensors
        if (golden := case.arrays.get(f"{text}.{tensor}")) is not None
    ]


def text_training(case: Case, text: str) -> tuple[jax.Array, Params]:
    """Loss of a text, the mean over all its next tokens, and the gradients."""
    real, batch = case.real(text), text_batch(case, text)
    tokens = np.where(real, case.arrays[f"{text}.input_ids"], -1)
    targets = jnp.asarray(to_slots(batch, _next(tokens, -1), -1, real))

    def loss(params: Params) -> jax.Array:
        model = model_params.bind(case.config, params)
        scores = token_scores(*model.head_inputs(model(batch)[0]), targets)
        return weighted_mean(scores.cross_entropy, targets >= 0)

    return jax.jit(jax.value_and_grad(loss))(case.params)


def text_training_pairs(case: Case, text: str) -> list[Pair]:
    loss, gradients = text_training(case, text)
    pairs = _compare_gradients(case, gradients, case.info[f"grad_{text}"])
    return [Pair("losses", text, loss, case.info["loss"][text]), *pairs]


@functools.cache
def programs(case: Case) -> Programs:
    return Programs(case.config, case.params)


def generation_pairs(case: Case, name: str, follow: bool = False) -> list[Pair]:
    """Tokens and step logits of one golden generation.

    Args:
      case: the golden case.
      name: one of its generations.
      follow: every step goes on from the golden tokens, and the likeliest tokens are compared with them. So one close
        race that turns does not make all later logits those of another text.
    """
    golden, forced = case.arrays[f"{name}.tokens"], name.endswith("forced")
    tokens, logits = _generate(case, name, golden if forced or follow else None, golden.shape)
    tokens = logits.argmax(axis=-1) if follow and not forced else tokens
    pairs = [Pair("generated tokens", f"{name}.tokens", tokens, golden)]
    if f"{name}.logits" in case.arrays:
        pairs.append(Pair("generation logits", f"{name}.logits", logits, case.arrays[f"{name}.logits"]))
    return pairs


def _generate(
    case: Case, name: str, dictated: np.ndarray | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens of every step, or those dictated, and the logits they are chosen from."""
    rows, steps = shape
    logits, cache = programs(case).prefill(case.prompts(name), steps)
    tokens, kept = np.zeros((len(logits), steps), np.int32), []
    for step in range(steps):
        kept.append(np.asarray(logits[:rows]))
        tokens[:rows, step] = kept[-1].argmax(axis=-1) if dictated is None else dictated[:, step]
        if step + 1 < steps:
            logits, cache = programs(case).decode(jnp.asarray(tokens[:, step]), cache)
    return tokens[:rows], np.stack(kept, axis=1)
