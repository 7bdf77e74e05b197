"""How fast the engine answers: `python -m benchmarks.decode --config configs/x.py`.

Asks the same questions about images one at a time and then many together, in one run, with fresh parameters (their
values change no time). Every way is run once before it is timed, so that nothing is compiled then. Prints one table:

    prefill        tokens of prompts read in a second, one answer token each
    decode         new tokens in a second, of whole answers
    together       times as fast as one at a time
"""

import argparse
import sys
import time
from collections.abc import Sequence

import jax
from PIL import Image

from benchmarks.step_time import NO_STOP, QUESTION, table
from navil_jax.batch import SampleFeatures
from navil_jax.config import Config
from navil_jax.config.flags import parse
from navil_jax.config.ranges import Count, read_as
from navil_jax.data.run import open_run
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import report_user_errors
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import Engine
from navil_jax.generate.programs import length_of
from navil_jax.generate.sampling import Sampler
from navil_jax.model import params as model_params
from navil_jax.model.params import Params
from navil_jax.sharding import make_mesh


def seconds_of(engine: Engine, prompts: Sequence[SampleFeatures], new_tokens: int, together: bool) -> float:
    """The time of all answers."""
    began = time.perf_counter()
    for group in [prompts] if together else [[prompt] for prompt in prompts]:
        engine.generate(group, Sampler(), new_tokens, NO_STOP)
    return time.perf_counter() - began


def prompts_of(config: Config, tokenizer: Tokenizer, engine: Engine, count: int, side: int) -> list[SampleFeatures]:
    """Questions about images of different sizes; about none, where the model has no vision part."""
    assistant = Assistant(config, tokenizer, engine)
    if config.model.vision is None:
        return [assistant.prompt((), QUESTION, ()) for _ in range(count)]
    images = [Image.new("RGB", (side + 8 * (number % 4), side)) for number in range(count)]
    return [assistant.prompt((), QUESTION, [assistant.read_image(image)]) for image in images]


def rows_of(
    config: Config, params: Params, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, options: argparse.Namespace
) -> list[tuple[str, str]]:
    """Measures; the ways take turns, and each keeps its best time."""
    engines = {slots: Engine(config.model, params, mesh, slots=slots) for slots in (1, options.batch)}
    prompts = prompts_of(config, tokenizer, engines[1], options.batch, options.side)
    ways = {"one at a time": (engines[1], False), f"{options.batch} together": (engines[options.batch], True)}
    best: dict[tuple[str, int], float] = {}
    for turn in range(options.turns + 1):
        for name, (engine, together) in ways.items():
            for count in (1, options.new_tokens):
                took = seconds_of(engine, prompts, count, together)
                if turn:
                    best[name, count] = min(took, best.get((name, count), took))
    tokens = sum(map(length_of, prompts))
    new = options.batch * (options.new_tokens - 1)
    rows = [("prompts", f"{options.batch} of {tokens / options.batch:,.0f} tokens"), ("new tokens", f"{new:,}")]
    rates = []
    for name in ways:
        first, whole = best[name, 1], best[name, options.new_tokens]
        rates.append(new / max(whole - first, 1e-9))
        rows.append((f"prefill, {name}", f"{tokens / first:,.0f} tokens/s"))
        rows.append((f"decode, {name}", f"{rates[-1]:,.1f} tokens/s"))
    return [*rows, ("decode, together against one at a time", f"{rates[1] / rates[0]:.2f} times")]


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for name, default, text in (
        ("batch", 16, "questions, all decoded together the second way"),
        ("new-tokens", 64, "of every answer"),
        ("side", 224, "of the images, in pixels"),
        ("turns", 3, "each way is timed; the best counts"),
    ):
        add(f"--{name}", type=read_as(Count), default=default, help=f"{text} (default: {default})")
    add("--int8", action="store_true", help="round the decoder's matrices to 8 bits")


@report_user_errors
def main(argv: list[str] | None = None) -> int:
    config, options = parse(sys.argv[1:] if argv is None else argv, __doc__, _add_options)
    mesh, opened = make_mesh(config.mesh), open_run(config, None)
    config = opened.config
    params = model_params.initialise(config.model, config.seed)
    if options.int8:
        params = model_params.with_int8(config.model, params)
    size = sum(array.nbytes for array in jax.tree.leaves(params))
    device = f"{mesh.size} {jax.devices()[0].device_kind}, jax {jax.__version__}"
    rows = rows_of(config, params, mesh, opened.tokenizer, options)
    print(table([("recipe", options.config), ("devices", device), ("parameters", f"{size / 2**20:,.0f} MiB"), *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
