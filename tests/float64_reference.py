"""Loss and gradients of NaViL in float64, one sample at a time: plain attention with explicit masks, autodiff alone.

Independent of navil_jax: it shares no function with it, only the layout of parameters and features.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]


def value_and_gradients(params: Params, model: Any, samples: list[dict[str, np.ndarray]]) -> tuple[float, Params]:
    """The weighted mean of the samples' cross-entropies, and its gradients; both float64.

    Args:
      params: nested dicts of arrays, as the model takes them.
      model: ModelConfig; only its numbers are used.
      samples: features as `batch.SampleFeatures` lists them.
    """
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
        loss, gradients = jax.jit(jax.value_and_grad(lambda p: _loss(p, model, samples)))(exact)
        return float(loss), jax.tree.map(np.asarray, gradients)


def _loss(params: Params, model: Any, samples: list[dict[str, np.ndarray]]) -> jax.Array:
    weights = [sample["text_weights"].astype(np.float64) for sample in samples]
    losses = [(_cross_entropy(params, model, s) * w).sum() for s, w in zip(samples, weights, strict=True)]
    return sum(losses) / sum(w.sum() for w in weights)


def _cross_entropy(params: Params, model: Any, sample: dict[str, np.ndarray]) -> jax.Array:
    """Of every text token of a sample; 0 where it has no target."""
    ids = np.zeros(len(sample["visual_tokens"]) + len(sample["text_tokens"]), int)
    ids[sample["visual_positions"]], ids[sample["text_positions"]] = sample["visual_tokens"], sample["text_tokens"]
    special = list(model.special_token_ids)
    is_special = np.isin(ids, special)
    rows = np.array([special.index(i) if i in special else 0 for i in ids])
    tables = params["decoder"]
    x = jnp.where(is_special[:, None], tables["special_embed"]["embedding"][rows], tables["embed"]["embedding"][ids])
    context, image = model.visual_token_ids
    if len(sample["patches"]):
        x = x.at[np.flatnonzero(ids == context)].set(_image_features(params, model.vision, sample))
    x = _decoder(params["decoder"], model.decoder, x, (ids == context) | (ids == image))
    head = tables["head"]["kernel"] if "head" in tables else tables["embed"]["embedding"].T
    log_probabilities = jax.nn.log_softmax(x[sample["text_positions"]] @ head, axis=-1)
    targets = sample["text_targets"]
    found = -log_probabilities[np.arange(len(targets)), np.maximum(targets, 0)]
    return jnp.where(targets >= 0, found, 0)


def _image_features(params: Params, vision: Any, sample: dict[str, np.ndarray]) -> jax.Array:
    """[units, H] of a sample's patches."""
    weights, coords, scales = params["vision"], sample["patch_coords"], sample["patch_blocks"]
    x = _linear((sample["patches"].astype(np.float64) / 255 - 0.5) / 0.5, weights["patch_embed"])
    quarter = vision.head_dim // 4
    frequencies = vision.rope_theta ** -(np.arange(quarter) / quarter)
    angles = np.concatenate([coords[:, :1] * frequencies, coords[:, 1:] * frequencies], axis=-1)
    same = scales[:, None] == scales
    windows = coords // vision.window_size
    same_window = same & (windows[:, None] == windows[None]).all(-1)
    for number in range(vision.depth):
        layer = jax.tree.map(lambda x, number=number: x[number], weights["layers"])
        full = vision.full_attention_layers is None or number in vision.full_attention_layers
        qkv = _linear(_layer_norm(x, layer["norm1"], vision.norm_eps), layer["qkv"])
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        out = _attention(_rotated(q, angles), _rotated(k, angles), v, same if full else same_window)
        x = x + _linear(out, layer["proj"], 2) * layer["ls1"]
        inner = _gelu(_linear(_layer_norm(x, layer["norm2"], vision.norm_eps), layer["fc1"]))
        x = x + _linear(inner, layer["fc2"]) * layer["ls2"]
    units = x.reshape(len(x) // vision.unit_patches, -1)
    connector = params["connector"]
    inner = _gelu(_linear(_layer_norm(units, connector["norm"], 1e-5), connector["fc1"]))
    return _linear(inner, connector["fc2"])


def _decoder(weights: Params, decoder: Any, x: jax.Array, visual: np.ndarray) -> jax.Array:
    """[n, H] -> [n, H] after the final norm; `visual` says which tokens the visual weights serve."""
    half, eps = decoder.head_dim // 2, decoder.norm_eps
    angles = np.arange(len(x))[:, None] * decoder.rope_theta ** -(np.arange(half) / half)
    causal = np.tril(np.ones((len(x), len(x)), bool))

    def routed(of_visual: jax.Array, of_text: jax.Array) -> jax.Array:
        return jnp.where(visual.reshape(-1, *[1] * (of_text.ndim - 1)), of_visual, of_text)

    def projected(x: jax.Array, own: Params, name: str) -> jax.Array:
        y = _linear(x, own[name])
        return _rms_norm(y, own[f"{name}_norm"], eps) if f"{name}_norm" in own else y

    def feed_forward(x: jax.Array, own: Params) -> jax.Array:
        return _linear(jax.nn.silu(_linear(x, own["gate"])) * _linear(x, own["up"]), own["down"])

    for number in range(decoder.depth):
        layer = jax.tree.map(lambda x, number=number: x[number], weights["layers"])
        h = _rms_norm(x, layer["attention_norm"], eps)
        sets = layer["qkv"]["visual"], layer["qkv"]["text"]
        q, k, v = (routed(*(projected(h, own, name) for own in sets)) for name in "qkv")
        attended = _attention(_rotated(q, angles), _rotated(k, angles), v, causal)
        text = _linear(attended, layer["out"]["text"], 2)
        serial = decoder.serial_visual_output
        of_visual = _linear(text, layer["out"]["visual"]) if serial else _linear(attended, layer["out"]["visual"], 2)
        x = x + routed(of_visual, text)
        h = _rms_norm(x, layer["ffn_norm"], eps)
        x = x + routed(feed_forward(h, layer["ffn"]["visual"]), feed_forward(h, layer["ffn"]["text"]))
    return _rms_norm(x, weights["final_norm"], eps)


def _linear(x: jax.Array, own: Params, inputs: int = 1) -> jax.Array:
    y = jnp.tensordot(x, own["kernel"], axes=inputs)
    return y + own["bias"] if "bias" in own else y


def _gelu(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + jax.scipy.special.erf(x / np.sqrt(2)))


def _layer_norm(x: jax.Array, own: Params, eps: float) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps) * own["scale"] + own["bias"]


def _rms_norm(x: jax.Array, own: Params, eps: float) -> jax.Array:
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * own["scale"]


def _rotated(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """x [n, heads, D], angles [n, D / 2]; pairs are i and i + D / 2."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray) -> jax.Array:
    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(jnp.where(mask, scores, -1e300), axis=-1), v)
