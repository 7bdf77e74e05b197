"""What modality-specific experts cost: `python -m benchmarks.routing_flops`.

Compiles the forward and backward pass of one decoder layer, and of that layer with the head and its loss, for

    routed    the experts as they are: every block of slots meets its own weights
    one set   the same decoder with a single weight set for all tokens
    both      the plain form of routing: both weight sets on every token, then a choice

and prints the FLOPs that the compiled CPU program executes. Nothing runs and no parameter exists, so the shapes are
those of the recipe (default: NaViL-2B). Two things make the compiler's count complete: the depth is 1 (it counts the
body of a loop once, however many turns it has), and neither attention nor the head is cut into chunks. Nothing is
recomputed in the backward pass.

Where a visual token's output is wo_ve(wo(a)) (InternLM2 flavour), every visual slot pays one product of width x width
more than with one set. That product belongs to the model, not to the routing: it is stated on its own, and "besides"
is the ratio without it. A slot that holds no token costs what a full one does; `benchmarks.step_time` prints the share
of such slots on a recipe's own data.

How long the three take on a device: `python -m benchmarks.layer_time`.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp

from navil_jax.batch import Batch, BatchSpec
from navil_jax.config import ModelConfig
from navil_jax.config.flags import load_config
from navil_jax.errors import report_user_errors
from navil_jax.model import params as model_params
from navil_jax.model.attention import Backend
from navil_jax.model.decoder import Output
from navil_jax.model.experts import Experts, Streams
from navil_jax.train.loss import token_scores, weighted_mean

SHARES = (0.1, 0.5, 0.9)  # of the slots that are visual
Form = Literal["routed", "one set", "both"]
Head = Literal["none", "text slots", "all slots"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One form of the decoder on one row of slots."""

    config: ModelConfig
    slots: int
    visual_slots: int
    form: Form
    head: Head
    attention: Backend = "xla"

    @property
    def model(self) -> ModelConfig:
        """One layer of it, without vision; without experts where one weight set serves all."""
        decoder = dataclasses.replace(self.config.decoder, depth=1)
        if self.form == "one set":
            decoder = dataclasses.replace(decoder, attention_experts=False, ffn_experts=False)
        return dataclasses.replace(self.config, vision=None, decoder=decoder, remat="none", attention=self.attention)

    def arguments(self) -> tuple[Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Batch]:
        """Abstract parameters, embedded tokens, gradient of the layer's output besides the head's, and batch."""
        spec = BatchSpec(1, self.visual_slots, self.slots - self.visual_slots, 0, patch_dim=1)
        x = jax.ShapeDtypeStruct((1, self.slots, self.config.decoder.width), jnp.dtype(self.config.compute_dtype))
        return model_params.shapes(self.model), x, x, spec.abstract()

    def compile(self) -> jax.stages.Compiled:
        """The program (params, x, cotangent, batch) -> loss, and gradients of params and x."""
        with _reference_form(self.visual_slots) if self.form == "both" else contextlib.nullcontext():
            return jax.jit(jax.value_and_grad(self._loss, argnums=(0, 1))).lower(*self.arguments()).compile()

    def _loss(self, params: Any, x: jax.Array, cotangent: jax.Array, batch: Batch) -> jax.Array:
        decoder = model_params.bind(self.model, params).decoder
        x, _ = decoder(x, decoder.layout(batch))
        loss = jnp.sum(x * cotangent, dtype=jnp.float32)  # or visual slots of a single layer would serve nothing
        if self.head == "none":
            return loss
        start = self.visual_slots if self.head == "text slots" else 0
        scores = token_scores(decoder.final_norm(x[:, start:]), decoder.head_kernel(), batch.targets[:, start:])
        return loss + weighted_mean(scores.cross_entropy, batch.loss_weights[:, start:])


def flops(workload: Workload) -> float:
    """Executed FLOPs of the compiled program."""
    with _no_chunks():
        return workload.compile().cost_analysis()["flops"]


