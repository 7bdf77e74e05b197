"""The batch contract: the one type that the pipeline, the model, prefill, tests and planning speak of.

A batch has B rows. Every row holds V visual slots, then T text slots (L = V + T), and beside them P patch slots. A
token's slot says which weights serve it, so that every projection is two dense products on static slices.
`reading_order` says in which order the slots are read.

One row with two samples, V = 4, T = 6 (`<img>` and `c` are visual, the rest is text):

    sample 1  <s> <img> c c </img> a      sample 2  <s> b

    slot          0     1   2   3  |  4    5      6   7    8   9
    tokens        <img> c   c   -  |  <s>  </img> a   <s>  b   -
    segment_ids   1     1   1   0  |  1    1      1   2    2   0
    positions     1     2   3   0  |  0    4      5   0    1   0
    reading_order 4     0   1   2     5    6      7   8    3   9     (slots in reading order, empty ones last)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import numpy as np

from navil_jax.config import ModelConfig

# One tokenised sample: arrays by feature name, n = visual tokens, m = text tokens, p = patches.
#   visual_tokens, visual_positions [n] int32      in reading order; positions count within the sample, from 0
#   text_tokens, text_positions     [m] int32
#   text_targets                    [m] int32      the next token of the sample, -1 at its end
#   text_weights                    [m] float32    loss weight of that target, 0 where nothing is learnt
#   text_source_ids, text_sample_ids [m] int32     the same number m times
#   patches                         [p, D] uint8   whole merged units, in the order of their <IMG_CONTEXT> tokens
#   patch_coords                    [p, 2] int32   (row, column) in the patch's own scale
#   patch_blocks                    [p] int32      number of the scale within the sample, from 1
SampleFeatures = Mapping[str, np.ndarray]
AnyArray = jax.Array | np.ndarray  # of a batch before and after it goes to the devices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed tokens and patches with static shapes; arrays may be NumPy, JAX or abstract. See the module's example."""

    tokens: jax.Array  # [B, L] int32, 0 where empty; slots 0..V-1 hold visual tokens, V..L-1 text tokens
    targets: jax.Array  # [B, L] int32, the next token of the same sample in reading order; -1 where there is none
    loss_weights: jax.Array  # [B, L] float32, 0 where nothing is learnt
    positions: jax.Array  # [B, L] int32, in its own sample, from 0
    segment_ids: jax.Array  # [B, L] int32, the sample's number in its row, from 1; 0 = empty
    reading_order: jax.Array  # [B, L] int32, the slot that is read first, second, ...; without visual slots 0, 1, ...
    source_ids: jax.Array  # [B, L] int32, which data source
    sample_ids: jax.Array  # [B, L] int32, which sample of that source
    patches: jax.Array  # [B, P, D] uint8, pixels; scaling to [-1, 1] happens on the device
    patch_coords: jax.Array  # [B, P, 2] int32, (row, column) within the patch's own scale
    patch_blocks: jax.Array  # [B, P] int32, number of the scale in the row, from 1; 0 = empty
    unit_slots: jax.Array  # [B, P/U] int32, the visual slot that each merged unit of U patches fills; L = none
    visual_slots: int = dataclasses.field(metadata={"static": True})  # V
    block_patches: int = dataclasses.field(metadata={"static": True})  # the most patches of one scale


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The numbers that fix every shape of a `Batch`."""

    rows: int
    visual_slots: int
    text_slots: int
    patch_slots: int
    patch_dim: int = 768
    unit_patches: int = 4
    block_patches: int | None = None  # the most patches of one scale; none: all patch slots

    @property
    def row_slots(self) -> int:
        """L, slots of one row."""
        return self.visual_slots + self.text_slots

    @property
    def budgets(self) -> dict[str, int]:
        """Feature name -> length of a packed row, for the packer."""
        visual = dict.fromkeys(("visual_tokens", "visual_positions"), self.visual_slots)
        text_keys = ("tokens", "positions", "targets", "weights", "source_ids", "sample_ids")
        text = {f"text_{k}": self.text_slots for k in text_keys}
        return visual | text | dict.fromkeys(("patches", "patch_coords", "patch_blocks"), self.patch_slots)

    def abstract(self, sharding: jax.sharding.Sharding | None = None) -> Batch:
        """Shapes and dtypes, for lowering without data."""
        rows, slots, patches = self.rows, self.row_slots, self.patch_slots

        def array(shape: tuple[int, ...], dtype: str) -> jax.Array:
            return _as_array(jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding))

        return Batch(
            tokens=array((rows, slots), "int32"),
            targets=array((rows, slots), "int32"),
            loss_weights=array((rows, slots), "float32"),
            positions=array((rows, slots), "int32"),
            segment_ids=array((rows, slots), "int32"),
            reading_order=array((rows, slots), "int32"),
            source_ids=array((rows, slots), "int32"),
            sample_ids=array((rows, slots), "int32"),
            patches=array((rows, patches, self.patch_dim), "uint8"),
            patch_coords=array((rows, patches, 2), "int32"),
            patch_blocks=array((rows, patches), "int32"),
            unit_slots=array((rows, patches // self.unit_patches), "int32"),
            **self._static(),
        )

    def fake(self, config: ModelConfig, seed: int = 0) -> Batch:
        """Random valid samples with and without images, as many as fit every row, for tests and timing."""
        rng = np.random.default_rng(seed)
        rows = []
        for _ in range(self.rows):
            row: list[SampleFeatures] = []
            fits = lambda sample, row=row: all(  # noqa: E731
                sum(len(s[name]) for s in [*row, sample]) <= budget for name, budget in self.budgets.items()
            )
            while True:
                with_image = (
                    fake_sample(rng, config, with_image=True) if self.patch_slots and rng.random() < 0.8 else None
                )
                text = fake_sample(rng, config, with_image=False)
                if with_image is not None and fits(with_image):
                    row.append(with_image)
                elif fits(text):
                    row.append(text)
                else:
                    break
            rows.append(row)
        return self.build(rows, config.special_id("<IMG_CONTEXT>") if config.special_token_ids else -1)

    def build(self, rows: Sequence[Sequence[SampleFeatures]], context_id: int) -> Batch:
        """Lays given samples into rows: one list of samples per row, fewer rows than B leave the rest empty.

        Raises:
          ValueError: more rows or more tokens or patches than the spec holds.
        """
        if len(rows) > self.rows:
            raise ValueError(f"{len(rows)} rows given, the spec holds {self.rows}")
        packed: dict[str, np.ndarray] = {}
        for name, budget in self.budgets.items():
            parts = [[sample[name] for sample in samples] for samples in rows]
            packed[name], packed[f"{name}_segment_ids"] = self._lay_out(name, budget, parts)
        return self.from_packed(packed, context_id)

    def _lay_out(self, name: str, budget: int, parts: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """One feature of all samples, joined by row and padded [B, budget, ...], and its segment ids [B, budget]."""
        like = self._feature_like(name)
        values = np.zeros((self.rows, budget, *like.shape[1:]), like.dtype)
        segments = np.zeros((self.rows, budget), np.int32)
        for row, samples in enumerate(parts):
            ends = np.cumsum([0, *map(len, samples)])
            if ends[-1] > budget:
                raise ValueError(f"{name}: {ends[-1]} do not fit the row's {budget}")
            for number, part in enumerate(samples):
                own = slice(ends[number], ends[number + 1])
                values[row, own] = part
                segments[row, own] = number + 1
        return values, segments

    def _feature_like(self, name: str) -> np.ndarray:
        if name == "patches":
            return np.zeros((0, self.patch_dim), np.uint8)
        if name == "patch_coords":
            return np.zeros((0, 2), np.int32)
        return np.zeros(0, np.float32 if name == "text_weights" else np.int32)

    def from_packed(self, packed: Mapping[str, np.ndarray], context_id: int) -> Batch:
        """Lays packed features into slots.

        Args:
          packed: every feature of `SampleFeatures` with shape [B, budget, ...], samples one after the other, and
            `<feature>_segment_ids` [B, budget] (0 = empty), as Grain's packers give them.
          context_id: id of `<IMG_CONTEXT>`; its k-th token of a row is filled by the k-th merged unit of the row.
        """

        def slots(visual: np.ndarray, text: np.ndarray) -> np.ndarray:
            return np.concatenate([visual, text], axis=1)

        visual_segments, text_segments = packed["visual_tokens_segment_ids"], packed["text_tokens_segment_ids"]
        segment_ids = slots(visual_segments, text_segments).astype(np.int32)
        positions = slots(packed["visual_positions"], packed["text_positions"]).astype(np.int32)
        order = np.where(segment_ids > 0, segment_ids, np.iinfo(np.int32).max)
        zeros = np.zeros_like(visual_segments, dtype=np.int32)
        targets = slots(zeros - 1, np.where(text_segments > 0, packed["text_targets"], -1))
        source_ids = slots(_spread(packed, "text_source_ids"), packed["text_source_ids"])
        sample_ids = slots(_spread(packed, "text_sample_ids"), packed["text_sample_ids"])
        unit_slots = self._unit_slots(packed["visual_tokens"] == context_id, visual_segments, packed)
        return Batch(
            tokens=_as_array(slots(packed["visual_tokens"], packed["text_tokens"]).astype(np.int32)),
            targets=_as_array(targets.astype(np.int32)),
            loss_weights=_as_array(slots(zeros, packed["text_weights"]).astype(np.float32)),
            positions=_as_array(positions),
            segment_ids=_as_array(segment_ids),
            reading_order=_as_array(np.lexsort((positions, order), axis=1).astype(np.int32)),
            source_ids=_as_array(source_ids.astype(np.int32)),
            sample_ids=_as_array(sample_ids.astype(np.int32)),
            patches=_as_array(packed["patches"]),
            patch_coords=_as_array(packed["patch_coords"].astype(np.int32)),
            patch_blocks=_as_array(_dense_blocks(packed["patches_segment_ids"], packed["patch_blocks"])),
            unit_slots=_as_array(unit_slots),
            **self._static(),
        )

    def _static(self) -> dict[str, int]:
        return {"visual_slots": self.visual_slots, "block_patches": self.block_patches or self.patch_slots}

    def _unit_slots(self, context: np.ndarray, segments: np.ndarray, packed: Mapping[str, np.ndarray]) -> np.ndarray:
        """The slots of the `<IMG_CONTEXT>` tokens in order, as many as the row has merged units."""
        context = context & (segments > 0)
        unit_segments = packed["patches_segment_ids"][:, :: self.unit_patches]
        result = np.full(unit_segments.shape, self.row_slots, np.int32)
        for row, (is_context, unit_segment) in enumerate(zip(context, unit_segments, strict=True)):
            where = np.flatnonzero(is_context)
            units = np.count_nonzero(unit_segment)
            if len(where) != units or not np.array_equal(segments[row, where], unit_segment[:units]):
                raise ValueError(f"row {row}: {len(where)} <IMG_CONTEXT> tokens for {units} merged units of patches")
            result[row, :units] = where
        return result


def validate(batch: Batch, config: ModelConfig) -> None:
    """Checks that a batch keeps the contract.

    Raises:
      ValueError: says which field breaks it, in which row, and how.
    """
    slots, visual = batch.tokens.shape[1], batch.visual_slots
    for name, shape in dataclasses.asdict(_spec_of(batch, config).abstract()).items():
        if name in ("visual_slots", "block_patches"):
            continue
        array = getattr(batch, name)
        if array.shape != shape.shape or array.dtype != shape.dtype:
            raise ValueError(f"{name}: {array.dtype}{list(array.shape)}, expected {shape.dtype}{list(shape.shape)}")
    for row in range(len(batch.tokens)):

        def require(good: bool | np.bool, field: str, why: str, row: int = row) -> None:
            if not good:
                raise ValueError(f"{field}, row {row}: {why}")

        tokens, segments, order = batch.tokens[row], batch.segment_ids[row], batch.reading_order[row]
        used = segments > 0
        is_visual = np.isin(tokens, config.visual_token_ids) if config.special_token_ids else np.zeros(slots, bool)
        require(np.array_equal(np.sort(order), np.arange(slots)), "reading_order", "not a permutation of the slots")
        in_order = visual > 0 or np.array_equal(order, np.arange(slots))
        require(in_order, "reading_order", "without visual slots the slots stand in reading order")
        ordered = segments[order][: used.sum()]
        require(
            bool(np.all(ordered > 0)) and np.all(np.diff(ordered) >= 0), "reading_order", "samples are not in order"
        )
        starts = np.flatnonzero(np.diff(ordered, prepend=0))
        lengths = np.diff(np.append(starts, len(ordered)))
        counted = np.concatenate([np.arange(n) for n in lengths]) if len(lengths) else np.zeros(0)
        require(np.array_equal(batch.positions[row][order][: used.sum()], counted), "positions", "not 0, 1, 2, ...")
        require(bool(np.all(is_visual[:visual] | ~used[:visual])), "tokens", "a text token in a visual slot")
        require(not np.any(is_visual[visual:] & used[visual:]), "tokens", "a visual token in a text slot")
        require(np.all(tokens < config.decoder.vocab_size) and np.all(tokens >= 0), "tokens", "outside the vocabulary")
        weights = batch.loss_weights[row]
        require(bool(np.all(weights >= 0)), "loss_weights", "negative")
        require(not np.any(weights[:visual]), "loss_weights", "a visual slot has a weight; the head runs on text alone")
        require(not np.any((weights > 0) & (batch.targets[row] < 0)), "loss_weights", "a weight without a target")
        units = batch.unit_slots[row]
        unit_blocks = batch.patch_blocks[row].reshape(len(units), -1)
        require(bool(np.all(unit_blocks == unit_blocks[:, :1])), "patch_blocks", "a merged unit lies in two blocks")
        largest = np.bincount(batch.patch_blocks[row], minlength=1)[1:].max(initial=0)
        limit = batch.block_patches
        require(largest <= limit, "patch_blocks", f"a scale of {largest} patches, block_patches allows {limit}")
        context = config.special_id("<IMG_CONTEXT>") if config.special_token_ids else -1
        filled = np.flatnonzero((tokens == context) & used)
        require(
            np.array_equal(units[unit_blocks[:, 0] > 0], filled), "unit_slots", "not the <IMG_CONTEXT> slots in order"
        )
        require(bool(np.all(units[unit_blocks[:, 0] == 0] == slots)), "unit_slots", "an empty unit fills a slot")


def _as_array(array: np.ndarray | jax.ShapeDtypeStruct) -> jax.Array:
    """Unchanged: a batch's arrays may be NumPy or abstract, where the types name those that the model computes with."""
    return cast(jax.Array, array)


