"""Weights both ways: `python -m navil_jax.convert {init,import,export,verify,inspect} ...`."""

import argparse
import sys
from collections.abc import Sequence

from absl import logging

from navil_jax.config.flags import parse
from navil_jax.convert import inspecting
from navil_jax.convert.exporting import SHARD_BYTES, export_checkpoint
from navil_jax.convert.importing import PARAM_DTYPES, import_checkpoint
from navil_jax.convert.upcycling import initialise_from
from navil_jax.convert.verify import command as verify
from navil_jax.errors import report_user_errors
from navil_jax.paths import local_path

EXAMPLES = """
a NaViL-2B to train from InternLM2-1.8B:
  python -m navil_jax.convert init internlm2-1_8b runs/navil_2b_init --config configs/navil_2b.py
  python -m navil_jax.train --config configs/navil_2b_s1_1.py

a released model, to talk with or to train on:
  python -m navil_jax.convert import NaViL-2B runs/navil-2b

back to PyTorch:
  python -m navil_jax.convert export runs/navil_2b_s2 NaViL-2B-mine
  python -m navil_jax.convert verify runs/navil_2b_s2 NaViL-2B-mine

`python -m navil_jax.convert COMMAND --help` says more. Exit status: 0 good, 1 verified and different, 2 bad input (one
line says what), 130 after Ctrl-C; the same command then goes on.
"""


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options, options.overrides = parser.parse_known_args(argv)
    if options.overrides and options.run != _init:
        parser.error(f"unknown arguments: {' '.join(options.overrides)}")
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every file
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(
        prog="python -m navil_jax.convert", description="Weights both ways.", epilog=EXAMPLES, **layout
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "init",
        help="a pre-trained InternLM2 or Qwen3 -> a NaViL ready for the first stage",
        description=initialise_from.__doc__.split("    Args:")[0].replace("\n    ", "\n"),
        **layout,
    )
    command.add_argument(
        "language_model", type=local_path, help="folder of InternLM2 or Qwen3 in the Hugging Face layout"
    )
    command.add_argument("target", type=local_path, help="new folder, for --config.init_from of the training run")
    command.add_argument(
        "--config", required=True, metavar="FILE", help="recipe whose model is built; --config.a.b=c changes it"
    )
    command.add_argument("--tokenizer", default="", metavar="DIR", help="if the language model's folder has none")
    command.set_defaults(run=_init)

    command = commands.add_parser(
        "import",
        help="a released NaViL, InternLM2 or Qwen3 folder -> a checkpoint",
        description="Converts config.json, weights (safetensors or .bin, sharded or not) and tokenizer, one parameter "
        "at a time. Every tensor is accounted for.",
        **layout,
    )
    command.add_argument("source", type=local_path, help="folder in the Hugging Face layout")
    command.add_argument("target", type=local_path, help="new folder")
    command.add_argument("--tokenizer", default="", metavar="DIR", help="if the folder has none")
    command.add_argument("--dtype", default="", choices=PARAM_DTYPES, help="of the parameters (default: as stored)")
    command.set_defaults(run=_import)

    command = commands.add_parser(
        "export",
        help="a checkpoint -> a folder that the released PyTorch code loads",
        description="Writes config.json, sharded safetensors with index, tokenizer, preprocessing, generation config "
        "and a model card. An imported model that was not trained comes back byte for byte.",
        **layout,
    )
    command.add_argument("source", type=local_path, help="workdir of a run, or its newest checkpoint")
    command.add_argument("target", type=local_path, help="new folder")
    command.add_argument("--dtype", default="", choices=PARAM_DTYPES, help="of the tensors (default: as stored)")
    command.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="most bytes per file (default: %(default)s)"
    )
    command.add_argument("--ema", action=argparse.BooleanOptionalAction, help=verify.EMA)
    command.set_defaults(run=_export)

    for name, module, text in (
        ("verify", verify, "a checkpoint against the released outputs, or two checkpoints against each other"),
        ("inspect", inspecting, "what a folder holds: architecture, parameters, dtypes, what is missing"),
    ):
        command = commands.add_parser(name, help=text, description=module.__doc__, **layout)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _init(options: argparse.Namespace) -> int:
    recipe, _ = parse(["--config", options.config, *options.overrides], __doc__)
    initialise_from(options.language_model, recipe, options.target, options.tokenizer)
    print(f"{options.target}: written; train from it with --config.init_from={options.target}")
    return 0


def _import(options: argparse.Namespace) -> int:
    import_checkpoint(options.source, options.target, options.tokenizer, options.dtype)
    print(f"{options.target}: written; train from it with --config.init_from={options.target}")
    return 0


def _export(options: argparse.Namespace) -> int:
    averaged = export_checkpoint(options.source, options.target, options.dtype, options.shard_bytes, options.ema)
    said = "written, with the running averages of the parameters" if averaged else "written"
    asked = "" if options.ema is None else f" --{'' if options.ema else 'no-'}ema"
    print(f"{options.target}: {said}; check it with: verify {options.source} {options.target}{asked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
