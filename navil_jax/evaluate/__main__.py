"""Evaluates a checkpoint: `python -m navil_jax.evaluate --checkpoint runs/x`, or scores answers that are there."""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from navil_jax.config import Config, EvaluatorConfig
from navil_jax.config.flags import PREFIX, load_config, parse, split_overrides
from navil_jax.config.ranges import Amount, read_as
from navil_jax.console import say
from navil_jax.errors import UserError, report_user_errors
from navil_jax.evaluate.score import score
from navil_jax.paths import given_path, is_remote, new_folder

if TYPE_CHECKING:
    from navil_jax.train.evaluators import Evaluator

ABOUT = """Scores a checkpoint on held-out samples, with the evaluators of its run or with others.

the newest checkpoint of a run, on all held-out samples of its own sources:
  python -m navil_jax.evaluate --checkpoint runs/demo

answers written token by token, as chat would, for 50 samples of each source:
  python -m navil_jax.evaluate --checkpoint runs/demo --evaluators generated --samples 50

a released model on the held-out samples of a recipe (model, image sizes and prompt are those of the checkpoint):
  python -m navil_jax.evaluate --checkpoint NaViL-2B --config configs/mine.py

a benchmark of the paper, from the files that it is published in, resumable:
  python -m navil_jax.evaluate --checkpoint NaViL-2B --benchmark docvqa --data DocVQA_VAL.tsv --out scores

answers that are there already, scored as the benchmark's reference code does (own --help):
  python -m navil_jax.evaluate score answers.jsonl --benchmark docvqa

Evaluators: held_out (losses, accuracies, the table of kinds; an answer is right if every token is, the true ones before
it given), generated (greedy answers compared with the truth), or package.module:Class of your own.

Exit status: 0 good, 2 bad input (one line says what), 130 after Ctrl-C."""


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["score"]:
        return score(argv[1:])
    overrides, rest = split_overrides(argv)
    known = [f"{PREFIX}{key}={text}" for key, text in overrides.items() if not key.startswith("data.sources.")]
    _, options = _parse([*rest, *known], Config())  # which sources there are is known once the checkpoint is open
    _check_together(options)
    if options.benchmark:
        return report_user_errors(_on_hosts, "stopped; the same command goes on from here")(_benchmark, argv, options)
    return _on_hosts(_evaluate, argv, options)


def _on_hosts(
    work: Callable[[Sequence[str], argparse.Namespace], int], argv: Sequence[str], options: argparse.Namespace
) -> int:
    """Does the work on every host of a pod."""
    from navil_jax.sharding import start_hosts  # --help needs no JAX
    from navil_jax.train.peers import Peers

    start_hosts()
    with Peers("run the same command again; a benchmark goes on from the answers that are there"):
        return work(argv, options)


def _parse(argv: Sequence[str], default: Config) -> tuple[Config, argparse.Namespace]:
    return parse(argv, ABOUT, _add_options, default=default, command="evaluate")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        type=given_path,
        metavar="DIR",
        help="run, checkpoint, Hugging Face folder or id on its hub",
    )
    add("--evaluators", type=_names, metavar="A,B", help="names (default: those of the recipe or run)")
    add("--samples", type=read_as(Amount), default=0, metavar="N", help="of every source; 0: all (default)")
    add("--out", type=new_folder, metavar="DIR", help="folder for tables and pictures (default: WORKDIR/evaluate)")
    add("--benchmark", default="", metavar="NAME", help="of the paper, in the place of evaluators: docvqa, mme, ...")
    add("--data", type=given_path, metavar="PATH", help="file or folder with the benchmark's questions")
    add("--split", default="", metavar="NAME", help="of the benchmark (default: one whose answers are public)")
    add("--protocol", default="", metavar="P", help="whose prompts and scores: internvl, vlmevalkit, lmms_eval, ...")
    add("--limit", type=read_as(Amount), default=0, metavar="N", help="the first N questions; 0: all (default)")
    add("--judge", default="", metavar="URL", help="endpoint of OpenAI's form for benchmarks with a judge")
    add("--judge-model", default="", metavar="NAME", help="model at the endpoint; its key: OPENAI_API_KEY")


