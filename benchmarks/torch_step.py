"""A small model's step on two CPU cores beside the same model in plain PyTorch: `python -m benchmarks.torch_step`.

A model of 12M parameters (encoder 4 x 192 with 3 heads, decoder 4 x 256 with 8 heads over 4, vocabulary 4,096) in
float32 and one row: 512 tokens, of which 308 are an image of 1,232 patches in scales of 16 x 22 and 22 x 40. PyTorch's
side is `benchmarks/torch_model.py`: scaled_dot_product_attention by scale, nothing recomputed, fused AdamW, the same
weights; and Qwen3 of transformers with the text's weights for decoding. Both sides have two threads and a C library
that keeps freed memory. They take turns, so that both meet the same load; losses and decoded tokens are compared.

    python3 -m venv torch-venv && torch-venv/bin/pip install torch==2.13.0 transformers
    python -m benchmarks.torch_step --torch-python torch-venv/bin/python
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from navil_jax.batch import Batch, BatchSpec, SampleFeatures
from navil_jax.config import Config, DataConfig, DecoderConfig, MeshConfig, ModelConfig, OptimizerConfig, VisionConfig
from navil_jax.console import markdown_table
from navil_jax.errors import UserError, report_user_errors
from navil_jax.generate.engine import Engine
from navil_jax.generate.sampling import Sampler
from navil_jax.model import params as model_params
from navil_jax.model import rope
from navil_jax.sharding import make_mesh
from navil_jax.train.host_memory import keep_freed_memory
from navil_jax.train.loss import token_scores, weighted_mean
from navil_jax.train.step import global_batch, initial_state, make_train_step

THREADS = 2
SCALES = ((16, 22), (22, 40))  # patches
BEFORE, TEXT = 4, 204  # text tokens before the image, and in all
PROMPT, NEW_TOKENS = 128, 64
ANSWERS = 16  # that are made together
TURNS = ("gradient", "step", "first", "answer", "firsts", "answers", "each")
TOLERANCE = 1e-5  # between the losses
KEPT_MEMORY = {"MMAP_MAX": 0, "TRIM_THRESHOLD": 2**31 - 1, "TOP_PAD": 2**28, "ARENA_MAX": 1}  # as keep_freed_memory


def model() -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(depth=4, width=192, num_heads=3, mlp_dim=768),
        decoder=DecoderConfig(
            family="qwen3",
            depth=4,
            width=256,
            mlp_dim=1024,
            num_heads=8,
            num_kv_heads=4,
            head_dim=32,
            vocab_size=4096,
            qk_norm=True,
            serial_visual_output=False,
        ),
        special_token_ids=tuple(range(4084, 4096)),
        compute_dtype="float32",
        remat="none",
    )


def text_model() -> ModelConfig:
    decoder = dataclasses.replace(model().decoder, attention_experts=False, ffn_experts=False)
    return dataclasses.replace(model(), vision=None, decoder=decoder, special_token_ids=())


def sample(config: ModelConfig) -> SampleFeatures:
    """Text, an image, text."""
    random, side = np.random.default_rng(0), config.encoder.merge_size
    patches = sum(rows * columns for rows, columns in SCALES)
    units = patches // config.encoder.unit_patches
    text = random.integers(0, 4000, TEXT).astype(np.int32)
    positions = np.arange(TEXT) + np.where(np.arange(TEXT) < BEFORE, 0, units)
    coords = [
        np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
        .reshape(rows // side, side, columns // side, side, 2)
        .swapaxes(1, 2)
        .reshape(-1, 2)
        for rows, columns in SCALES
    ]
    targets = np.append(text[1:], -1)
    targets[BEFORE - 1] = -1
    return {
        "visual_tokens": np.full(units, config.special_id("<IMG_CONTEXT>"), np.int32),
        "visual_positions": BEFORE + np.arange(units),
        "text_tokens": text,
        "text_positions": positions,
        "text_targets": targets,
        "text_weights": (targets >= 0).astype(np.float32),
        "text_source_ids": np.zeros(TEXT, np.int32),
        "text_sample_ids": np.ones(TEXT, np.int32),
        "patches": random.integers(0, 256, (patches, config.encoder.patch_dim), np.uint8),
        "patch_coords": np.concatenate(coords),
        "patch_blocks": np.repeat(np.arange(len(SCALES)) + 1, [len(own) for own in coords]),
    }


def settings() -> dict[str, Any]:
    """What PyTorch's side needs to know beside weights and batch."""
    optimizer, decoder = OptimizerConfig(), model().decoder
    return {
        "optimizer": {
            "lr": optimizer.peak_learning_rate,
            "betas": (optimizer.b1, optimizer.b2),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            "clip": optimizer.clip_norm,
        },
        "language": {
            "vocab_size": decoder.vocab_size,
            "hidden_size": decoder.width,
            "intermediate_size": decoder.mlp_dim,
            "num_hidden_layers": decoder.depth,
            "num_attention_heads": decoder.num_heads,
            "num_key_value_heads": decoder.num_kv_heads,
            "head_dim": decoder.head_dim,
            "rms_norm_eps": decoder.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},
            "tie_word_embeddings": False,
        },
        "prompts": np.random.default_rng(1).integers(0, 4000, (ANSWERS, PROMPT)).tolist(),
        "new_tokens": NEW_TOKENS,
    }


