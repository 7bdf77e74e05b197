"""How full rows get, and how fast: `python -m benchmarks.packing`.

Three made mixtures (only sizes are made; images are planned by the real code, none is decoded) are packed into rows
of 24,576 patches, first with 8,192 visual and 8,192 text slots, then with the slots that `advise_slots` proposes:

    captions    one photograph of the web and a caption, about 90% visual tokens
    mixed       the same, with 40% samples of text alone
    documents   pages up to twice the patches that a row holds; those are made smaller until they fit

For each: the share of slots that hold something (the first tenth of the rows and the last, less full ones are left
out), the share that no packer can exceed because the mixture fills another kind of slot first, the same of Grain's
packers at as many bins, and samples per second of choosing rows and of making batches of them.

With --state: size of an iterator's state and the time until a restored one gives its batch, early and late in a run.
With --config RECIPE: slots for the recipe's own data, from some hundred samples of it.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable

import grain
import numpy as np

from navil_jax.batch import BatchSpec
from navil_jax.config import Config, DataConfig, ImageConfig, ModelConfig, SourceConfig, VisionConfig
from navil_jax.config.flags import parse
from navil_jax.data.features import Usable, smaller_images
from navil_jax.data.packing import SIZES, SlotAdvice, advise_slots, best_fill, choose_row, sizes_of
from navil_jax.data.pipeline import make_dataset, sample_streams
from navil_jax.data.prompt import image_tokens, role_texts
from navil_jax.data.run import complete, open_run
from navil_jax.data.sample import Sample
from navil_jax.data.tokenizers.sentencepiece import train_tokenizer
from navil_jax.errors import UserError, report_user_errors

PATCHES, TOKENS = 24_576, 16_384  # of the paper's rows
PROMPT = 25  # text tokens around question and answer
Row = tuple[str, ...]


def image_sizes(height: int, width: int, text: int, config: Config) -> tuple[int, int, int]:
    """Visual tokens, text tokens and patches of one image with `text` other tokens; shrunk to fit a row."""
    data = config.data
    budgets = {"visual_tokens": data.visual_slots, "text_tokens": data.text_slots, "patches": data.patch_slots}

    def measure(config: Config) -> tuple[int, int, int]:
        cost = image_tokens(width, height, config)
        return cost.visual_tokens, cost.text_tokens + text, cost.patches

    found = measure(config)
    if any(size > budgets[name] for name, size in zip(SIZES, found, strict=True)):
        found = measure(smaller_images([(height, width)], config, found[1], budgets))
    return found


def captions(count: int, config: Config, rng: np.random.Generator) -> np.ndarray:
    """Web photographs, 200 to 3,000 pixels a side with median 900, with captions of about 40 tokens. [count, 3]"""
    sides = rng.lognormal(np.log(900), 0.45, (count, 2)).clip(200, 3000).astype(int).tolist()
    texts = rng.lognormal(np.log(40), 0.5, count).astype(int).tolist()
    return np.array(
        [image_sizes(*side, PROMPT + text, config) for side, text in zip(sides, texts, strict=True)], np.int64
    )


def mixed(count: int, config: Config, rng: np.random.Generator) -> np.ndarray:
    """`captions`, of which 40% are replaced by texts of 30 to 8,000 tokens, median 500. [count, 3]"""
    sizes = captions(count, config, rng)
    plain = rng.random(count) < 0.4
    sizes[plain] = 0
    sizes[plain, 1] = rng.lognormal(np.log(500), 0.9, plain.sum()).clip(30, config.data.text_slots - PROMPT) + PROMPT
    return sizes


def documents(count: int, config: Config, rng: np.random.Generator) -> np.ndarray:
    """Pages of 1,500 to 24,576 patches in their largest scale, evenly in the logarithm, with 600 tokens. [count, 3]"""
    patches = np.exp(rng.uniform(np.log(1500), np.log(PATCHES), count))
    aspect = rng.uniform(0.6, 1.7, count) ** 0.5
    side = patches**0.5 * config.model.vision.patch_size
    texts = rng.lognormal(np.log(600), 0.8, count).clip(0, config.data.text_slots // 2).astype(int)
    return np.array(
        [
            image_sizes(int(height), int(width), PROMPT + int(text), config)
            for height, width, text in zip(side * aspect, side / aspect, texts, strict=True)
        ],
        np.int64,
    )


MIXTURES: dict[str, Callable[[int, Config, np.random.Generator], np.ndarray]] = {
    "captions": captions,
    "mixed": mixed,
    "documents": documents,
}


def pack(sizes: np.ndarray, budgets: np.ndarray, bins: int) -> list[list[int]]:
    """Rows as numbers of samples, chosen as `PackedRows` does; the last, less full rows are left out."""
    waiting: list[int] = []
    total, read, rows = np.zeros(3, np.int64), 0, []
    while True:
        while read < len(sizes) and np.all(total < bins * budgets):
            waiting.append(read)
            total = total + sizes[read]
            read += 1
        if read == len(sizes):
            return rows
        chosen = choose_row(sizes[waiting], budgets)
        rows.append([waiting[number] for number in chosen])
        total = total - sizes[rows[-1]].sum(axis=0)
        taken = set(chosen)
        waiting = [place for number, place in enumerate(waiting) if number not in taken]


def fill(rows: list[list[int]], sizes: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Shares of the visual, text and patch slots and of all token slots that hold something. [4]"""
    used = np.array([sizes[row].sum(axis=0) for row in rows[len(rows) // 10 :]]).mean(axis=0)
    return np.append(used / budgets, used[:2].sum() / budgets[:2].sum())


def grain_fill(packer: type, sizes: np.ndarray, budgets: np.ndarray, bins: int) -> np.ndarray:
    """As `fill`, of one of Grain's packers. [4]"""
    samples = [{name: np.ones(size, np.uint8) for name, size in zip(SIZES, row, strict=True)} for row in sizes.tolist()]
    lengths = dict(zip(SIZES, budgets.tolist(), strict=True))
    rows = packer(
        grain.MapDataset.source(samples).to_iter_dataset(), length_struct=lengths, num_packing_bins=bins, seed=0
    )
    used = np.array([[np.count_nonzero(row[name]) for name in SIZES] for row in rows]).mean(axis=0)
    return np.append(used / budgets, used[:2].sum() / budgets[:2].sum())


def batches_per_second(rows: list[list[int]], sizes: np.ndarray, spec: BatchSpec) -> float:
    """Samples per second of laying chosen samples out as batches."""
    pixels = np.ones((PATCHES, spec.patch_dim), np.uint8)
    began, done = time.perf_counter(), 0
    for start in range(0, min(len(rows), 8 * spec.rows) - spec.rows + 1, spec.rows):
        chosen = rows[start : start + spec.rows]
        spec.build([[_sample(*sizes[number], pixels) for number in row] for row in chosen], context_id=1)
        done += sum(map(len, chosen))
    return done / (time.perf_counter() - began)


def _sample(visual: int, text: int, patches: int, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """A sample of the given sizes whose first visual token is `<img>`."""
    tokens = np.ones(visual, np.int32)
    tokens[: visual - patches // 4] = 2
    count, numbers = np.arange(max(visual, text), dtype=np.int32), np.zeros(text, np.int32)
    return {
        "visual_tokens": tokens,
        "visual_positions": count[:visual],
        "text_tokens": numbers,
        "text_positions": count[:text],
        "text_targets": numbers,
        "text_weights": numbers,
        "text_source_ids": numbers,
        "text_sample_ids": numbers,
        "patches": pixels[:patches],
        "patch_coords": np.zeros((patches, 2), np.int32),
        "patch_blocks": np.ones(patches, np.int32),
    }


def percent(shares: np.ndarray) -> str:
    return " ".join(f"{share:6.1%}" for share in shares)


def measure(name: str, config: Config, count: int, bins: int) -> list[str]:
    """Lines about one mixture in rows of the config's slots."""
    data = config.data
    budgets = np.array([data.visual_slots, data.text_slots, data.patch_slots])
    sizes = MIXTURES[name](count, config, np.random.default_rng(0))
    began = time.perf_counter()
    rows = pack(sizes, budgets, bins)
    rate = sum(map(len, rows)) / (time.perf_counter() - began)
    best = best_fill(sizes, budgets)
    tokens = (best[:2] * budgets[:2]).sum() / budgets[:2].sum()
    first, fitting = (
        grain_fill(packer, sizes, budgets, bins)
        for packer in (grain.experimental.FirstFitPackIterDataset, grain.experimental.BestFitPackIterDataset)
    )
    made = batches_per_second(rows, sizes, BatchSpec(2, data.visual_slots, data.text_slots, data.patch_slots))
    share = sizes[:, 0].sum() / sizes[:, :2].sum()
    slots = f"{budgets[0]:,} + {budgets[1]:,} token and {budgets[2]:,} patch slots"
    return [
        f"{name}: {share:.0%} visual tokens, rows of {slots}",
        "                       visual   text patches tokens",
        f"  here, {bins} bins      {percent(fill(rows, sizes, budgets))}",
        f"  no packer more than  {percent(np.append(best, tokens))}",
        f"  Grain first-fit      {percent(first)}",
        f"  Grain best-fit       {percent(fitting)}",
        f"  choosing rows: {rate:,.0f} samples/s; making batches: {made:,.0f} samples/s",
    ]


def made_config(visual_slots: int, text_slots: int) -> Config:
    data = DataConfig(visual_slots=visual_slots, text_slots=text_slots, patch_slots=PATCHES, oversize="resize")
    return Config(model=ModelConfig(vision=VisionConfig()), images=ImageConfig(), data=data)


def report_mixtures(count: int, bins: int) -> None:
    plain = made_config(TOKENS // 2, TOKENS // 2)
    for name, make in MIXTURES.items():
        sizes = make(min(count, 1000), plain, np.random.default_rng(1))
        advice = advise_slots(sizes, PATCHES)
        for config in (plain, made_config(advice.visual_slots, advice.text_slots)):
            print("\n".join(measure(name, config, count, bins)), flush=True)
        print()


@dataclasses.dataclass(frozen=True)
class Texts:
    """Ten million made questions with answers of 1 to 60 letters."""

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"texts/{index}", (), ((f"What is {index}?", "a" * (1 + index * 2_654_435_761 % 60)),))

    def texts(self) -> list[str]:
        return []


def report_state(steps: tuple[int, ...]) -> None:
    """Prints how large the state is and how long restoring takes after so many steps over ten million samples."""
    tokenizer = train_tokenizer(("What is 0123456789? a b c d", *role_texts("qwen3-chat")) * 50, 400, None)
    data = DataConfig((SourceConfig("texts"),), 4, 8, 512, 8, template="qwen3-chat", system_message="S")
    config = complete(Config(model=ModelConfig(special_token_ids=()), data=data), tokenizer)
    dataset = make_dataset(config, [Texts()], tokenizer)
    iterator, taken = iter(dataset), 0
    for step in steps:
        began = time.perf_counter()
        for _ in range(step - taken):
            next(iterator)
        rate, taken = (step - taken) / (time.perf_counter() - began), step
        state = json.dumps(iterator.get_state(), indent=4)
        expected = next(iterator)
        taken += 1
        began = time.perf_counter()
        resumed = iter(dataset)
        resumed.set_state(json.loads(state))
        batch = next(resumed)
        seconds = time.perf_counter() - began
        resumed.close()
        same = np.array_equal(batch.tokens, expected.tokens) and np.array_equal(batch.sample_ids, expected.sample_ids)
        samples = len(json.loads(state)["waiting"])
        print(
            f"step {step:,}: state {len(state):,} bytes ({samples:,} samples wait); restored and next batch read in "
            f"{seconds:.2f} s, {'the same' if same else 'ANOTHER'}; {rate:,.0f} steps/s before",
            flush=True,
        )


def report_recipe(config: Config, samples: int) -> None:
    """Prints the slots that fit a recipe's own data."""
    opened = open_run(config, None)
    config = opened.config
    (stream,) = sample_streams(config, opened.sources, opened.tokenizer)
    found = [sample for sample in (stream[place] for place in range(samples)) if isinstance(sample, Usable)]
    if not found:
        raise UserError(f"none of {samples} samples fits a row of this recipe; see config.data.oversize")
    sizes = np.array([sizes_of(sample.features) for sample in found])
    data = config.data
    print(
        f"{len(found)} of {samples} samples fit a row; on average {', '.join(f'{m:.0f}' for m in sizes.mean(axis=0))}"
    )
    print("visual, text and patch slots      filled at best")
    multiple = 128 if data.visual_slots % 128 == 0 else 8
    slots = {
        "now": SlotAdvice(data.visual_slots, data.text_slots, data.patch_slots),
        "for all": advise_slots(sizes, data.patch_slots, multiple=multiple),
        "for 99%": advise_slots(sizes, data.patch_slots, keep=0.99, multiple=multiple),
    }
    for name, advice in slots.items():
        numbers = " ".join(f"{number:7,}" for number in advice)
        print(f"{name:8} {numbers}  {percent(best_fill(sizes, np.array(advice)))}")


@report_user_errors
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--samples", type=int, default=300, help="of the recipe's data (default: 300)")

    if any(word.startswith("--config") for word in argv):
        config, options = parse(argv, __doc__, add)
        report_recipe(config, options.samples)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5000, help="per mixture (default: 5000)")
    parser.add_argument("--state", action="store_true", help="measure states instead")
    parser.add_argument("--bins", type=int, default=DataConfig.packing_lookahead, help="rows' worth that wait")
    options = parser.parse_args(argv)
    if options.state:
        report_state((10, 1000, 10_000))
    else:
        report_mixtures(options.samples, options.bins)
    return 0


if __name__ == "__main__":
    sys.exit(main())
