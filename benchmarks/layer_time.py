"""How fast a layer of each tower runs on the device here: `python -m benchmarks.layer_time`.

Times forward and backward pass, side by side in one run, of

    decoder, routed    one decoder layer with its experts: every block of slots meets its own weights
    decoder, one set   the same layer with a single weight set for all tokens
    decoder, both      the plain form of routing: both weight sets on every token, then a choice
    encoder            the embedding of patches and one encoder layer

in the shapes and dtypes of the recipe (default: the first stage of NaViL-2B), over one packed row of its slots, filled
as the planner simulates rows (docs/tpu.md). Attention is that of the platform. MFU is useful FLOPs
over the device's peak, where that is known.

    python -m benchmarks.layer_time                                    # a GPU or TPU
    python -m benchmarks.layer_time --config configs/navil_9b.py
    python -m benchmarks.layer_time --slots 512                        # a CPU: rows cut to a share of the recipe's
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.routing_flops import Form, Workload
from navil_jax.config import Config, DataConfig
from navil_jax.config.flags import load_config
from navil_jax.console import markdown_table
from navil_jax.errors import UserError, report_user_errors
from navil_jax.model import params as model_params
from navil_jax.model.flops import Counts, peak_flops, useful_flops
from navil_jax.model.vision import VisionEncoder
from navil_jax.plan.statistics import BatchStatistics, simulate
from navil_jax.train.host_memory import keep_freed_memory

FORMS: tuple[Form, ...] = ("routed", "one set", "both")


class Timed(NamedTuple):
    """A compiled program, what it takes, and what a run of it is worth."""

    name: str
    program: Callable[..., Any]
    arguments: tuple[Any, ...]
    units: float  # real tokens or patches
    flops: float  # useful


def shortened(data: DataConfig, slots: int) -> DataConfig:
    """The same shares of visual, text and patch slots, in a row of `slots` token slots.

    Raises:
      UserError: too few for an image.
    """
    share = slots / (data.visual_slots + data.text_slots)
    visual = int(data.visual_slots * share) // 128 * 128
    if visual < 128 or slots <= visual:
        raise UserError(f"--slots: {slots} token slots hold no image; take at least 256")
    return dataclasses.replace(
        data, visual_slots=visual, text_slots=slots - visual, patch_slots=int(data.patch_slots * share) // 128 * 128
    )


def decoder_layer(config: Config, row: BatchStatistics, form: Form) -> Timed:
    """One decoder layer over the first simulated row, whose tokens are visual in the proportion of the slots."""
    data = config.data
    work = Workload(config.model, row.token_slots, data.visual_slots, form, "none", attention="auto")
    lengths = np.array(row.token_lengths[0])
    visual = lengths * data.visual_slots // row.token_slots
    ids = [_segments(part, size) for part, size in ((visual, data.visual_slots), (lengths - visual, data.text_slots))]
    segment_ids = np.concatenate(ids)
    order = np.argsort(np.where(segment_ids == 0, len(lengths) + 1, segment_ids), kind="stable")
    _, x, _, batch = work.arguments()
    batch = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), batch)
    batch = dataclasses.replace(
        batch, reading_order=order[None].astype(np.int32), segment_ids=segment_ids[None].astype(np.int32)
    )
    used = segment_ids > 0
    lengths = np.bincount(segment_ids[used]).astype(np.float64)
    counts = Counts(
        patches=0,
        patch_pairs=0,
        window_pairs=0,
        visual_tokens=float(used[: data.visual_slots].sum()),
        text_tokens=float(used[data.visual_slots :].sum()),
        token_pairs=float((lengths * (lengths + 1) / 2).sum()),
        targets=0,
    )
    params = model_params.initialise(work.model, 0)
    useful = useful_flops(work.model, counts, set(model_params.flatten(params)))
    features = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
    flops = sum(sum(useful[part]) for part in ("decoder linear", "decoder attention"))
    return Timed(f"decoder, {form}", work.compile(), (params, features, features, batch), float(used.sum()), flops)


def encoder_layer(config: Config, row: BatchStatistics) -> Timed:
    """The embedding and one encoder layer over the patches of the first simulated row."""
    vision = dataclasses.replace(config.model.vision, depth=1, full_attention_layers=None)
    decoder = dataclasses.replace(config.model.decoder, depth=1)
    model = dataclasses.replace(config.model, vision=vision, decoder=decoder, remat="none")
    form, params = nnx.split(VisionEncoder(model, nnx.Rngs(0)))
    blocks = _segments(np.array(row.patch_lengths[0]), row.patch_slots)[None].astype(np.int32)
    places = np.arange(row.patch_slots, dtype=np.int32) % 64
    patches = np.random.default_rng(0).integers(0, 256, (1, row.patch_slots, vision.patch_dim), np.uint8)
    longest = max(row.patch_lengths[0], default=1)

    def loss(params: Any, patches: jax.Array, coords: jax.Array, blocks: jax.Array) -> jax.Array:
        out = nnx.merge(form, params)(patches, coords, blocks, longest)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    arguments = params, patches, np.stack([places, places], axis=-1)[None], blocks
    sizes = np.bincount(blocks[blocks > 0]).astype(np.float64)
    pairs = float(np.square(sizes).sum())
    counts = Counts(sizes.sum(), pairs, pairs, 0, 0, 0, 0)
    useful = useful_flops(model, counts, set(model_params.flatten(model_params.shapes(model))))
    flops = sum(sum(useful[part]) for part in ("vision linear", "vision attention"))
    program = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    return Timed("encoder", program, arguments, float(sizes.sum()), flops)


def _segments(lengths: np.ndarray, slots: int) -> np.ndarray:
    """Segment ids 1, 2, ... of these lengths, one after the other, then 0: [slots]."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:slots]
    return np.pad(ids, (0, slots - len(ids)))