class Turns:
    """What is timed, by the names that PyTorch's side has for it."""

    def __init__(self, params: model_params.Params, batch: Batch):
        optimizer = OptimizerConfig(warmup_steps=0)
        data = DataConfig(rows=1, visual_slots=batch.visual_slots, text_slots=TEXT, patch_slots=batch.patches.shape[1])
        config = Config(model=model(), data=data, optimizer=optimizer)
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self.params, self.batch = params, global_batch(batch, mesh)
        self._gradient = jax.jit(jax.value_and_grad(_loss))
        self.state = initial_state(config, mesh, jax.tree.map(jnp.copy, params))
        self._step = make_train_step(config, mesh)
        text = model_params.flatten(params)
        text = {name: text[name] for name in model_params.flatten(model_params.shapes(text_model()))}
        self.alone, self.together = (
            Engine(text_model(), model_params.unflatten(text), slots=slots) for slots in (1, ANSWERS)
        )
        self.prompts = [prompt_of(np.array(tokens, np.int32)) for tokens in settings()["prompts"]]

    def gradient(self) -> float:
        return float(jax.block_until_ready(self._gradient(self.params, self.batch))[0])

    def step(self) -> float:
        self.state, metrics = self._step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def first(self) -> list[list[int]]:
        return self.alone.generate(self.prompts[:1], Sampler(), 1, stop_id=-1)

    def answer(self) -> list[list[int]]:
        return self.alone.generate(self.prompts[:1], Sampler(), NEW_TOKENS, stop_id=-1)

    def firsts(self) -> list[list[int]]:
        return self.together.generate(self.prompts, Sampler(), 1, stop_id=-1)

    def answers(self) -> list[list[int]]:
        return self.together.generate(self.prompts, Sampler(), NEW_TOKENS, stop_id=-1)

    def each(self) -> list[list[int]]:
        return self.alone.generate(self.prompts, Sampler(), NEW_TOKENS, stop_id=-1)


def prompt_of(tokens: np.ndarray) -> SampleFeatures:
    """A prompt of text tokens [n] int32."""
    empty = np.zeros(0, np.int32)
    return {
        **dict.fromkeys(("visual_tokens", "visual_positions", "patch_blocks"), empty),
        **dict.fromkeys(("text_targets", "text_weights", "text_source_ids", "text_sample_ids"), 0 * tokens),
        "text_tokens": tokens,
        "text_positions": np.arange(len(tokens), dtype=np.int32),
        "patches": np.zeros((0, model().encoder.patch_dim), np.uint8),
        "patch_coords": np.zeros((0, 2), np.int32),
    }


def _loss(params: model_params.Params, batch: Batch) -> jax.Array:
    bound = model_params.bind(model(), params)
    x, _ = bound(batch)
    text = slice(batch.visual_slots, None)
    scores = token_scores(*bound.head_inputs(x[:, text]), batch.targets[:, text])
    return weighted_mean(scores.cross_entropy, batch.loss_weights[:, text])


def write(folder: Path, params: model_params.Params, features: SampleFeatures) -> None:
    """Weights by name, the batch and the settings, for PyTorch's side."""
    np.savez(folder / "weights.npz", **{name: np.asarray(x) for name, x in model_params.flatten(params).items()})
    config = model()
    angles = rope.vision_angles(config.encoder, features["patch_coords"])
    cos, sin = rope.decoder_rotation(config.decoder, jnp.arange(len(features["visual_tokens"]) + TEXT)[None])
    np.savez(
        folder / "batch.npz",
        patches=features["patches"],
        vision_cos=np.cos(angles),
        vision_sin=np.sin(angles),
        cos=cos[0],
        sin=sin[0],
        text=features["text_tokens"].astype(np.int64),
        targets=features["text_targets"].astype(np.int64),
        before=BEFORE,
        sizes=[rows * columns for rows, columns in SCALES],
    )
    (folder / "settings.json").write_text(json.dumps(settings()))


