"""Useful FLOPs of a batch, counted from the config and from what is real in the batch, and the peaks of devices.

Useful is what the mathematics of the model needs for the real tokens, patches and targets: matrix products alone, two
FLOPs per multiplication. Padding, masked pairs of attention, recomputation (remat) and a second weight set that serves
nobody are no part of it. The products of low-rank updates (LoRA) are. The backward pass knows what trains: a frozen
weight has no gradient of its own, and what lies wholly below every trained parameter has no backward pass.

Example, model FLOPs utilisation of a step that took `seconds` on this process's devices:

    counts = count_batch(batch, config.model)                       # NumPy, of this process's rows
    parts = useful_flops(config.model, counts, flatten(state.trainable))
    peak = peak_flops(jax.local_devices()[0].device_kind)           # None where unknown, as on CPU
    mfu = total(parts) / (seconds * jax.local_device_count() * peak)
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from navil_jax.batch import Batch
from navil_jax.config import ModelConfig

PARTS = ("vision linear", "vision attention", "connector", "decoder linear", "decoder attention", "head")

# Dense bfloat16 FLOP/s of one JAX device, by what its `device_kind` holds; the first hit counts. TPUs: the pages of
# Google Cloud's "TPU versions" (a JAX device is a chip, but a tpu7x chip is two). GPUs: NVIDIA's data sheets, without
# sparsity.
PEAKS: tuple[tuple[str, float], ...] = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),  # v5e
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p
    ("TPU v6", 918e12),  # v6e
    ("TPU7x", 2307e12 / 2),
    ("TPU v7", 2307e12 / 2),
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H200", 989.4e12),
    ("GH200", 989.4e12),
    ("B200", 2250e12),
)


class Flops(NamedTuple):
    """FLOPs of one part of the model."""

    forward: float
    backward: float


@dataclasses.dataclass(frozen=True)
class Counts:
    """What is real in a batch, summed over its rows (floats where they are means)."""

    patches: float
    patch_pairs: float  # sum over scales of (patches of the scale)^2: pairs of a full attention layer
    window_pairs: float  # the same over windows: pairs of a windowed layer
    visual_tokens: float
    text_tokens: float
    token_pairs: float  # sum over samples of n * (n + 1) / 2: pairs of causal attention
    targets: float  # text tokens whose next token has a loss weight

    def scaled(self, factor: float) -> "Counts":
        """All counts times `factor`."""
        return Counts(*(value * factor for value in dataclasses.astuple(self)))


def count_batch(batch: Batch, config: ModelConfig) -> Counts:
    """Counts what is real in a batch of NumPy arrays; about a millisecond per row of 16k tokens and 24k patches.

    Example: one row with samples of 5 and 2 tokens and one image of 8 and 16 patches -> 24 patches, 8^2 + 16^2 patch
    pairs and 15 + 3 token pairs.
    """
    used = np.asarray(batch.segment_ids) > 0
    visual = batch.visual_slots
    lengths = _sizes(np.asarray(batch.segment_ids))
    blocks = np.asarray(batch.patch_blocks)
    patch_pairs = float(np.square(_sizes(blocks)).sum())
    window_pairs = patch_pairs
    if _windowed_layers(config):
        window_pairs = float(np.square(_sizes(_windows(batch, config.encoder.window_size))).sum())
    return Counts(
        patches=float((blocks > 0).sum()),
        patch_pairs=patch_pairs,
        window_pairs=window_pairs,
        visual_tokens=float(used[:, :visual].sum()),
        text_tokens=float(used[:, visual:].sum()),
        token_pairs=float((lengths * (lengths + 1) / 2).sum()),
        targets=float((np.asarray(batch.loss_weights)[:, visual:] > 0).sum()),
    )


def useful_flops(config: ModelConfig, counts: Counts, trained: Collection[str]) -> dict[str, Flops]:
    """Useful FLOPs of one step over what `counts` holds.

    Args:
      config: the model.
      counts: of the batch.
      trained: names of the trained parameters, such as decoder/layers/ffn/visual/up/kernel; empty for inference.

    Returns:
      Every name of `PARTS` -> its FLOPs.

    Example, one decoder weight of n entries that serves t tokens: forward 2 n t; backward 2 n t if something below it
    trains, and 2 n t more if it trains itself. Its update of rank r, from i inputs by a to o outputs by b: forward
    2 t r (i + o); backward 2 t r o each for b and for what a gives, and 2 t r i each for a and for the layer's inputs.
    """
    return _Tally(config, counts, _Trained(trained)).parts()


def total(parts: dict[str, Flops]) -> float:
    """Forward and backward FLOPs of all parts."""
    return sum(sum(part) for part in parts.values())


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device of this `jax.Device.device_kind`; None where it is not known (as on CPU)."""
    return next((peak for name, peak in PEAKS if name.lower() in device_kind.lower()), None)


