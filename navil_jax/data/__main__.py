"""Work on data: `python -m navil_jax.data COMMAND ...`; the commands are

  clean     finds samples that training is better without: duplicates, bad text and images, benchmarks
  convert   data of any kind to sharded ArrayRecord, the format to train from
  doctor    opens every sample before a run does, and reports what is wrong
  mix       says what a run draws from each source
  preview   shows packed rows as training sees them
  tokens    says what images cost in tokens

for example, to look at the data of a recipe before it trains:
  python -m navil_jax.data doctor --config configs/demo.py
  python -m navil_jax.data preview --config configs/demo.py --out rows.html --open

`python -m navil_jax.data COMMAND --help` says more.
"""

import argparse
import dataclasses
import difflib
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from navil_jax.config import WITHOUT_EFFECT, Config, SourceConfig, VisionConfig
from navil_jax.config.flags import parse
from navil_jax.config.ranges import Count, Positive, Seed, read_as
from navil_jax.console import say
from navil_jax.errors import Parser, UserError, fitted, report_user_errors
from navil_jax.paths import given_path

if TYPE_CHECKING:
    from navil_jax.data.engine import Engine
    from navil_jax.data.run import OpenRun
    from navil_jax.data.sample import Source, Split

# The commands import what they need when they run: --help needs no JAX, and every process of the doctor imports this.
SHUFFLE = """write the samples in a random order over all shards. Training draws samples at random and
needs none; use it where shards are read one after another, or where a few of them shall be like the whole"""
EXAMPLES = """kinds:
  llava        FILE.jsonl or FILE.json with "image" and "conversations", or a folder of them
  meta         InternVL's JSON file of several such sources; each goes to a folder of its own in --out
  webdataset   tars, as a folder or a pattern
  parquet      files with columns such as image and caption, or conversations
  huggingface  a folder of Dataset.save_to_disk; or an id of the hub, as ID, ID#SPLIT or ID#CONFIG:SPLIT, which is read
               as it comes, without a copy on the disk, into a shard for each of its files
  tfds         FOLDER/NAME/VERSION of TensorFlow Datasets in ArrayRecord files, #SPLIT behind it if not train
  array_record what this command writes, to change the number of shards
  {built_in}: built in, without --path

examples:
  python -m navil_jax.data convert --from llava --path train.jsonl --root images --out data/train
  python -m navil_jax.data convert --from webdataset --path "gs://b/{{000..999}}.tar" --out data/web --shards 64
  python -m navil_jax.data convert --from huggingface --path "HuggingFaceM4/the_cauldron#ai2d:train" --out ai2d
  python -m navil_jax.data convert --from meta --path internvl.json --out data/stage3
  python -m navil_jax.data convert --from webdataset --path "gs://b/*.tar" --out gs://b/shards --estimate --price 0.06
  python -m navil_jax.data convert --from webdataset --path t.tar --out s --runner FlinkRunner -- --flink_master=f:8081

Shards that are whole already are not written again, so the same command goes on where it was interrupted; files that
have changed since are refused. What cannot be used is left out and listed in OUT/*.bad.jsonl with source, key and
reason.
Train on the result with SourceConfig("web", kind="array_record", path="data/web").

Exit status: 0 good, 2 bad input (one line says what), 130 after Ctrl-C.
"""


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(fitted(__doc__.strip(), shutil.get_terminal_size().columns))
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)[0]
        raise UserError(f"no command {name!r}; nearest is {nearest!r}, all are {', '.join(COMMANDS)}")
    command, interrupted = COMMANDS[name]
    return report_user_errors(command, f"stopped{interrupted}")(rest)


