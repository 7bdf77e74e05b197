"""Evaluates a checkpoint: `python -m navil_jax.evaluate --checkpoint runs/x`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from navil_jax.config import Config, EvaluatorConfig
from navil_jax.config.flags import parse
from navil_jax.errors import UserError, report_user_errors

ABOUT = """Scores a checkpoint on held-out samples, with the evaluators of its run or with others.

the newest checkpoint of a run, on all held-out samples of its own sources:
  python -m navil_jax.evaluate --checkpoint runs/demo

answers written token by token, as chat would, for 50 samples of each source:
  python -m navil_jax.evaluate --checkpoint runs/demo --evaluators generated --samples 50

a released model on the held-out samples of a recipe:
  python -m navil_jax.evaluate --checkpoint NaViL-2B --config configs/mine.py

Evaluators: held_out (losses, accuracies, the table of kinds; the answer is right if every token is, the true ones before
it given), generated (greedy answers compared with the truth), or package.module:Class of your own.

Exit status: 0 good, 2 bad input (one line says what), 130 after Ctrl-C."""


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    config, options = parse(
        sys.argv[1:] if argv is None else argv, ABOUT, _add_options, default=Config(), command="evaluate"
    )
    if options.samples < 0:
        raise UserError(f"--samples: {options.samples} is negative")
    logging.set_verbosity(logging.ERROR)  # Orbax says at every reading that it only reads
    try:
        return _evaluate(config, options)
    except KeyboardInterrupt:
        print("\nstopped")
        return 130


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="run, checkpoint, Hugging Face folder or id on its hub")
    add("--evaluators", default="", metavar="A,B", help="names (default: those of the recipe or run)")
    add("--samples", type=int, default=0, metavar="N", help="of every source; 0: all (default)")
    add("--out", default="", metavar="DIR", help="folder for tables and pictures (default: WORKDIR/evaluate)")


def _evaluate(config: Config, options: argparse.Namespace) -> int:
    from navil_jax.convert.opened import open_checkpoint  # --help needs no JAX
    from navil_jax.data.run import complete
    from navil_jax.sharding import make_mesh, use_rules
    from navil_jax.train.evaluators import make_evaluator

    with open_checkpoint(options.checkpoint) as opened:
        own = opened.record.config if opened.record else opened.config
        if opened.tokenizer is None:
            raise UserError(f"{options.checkpoint}: holds no tokenizer; copy the files of one into the folder")
        sources = config.data.sources or own.data.sources
        if not sources:
            raise UserError("no data given: use --config RECIPE with the sources to score")
        data = dataclasses.replace(own.data if not options.config else config.data, sources=sources)
        data = dataclasses.replace(data, template=own.data.template, system_message=own.data.system_message)
        evaluators = tuple(EvaluatorConfig(name) for name in options.evaluators.split(",") if name)
        used = dataclasses.replace(own, data=data, mesh=config.mesh, evaluators=evaluators or own.evaluators)
        used = complete(used, opened.tokenizer)
        use_rules(used.mesh.rules)
        mesh = make_mesh(used.mesh)
        params = opened.restore(used.model, mesh)
    out = Path(options.out or Path(options.checkpoint) / "evaluate")
    out.mkdir(parents=True, exist_ok=True)
    for entry in used.evaluators:
        evaluator = make_evaluator(entry.name, used, mesh, opened.tokenizer)
        scores = evaluator.score(params, options.samples)
        print(evaluator.report(scores, out, final=True), flush=True)
    print(f"tables and pictures: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