def _check_together(options: argparse.Namespace) -> None:
    """Options that say nothing without --benchmark, or nothing beside it."""
    of_benchmark = ("data", "split", "protocol", "limit", "judge", "judge_model")
    wrong, said = (("evaluators", "samples", "config"), "beside") if options.benchmark else (of_benchmark, "without")
    for name in wrong:
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: has no effect {said} --benchmark; leave it out")


def _benchmark(argv: Sequence[str], options: argparse.Namespace) -> int:
    from navil_jax.evaluate.benchmark_run import run_benchmark

    is_run = (Path(options.checkpoint) / "checkpoints").is_dir()
    out = Path(options.out or (Path(options.checkpoint) / "evaluate" if is_run else "runs/evaluate"))
    run_benchmark(options, lambda own: _parse(argv, own)[0], out)
    return 0


def _names(text: str) -> tuple[str, ...]:
    """An option's names, for `argparse`."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; write names such as held_out,generated")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} has a name twice")
    return names


def _evaluate(argv: Sequence[str], options: argparse.Namespace) -> int:
    import jax

    from navil_jax.convert.opened import open_checkpoint
    from navil_jax.data.run import complete
    from navil_jax.data.sources import expand_sources
    from navil_jax.evaluate.processes import on_first
    from navil_jax.sharding import make_mesh, use_rules
    from navil_jax.train.evaluators import make_evaluator
    from navil_jax.train.lock import check_same_settings

    first = jax.process_index() == 0

    with open_checkpoint(options.checkpoint) as opened:
        if opened.tokenizer is None:
            raise UserError(f"{options.checkpoint}: holds no tokenizer; copy the files of one into the folder")
        own = opened.record.config if opened.record else opened.config
        config, _ = _parse(_without_recipe(argv), _recipe(options.config, own))
        if options.evaluators:
            config = dataclasses.replace(config, evaluators=_chosen(config.evaluators, options.evaluators))
        if not config.data.sources:
            raise UserError(f"{options.checkpoint}: names no data; use --config RECIPE with the sources to score")
        config = complete(expand_sources(config), opened.tokenizer)
        use_rules(config.mesh.rules)
        check_same_settings(config)
        mesh = make_mesh(config.mesh)
        evaluators = [make_evaluator(entry, config, mesh, opened.tokenizer) for entry in config.evaluators]
        params = opened.restore(config.model, mesh, averaged=config.eval_ema)
        said = "running averages of the parameters" if opened.averaged and config.eval_ema else "parameters"
        if first:
            say(f"{said} of step {opened.step} of {opened.path}")
        is_run = opened.record is not None and not is_remote(opened.path)
    out = Path(options.out or (Path(options.checkpoint) / "evaluate" if is_run else "runs/evaluate"))
    out.mkdir(parents=True, exist_ok=True)
    for evaluator in evaluators:
        scores = evaluator.score(params, options.samples)
        on_first(functools.partial(_report, evaluator, scores, opened.step, out))
    if first:
        say(f"metrics, tables and pictures: {out}")
    return 0


def _report(evaluator: "Evaluator", scores: Any, step: int, out: Path) -> None:
    say(evaluator.report(scores, out, final=True))
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, **evaluator.metrics(scores)}) + "\n")


def _chosen(known: Sequence[EvaluatorConfig], names: Sequence[str]) -> tuple[EvaluatorConfig, ...]:
    """The entries of these names, or new ones."""
    return tuple(
        entry for name in names for entry in [one for one in known if one.name == name] or [EvaluatorConfig(name)]
    )


def _recipe(path: str | None, own: Config) -> Config:
    """The config of the run itself, or a recipe with the model, images and prompt of the checkpoint."""
    if not path:
        return own
    recipe = load_config(path)
    data = dataclasses.replace(recipe.data, template=own.data.template, system_message=own.data.system_message)
    return dataclasses.replace(recipe, model=own.model, images=own.images, data=data)


def _without_recipe(argv: Sequence[str]) -> list[str]:
    """The arguments without --config FILE."""
    kept, rest = [], iter(argv)
    for argument in rest:
        if argument == "--config":
            next(rest, None)
        elif not argument.startswith("--config="):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    sys.exit(main())