def _doctor(argv: Sequence[str]) -> int:
    from navil_jax.data.engine import engine_of, split_options
    from navil_jax.data.estimate import check_options
    from navil_jax.data.inspect import doctor

    own, pipeline = split_options(argv)
    config, options = parse(own, doctor.ABOUT, doctor.add_options, default=Config(), command="data doctor")
    check_options(options)
    out = doctor.out_folder(config, options)
    config = doctor.with_sources(config, options)
    engine = engine_of(options, pipeline, doctor.notes_folder(out, options))
    opened = _opened(config, engine)
    if opened.trained:
        opened.tokenizer.save(out / "tokenizer")
    return doctor.run(opened, out, options, engine, shlex.join(["python", "-m", "navil_jax.data", "doctor", *argv]))


def _clean(argv: Sequence[str]) -> int:
    from navil_jax.data.cleaning import clean
    from navil_jax.data.cleaning.given import Given
    from navil_jax.data.cleaning.parts import MEASURES
    from navil_jax.data.cleaning.settings import given_settings
    from navil_jax.data.engine import engine_of, split_options
    from navil_jax.data.formats import files
    from navil_jax.data.sources import expand_meta, expand_sources, open_source

    own, pipeline = split_options(argv)
    config, options = parse(own, clean.ABOUT, clean.add_options, default=Config(), command="data clean")
    if bool(options.kind) == bool(config.data.sources):
        raise UserError("no data given, or twice: use either --config RECIPE or --from KIND --path PATH")
    engine = engine_of(options, pipeline, files.join(options.out, MEASURES))
    name = files.name_of(options.path or "")
    entries = expand_meta(_entry(options, name)) if options.kind else expand_sources(config).data.sources
    sources = [open_source(dataclasses.replace(entry, leave_out=""), "train", engine) for entry in entries]
    given = Given(entries, sources, {f"--against {text}": _reference(text, engine) for text in options.against})
    command = shlex.join(["python", "-m", "navil_jax.data", "clean", *argv])
    return clean.run(given, given_settings(options), options, engine, command)


def _reference(text: str, engine: "Engine") -> "Source":
    """What samples are compared with: a benchmark's questions, or other data."""
    from navil_jax.data import formats
    from navil_jax.data.sources import SOURCES, open_source
    from navil_jax.evaluate.questions.layouts import SPLITS, read_questions
    from navil_jax.evaluate.questions.source import QuestionSource

    what, _, path = text.partition(":")
    name, _, split = what.partition("/")
    if not path and text not in SOURCES:
        formats.check_kind(name, (*SPLITS, *formats.FORMATS, formats.META, *SOURCES))
        raise UserError(f"--against {text}: no path given, write {what}:PATH")
    if name in SPLITS:
        try:
            return QuestionSource(read_questions(name, Path(given_path(path)), split))
        except UserError as error:
            raise UserError(f"--against {text}: {error}") from error
    if not path:
        return open_source(text, "test")
    return open_source(SourceConfig(text, kind=what, path=given_path(path)), "train", engine)


def _preview(argv: Sequence[str]) -> int:
    from navil_jax.data.inspect import preview
    from navil_jax.data.sources import held_out_fingerprints

    config, options = parse(argv, preview.ABOUT, preview.add_options, command="data preview")
    opened = _opened(config)
    held_out_fingerprints(opened.config)  # refuses held-out files that are not there
    return preview.run(opened, options)


def _mix(argv: Sequence[str]) -> int:
    from navil_jax.data.inspect import mix

    config, options = parse(argv, mix.ABOUT, mix.add_options, command="data mix")
    return mix.run(_opened(config), options)


def _tokens(argv: Sequence[str]) -> int:
    from navil_jax.data.inspect import tokens

    return tokens.run(*parse(argv, tokens.ABOUT, tokens.add_options, default=Config(), command="data tokens"))


def _opened(config: Config, engine: "Engine | None" = None) -> "OpenRun":
    from navil_jax.convert.opened import open_start
    from navil_jax.data.run import open_run

    with open_start(config, planned=True) as start:
        opened = open_run(config, start, engine)
    if opened.trained:
        said = "a tokenizer was trained on the text of the sources; --config.data.tokenizer=FOLDER takes another one"
        say(said, stream=sys.stderr)
    return opened