def serial_flops(config: ModelConfig, visual_slots: int) -> float:
    """FLOPs of wo_ve, forward and backward, where it is one product more than a single weight set has; else 0."""
    return 3 * 2 * visual_slots * config.decoder.width**2 if config.decoder.serial_visual_output else 0.0


@contextlib.contextmanager
def _reference_form(visual_slots: int) -> Iterator[None]:
    """All slots stay one part; both weight sets on every slot, then a choice, wherever weights follow slots."""

    def choose(v: jax.Array, t: jax.Array) -> jax.Array:
        is_visual = jnp.arange(v.shape[1]) < visual_slots
        return jnp.where(is_visual.reshape(-1, *(1,) * (v.ndim - 2)), v, t)

    def experts(self: Experts, parts: Streams) -> tuple[Any, ...]:
        (x,) = parts
        return (jax.tree.map(choose, self.visual(x), self.text(x)),)

    def output(self: Output, parts: Streams) -> Streams:
        (x,) = parts
        text = self.text(x)
        return (choose(self.visual(text if self.serial else x), text),)

    with (
        mock.patch("navil_jax.model.decoder.split_slots", lambda x, visual_slots: (x,)),
        mock.patch.object(Experts, "__call__", experts),
        mock.patch.object(Output, "__call__", output),
    ):
        yield


@contextlib.contextmanager
def _no_chunks() -> Iterator[None]:
    with (
        mock.patch("navil_jax.model.xla_attention.BLOCK", sys.maxsize),
        mock.patch("navil_jax.train.loss.CHUNK_LOGITS", sys.maxsize),
    ):
        yield


def layer_table(config: ModelConfig, slots: int) -> str:
    """FLOPs of the layer alone, and how they compare."""
    lines = [
        "| visual slots | routed | wo_ve of it | one set | both | routed / one set | besides wo_ve | both / one set |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    one, both = (flops(Workload(config, slots, slots // 2, form, "none")) for form in ("one set", "both"))
    for share in SHARES:
        visual = round(share * slots)
        routed, extra = flops(Workload(config, slots, visual, "routed", "none")), serial_flops(config, visual)
        counts = " | ".join(f"{count / 1e9:,.1f} G" for count in (routed, extra, one, both))
        ratios = " | ".join(f"{ratio:.3f}" for ratio in (routed / one, (routed - extra) / one, both / one))
        lines.append(f"| {share:.0%} | {counts} | {ratios} |")
    return "\n".join(lines)


def head_table(config: ModelConfig, slots: int) -> str:
    """FLOPs of the layer with head and loss: on the text slots alone (as in training) against all slots."""
    lines = [
        "| visual slots | routed, head on text slots | routed, head on all slots | one set, head on all slots "
        "| text / all | routed on text / one set |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    one = flops(Workload(config, slots, slots // 2, "one set", "all slots"))
    for share in SHARES:
        heads = ("text slots", "all slots")
        text, everywhere = (flops(Workload(config, slots, round(share * slots), "routed", head)) for head in heads)
        counts = " | ".join(f"{count / 1e9:,.1f} G" for count in (text, everywhere, one))
        lines.append(f"| {share:.0%} | {counts} | {text / everywhere:.3f} | {text / one:.3f} |")
    return "\n".join(lines)


@report_user_errors
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing_flops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="configs/navil_2b.py", metavar="FILE", help="recipe whose decoder is taken")
    parser.add_argument("--slots", type=int, default=4096, help="slots of the row (default: 4096)")
    options = parser.parse_args(argv)
    config = load_config(options.config).model
    decoder = config.decoder
    print(
        f"{options.config}: {decoder.family} flavour, width {decoder.width}, mlp {decoder.mlp_dim}, vocabulary "
        f"{decoder.vocab_size:,}; one row of {options.slots} slots, forward and backward, jax {jax.__version__}\n"
    )
    print(f"One decoder layer:\n\n{layer_table(config, options.slots)}\n")
    print(f"One decoder layer, head and loss:\n\n{head_table(config, options.slots)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