@contextlib.contextmanager
def torch_side(python: str, folder: Path) -> Iterator[tuple[dict[str, Any], Callable[[str], tuple[float, Any]]]]:
    """Starts PyTorch's side: what it says of itself, and name of a turn -> seconds and what was found."""
    script = Path(__file__).with_name("torch_model.py")
    environment = os.environ | {f"MALLOC_{name}_": str(value) for name, value in KEPT_MEMORY.items()}
    command = [python, str(script), str(folder), str(THREADS)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def answer() -> dict[str, Any]:
            line = process.stdout.readline()  # type: ignore[union-attr]  # a pipe, see above
            if not line:
                raise UserError(f"--torch-python {python}: PyTorch's side ended, see its error above")
            return json.loads(line)

        def turn(name: str) -> tuple[float, Any]:
            print(name, file=process.stdin, flush=True)
            found = answer()
            return found["seconds"], found["found"]

        yield answer(), turn
        process.stdin.close()


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def measure(ours: Turns, theirs: Callable[[str], tuple[float, Any]], names: Sequence[str], runs: int) -> dict[str, Any]:
    """Seconds of both sides in turn, after two that do not count.

    Raises:
      UserError: the sides do not find the same.
    """
    times: dict[str, Any] = {}
    for name in names:
        pairs = [(_timed(getattr(ours, name)), theirs(name)) for _ in range(runs + 2)]
        for (_, own), (_, other) in pairs:
            same = own == other if isinstance(own, list) else abs(own - other) <= TOLERANCE * abs(other)
            if not same:
                raise UserError(f"{name}: the sides differ, {own} here and {other} in PyTorch")
        times[name] = [(own[0], other[0]) for own, other in pairs[2:]]
    return times


def report(times: dict[str, Any]) -> str:
    """A line for each turn; the ratio is the median of those of each pair."""
    titles = {
        "gradient": "forward and backward",
        "step": "training step, AdamW",
        "first": f"first token after {PROMPT}",
        "answer": f"{NEW_TOKENS} tokens after {PROMPT}",
        "firsts": f"{ANSWERS} first tokens, together",
        "answers": f"{ANSWERS} answers of {NEW_TOKENS}, together",
        "each": f"{ANSWERS} answers of {NEW_TOKENS}, one at a time",
    }
    lines = []
    for name, pairs in times.items():
        own, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        best, best_other = (min(side) for side in zip(*pairs, strict=True))
        lines.append(
            {
                "what": titles[name],
                "ms": f"{1e3 * own:,.1f}",
                "PyTorch, ms": f"{1e3 * other:,.1f}",
                "ratio": f"{statistics.median(a / b for a, b in pairs):.2f}",
                "least, ms": f"{1e3 * best:,.1f}",
                "PyTorch, least": f"{1e3 * best_other:,.1f}",
                "ratio of least": f"{best / best_other:.2f}",
            }
        )
    return markdown_table(lines)


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", required=True, metavar="PATH", help="interpreter that has torch")
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each side (default: 15)")
    parser.add_argument("--only", nargs="+", choices=TURNS, help="what is timed (default: all)")
    options = parser.parse_args(argv)
    if options.runs < 1:
        raise UserError("--runs must be at least 1")
    if not Path(options.torch_python).exists():
        raise UserError(f"--torch-python {options.torch_python}: there is no such file")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    keep_freed_memory()
    config, features = model(), sample(model())
    params = model_params.initialise(config, 0)
    units = len(features["visual_tokens"])
    spec = BatchSpec(1, visual_slots=units, text_slots=TEXT, patch_slots=len(features["patches"]))
    ours = Turns(params, spec.build([[features]], config.special_id("<IMG_CONTEXT>")))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), params, features)
        with torch_side(options.torch_python, Path(folder)) as (about, theirs):
            names = [name for name in options.only or TURNS if about["language"] or name in ("gradient", "step")]
            times = measure(ours, theirs, names, options.runs)
    count = sum(x.size for x in model_params.flatten(params).values())
    print(
        f"{count:,} parameters, float32, {THREADS} threads, jax {jax.__version__}, torch {about['torch']}, medians of "
        f"{options.runs} runs in turn; losses agree to {TOLERANCE:g}\n\n{report(times)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
