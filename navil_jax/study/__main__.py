"""Scaling studies: `python -m navil_jax.study {run,fit,plot,report,plan,extrapolate} ...`."""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from navil_jax.config.ranges import Amount, Threads, read_as
from navil_jax.console import say
from navil_jax.errors import Parser, report_user_errors
from navil_jax.paths import local_path, new_drawing, new_file, new_folder
from navil_jax.study.results import PUBLISHED, parse_size, read_results

EXAMPLES = """
the paper's published points, fitted, drawn, and as one page:
  python -m navil_jax.study fit --out laws.json
  python -m navil_jax.study plot --out figures
  python -m navil_jax.study report --out published.html

which encoder for an LLM, how much data per stage, what loss to expect, and recipes for the three stages:
  python -m navil_jax.study plan --llm 1.8B --samples 500M --have 200M --out configs/my.py

runs of your own, as many at a time as there is room for; the same command goes on after an interruption:
  python -m navil_jax.study run --config configs/study/small.py --out runs/study --jobs 2
  python -m navil_jax.study report runs/study/results.jsonl --out study.html

whether a running run is worth going on:
  python -m navil_jax.study extrapolate runs/stage1

RESULTS is a results file (docs/study.md); without one the paper's published points are used. Exit status: 0 good, 1
some runs failed, 2 bad input (one line says what), 130 after Ctrl-C.
"""


@functools.partial(report_user_errors, stopped="stopped; the same command goes on from here")
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m navil_jax.study",
        description="Scaling studies.",
        epilog=EXAMPLES,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        lines = [line for line in EXAMPLES.splitlines() if line.startswith(f"  python -m navil_jax.study {name} ")]
        added = commands.add_parser(name, help=text, description=text, epilog="\n".join(["for example:", *lines]))
        added.set_defaults(run=run)
        return added

    added = command("run", _run, "trains a grid of models and writes a line per run and evaluation")
    added.add_argument("--config", required=True, type=local_path, metavar="FILE", help="Python file with get_study()")
    added.add_argument(
        "--out", type=new_folder, metavar="DIR", help="folder of runs and results.jsonl (default: runs/NAME)"
    )
    added.add_argument("--jobs", type=read_as(Threads), default=1, metavar="N", help="runs at a time (default: 1)")
    added.add_argument("--shard", default="0/1", metavar="I/N", help="only every N-th run, from run I: one per slice")

    for name, run, text in (
        ("fit", _fit, "fits the laws, with intervals"),
        ("plot", _plot, "draws the paper's figures as PNG"),
        ("report", _report, "writes one HTML page that needs nothing from outside"),
    ):
        added = command(name, run, text)
        added.add_argument("results", nargs="*", type=local_path, default=[PUBLISHED], metavar="RESULTS")
        if name == "fit":
            added.add_argument("--out", type=new_file, metavar="FILE", help="also write the laws as JSON")
        else:
            kind, target = ("DIR", new_folder) if name == "plot" else ("FILE", new_file)
            added.add_argument("--out", required=True, type=target, metavar=kind, help="what to write")
        if name == "report":
            added.add_argument("--markdown", type=new_file, metavar="FILE", help="also the table of the five findings")

    added = command("plan", _plan, "advises encoder, data and stages for an LLM")
    added.add_argument("--llm", required=True, metavar="SIZE", help="parameters of the language model, such as 1.8B")
    added.add_argument("--samples", required=True, metavar="N", help="of all stages together, such as 500M")
    added.add_argument("--have", metavar="N", help="different samples at hand")
    added.add_argument("--results", type=local_path, default=PUBLISHED, metavar="FILE", help="pilot runs of your own")
    added.add_argument("--image", default="640x480", metavar="WxH", help="a typical image (default: %(default)s)")
    added.add_argument(
        "--words", type=read_as(Amount), default=100, metavar="N", help="text of a sample (default: 100)"
    )
    added.add_argument("--out", type=new_file, metavar="FILE.py", help="write recipes of the three stages")
    added.add_argument("--topology", metavar="NAME", help="a TPU slice, such as v5p-128: adds days and chip-hours")

    added = command("extrapolate", _extrapolate, "draws a run's loss onward and says whether going on is likely to pay")
    added.add_argument("workdir", type=local_path, help="of a run, finished or not")
    added.add_argument("--to", metavar="STEPS", help="how far (default: four times the steps so far)")
    added.add_argument("--metric", default="", help="such as loss or eval/NAME/loss (default: the training loss)")
    added.add_argument("--out", type=new_drawing, metavar="FILE.png", help="default: WORKDIR/extrapolation.png")
    return parser


def _run(options: argparse.Namespace) -> int:
    from navil_jax.study.grid import load_study
    from navil_jax.study.run import parse_shard, run_study

    study = load_study(options.config)
    return run_study(study, options.out or Path("runs") / study.name, options.jobs, parse_shard(options.shard))


def _fit(options: argparse.Namespace) -> int:
    from navil_jax.study.analysis import analyse, as_json, table

    analysis = analyse([row for path in options.results for row in read_results(path)])
    say(table(analysis))
    if options.out:
        options.out.write_text(json.dumps(as_json(analysis), indent=2) + "\n")
        say(f"\nwritten: {options.out}")
    return 0


def _plot(options: argparse.Namespace) -> int:
    from navil_jax.study.analysis import analyse
    from navil_jax.study.figures import draw

    drawn, missing = draw(analyse([row for path in options.results for row in read_results(path)]), options.out)
    for title, path in drawn.items():
        say(f"{title}: {path}")
    for title, reason in missing.items():
        say(f"{title}: not drawn, {reason}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from navil_jax.study.analysis import analyse
    from navil_jax.study.page import write_report

    analysis = analyse([row for path in options.results for row in read_results(path)])
    write_report(
        analysis, options.out, options.markdown, "Scaling study: " + ", ".join(p.name for p in options.results)
    )
    say(f"report: {options.out}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from navil_jax.study.analysis import analyse
    from navil_jax.study.known_llms import nearest_llm
    from navil_jax.study.plan_text import describe
    from navil_jax.study.planner import advise, check, parse_image
    from navil_jax.study.recipe_file import write_recipes

    llm, samples = parse_size(options.llm, "--llm"), parse_size(options.samples, "--samples")
    have = parse_size(options.have, "--have") if options.have else None
    image = parse_image(options.image)
    check(llm, options.words)
    known = nearest_llm(llm) if options.out or options.topology else None
    advice = advise(analyse(read_results(options.results)), llm, samples, have, image, options.words)
    say(describe(advice))
    if known is None:
        return 0
    if options.out:
        for path in write_recipes(options.out, advice, known):
            say(f"written: {path} ({known.name})")
    if options.topology:
        from navil_jax.study.pod_plan import slice_plan

        say(slice_plan(advice, known, options.topology))
    return 0


def _extrapolate(options: argparse.Namespace) -> int:
    from navil_jax.study.extrapolation import extrapolate

    to = int(parse_size(options.to, "--to")) if options.to else None
    say(extrapolate(options.workdir, options.metric, to, options.out or options.workdir / "extrapolation.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
