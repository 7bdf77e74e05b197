"""How fast a recipe runs here: `python -m benchmarks.step_time --config configs/x.py`.

Trains some steps on the recipe's own data (from fresh parameters; nothing is saved), then reads prompts with images
of ten sizes and decodes, all through the code that training and chat use. Prints one table:

    training   time of a step with and without waiting for data, throughput of real tokens and images, shares of
               slots that hold padding, compile time, compilations of the training step
    prefill    compiled programs and time of the ten prompts, once each program exists
    decoding   compiled programs and tokens per second, one conversation at a time
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator

import jax
from PIL import Image

from navil_jax.config import Config
from navil_jax.config.flags import parse
from navil_jax.data.pipeline import make_dataset
from navil_jax.data.run import OpenRun, open_run
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import UserError, report_user_errors
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import Engine, Request
from navil_jax.generate.sampling import Sampler
from navil_jax.model.params import Params, flatten
from navil_jax.sharding import make_mesh
from navil_jax.train.host_memory import keep_freed_memory
from navil_jax.train.profiling import compilations
from navil_jax.train.step import global_batch, initial_params, initial_state, make_train_step

ASPECTS = (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16)  # width against height of the ten images, in turn
MOST_PATCHES = 4096  # of an image; fewer where config.images.max_patches is less
QUESTION = "What do you see?"
NO_STOP = -1
Row = tuple[str, str]  # what, and how much


def training_rows(opened: OpenRun, mesh: jax.sharding.Mesh, steps: int) -> tuple[list[Row], Params]:
    """Measures `steps` steps after a first one that compiles; also gives the parameters they end with."""
    config = opened.config
    iterator = iter(make_dataset(config, opened.sources, opened.tokenizer))
    state = initial_state(config, mesh, initial_params(config, mesh))
    train_step = make_train_step(config, mesh)
    batch = global_batch(next(iterator), mesh)
    waits, times, done = [], [], []
    with compilations("train_step") as compiled:
        began = time.perf_counter()
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)
        first = time.perf_counter() - began
        for _ in range(steps):
            began = time.perf_counter()
            batch = global_batch(next(iterator), mesh)
            waits.append(time.perf_counter() - began)
            state, metrics = train_step(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - began)
            done.append(jax.device_get(metrics))
    tokens, images, patches = (
        float(sum(metrics[name] for metrics in done)) for name in ("tokens", "images", "patches")
    )
    data, total = config.data, sum(times)
    slots = steps * data.rows
    compute = [whole - wait for whole, wait in zip(times, waits, strict=True)]
    rows = [
        ("training step, median", _milliseconds(statistics.median(compute))),
        ("the same with reading data", _milliseconds(statistics.median(times))),
        ("tokens per second (real ones)", f"{tokens / total:,.0f}"),
        ("images per second", f"{images / total:,.1f}"),
        ("padding, share of token slots", f"{1 - tokens / (slots * (data.visual_slots + data.text_slots)):.1%}"),
        ("padding, share of patch slots", f"{1 - patches / (slots * data.patch_slots):.1%}"),
        ("compile time of the training step", f"{first - statistics.median(compute):.1f} s"),
        ("compilations of the training step", str(len(compiled))),
    ]
    return rows, state.params


def example_images(config: Config) -> Iterator[Image.Image]:
    """Ten sizes, from the fewest to the most patches of the recipe in equal ratios."""
    images, side = config.images, config.model.vision.patch_size
    most = min(images.max_patches, MOST_PATCHES)
    for number, aspect in zip(range(10), itertools.cycle(ASPECTS), strict=False):
        pixels = images.min_patches * (most / images.min_patches) ** (number / 9) * side**2
        yield Image.new("RGB", (max(1, round((pixels * aspect) ** 0.5)), max(1, round((pixels / aspect) ** 0.5))))


def inference_rows(
    config: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, params: Params, new_tokens: int
) -> list[Row]:
    """Reads each prompt twice, so that the second time nothing is compiled, then decodes after the last one."""
    engine = Engine(config.model, params, mesh)
    assistant = Assistant(config, tokenizer, engine)
    if config.model.vision is None:
        prompts = [assistant.prompt((), QUESTION * n, ()) for n in range(1, 11)]
    else:
        prompts = [assistant.prompt((), QUESTION, [assistant.read_image(image)]) for image in example_images(config)]
    for prompt in prompts:
        engine.programs.prefill([prompt], new_tokens)
    times = []
    for prompt in prompts:
        began = time.perf_counter()
        jax.block_until_ready(engine.programs.prefill([prompt], new_tokens))
        times.append(time.perf_counter() - began)
    lengths = [len(prompt["visual_tokens"]) + len(prompt["text_tokens"]) for prompt in prompts]
    moments = list[float]()
    for _ in range(2):
        moments.clear()
        tick = lambda _: moments.append(time.perf_counter())  # noqa: E731
        engine.submit(Request(prompts[-1], Sampler(), new_tokens, NO_STOP, on_token=tick))
        while engine.step():
            pass
    return [
        ("prefill, ten prompts of", f"{min(lengths)} to {max(lengths)} tokens"),
        ("compiled prefill programs", str(engine.compilations["prefill"])),
        ("prefill, median", _milliseconds(statistics.median(times))),
        ("prefill, fastest and slowest", f"{_milliseconds(min(times))}, {_milliseconds(max(times))}"),
        ("compiled decoding programs", str(engine.compilations["decode"])),
        ("decoding, tokens per second", f"{(new_tokens - 1) / (moments[-1] - moments[0]):,.1f}"),
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def table(rows: list[Row]) -> str:
    return "\n".join(["| what | measured |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=10, help="training steps to measure (default: 10)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to decode (default: 64)")


@report_user_errors
def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    config, options = parse(sys.argv[1:] if argv is None else argv, __doc__, _add_options)
    if options.steps < 1 or options.new_tokens < 2:
        raise UserError("--steps must be at least 1 and --new-tokens at least 2")
    mesh, opened = make_mesh(config.mesh), open_run(config, None)
    config, tokenizer = opened.config, opened.tokenizer
    data, device = config.data, jax.devices()[0].device_kind
    rows, params = training_rows(opened, mesh, options.steps)
    count = sum(x.size for x in flatten(params).values())
    rows = [
        ("recipe", options.config),
        ("devices", f"{mesh.size} {device}, jax {jax.__version__}"),
        ("parameters", f"{count:,}"),
        ("batch", f"{data.rows} rows of {data.visual_slots} + {data.text_slots} token, {data.patch_slots} patch slots"),
        *rows,
        *inference_rows(config, mesh, tokenizer, params, options.new_tokens),
    ]
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
