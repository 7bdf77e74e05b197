"""Weights both ways: `python -m navil_jax.convert {init,import,export,verify,inspect} ...`."""

import argparse
import functools
import importlib
import inspect
import sys
from collections.abc import Sequence

from navil_jax.config.flags import parse
from navil_jax.config.ranges import Bytes, read_as
from navil_jax.convert.stored import PARAM_DTYPES, SHARD_BYTES
from navil_jax.errors import Parser, report_user_errors
from navil_jax.paths import given_path, local_path, new_folder

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


@functools.partial(report_user_errors, stopped="stopped; the same command goes on from here")
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(next((argument for argument in argv if not argument.startswith("-")), ""))
    options, rest = parser.parse_known_args(argv)
    options.overrides = rest
    if options.overrides and options.run != _init:
        parser.error(f"unrecognized arguments: {' '.join(options.overrides)}")
    return options.run(options)


def _parser(chosen: str) -> argparse.ArgumentParser:
    """Options of all commands; only the chosen one's module is imported, as `--help` needs no JAX."""
    parser = Parser(
        prog="python -m navil_jax.convert",
        description="Weights both ways.",
        epilog=EXAMPLES,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, description: str | None = None) -> argparse.ArgumentParser:
        lines = [line for line in EXAMPLES.splitlines() if line.startswith(f"  python -m navil_jax.convert {name} ")]
        epilog = "\n".join(["for example:", *lines]) if lines else None
        return commands.add_parser(name, help=text, description=description, epilog=epilog)

    command = add("init", "a pre-trained InternLM2, Qwen2.5 or Qwen3 -> a NaViL ready for the first stage")
    if chosen == "init":
        from navil_jax.convert.upcycling import initialise_from

        command.description = (inspect.getdoc(initialise_from) or "").split("Args:")[0]
    command.add_argument(
        "language_model", type=local_path, help="folder of InternLM2, Qwen2.5 or Qwen3 in the Hugging Face layout"
    )
    command.add_argument("target", type=new_folder, help="new folder, for --config.init_from of the training run")
    command.add_argument(
        "--config",
        required=True,
        type=given_path,
        metavar="FILE",
        help="recipe whose model is built; --config.a.b=c changes it",
    )
    command.add_argument("--tokenizer", type=given_path, metavar="DIR", help="if the language model's folder has none")
    command.set_defaults(run=_init)

    command = add(
        "import",
        "a folder of NaViL, InternLM2, Qwen2.5 or Qwen3 -> a checkpoint",
        "Converts config.json, weights (safetensors or .bin, sharded or not) and tokenizer, one parameter at a time. "
        "Every tensor is accounted for.",
    )
    command.add_argument("source", type=local_path, help="folder in the Hugging Face layout")
    command.add_argument("target", type=new_folder, help="new folder")
    command.add_argument("--tokenizer", type=given_path, metavar="DIR", help="if the folder has none")
    command.add_argument("--dtype", choices=PARAM_DTYPES, help="of the parameters (default: as stored)")
    command.set_defaults(run=_import)

    command = add(
        "export",
        "a checkpoint -> a folder that the released PyTorch code loads",
        "Writes config.json, sharded safetensors with index, tokenizer, preprocessing, generation config and a model "
        "card. An imported model that was not trained comes back byte for byte.",
    )
    command.add_argument("source", type=local_path, help="workdir of a run, or its newest checkpoint")
    command.add_argument("target", type=new_folder, help="new folder")
    command.add_argument("--dtype", default="", choices=PARAM_DTYPES, help="of the tensors (default: as stored)")
    command.add_argument(
        "--shard-bytes",
        type=read_as(Bytes),
        default=SHARD_BYTES,
        metavar="N",
        help="most bytes per file (default: %(default)s)",
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
    initialise_from(options.language_model, recipe, options.target, options.tokenizer or "")
    print(f"{options.target}: written; train from it with --config.init_from={options.target}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from navil_jax.convert.importing import import_checkpoint

    import_checkpoint(options.source, options.target, options.tokenizer or "", options.dtype)
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