class _Trained:
    """Answers whether anything of a module trains; its names are those of parameters."""

    def __init__(self, names: Collection[str]):
        self._names = frozenset(names)

    def any(self, prefix: str) -> bool:
        return any(name.startswith(prefix + "/") for name in self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names


class _Tally:
    """Walks the model from input to output and keeps, per stream, whether something below trains."""

    def __init__(self, config: ModelConfig, counts: Counts, trained: _Trained):
        self._config, self._counts, self._trained = config, counts, trained
        self._sums = {part: [0.0, 0.0] for part in PARTS}

    def parts(self) -> dict[str, Flops]:
        images = self._vision() if self._config.vision else False
        self._decoder(images)
        return {part: Flops(*sums) for part, sums in self._sums.items()}

    def _product(self, part: str, name: str, tokens: float, inputs: int, outputs: int, below: bool) -> bool:
        """A dense layer with its update, over `tokens`; gives whether something up to here trains."""
        self._add(part, 2 * tokens * inputs * outputs, below, f"{name}/kernel")
        if self._config.lora_rank and part != "head":
            thin = 2 * tokens * self._config.lora_rank
            self._add(part, thin * inputs, below, f"{name}/lora_a")
            self._add(part, thin * outputs, below or f"{name}/lora_a" in self._trained, f"{name}/lora_b")
        return below or self._trained.any(name)

    def _add(self, part: str, flops: float, below: bool, weight: str) -> None:
        """A product with a weight: its inputs have a gradient if something below trains, and it if it trains itself."""
        self._sums[part][0] += flops
        self._sums[part][1] += flops * (below + (weight in self._trained))

    def _attention(self, part: str, pairs: float, width: int, below: bool) -> None:
        flops = 4 * pairs * width  # scores, and weighted values
        self._sums[part][0] += flops
        self._sums[part][1] += 2 * flops * below

    def _vision(self) -> bool:
        vision, counts, any_trained = self._config.encoder, self._counts, self._trained.any
        windowed, width, patches = _windowed_layers(self._config), vision.width, counts.patches
        linear = "vision linear"
        below = self._product(linear, "vision/patch_embed", patches, vision.patch_dim, width, False)
        for layer in range(vision.depth):
            at = "vision/layers/"
            below |= any_trained(at + "norm1")
            below = self._product(linear, at + "qkv", patches, width, 3 * width, below)
            pairs = counts.window_pairs if layer in windowed else counts.patch_pairs
            self._attention("vision attention", pairs, width, below)
            below = self._product(linear, at + "proj", patches, width, width, below)
            below |= any_trained(at + "norm2")
            below = self._product(linear, at + "fc1", patches, width, vision.mlp_dim, below)
            below = self._product(linear, at + "fc2", patches, vision.mlp_dim, width, below)
            below |= any_trained("vision/layers")  # layer scales
        joined, out, units = vision.unit_patches * width, self._config.decoder.width, patches / vision.unit_patches
        below |= any_trained("connector/norm")
        below = self._product("connector", "connector/fc1", units, joined, out, below)
        return self._product("connector", "connector/fc2", units, out, out, below)

    def _decoder(self, images: bool) -> None:
        decoder, any_trained = self._config.decoder, self._trained.any
        special = any_trained("decoder/special_embed")  # <img> is visual, line breaks are text
        below = {"visual": images or special, "text": special or any_trained("decoder/embed")}
        for _ in range(decoder.depth):
            self._decoder_layer(below)
        final = below["text"] or any_trained("decoder/final_norm")
        name = "decoder/embed" if decoder.tie_embeddings else "decoder/head"
        self._product("head", name, self._counts.targets, decoder.width, decoder.vocab_size, final)
        if decoder.tie_embeddings and any_trained(name):  # its weight is called embedding, not kernel
            self._sums["head"][1] += 2 * self._counts.targets * decoder.width * decoder.vocab_size

    def _decoder_layer(self, below: dict[str, bool]) -> None:
        decoder, counts, linear, at = self._config.decoder, self._counts, "decoder linear", "decoder/layers/"
        width, heads = decoder.width, decoder.num_heads * decoder.head_dim
        tokens = {"visual": counts.visual_tokens, "text": counts.text_tokens}

        def every(name: str) -> None:
            for stream in below:
                below[stream] |= self._trained.any(at + name)

        every("attention_norm")
        for stream, entered in list(below.items()):
            own = _weight_set(at + "qkv", stream, decoder.attention_experts)
            kv = decoder.num_kv_heads * decoder.head_dim
            for name, size in ((f"{own}/q", heads), (f"{own}/k", kv), (f"{own}/v", kv)):
                below[stream] |= self._product(linear, name, tokens[stream], width, size, entered)
            below[stream] |= self._trained.any(own)  # norms of heads
        mixed = any(below.values())
        self._attention("decoder attention", counts.token_pairs, heads, mixed)
        for stream in below:
            below[stream] = mixed
            serial = decoder.attention_experts and decoder.serial_visual_output
            first = "text" if serial else stream
            name = _weight_set(at + "out", first, decoder.attention_experts)
            below[stream] |= self._product(linear, name, tokens[stream], heads, width, mixed)
            if serial and stream == "visual":
                below[stream] = self._product(linear, at + "out/visual", tokens[stream], width, width, below[stream])
        every("ffn_norm")
        for stream, entered in list(below.items()):
            own = _weight_set(at + "ffn", stream, decoder.ffn_experts)
            count, inner = tokens[stream], decoder.mlp_dim
            inside = [self._product(linear, f"{own}/{name}", count, width, inner, entered) for name in ("gate", "up")]
            below[stream] = self._product(linear, f"{own}/down", count, inner, width, any(inside))


def _weight_set(module: str, stream: str, experts: bool) -> str:
    return f"{module}/{stream if experts else 'text'}"


def _windowed_layers(config: ModelConfig) -> frozenset[int]:
    vision = config.vision
    if vision is None or vision.full_attention_layers is None:
        return frozenset()
    return frozenset(range(vision.depth)) - frozenset(vision.full_attention_layers)


def _sizes(ids: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal ids above 0 in every row, float64. ids [B, N]; equal ids of a row need not touch."""
    return np.concatenate([np.zeros(0), *_row_sizes(ids)])


def _row_sizes(ids: np.ndarray) -> Iterator[np.ndarray]:
    for row in ids:
        yield np.unique(row[row > 0], return_counts=True)[1].astype(np.float64)


def _windows(batch: Batch, side: int) -> np.ndarray:
    """A number for the window of each patch, unique in its row, 0 where empty. [B, P] int64"""
    blocks, window = np.asarray(batch.patch_blocks).astype(np.int64), np.asarray(batch.patch_coords) // side
    return np.where(blocks > 0, (blocks << 32) + (window[..., 0].astype(np.int64) << 16) + window[..., 1], 0)
