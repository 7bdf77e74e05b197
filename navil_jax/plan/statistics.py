"""What packed rows of a recipe hold: simulated from stated distributions by the real rules for images and packing.

A recipe without data has no batch to count. So samples are drawn (only their sizes), their images get the grids that
`data.images` gives them, samples longer than a row are resized as `data.features` does, and rows are chosen as
`data.packing` chooses them. The distributions are those of `mixtures`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from navil_jax.config import Config
from navil_jax.data.features import smaller_images
from navil_jax.data.grouping import attention_cost
from navil_jax.data.packing import SlotAdvice, advise_slots, choose_row
from navil_jax.data.prompt import image_tokens
from navil_jax.model.flops import Counts
from navil_jax.plan.mixtures import MIXTURES

ROWS = 64  # packed rows that are simulated
PROMPT = 25  # text tokens of a sample around its question and answer


class SampleSizes(NamedTuple):
    """The sizes of one sample."""

    visual: int  # tokens
    text: int
    targets: int  # text tokens that are learnt
    scales: tuple[tuple[int, int], ...]  # (rows, columns) in patches of each scale of its images

    @property
    def patches(self) -> int:
        return sum(rows * cols for rows, cols in self.scales)


@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """Means over packed rows, and the lengths that attention kernels meet."""

    counts: Counts  # of one row
    samples: float  # per row
    images: float  # per row
    fill: dict[str, float]  # share of the visual, text and patch slots that hold something
    advice: SlotAdvice  # slots that these samples would fill alike
    token_slots: int  # of a row
    patch_slots: int
    token_lengths: tuple[tuple[int, ...], ...]  # of each simulated row: tokens of its samples, in reading order
    patch_lengths: tuple[tuple[int, ...], ...]  # of each simulated row: patches of its scales
    costs: tuple[int, ...]  # of each simulated row: its attention (data.grouping)
    balance_window: int  # config.data
    origin: str  # where the figures come from, for the report


def simulate(config: Config, mixture: str = "captions", rows: int = ROWS, seed: int = 0) -> BatchStatistics:
    """Statistics of `rows` packed rows of a mixture, in the slots of `config.data`.

    Example: NaViL-2B's first stage, captions -> about 6 samples a row, visual slots the scarce ones
    """
    about, draw = MIXTURES[mixture]
    rng, data = np.random.default_rng(seed), config.data
    budgets = np.array([data.visual_slots, data.text_slots, data.patch_slots if config.model.vision else 1])
    waiting: list[SampleSizes] = []
    seen: list[SampleSizes] = []
    packed: list[list[SampleSizes]] = []
    enough = data.packing_lookahead * budgets
    total = np.zeros(3)
    while len(packed) < rows:
        while np.all(total < enough) and len(waiting) < 2048:
            waiting.append(_sample(config, *draw(rng)))
            seen.append(waiting[-1])
            total += _sizes(waiting[-1])
        chosen = choose_row(np.array([_sizes(sample) for sample in waiting]), budgets)
        packed.append([waiting[number] for number in chosen])
        total -= np.sum([_sizes(sample) for sample in packed[-1]], axis=0)
        taken = set(chosen)
        waiting = [sample for number, sample in enumerate(waiting) if number not in taken]
    return _statistics(config, packed, seen, f"simulated: {about}; {rows} rows")


def _sizes(sample: SampleSizes) -> tuple[int, int, int]:
    return sample.visual, sample.text, sample.patches


def _sample(config: Config, image: tuple[int, int] | None, answer: int) -> SampleSizes:
    data, vision = config.data, config.model.vision
    answer = min(answer, data.text_slots // 2)
    text = min(PROMPT, data.text_slots // 4) + answer
    if image is None or vision is None:
        return SampleSizes(0, text, answer + 1, ())
    height, width = image

    def measure(config: Config) -> SampleSizes:
        cost = image_tokens(width, height, config)
        return SampleSizes(cost.visual_tokens, cost.text_tokens + text, answer + 1, tuple(cost.grids))

    found = measure(config)
    budgets = {"visual_tokens": data.visual_slots, "text_tokens": data.text_slots, "patches": data.patch_slots}
    if any(size > budget for size, budget in zip(_sizes(found), budgets.values(), strict=True)):
        found = measure(smaller_images([image], config, found.text, budgets))
    return found


def _statistics(
    config: Config, packed: Sequence[Sequence[SampleSizes]], seen: Sequence[SampleSizes], origin: str
) -> BatchStatistics:
    data, side = config.data, config.model.vision.window_size if config.model.vision else 1
    token_lengths = tuple(tuple(sample.visual + sample.text for sample in row) for row in packed)
    patch_lengths = tuple(tuple(a * b for sample in row for a, b in sample.scales) for row in packed)
    every = [sample for row in packed for sample in row]
    scales = [scale for sample in every for scale in sample.scales]
    lengths = np.concatenate([np.array(row, np.float64) for row in token_lengths])
    sums = Counts(
        patches=sum(a * b for a, b in scales),
        patch_pairs=sum((a * b) ** 2 for a, b in scales),
        window_pairs=sum(_window_squares(a, side) * _window_squares(b, side) for a, b in scales),
        visual_tokens=sum(sample.visual for sample in every),
        text_tokens=sum(sample.text for sample in every),
        token_pairs=float((lengths * (lengths + 1) / 2).sum()),
        targets=sum(sample.targets for sample in every),
    )
    counts = sums.scaled(1 / len(packed))
    fill = {
        "visual": counts.visual_tokens / data.visual_slots,
        "text": counts.text_tokens / data.text_slots,
        "patches": counts.patches / data.patch_slots,
    }
    return BatchStatistics(
        counts=counts,
        samples=len(every) / len(packed),
        images=sum(bool(sample.scales) for sample in every) / len(packed),
        fill=fill,
        advice=advise_slots(np.array([_sizes(sample) for sample in seen]), data.patch_slots),
        token_slots=data.visual_slots + data.text_slots,
        patch_slots=data.patch_slots,
        token_lengths=token_lengths,
        patch_lengths=patch_lengths,
        costs=tuple(map(functools.partial(attention_cost, config.model), patch_lengths, token_lengths)),
        balance_window=data.balance_window,
        origin=origin,
    )


def _window_squares(length: int, side: int) -> int:
    """Sum of the squares of the sides of the windows along one axis: those of a grid multiply."""
    whole, rest = divmod(length, side)
    return whole * side**2 + rest**2


def executed_pairs(
    lengths: Sequence[Sequence[int]], slots: int, block_q: int, block_kv: int, causal: bool
) -> np.ndarray:
    """Pairs of attention that the kernel computes in each row: whole blocks that a segment shares (`model.attention`).

    Args:
      lengths: of each row, the lengths of its segments, one after the other.
      slots: places of a row; it is padded to whole blocks.
      block_q, block_kv: the kernel's blocks of queries and of keys.
      causal: blocks of keys beyond the queries are skipped, too.

    Example: segments of 3 and 5 in 8 slots, blocks of 4, causal -> the blocks (0,0), (1,0), (1,1): 48 pairs
    """
    blocks = [_executed_blocks(row, slots, block_q, block_kv, causal) for row in lengths]
    return np.array(blocks, np.float64) * (block_q * block_kv)


def _executed_blocks(lengths: Sequence[int], slots: int, block_q: int, block_kv: int, causal: bool) -> int:
    shared = np.zeros((-(-slots // block_q), -(-slots // block_kv)), bool)
    start = 0
    for length in lengths:
        end = start + length
        if length:
            shared[start // block_q : (end - 1) // block_q + 1, start // block_kv : (end - 1) // block_kv + 1] = True
        start = end
    np.fill_diagonal(shared, True)  # the kernel always computes a block with itself
    if causal:
        last_query = (np.arange(len(shared)) + 1) * block_q - 1
        shared &= np.arange(shared.shape[1]) * block_kv <= last_query[:, None]
    return int(shared.sum())