def _convert(argv: Sequence[str]) -> int:
    from navil_jax.data.engine import split_options

    own, pipeline = split_options(argv)
    return _convert_options(_parser().parse_args(own), pipeline)


def _parser() -> argparse.ArgumentParser:
    from navil_jax.data import estimate
    from navil_jax.data.convert import SHARD_SAMPLES
    from navil_jax.data.engine import add_options
    from navil_jax.data.sources import SOURCES

    about = "Converts data of any kind to sharded ArrayRecord, the format to train from."
    parser = Parser(
        prog="python -m navil_jax.data convert",
        description=about,
        epilog=EXAMPLES.format(built_in=", ".join(SOURCES)),
    )
    add = parser.add_argument
    add("--from", required=True, dest="kind", metavar="KIND", help="kind of the data, see below")
    add(
        "--path",
        type=given_path,
        help="file, folder, pattern with * or {000..127}, or address such as gs://bucket/x.tar",
    )
    add("--out", required=True, type=given_path, metavar="FOLDER", help="where the shards go, local or at an address")
    add(
        "--shards",
        type=read_as(Count),
        default=0,
        metavar="N",
        help=f"number of files (default: one per {SHARD_SAMPLES:,} samples)",
    )
    add("--root", type=given_path, metavar="FOLDER", help="of the images that records name (default: that of the file)")
    add("--prompt", metavar="TEXT", help='question of samples that are a caption (default: "Describe ...")')
    add(
        "--boxes",
        choices=("0..1", "0..1000", "pixels"),
        help="coordinates of <box> in texts (default: the records say)",
    )
    text = f"images that a video becomes, evenly spread (default: {SourceConfig.video_frames})"
    add("--video-frames", type=read_as(Count), metavar="N", help=text)
    add("--video-fps", type=read_as(Positive), metavar="X", help="frames for each second of a video, at most N")
    add("--split", choices=("train", "test"), help="of a built-in source (default: train)")
    add("--shuffle", type=read_as(Seed), metavar="SEED", help=SHUFFLE)
    text = "list of `data clean`, or the folder with it: these samples are not converted"
    add("--leave-out", type=given_path, metavar="FILE", help=text)
    add_options(parser)
    estimate.add_options(parser)
    return parser


def _convert_options(options: argparse.Namespace, pipeline: Sequence[str]) -> int:
    from navil_jax.data.estimate import check_options
    from navil_jax.data.formats import files
    from navil_jax.data.sources import expand_meta

    check_options(options)
    entry = _entry(options, files.name_of(options.out))
    if not entry.kind:
        _report(entry, options.out, options, pipeline)
        return 0
    _refuse(options, "split")
    parts = expand_meta(entry)
    for part in parts:
        out = options.out if parts == (entry,) else files.join(options.out, part.name)
        _report(part, out, options, pipeline)
    if any(part.max_patches for part in parts):
        side = VisionConfig.patch_size
        say(f"max_patches counts patches of {side} x {side} pixels; of P x P: times ({side} / P)^2")
    return 0


def _entry(options: argparse.Namespace, name: str) -> SourceConfig:
    """The source that --from, --path and what goes with them name, called by a name or by its kind."""
    from navil_jax.data import formats
    from navil_jax.data.sources import SOURCES

    formats.check_kind(options.kind, (*formats.FORMATS, formats.META, *SOURCES))
    leave_out = getattr(options, "leave_out", None) or ""
    if options.kind in SOURCES:
        _refuse(options, "path", "root", "prompt", "boxes", "video_frames", "video_fps")
        return SourceConfig(options.kind, leave_out=leave_out)
    _refuse(options, *WITHOUT_EFFECT.get(options.kind, ()))
    if not options.path:
        raise UserError(f"--path: data of kind {options.kind} need a path")
    return SourceConfig(
        name or options.kind,
        kind=options.kind,
        path=options.path,
        root=options.root or "",
        prompt=options.prompt or "",
        boxes=options.boxes or "",
        video_frames=getattr(options, "video_frames", None) or SourceConfig.video_frames,
        video_fps=getattr(options, "video_fps", None),
        leave_out=leave_out,
    )


