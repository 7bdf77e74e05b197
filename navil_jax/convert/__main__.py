"""Weights both ways: `python -m navil_jax.convert {init,import,export,verify,inspect} ...`."""

# ruff: noqa: E402

import os
import signal
import sys
from types import FrameType

STOPPED = "stopped; the same command goes on from here"


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends the process: what is written so far is whole, and nothing that a library prints on the way is of use."""
    os.write(sys.stderr.fileno(), f"{STOPPED}\n".encode())
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _stop)  # before the imports, which take a second

import argparse
import importlib
import inspect
from collections.abc import Sequence

from absl import logging

from navil_jax.config.flags import parse
from navil_jax.convert.stored import PARAM_DTYPES, SHARD_BYTES
from navil_jax.errors import report_user_errors
from navil_jax.paths import local_path

EMA = "running averages of the trained parameters in their place (default: where the run's evaluations use them)"
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
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(next((argument for argument in argv if not argument.startswith("-")), ""))
    options, rest = parser.parse_known_args(argv)
    options.overrides = rest
    if options.overrides and options.run != _init:
        parser.error(f"unknown arguments: {' '.join(options.overrides)}")
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every file
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130


def _parser(chosen: str) -> argparse.ArgumentParser:
    """Options of all commands; only the chosen one's module is imported, as `--help` needs no JAX."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m navil_jax.convert",
        description="Weights both ways.",
        epilog=EXAMPLES,
        formatter_class=layout,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, description: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=description, formatter_class=layout, allow_abbrev=False)

    command = add("init", "a pre-trained InternLM2, Qwen2.5 or Qwen3 -> a NaViL ready for the first stage")
    if chosen == "init":
        from navil_jax.convert.upcycling import initialise_from

        command.description = (inspect.getdoc(initialise_from) or "").split("Args:")[0]
    command.add_argument(
        "language_model", type=local_path, help="folder of InternLM2, Qwen2.5 or Qwen3 in the Hugging Face layout"
    )
    command.add_argument("target", type=local_path, help="new folder, for --config.init_from of the training run")
    command.add_argument(
        "--config", required=True, metavar="FILE", help="recipe whose model is built; --config.a.b=c changes it"
    )
    command.add_argument("--tokenizer", default="", metavar="DIR", help="if the language model's folder has none")
    command.set_defaults(run=_init)

    command = add(
        "import",
        "a folder of NaViL, InternLM2, Qwen2.5 or Qwen3 -> a checkpoint",
        "Converts config.json, weights (safetensors or .bin, sharded or not) and tokenizer, one parameter at a time. "
        "Every tensor is accounted for.",
    )
    command.add_argument("source", type=local_path, help="folder in the Hugging Face layout")
    command.add_argument("target", type=local_path, help="new folder")
    command.add_argument("--tokenizer", default="", metavar="DIR", help="if the folder has none")
    command.add_argument("--dtype", choices=PARAM_DTYPES, help="of the parameters (default: as stored)")
    command.set_defaults(run=_import)

    command = add(
        "export",
        "a checkpoint -> a folder that the released PyTorch code loads",
        "Writes config.json, sharded safetensors with index, tokenizer, preprocessing, generation config and a model "
        "card. An imported model that was not trained comes back byte for byte.",
    )
    command.add_argument("source", type=local_path, help="workdir of a run, or its newest checkpoint")
    command.add_argument("target", type=local_path, help="new folder")
    command.add_argument("--dtype", default="", choices=PARAM_DTYPES, help="of the tensors (default: as stored)")
    command.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="most bytes per file (default: %(default)s)"
    )
    command.add_argument("--ema", action=argparse.BooleanOptionalAction, help=EMA)
    command.set_defaults(run=_export)

    for name, module_name, text in (
        ("verify", "verify.command", "a checkpoint against the released outputs, or two checkpoints with each other"),
        ("inspect", "inspecting", "what a folder holds: architecture, parameters, dtypes, what is missing"),
    ):
        command = add(name, text)
        if chosen == name:
            module = importlib.import_module(f"navil_jax.convert.{module_name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _init(options: argparse.Namespace) -> int:
    from navil_jax.convert.upcycling import initialise_from

    recipe, _ = parse(["--config", options.config, *options.overrides], __doc__)
    initialise_from(options.language_model, recipe, options.target, options.tokenizer)
    print(f"{options.target}: written; train from it with --config.init_from={options.target}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from navil_jax.convert.importing import import_checkpoint

    import_checkpoint(options.source, options.target, options.tokenizer, options.dtype)
    print(f"{options.target}: written; train from it with --config.init_from={options.target}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from navil_jax.convert.exporting import export_checkpoint

    averaged = export_checkpoint(options.source, options.target, options.dtype, options.shard_bytes, options.ema)
    said = "written, with the running averages of the parameters" if averaged else "written"
    asked = "" if options.ema is None else f" --{'' if options.ema else 'no-'}ema"
    print(f"{options.target}: {said}; check it with: verify {options.source} {options.target}{asked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
