"""Doctor: opens every sample as training would, and says what was found, per source and in a report."""

import argparse
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from navil_jax.config import Config, SourceConfig, validate
from navil_jax.config.plain import to_json
from navil_jax.config.ranges import Amount, read_as
from navil_jax.console import say
from navil_jax.data import formats
from navil_jax.data.engine import Engine
from navil_jax.data.engine import add_options as add_engine_options
from navil_jax.data.estimate import add_options as add_estimate_options
from navil_jax.data.estimate import estimate_examination
from navil_jax.data.formats import files
from navil_jax.data.inspect.checkup import Checkup
from navil_jax.data.inspect.examination import TABLES, Examined, examine
from navil_jax.data.inspect.input_cost import FILE as INPUT_FILE
from navil_jax.data.inspect.input_cost import measure
from navil_jax.data.inspect.report import LISTED, Head, report
from navil_jax.data.inspect.summary import (
    bad_reasons,
    bad_samples,
    box,
    findings,
    marks_in_text,
    seen,
    shared,
    slot_advice,
    summarise,
)
from navil_jax.data.inspect.token_map import row_budgets
from navil_jax.data.quarantine import FILE
from navil_jax.data.run import OpenRun
from navil_jax.data.sources import SOURCES, for_source, has_split, open_source
from navil_jax.errors import UserError
from navil_jax.paths import at_home, given_path, is_remote, local_path, new_folder

ABOUT = """Opens every sample of every source, as training would, and says what was found.

all sources of a recipe, with a report in reports/stage1:
  python -m navil_jax.data doctor --config configs/stage1.py --out reports/stage1

files, before there is a recipe (kinds as in docs/data.md; a built-in source has a name alone):
  python -m navil_jax.data doctor --source llava:train.jsonl --source "webdataset:gs://b/{000..999}.tar"

train without the samples that were found to be bad:
  python -m navil_jax.train --config configs/stage1.py --config.data.quarantine=reports/stage1/quarantine.jsonl

Of each source's samples, and of its held-out ones, you get the numbers of samples and images, tokens, patches and
aspect ratios, and of those that are longer than a row, bad (with reasons), seen twice, with empty answers, or with
markers such as <img> or [IMG] in their text, and which fields of the records are not used. The folder holds
  report.html        the same with histograms, and some samples in which you see what is trained, with which weight
  quarantine.jsonl   the bad samples, for data.quarantine
  findings.jsonl     samples that are worth a look: too long, seen twice, markers in text, empty answers
  input.json         CPU time of a sample from its file to a packed row, for `navil_jax.plan --input`
  notes/             80 bytes per sample. After Ctrl-C the same command goes on; remove the folder to begin anew.

Tokens are counted with the tokenizer of the run in config.workdir, else in config.init_from, else with data.tokenizer;
if there is none, one is trained on the text of the sources, which says little about the tokens of a large model.

Exit status: 0 good, 1 more bad samples than data.max_bad_share allows, 2 bad input (one line says what), 130 after
Ctrl-C."""


def run(opened: OpenRun, out: Path, options: argparse.Namespace, engine: Engine, command: str) -> int:
    """Examines every sample of the opened sources, and writes the report to `out`; the exit status.

    Args: command: as it was given, for the report.
    """
    config, tokenizer = opened.config, opened.tokenizer
    budgets = row_budgets(config)
    checkups = [
        Checkup(source, entry.name, for_source(config, number), tokenizer, budgets)
        for number, (source, entry) in enumerate(zip(opened.sources, config.data.sources, strict=True))
    ]
    checkups += [
        Checkup(
            open_source(entry, "test", engine),
            f"{entry.name} (held out)",
            for_source(config, number),
            tokenizer,
            budgets,
        )
        for number, entry in enumerate(config.data.sources)
        if has_split(entry, "test")
    ]
    if options.estimate:
        for checkup in checkups:
            say(f"{checkup.name}: {estimate_examination(checkup).text(options.price)}")
        return 0
    examined = examine(config, checkups, out, engine, notes_folder(out, options))
    status = _tell(config, checkups, examined, out, options.samples, command)
    cost = measure(opened)
    cost.write(out / INPUT_FILE)
    say(cost.text())
    say(f"what each host of a slice needs of that: python -m navil_jax.plan --input {out / INPUT_FILE}")
    return status


