"""How far the outputs of two models lie apart: tensors by group, next-token distributions, generated tokens."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from navil_jax.batch import Batch
from navil_jax.config import ModelConfig
from navil_jax.convert.verify.compare import LOGITS, TOLERANCES, Group, Pair, by_group
from navil_jax.convert.verify.golden import build_batch, in_order, merge_block_coords, sample_features
from navil_jax.model import params as model_params
from navil_jax.model.params import Params

# Weights rounded to a narrower dtype move outputs by a few times the rounding error, of the tensor's largest value.
ROUNDING_STEPS = 16
FREE_WHEN_ROUNDED = ("generated tokens", "text accuracy")  # a close race between two tokens may turn


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What outputs may differ by.

    Attributes:
      tolerance: for every group; None: the tolerances of golden data.
      rounding: relative rounding error of the checkpoint's weights against the golden ones; 0 for equal dtypes.
    """

    tolerance: float | None = None
    rounding: float = 0.0

    def of(self, pair: Pair) -> float:
        """The largest difference that is good."""
        if self.tolerance is not None:
            return self.tolerance
        base = TOLERANCES[pair.group]
        if not self.rounding:
            return base
        if pair.group in FREE_WHEN_ROUNDED:
            return math.inf
        largest = float(np.abs(np.asarray(pair.golden, np.float64)).max()) / pair.scale
        steps = 1 if pair.group == "losses" else ROUNDING_STEPS  # a mean over many tokens
        return max(base, steps * self.rounding * (1.0 if pair.group == "gradients" else largest))

    def within(self, pair: Pair) -> bool:
        """False for nan, too."""
        return pair.difference <= self.of(pair)

    def words(self) -> str:
        if self.tolerance is not None:
            return f"{self.tolerance:g}"
        if self.rounding:
            return f"rounded weights: {ROUNDING_STEPS * self.rounding:g} of a tensor's largest value"
        return "those of golden data in float32"


@dataclasses.dataclass(frozen=True)
class Distributions:
    """Next-token distributions of two models at the same positions.

    Attributes:
      positions: how many were compared.
      kl_mean, kl_max: divergence KL(first || second) in nats.
      top1: share of positions whose likeliest token is the same.
    """

    positions: int
    kl_mean: float
    kl_max: float
    top1: float


def distributions(logits: Iterable[tuple[np.ndarray, np.ndarray]]) -> Distributions:
    """Compares pairs of logits [..., vocab], first model and second model."""
    divergences, same = [], []
    for first, second in logits:
        p, q = (_log_softmax(np.asarray(x, np.float64).reshape(-1, x.shape[-1])) for x in (first, second))
        divergences.append(np.maximum(np.sum(np.exp(p) * (p - q), axis=-1), 0))  # below 0 by rounding alone
        same.append(p.argmax(-1) == q.argmax(-1))
    divergence = np.concatenate(divergences)
    return Distributions(
        len(divergence), float(divergence.mean()), float(divergence.max()), float(np.concatenate(same).mean())
    )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """Outputs by group, and what they mean for the next token.

    Attributes:
      groups: largest difference and more, by group.
      limits: largest tolerance of a group's tensors.
      distributions: at all positions whose logits are known; None if there are none.
      tokens_equal: whether generated tokens are the same; None if there are none.
      tolerance: in words.
    """

    groups: dict[str, Group]
    limits: dict[str, float]
    distributions: Distributions | None
    tokens_equal: bool | None
    tolerance: str

    @property
    def ok(self) -> bool:
        return bool(self.groups) and all(group.within for group in self.groups.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "tolerance": self.tolerance,
            "tensors": sum(group.tensors for group in self.groups.values()),
            "groups": {
                name: {
                    "tensors": group.tensors,
                    "difference": group.difference,
                    "tolerance": self.limits[name],
                    "worst": group.worst,
                    "ok": group.within,
                }
                for name, group in self.groups.items()
            },
            **(dataclasses.asdict(self.distributions) if self.distributions else {}),
            "generated_tokens_equal": self.tokens_equal,
        }


def report(pairs: Iterable[Pair], allowed: Allowed) -> OutputReport:
    """Sums up pairs of outputs."""
    pairs = list(pairs)
    limits: dict[str, float] = {}
    for pair in pairs:
        limits[pair.group] = max(limits.get(pair.group, 0.0), allowed.of(pair))
    logits = [(np.asarray(pair.golden), np.asarray(pair.ours)) for pair in pairs if pair.group in LOGITS]
    tokens = [pair.difference == 0 for pair in pairs if pair.group == "generated tokens"]
    return OutputReport(
        by_group(pairs, allowed.within),
        limits,
        distributions(logits) if logits else None,
        all(tokens) if tokens else None,
        allowed.words(),
    )


def float32(params: Params) -> Params:
    """Parameters widened to float32, which no product rounds again."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def made_logits(config: ModelConfig, params: Params, batch: Batch) -> list[np.ndarray]:
    """Logits [n, vocab] of every row of `made_batch`, in reading order."""
    config = dataclasses.replace(config, compute_dtype="float32", remat="none", attention="auto")

    @jax.jit
    def run(params: Params, batch: Batch) -> jax.Array:
        model = model_params.bind(config, params)
        return model.logits(model(batch)[0])

    logits = run(float32(params), batch)
    return [in_order(batch, logits, row) for row in range(len(batch.tokens))]


def made_batch(config: ModelConfig, seed: int = 0, length: int = 48) -> Batch:
    """Random text of `length` tokens, and where the model has vision a second row with an image within such text.

    The image has 6 x 4 merged units of random pixels, more than one window; its line breaks are those of a prompt.
    """
    rng = np.random.default_rng(seed)
    taken = min((*config.special_token_ids, config.decoder.vocab_size))
    text = rng.integers(0, taken, length)
    rows = [[sample_features(config, text)]]
    if config.vision is not None:
        side, units = config.vision.merge_size, (6, 4)
        line = [config.special_id("<IMG_CONTEXT>")] * units[1] + [config.special_id("<IMG_LINE_BREAK>")]
        image = [config.special_id("<img>"), *line * units[0], config.special_id("<IMG_FRAME_BREAK>")]
        tokens = np.concatenate([text[: length // 4], image, [config.special_id("</img>")], text[length // 4 :]])
        count = units[0] * units[1] * config.vision.unit_patches
        patches = {
            "patches": rng.integers(0, 256, (count, config.vision.patch_dim), np.uint8),
            "patch_coords": merge_block_coords(units[0] * side, units[1] * side, side).reshape(-1, 2),
            "patch_blocks": np.ones(count, np.int32),
        }
        rows.append([sample_features(config, tokens, patches)])
    return build_batch(config, rows)


def made_pairs(first: list[np.ndarray], second: list[np.ndarray]) -> list[Pair]:
    """The rows' logits of two models."""
    return [
        Pair("logits", name, ours, golden) for name, ours, golden in zip(("text", "image"), second, first, strict=False)
    ]
