"""Memory of the input over a long run: `python -m benchmarks.input_memory [--samples 10000000 --steps 2000]`.

Writes a JSON-lines file of captions of one image into a temporary folder, indexes it, and reads packed batches from it
as training does, in this process. Prints, after some of the steps, what the process holds of its own and which parts of
mapped files (libraries, the index) it has touched. The file is deleted at the end.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from navil_jax.config import Config, DataConfig, ImageConfig, ModelConfig, SourceConfig
from navil_jax.data.pipeline import make_dataset
from navil_jax.data.prompt import role_texts
from navil_jax.data.run import complete
from navil_jax.data.sources import open_source
from navil_jax.data.streams import sample_counts
from navil_jax.data.tokenizers.sentencepiece import train_tokenizer
from navil_jax.errors import UserError, report_user_errors

BLOCK = 100_000  # lines that are written at a time


def write_file(folder: Path, samples: int) -> Path:
    """Lines that differ in their number only."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((64, 48)).save(folder / "a.jpg")
    path = folder / "made.jsonl"
    with path.open("wb") as file:
        for start in range(0, samples, BLOCK):
            numbers = range(start, min(samples, start + BLOCK))
            file.write(b"".join(b'{"image":"a.jpg","text":"Number %d."}\n' % number for number in numbers))
    return path


def row(step: int, read: int, seconds: float) -> str:
    gc.collect()
    memory = psutil.Process().memory_info()
    own, files = (f"{size / 1e6:,.0f} MB" for size in (memory.rss - memory.shared, memory.shared))
    return f"| {step:,} | {read:,} | {own} | {files} | {seconds:,.0f} s |"


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="in the file (default: 1,000,000)")
    parser.add_argument("--steps", type=int, default=2000, help="batches (default: 2,000)")
    options = parser.parse_args(argv)
    if options.samples < 1 or options.steps < 1:
        raise UserError("--samples and --steps must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        entry = SourceConfig("made", kind="llava", path=str(write_file(Path(folder), options.samples)))
        data = DataConfig(
            (entry,), rows=2, visual_slots=64, text_slots=256, patch_slots=128, packing_lookahead=8, system_message="S"
        )
        images = ImageConfig(min_patches=4, max_patches=16)
        tokenizer = train_tokenizer(("Number 0123456789. a b c d", *role_texts("internlm2-chat")) * 50, 400, None)
        config = Config(model=ModelConfig(special_token_ids=()), images=images, data=data)
        batches = iter(make_dataset(complete(config, tokenizer), [open_source(entry, "train")], tokenizer))
        print("| step | samples read | memory of its own | mapped files | since the start |")
        print("| ---: | ---: | ---: | ---: | ---: |")
        shown, began = {max(1, options.steps * share // 20) for share in (1, 5, 10, 15, 20)}, time.perf_counter()
        for step in range(1, options.steps + 1):
            next(batches)
            if step in shown:
                read = sum(sample_counts(batches).values())
                print(row(step, read, time.perf_counter() - began), flush=True)
        batches.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