def _spec_of(batch: Batch, config: ModelConfig) -> BatchSpec:
    rows, slots = batch.tokens.shape
    patches, dim = batch.patches.shape[1:]
    unit = config.vision.unit_patches if config.vision else 1
    return BatchSpec(rows, batch.visual_slots, slots - batch.visual_slots, patches, dim, unit, batch.block_patches)


def fake_sample(rng: np.random.Generator, config: ModelConfig, with_image: bool) -> SampleFeatures:
    """A text, around an image of one scale if `with_image`: t <img> c c <break> c c <break> </img> t t t"""

    def text(least: int, most: int) -> list[int]:
        length = int(rng.integers(least, most))
        return rng.integers(0, min(config.special_token_ids, default=9), length).tolist()

    ids, grid, dim = text(1, 8), (0, 0), config.vision.patch_dim if config.vision else 0
    if with_image:
        side = config.encoder.merge_size
        rows, columns = rng.integers(1, 5, 2).tolist()
        grid = side * rows, side * columns
        line = [config.special_id("<IMG_CONTEXT>")] * columns + [config.special_id("<IMG_LINE_BREAK>")]
        ids += [config.special_id("<img>"), *line * rows, config.special_id("</img>")]
    tokens = np.array(ids + text(2, 12), np.int32)
    visual = np.isin(tokens, config.visual_token_ids) if with_image else np.zeros(len(tokens), bool)
    coords = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1)
    if with_image:
        coords = coords.reshape(rows, side, columns, side, 2).swapaxes(1, 2)
    texts = np.count_nonzero(~visual)
    return {
        "visual_tokens": tokens[visual],
        "visual_positions": np.flatnonzero(visual),
        "text_tokens": tokens[~visual],
        "text_positions": np.flatnonzero(~visual),
        "text_targets": np.append(tokens[1:], -1)[~visual],
        "text_weights": np.append(rng.random(texts - 1), 0),
        "text_source_ids": np.zeros(texts, np.int32),
        "text_sample_ids": np.full(texts, rng.integers(1 << 30)),
        "patches": rng.integers(0, 256, (grid[0] * grid[1], dim), np.uint8),
        "patch_coords": coords.reshape(-1, 2),
        "patch_blocks": np.ones(grid[0] * grid[1], np.int32),
    }


def _spread(packed: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Gives a sample's visual tokens the number that its text tokens carry. [B, V]"""
    visual, text = packed["visual_tokens_segment_ids"], packed["text_tokens_segment_ids"]
    table = np.zeros((len(text), max(text.max(initial=0), visual.max(initial=0)) + 1), np.int32)
    np.put_along_axis(table, text.astype(np.int64), packed[name], axis=1)
    table[:, 0] = 0
    return np.take_along_axis(table, visual.astype(np.int64), axis=1)


def _dense_blocks(segments: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Numbers the (sample, scale) pairs of each row from 1, 0 where empty. [B, P]

    Example: segments 1 1 1 2 2 0, scales 1 1 2 1 1 0 -> 1 1 2 3 3 0
    """
    new = np.ones(segments.shape, np.int32)
    new[:, 1:] = (segments[:, 1:] != segments[:, :-1]) | (scales[:, 1:] != scales[:, :-1])
    return np.where(segments > 0, np.cumsum(new, axis=1), 0).astype(np.int32)
