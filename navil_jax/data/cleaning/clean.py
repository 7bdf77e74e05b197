"""Clean: measures every sample, decides which ones to leave out, and writes lists and a report."""

import argparse
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

import numpy as np

from navil_jax.config import SourceConfig
from navil_jax.console import say, table
from navil_jax.data.cleaning import parts
from navil_jax.data.cleaning.compare import Compare
from navil_jax.data.cleaning.decide import RULES, Verdicts, decide
from navil_jax.data.cleaning.given import Given
from navil_jax.data.cleaning.lists import write_lists
from navil_jax.data.cleaning.measure import NOTE, Measure
from navil_jax.data.cleaning.references import question_runs
from navil_jax.data.cleaning.report import Findings, report
from navil_jax.data.cleaning.rules import named_scripts
from navil_jax.data.cleaning.settings import STEPS, Settings, add_settings
from navil_jax.data.convert import alone_in
from navil_jax.data.engine import Engine
from navil_jax.data.engine import add_options as add_engine_options
from navil_jax.data.formats import files
from navil_jax.data.left_out import list_file
from navil_jax.data.sample import stamp
from navil_jax.errors import UserError
from navil_jax.paths import given_path

PACKAGES = ("datasketch", "imagehash")
PLAN_FILE, COLUMNS = "cleaning.json", "columns"
ABOUT = f"""Finds the samples that training is better without, and lists them; nothing is copied.

all sources of a recipe:
  python -m navil_jax.data clean --config configs/stage1.py --out cleaned

files, before there is a recipe (kinds as in docs/data.md):
  python -m navil_jax.data clean --from llava --path train.jsonl --root images --out cleaned

without what the benchmarks ask, and of one source 2 million samples at most:
  python -m navil_jax.data clean --config configs/stage1.py --against mme:MME --keep web=2000000 --out cleaned

Steps, in this order; a sample is counted in the first one that leaves it out:
{chr(10).join(f"  {name:<12}{text}" for name, text in STEPS.items())}

OUT holds
  NAME.leave_out.jsonl   of each source, for SourceConfig.leave_out and `data convert --leave-out`
  report.html            counts, distributions with the thresholds, and examples
  measures/, ...         what was measured: other thresholds read no sample again, and after Ctrl-C the same command
                         goes on

Exit status: 0 good, 2 bad input (one line says what), 130 after Ctrl-C."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="kind", metavar="KIND", help="kind of the data at --path, in the place of a recipe's sources")
    add("--path", type=given_path, help="file, folder, pattern or address")
    add("--root", type=given_path, metavar="DIR", help="folder of the images that records of --path name")
    add("--prompt", metavar="TEXT", help="question of samples of --path that are a caption")
    add("--boxes", choices=("0..1", "0..1000", "pixels"), help="coordinates of <box> in their texts")
    add("--out", type=given_path, required=True, metavar="DIR", help="for lists and report, local or at an address")
    text = "benchmark and its questions (mme:FOLDER), or kind and path of other data; may be given several times"
    add("--against", action="append", default=[], metavar="WHAT:PATH", help=text)
    text = "of a source keep N samples, or a share below 1; may be given several times"
    add("--keep", action="append", default=[], metavar="SOURCE=N", help=text)
    text = f"leave out no sample by this step or rule: {', '.join((*STEPS, *(r for r in RULES if r not in STEPS)))}"
    add("--off", action="append", default=[], metavar="NAME", help=text)
    add_engine_options(parser)
    add_settings(parser)


def run(given: Given, settings: Settings, options: argparse.Namespace, engine: Engine, command: str) -> int:
    """Writes lists and report to the folder; the exit status. Args: command: as it was given, for the report."""
    _need_packages()
    named_scripts(settings)
    off, keep, out = _off(options.off), _keep(options.keep, given.entries), options.out
    with alone_in(out):
        _run(given, settings, off, keep, out, engine, command)
    return 0


def _run(
    given: Given,
    settings: Settings,
    off: frozenset[str],
    keep: Mapping[int, float],
    out: str,
    engine: Engine,
    command: str,
) -> None:
    runs = question_runs(given.references, settings.question_words)
    _check_plan(out, given, settings)
    measures = [
        Measure(source, name, entry.prompt, runs.numbers, settings.question_words)
        for source, name, entry in zip(given.sources, given.names, given.entries, strict=False)
    ]
    measures += [Measure(source, name) for name, source in given.references.items()]
    job = parts.MeasureJob(tuple(measures), files.join(out, parts.MEASURES))
    engine.run(job, len(job.parts), "measures")
    joined = files.join(out, COLUMNS)
    columns = parts.join(job.folder, [len(source) for source in given.all_sources], joined)
    bounds, samples = given.bounds, sum(map(len, given.sources))
    compare = Compare(out, joined, settings, engine)
    verdicts = decide(columns, bounds[: len(given.sources) + 1], bounds[-1] - samples, settings, off, keep, compare)
    entries = write_lists(out, given, columns, verdicts, settings)
    findings = Findings(given, columns, verdicts, settings, off, runs.said, entries)
    files.write_file(files.join(out, "report.html"), report(findings, command).encode())
    _tell(given, verdicts, runs.said, out)


def _need_packages() -> None:
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"data clean needs other packages: pip install {' '.join(missing)}")


def _off(given: Iterable[str]) -> frozenset[str]:
    """Raises `UserError` for what is no step and no rule."""
    if unknown := [name for name in given if name not in STEPS and name not in RULES]:
        raise UserError(
            f"--off {unknown[0]}: no such step or rule; all are {', '.join(dict.fromkeys((*STEPS, *RULES)))}"
        )
    return frozenset(given)


def _keep(given: Iterable[str], entries: Sequence[SourceConfig]) -> dict[int, float]:
    """Number of a source -> how many samples, or which share, to keep. Raises `UserError` for what is neither."""
    names, found = [entry.name for entry in entries], {}
    for text in given:
        name, _, number = text.rpartition("=")
        if name not in names:
            raise UserError(f"--keep {text}: write SOURCE=N, with one of the sources {', '.join(names)}")
        try:
            wanted = float(number.replace("_", ""))
        except ValueError:
            wanted = 0.0
        if not (0 < wanted < 1 or (wanted >= 1 and wanted.is_integer())):
            raise UserError(f"--keep {text}: {number!r} is neither a number of samples nor a share below 1")
        found[names.index(name)] = wanted
    return found


def _check_plan(out: str, given: Given, settings: Settings) -> None:
    """Notes in the folder what is measured; raises `UserError` if that was something else."""
    path = files.join(out, PLAN_FILE)
    plan = {
        "record": [str(NOTE), *(f"{name} {version(name)}" for name in PACKAGES)],
        "question_words": settings.question_words if given.references else 0,
        "sources": [
            [entry.name, entry.prompt, len(source), stamp(source)]
            for entry, source in zip(given.entries, given.sources, strict=True)
        ],
        "against": [[name, len(source), stamp(source)] for name, source in given.references.items()],
    }
    if not files.exists(path):
        files.write_file(path, json.dumps(plan, indent=2).encode())
    found = json.loads(files.read_file(path))
    if changed := [name for name in plan if found.get(name) != plan[name]]:
        raise UserError(f"{out}: holds measures of other {changed[0]}, or their files have changed; give another --out")


def _tell(given: Given, verdicts: Verdicts, said: Sequence[str], out: str) -> None:
    bounds, rows = given.bounds, []
    for number, entry in enumerate(given.entries):
        own = slice(bounds[number], bounds[number + 1])
        total = len(given.sources[number])
        left_out = np.count_nonzero(verdicts.codes[own])
        rows.append((entry.name, f"{total:,}", f"{total - left_out:,}", ""))
        for rule in RULES:
            if count := len(verdicts.left_out(rule, own)):
                rows.append(("", f"{count:,}", f"{count / total:.2%}", rule))
    print(table(("source", "samples", "stay", "left out by"), rows))
    for text in said:
        say(text)
    if verdicts.uncompared:
        say(f"{verdicts.uncompared:,} samples stand in crowded buckets and were not compared with all others there")
    say(f"report: {files.join(out, 'report.html')}")
    for entry in given.entries:
        say(f'leave them out: SourceConfig("{entry.name}", ..., leave_out="{files.join(out, list_file(entry.name))}")')