def _refuse(options: argparse.Namespace, *names: str) -> None:
    """Raises a `UserError` for options that have no effect on the kind of data."""
    for name in names:
        if getattr(options, name, None):
            raise UserError(f"--{name.replace('_', '-')}: has no effect on data of kind {options.kind}; leave it out")


def _report(part: SourceConfig, out: str, options: argparse.Namespace, pipeline: Sequence[str]) -> None:
    """Converts one source, and prints what to write into a recipe."""
    from navil_jax.data import formats
    from navil_jax.data.convert import WORK, convert, convert_stream
    from navil_jax.data.engine import engine_of
    from navil_jax.data.estimate import estimate_conversion
    from navil_jax.data.formats import files
    from navil_jax.data.formats.record_videos import Frames
    from navil_jax.data.formats.records import Reading
    from navil_jax.data.inspect.summary import unused_fields
    from navil_jax.data.left_out import Without
    from navil_jax.data.sources import open_source

    split: Split = options.split or "train"
    origin = (
        f"{part.kind or part.name} {part.path or split} {part.root} {part.prompt} {part.boxes} {part.leave_out}".strip()
    )
    own = {name: getattr(part, name) for name in ("video_frames", "video_fps")}
    origin += "".join(f" {name}={value}" for name, value in own.items() if value != getattr(SourceConfig, name))
    engine = engine_of(options, pipeline, files.join(out, WORK))
    streamed = formats.is_streamed(part.kind, part.path)
    if streamed:
        _refuse_for_streams(options)
    if options.estimate:
        found = estimate_conversion(part, lambda entry: open_source(entry, split), options.shuffle)
        say(f"{out}: {found.text(options.price)}")
        return
    source: Source | None = None
    if streamed:
        frames = Frames(part.video_frames, part.video_fps)
        reading = Reading(part.root, part.prompt, part.boxes, frames)
        done = convert_stream(formats.open_stream(part.path, reading), out, origin, engine)
    else:
        source = open_source(part, split, engine)
        done = convert(source, out, options.shards, origin, options.shuffle, engine)
    bad = f"; {done.bad:,} left out, see {out}/*.bad.jsonl" if done.bad else ""
    say(f"{out}: {done.samples:,} samples in {done.shards} shards{bad}")
    if isinstance(source, Without):
        say(f"  {len(source.left_out):,} more are left out by {part.leave_out}")
    if done.unused:
        say(f"  fields of the records that are not used: {unused_fields(done.unused.most_common())}")
    defaults = {field.name: field.default for field in dataclasses.fields(SourceConfig)}
    changed = {name: getattr(part, name) for name in ("weight", "repeat", "max_patches", "transforms")}
    extra = "".join(f", {name}={value!r}" for name, value in changed.items() if value != defaults[name])
    print(f'  SourceConfig("{part.name}", kind="array_record", path="{out}"{extra})')


def _refuse_for_streams(options: argparse.Namespace) -> None:
    """Raises a `UserError` for options of data that can be read in any order."""
    given = {"shards": options.shards, "leave-out": options.leave_out, "estimate": options.estimate}
    for name in [name for name, value in given.items() if value] + ["shuffle"] * (options.shuffle is not None):
        raise UserError(
            f"--{name}: data of the hub are read as they come; convert them first, and then OUT with --{name}"
        )


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "clean": (_clean, "; the same command goes on from here"),
    "convert": (_convert, "; the same command goes on with the first missing shard"),
    "doctor": (_doctor, "; the same command goes on from here"),
    "mix": (_mix, ""),
    "preview": (_preview, ""),
    "tokens": (_tokens, ""),
}

if __name__ == "__main__":
    sys.exit(main())
