"""Answers a file of requests: `python -m navil_jax.generate FILE.jsonl --checkpoint DIR --out OUT.jsonl`."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from navil_jax.config import MeshConfig
from navil_jax.config.ranges import Amount, Count, NotNegative, PositiveShare, Seed, read_as
from navil_jax.errors import Parser, UserError, report_user_errors
from navil_jax.paths import given_path, local_path, new_file

if TYPE_CHECKING:
    from navil_jax.generate.assistant import Assistant

ABOUT = """Answers requests, one JSON object a line, many at a time; a line of answers for each, in the same order.

  {"id": 7, "prompt": "What is this?", "images": ["cat.png"], "max_new_tokens": 64}
  {"id": 8, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.7, "seed": 1, "stop": ["."]}
->
  {"id": 7, "text": "A cat.", "reason": "stop", "prompt_tokens": 612, "new_tokens": 4}

  python -m navil_jax.generate requests.jsonl --checkpoint runs/x --out answers.jsonl

what tokens of a prompt look at, as drawings over the image (own --help):
  python -m navil_jax.generate attention --checkpoint runs/x --image cat.png --prompt "What is this?" --out look

The same command goes on where it was stopped. A line that cannot be used is answered by an "error"; blank ones hold no
request.

Exit status: 0 good, 2 bad input (one line says what), 130 after Ctrl-C."""


@functools.partial(report_user_errors, stopped="stopped; the same command goes on from here")
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["attention"]:
        from navil_jax.generate.attention_page import run  # generate's --help needs no JAX

        return run(argv[1:], _assistant)
    options = _parser().parse_args(argv)
    if not options.file.is_file():
        raise UserError(f"{options.file}: no such file")
    if options.out.exists() and options.out.samefile(options.file):
        raise UserError(f"--out {options.out}: is the file of requests; give another")
    from navil_jax.convert.opened import open_checkpoint  # --help needs none of these
    from navil_jax.evaluate.answers import hash_of
    from navil_jax.evaluate.journal import same_settings
    from navil_jax.generate.batch import Lines, Output, answer_lines
    from navil_jax.generate.sampling import Sampler

    sampler = Sampler(options.temperature, options.top_k, options.top_p, options.seed)
    with Output(options.out) as output:
        with open_checkpoint(options.checkpoint) as opened:
            known = {"file": options.file.name, "sha256": hash_of([options.file]), "step": opened.step}
        given = {name: value for name, value in vars(options).items() if name not in ("file", "out", "slots")}
        same_settings(Path(f"{options.out}.settings.json"), known | given, options.out)
        assistant = _assistant(options.checkpoint, options.slots, options.int8)
        lines = Lines(assistant, options.file.parent, sampler, options.max_new_tokens)
        answer_lines(lines, options.file, output)
    failed = f"; {output.failed:,} of them hold an error" if output.failed else ""
    print(f"{output.done:,} answers: {options.out}{failed}")
    return 0


def _assistant(checkpoint: str, slots: int = 1, int8: bool = False) -> "Assistant":
    from navil_jax.convert.loading import load_assistant
    from navil_jax.sharding import make_mesh

    return load_assistant(checkpoint, make_mesh(MeshConfig()), slots, int8=int8)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m navil_jax.generate", description=ABOUT)
    add = parser.add_argument
    add("file", type=lambda text: local_path(given_path(text)), metavar="FILE", help="requests, one a line")
    text = "workdir of a training run, or its checkpoint folder"
    add("--checkpoint", required=True, type=given_path, metavar="DIR", help=text)
    add("--out", required=True, type=new_file, metavar="FILE", help="answers")
    add("--slots", type=read_as(Count), default=8, metavar="N", help="requests decoded together (default: 8)")
    for name, kind, default in (
        ("temperature", NotNegative, 0.0),
        ("top-k", Amount, 0),
        ("top-p", PositiveShare, 1.0),
        ("seed", Seed, 0),
        ("max-new-tokens", Count, 1024),
    ):
        add(f"--{name}", type=read_as(kind), default=default, help=f"of lines without (default: {default})")
    text = "round the decoder's matrices to 8 bits: less memory, answers may differ a little"
    add("--int8", action="store_true", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
