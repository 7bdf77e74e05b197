"""The any-resolution vision encoder over packed patches (paper section 3.2; released behaviour)."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from navil_jax.batch import AnyArray
from navil_jax.config import ModelConfig, VisionConfig
from navil_jax.model import layers, rope
from navil_jax.model.encoder_attention import Segments, choose, encoder_attention, make_segments
from navil_jax.sharding import constrain


class VisionLayout(NamedTuple):
    """What every layer needs to know of the patches."""

    rotation: rope.Rotation
    scales: Segments  # the scale of each patch
    windows: Segments  # the window of each patch
    longest: int | None  # the most patches of a scale


class VisionLayer(nnx.Module):
    """x += ls1 * attention(norm1(x)); x += ls2 * mlp(norm2(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision = config.encoder
        make_norm = layers.rms_norm if vision.norm == "rms_norm" else layers.layer_norm
        norm = functools.partial(make_norm, vision.width, vision.norm_eps, config, rngs)
        linear = functools.partial(layers.linear, config=config, rngs=rngs, use_bias=True)
        heads = (vision.num_heads, vision.head_dim)
        self.norm1, self.norm2 = norm(), norm()
        self.qkv = linear(
            (vision.width,), (3, *heads), ("embed", "qkv", "vision_heads", "head_dim"), use_bias=vision.qkv_bias
        )
        self.proj = linear(heads, (vision.width,), ("vision_heads", "head_dim", "embed"))
        self.fc1 = linear((vision.width,), (vision.mlp_dim,), ("embed", "mlp"))
        self.fc2 = linear((vision.mlp_dim,), (vision.width,), ("mlp", "embed"))
        scale = functools.partial(jnp.full, (vision.width,), vision.layer_scale_init, jnp.dtype(config.param_dtype))
        self.ls1 = nnx.Param(scale(), **layers.axes("norm"))
        self.ls2 = nnx.Param(scale(), **layers.axes("norm"))
        self.config = config

    def __call__(
        self, x: Float[Array, "B P W"], layout: VisionLayout, windowed: Bool[Array, ""] | bool = False
    ) -> Float[Array, "B P W"]:
        """Runs the layer; `windowed`: attention stays inside windows instead of whole scales."""
        x = x + _scaled(self._attend(self.norm1(x), layout, windowed), self.ls1[...])
        x = x + _scaled(self._mlp(self.norm2(x)), self.ls2[...])
        return constrain(x, "batch", "patches", "features")

    @jax.named_scope("attention")
    def _attend(self, x: jax.Array, layout: VisionLayout, windowed: jax.Array | bool) -> jax.Array:
        segments = choose(windowed, layout.windows, layout.scales)
        return encoder_attention(x, self.qkv, self.proj, layout.rotation, segments, self.config, layout.longest)

    @jax.named_scope("mlp")
    def _mlp(self, x: jax.Array) -> jax.Array:
        return self.fc2(layers.gelu(self.fc1(x)))


def _scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x * scale in x's dtype, multiplied in float32: the gradient of the scale is a sum over all patches."""
    return (x.astype(jnp.float32) * scale.astype(jnp.float32)).astype(x.dtype)


class VisionEncoder(nnx.Module):
    """Patches of any number of images and scales -> one feature per merged unit."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision = config.encoder
        self.config, self.model_config = vision, config
        self.compute_dtype, self.remat = jnp.dtype(config.compute_dtype), config.remat
        self.patch_embed = layers.linear(
            (vision.patch_dim,),
            (vision.width,),
            ("patch", "embed"),
            config,
            rngs,
            use_bias=True,
            kernel_init=functools.partial(smooth_filters, vision) if vision.patch_waves else None,
        )
        self.layers = layers.stack(lambda rngs: VisionLayer(config, rngs), vision.depth, rngs)

    @jax.named_scope("embed")
    def embed(self, patches: UInt8[AnyArray, "B P D"]) -> Float[Array, "B P W"]:
        """Embeds pixels, scaled to [-1, 1]."""
        pixels = constrain(pixel_values(patches).astype(self.compute_dtype), "batch", "patches", "patch")
        return constrain(layers.unsharded(self.patch_embed, self.model_config)(pixels), "batch", "patches", "features")

    def layout(
        self,
        coords: Int32[AnyArray, "B P 2"],
        blocks: Int32[AnyArray, "B P"],
        longest: int | None = None,
    ) -> VisionLayout:
        """Rotation and attention segments of the patches."""
        angles = rope.vision_angles(self.config, coords)
        rotation = jnp.cos(angles), jnp.sin(angles)
        scales = make_segments(blocks, rotation, self.model_config, longest)
        if self.config.full_attention_layers is None:
            return VisionLayout(rotation, scales, scales, longest)
        windows = make_segments(window_ids(coords, blocks, self.config), rotation, self.model_config, longest)
        return VisionLayout(rotation, scales, windows, longest)

    def windowed_layers(self) -> Bool[Array, " depth"]:
        """The layers that attend inside windows."""
        full = self.config.full_attention_layers
        return jnp.array([full is not None and i not in full for i in range(self.config.depth)])

    @jax.named_scope("vision")
    def __call__(
        self,
        patches: UInt8[AnyArray, "B P D"],
        coords: Int32[AnyArray, "B P 2"],
        blocks: Int32[AnyArray, "B P"],
        longest: int | None = None,
    ) -> Float[Array, "B N UW"]:
        """Encodes packed patches.

        Args:
          coords: (row, column) in the patch's own scale.
          blocks: the patch's scale; 0 = empty.
          longest: the most patches that a scale has; None: as many as a row.

        Returns:
          N = P/U units of width U*W: the U patches of every merged unit side by side (top-left, top-right, bottom-left,
          bottom-right), in the order of the patches.
        """
        layout = self.layout(coords, blocks, longest)

        def body(layer: VisionLayer, x: jax.Array, windowed: jax.Array) -> tuple[jax.Array, None]:
            return layers.unsharded(layer, self.model_config)(x, layout, windowed), None

        x, _ = layers.scan_layers(self.layers, body, self.embed(patches), self.windowed_layers(), self.remat)
        rows, count, width = x.shape
        unit = self.config.unit_patches
        return x.reshape(rows, count // unit, unit * width)


def smooth_filters(
    vision: VisionConfig, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, out_sharding: object = None
) -> jax.Array:
    """Filters of patches to start from: random mixtures of the lowest `vision.patch_waves` cosines along each side.

    Random pixels, the default, see little of things that are larger than a pixel.

    Args:
      shape: (patch_dim, width) of the kernel; colours first, then rows and columns.
    """
    count, side = vision.patch_waves, vision.patch_size
    waves = jnp.cos(jnp.pi * (jnp.arange(side)[:, None] + 0.5) * jnp.arange(count) / side)
    waves /= jnp.linalg.norm(waves, axis=0)
    mixtures = jax.random.normal(key, (3, count, count, vision.width), dtype) / math.sqrt(3 * count**2)
    return jnp.einsum("yi,xj,cijw->cyxw", waves, waves, mixtures).reshape(shape).astype(dtype)


def pixel_values(levels: UInt8[AnyArray, "..."]) -> Float32[Array, "..."]:
    """Levels of a colour -> numbers in [-1, 1], bit for bit the released preprocessing's.

    That divides by 255 in double precision and rounds. Here 1/255 is two numbers: the product with 257/65536 is exact,
    and so the sum of both products is rounded as the quotient is, whether or not a compiler fuses them.

    Example: 0, 127, 255 -> -1, -0.0039215684, 1
    """
    level, large = levels.astype(jnp.float32), 257 / 65536
    return (level * jnp.float32(large) + level * jnp.float32(1 / 255 - large) - 0.5) / 0.5


def window_ids(
    coords: Int32[AnyArray, "B P 2"], blocks: Int32[AnyArray, "B P"], config: VisionConfig
) -> Int32[Array, "B P"]:
    """A number for the window of each patch, unique in its row and below P + 1; 0 where empty.

    Windows of window_size x window_size patches tile every scale from its top left; those at its edges are smaller.
    A scale's windows are counted row by row from its first patch on: it has no more windows than patches. The patches
    of a scale stand side by side.

    Example: one scale of 2 x 4 patches, window_size 2, in window order -> 1 1 1 1 2 2 2 2
    """
    window = jnp.asarray(coords) // config.window_size
    scales = blocks.shape[1] // config.unit_patches + 2

    def numbers(window: jax.Array, blocks: jax.Array) -> jax.Array:
        first = jax.ops.segment_min(jnp.arange(len(blocks)), blocks, scales)
        columns = jax.ops.segment_max(window[:, 1], blocks, scales) + 1
        return jnp.where(blocks > 0, 1 + first[blocks] + window[:, 0] * columns[blocks] + window[:, 1], 0)

    return jax.vmap(numbers)(window, jnp.asarray(blocks)).astype(jnp.int32)


class Connector(nnx.Module):
    """LayerNorm, linear, GELU, linear: features of merged units -> decoder width (paper section 3.2)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, out = config.encoder.unit_patches * config.encoder.width, config.decoder.width
        self.norm = layers.layer_norm(width, 1e-5, config, rngs)
        self.fc1 = layers.linear((width,), (out,), ("mlp", "embed"), config, rngs, use_bias=True)
        self.fc2 = layers.linear((out,), (out,), ("mlp", "embed"), config, rngs, use_bias=True)

    @jax.named_scope("connector")
    def __call__(self, x: Float[Array, "B N UW"]) -> Float[Array, "B N H"]:
        """Maps units to the decoder's width."""
        return self.fc2(layers.gelu(self.fc1(self.norm(x))))