def out_folder(config: Config, options: argparse.Namespace) -> Path:
    """Where the report goes. Raises `UserError` for an address."""
    own = bool(config.workdir) and not is_remote(config.workdir)
    return local_path(options.out or (f"{config.workdir}/doctor" if own else "runs/doctor"))


def notes_folder(out: Path, options: argparse.Namespace) -> str:
    """Where parts of the tables go."""
    return options.notes or str(out / TABLES)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--source",
        action="append",
        default=[],
        metavar="KIND:PATH",
        help="these files in the place of the recipe's sources; may be given several times",
    )
    add("--root", type=given_path, metavar="DIR", help="folder of the images that records of --source name")
    add("--out", type=new_folder, metavar="DIR", help="folder of the report (default: WORKDIR/doctor, or runs/doctor)")
    add_engine_options(parser)
    add_estimate_options(parser)
    text = "folder of the notes, at an address where workers of --runner are on other machines (default: OUT/notes)"
    add("--notes", type=given_path, metavar="DIR", help=text)
    add(
        "--samples",
        type=read_as(Amount),
        default=6,
        metavar="N",
        help="samples of each source in the report (default: 6)",
    )


def with_sources(config: Config, options: argparse.Namespace) -> Config:
    """The config with the sources to open."""
    if options.root and not options.source:
        raise UserError("--root: has no effect without --source; set config.data.sources.N.root")
    if options.source:
        entries: list[SourceConfig] = []
        for given in options.source:
            entries.append(_entry(given, options.root or "", {entry.name for entry in entries}))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=tuple(entries)))
    if not config.data.sources:
        raise UserError("no data given: use --config RECIPE or --source KIND:PATH; --help shows how")
    validate(config)
    return config


def _entry(given: str, root: str, taken: set[str]) -> SourceConfig:
    kind, _, path = given.partition(":")
    if not path and kind in SOURCES:
        return SourceConfig(kind, root=root)
    formats.check_kind(kind, (*formats.FORMATS, formats.META, *SOURCES))
    if not path:
        raise UserError(f"--source {given}: no path given, write {kind}:PATH")
    plain = files.name_of(path)
    name = next(
        name for number in itertools.count(1) if (name := plain if number == 1 else f"{plain}-{number}") not in taken
    )
    return SourceConfig(name, kind=kind, path=at_home(path), root=root)


def _tell(
    config: Config, checkups: Sequence[Checkup], examined: Sequence[Examined], out: Path, samples: int, command: str
) -> int:
    """Prints the summaries and writes the report; the exit status."""
    quarantine = out / FILE
    quarantine.touch()
    reasons = bad_reasons(quarantine)
    tables = [found.table for found in examined]
    summaries = [
        summarise(
            checkup.name,
            found.table,
            reasons.get(checkup.name, Counter()),
            marks_in_text(checkup, found.table),
            found.unused,
        )
        for checkup, found in zip(checkups, examined, strict=True)
    ]
    for checkup, summary in zip(checkups, summaries, strict=True):
        print(box(summary, row_budgets(checkup.config)))
    trained, held_out = tables[: len(config.data.sources)], tables[len(config.data.sources) :]
    if repeated := shared(trained):
        say(f"{repeated:,} samples stand in more than one source")
    if known := seen(held_out, trained):
        say(f"{known:,} held-out samples are trained on too; what is measured on them is too good")
    advice = slot_advice(config, trained)
    say(advice)
    with (out / "findings.jsonl").open("w") as file:
        for checkup, table in zip(checkups, tables, strict=True):
            file.writelines(json.dumps(finding) + "\n" for finding in findings(checkup.name, table))
    bad, read = sum(summary.bad for summary in summaries), sum(summary.samples for summary in summaries)
    head = Head(_verdict(config, bad, read), bad > config.data.max_bad_share * read, advice, command, to_json(config))
    page = report(checkups, tables, summaries, head, samples, bad_samples(quarantine, LISTED))
    (out / "report.html").write_text(page, encoding="utf-8")
    say(f"report: {out / 'report.html'}")
    if bad:
        say(f"train without the {bad:,} bad samples: --config.data.quarantine={quarantine}")
    if head.is_bad:
        say(head.verdict)
    return int(head.is_bad)


def _verdict(config: Config, bad: int, read: int) -> str:
    if not bad:
        return f"none of {read:,} samples is bad"
    side = "more" if bad > config.data.max_bad_share * read else "no more"
    return f"{bad:,} of {read:,} samples are bad, {side} than data.max_bad_share = {config.data.max_bad_share:g}"