def medians(found: Sequence[Timed], runs: int) -> list[float]:
    """Median seconds of a run of each, after one that does not count; they take turns, so that all meet one load."""
    ready = [jax.device_put(timed.arguments) for timed in found]
    times: list[list[float]] = [[] for _ in found]
    for _ in range(runs + 1):
        for timed, arguments, taken in zip(found, ready, times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(timed.program(*arguments))
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken[1:]) for taken in times]


def report(found: Sequence[Timed], times: Sequence[float], peak: float | None) -> str:
    """A line for each program."""
    lines = []
    routed = times[0]
    for timed, seconds in zip(found, times, strict=True):
        lines.append(
            {
                "layer": timed.name,
                "ms": f"{1e3 * seconds:,.2f}",
                "tokens or patches/s": f"{timed.units / seconds:,.0f}",
                "useful TFLOP/s": f"{timed.flops / seconds / 1e12:,.2f}",
                "MFU": f"{timed.flops / seconds / peak:.1%}" if peak else "-",
                "over routed": f"{seconds / routed:.2f}" if timed.name.startswith("decoder") else "-",
            }
        )
    return markdown_table(lines)


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default="configs/navil_2b_s1_1.py", metavar="FILE", help="recipe whose shapes are taken"
    )
    parser.add_argument("--slots", type=int, help="token slots of the row (default: the recipe's)")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each program (default: 9)")
    options = parser.parse_args(argv)
    if options.runs < 1:
        raise UserError("--runs must be at least 1")
    config = load_config(options.config)
    if options.slots:
        config = dataclasses.replace(config, data=shortened(config.data, options.slots))
    row = simulate(config, rows=1)
    found = [decoder_layer(config, row, form) for form in FORMS] + [encoder_layer(config, row)]
    times = medians(found, options.runs)
    device = jax.devices()[0]
    print(
        f"{options.config} on one {device.device_kind}, jax {jax.__version__}, {config.model.compute_dtype}: a row of "
        f"{config.data.visual_slots:,} visual, {config.data.text_slots:,} text and {config.data.patch_slots:,} patch "
        f"slots, median of {options.runs} runs\n\n{report(found, times, peak_flops(device.device_kind))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
