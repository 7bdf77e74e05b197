"""Input cost: CPU time of a sample from its source to a packed row, stage by stage, measured on some of each source."""

import contextlib
import dataclasses
import json
import pickle
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from PIL import Image

from navil_jax.config import Config, ImageConfig
from navil_jax.config.plain import plain, typed
from navil_jax.console import table
from navil_jax.data.features import TooLong, Usable, cut_patches, decoded, tokenised
from navil_jax.data.grouping import row_cost
from navil_jax.data.inspect.summary import PACKED, drawn_by
from navil_jax.data.packing import SIZES, PackedRows
from navil_jax.data.pipeline import batch_spec
from navil_jax.data.quarantine import Quarantine, SampleWatch
from navil_jax.data.run import OpenRun
from navil_jax.data.sample import Sample, Source
from navil_jax.data.sources import for_source
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.data.transforms import TransformFailed
from navil_jax.errors import UserError

FILE = "input.json"
SAMPLES, SECONDS, ROWS = (
    100,
    2.0,
    8,
)  # of a source: samples that are measured, for so long at most; rows that are packed
STAGES = ("read", "decode", "tokenise", "resize", "send", "receive", "pack")
IN_TRAINER = ("receive", "pack")  # what one thread of the trainer does for all samples of a host, with data.workers


@dataclasses.dataclass(frozen=True)
class SourceCost:
    """What a sample of a source costs and holds, on average over those that were measured.

    Attributes:
      share: of the samples that a run draws.
      measured: samples.
      usable: share of them that is trained on; the others count with the time that they took and with no content.
      images: in a sample.
      bytes: of the encoded images and the texts.
      read, decode, tokenise, resize, send, receive, pack: seconds of CPU (`STAGES`). Decoding is with the source's
        transforms; to send and receive is to hand features over between processes.
    """

    name: str
    share: float
    measured: int
    usable: float
    images: float
    bytes: float
    visual_tokens: float
    text_tokens: float
    patches: float
    read: float
    decode: float
    tokenise: float
    resize: float
    send: float
    receive: float
    pack: float


@dataclasses.dataclass(frozen=True)
class InputCost:
    """What `measure` found, and with which settings.

    Attributes:
      processor: of the machine.
    """

    processor: str
    images: ImageConfig
    patch_size: int
    sources: tuple[SourceCost, ...]

    def mean(self, *fields: str) -> float:
        """Of the sum of these fields, over the samples of the mixture that can be used."""
        usable = sum(source.share * source.usable for source in self.sources)
        return sum(source.share * getattr(source, field) for source in self.sources for field in fields) / usable

    @property
    def core(self) -> float:
        """Seconds of CPU for a sample, all stages."""
        return self.mean(*STAGES)

    def samples_of_row(self, config: Config) -> float:
        """Samples that a row of this config holds, as packing fills it."""
        budgets = batch_spec(config).budgets
        return PACKED / max(self.mean(name) / budgets[name] for name in SIZES)

    def text(self) -> str:
        """A table of the sources, and a line on all of them."""
        head = ("source", "share", "images/s a core", *(f"{stage} ms" for stage in STAGES), "kB read")
        rows = []
        for source in self.sources:
            own = dataclasses.replace(self, sources=(source,))
            if not source.usable * source.share:
                rows.append((source.name, f"{source.share:.1%}", *["-"] * (len(head) - 2)))
                continue
            times = (f"{1e3 * own.mean(stage):.2f}" for stage in STAGES)
            rate = f"{own.mean('images') / own.core:,.0f}"
            rows.append((source.name, f"{source.share:.1%}", rate, *times, f"{own.mean('bytes') / 1e3:,.1f}"))
        found = table(head, rows)
        if not any(source.usable * source.share for source in self.sources):
            return found
        rates = f"{1 / self.core:,.0f} samples/s, {self.mean('images') / self.core:,.0f} images/s"
        return f"{found}\na core of this machine ({self.processor}) makes {rates} of this mixture"

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(plain(self), indent=2) + "\n")


def read_input_cost(path: Path) -> InputCost:
    """What `InputCost.write` wrote. Raises `UserError` for any other file, and where no sample can be used."""
    made = "give the input.json that python -m navil_jax.data doctor writes"
    try:
        found: InputCost = typed(json.loads(path.read_text()), InputCost, "")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {made}") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON; {made}") from error
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('config.')}; {made}") from error
    if not any(source.usable * source.share for source in found.sources):
        raise UserError(f"{path}: none of its samples can be used; {made}")
    return found


def check_same_images(cost: InputCost, config: Config, path: Path) -> None:
    """Raises `UserError` if images were measured with other settings than a config's, which make other patches."""
    if config.model.vision is None:
        return
    now = {**plain(config.images), "patch_size": config.model.encoder.patch_size}
    for name, before in {**plain(cost.images), "patch_size": cost.patch_size}.items():
        if before != now[name]:
            raise UserError(
                f"{path}: was measured with {name} {before}, and the recipe has {now[name]}; call data doctor with it"
            )


def measure(opened: OpenRun) -> InputCost:
    """Works on some samples of each source of a run, in this process."""
    config = opened.config
    drawn = drawn_by(config, [len(source) for source in opened.sources], config.steps * config.batch_samples)
    found = tuple(
        _measured(config, opened.tokenizer, number, source, share)
        for number, (source, share) in enumerate(zip(opened.sources, (drawn / drawn.sum()).tolist(), strict=True))
    )
    side = config.model.vision.patch_size if config.model.vision else 0
    return InputCost(_processor(), config.images, side, found)


def _measured(config: Config, tokenizer: Tokenizer, number: int, source: Source, share: float) -> SourceCost:
    name, config = config.data.sources[number].name, for_source(config, number)
    budgets = batch_spec(config).budgets
    places = np.linspace(0, len(source) - 1, min(SAMPLES, len(source))).round().astype(int).tolist()
    clock, kept = _Clock(), list[Usable]()
    images = size = measured = 0
    for place in places[:1]:  # compiles what has to be, fills caches
        _features(source, place, config, tokenizer, number, budgets, _Clock())
    for place in places:
        measured += 1
        if made := _features(source, place, config, tokenizer, number, budgets, clock):
            sample, usable = made
            kept.append(dataclasses.replace(usable, source=name))
            images, size = images + len(sample.images), size + _bytes(sample)
        if sum(clock.seconds.values()) > SECONDS:
            break
    _pack(kept, config, tokenizer, clock)
    count = max(1, measured)
    means = {stage: clock.seconds[stage] / count for stage in STAGES}
    content = {field: sum(len(sample.features[field]) for sample in kept) / count for field in SIZES}
    return SourceCost(name, share, measured, len(kept) / count, images / count, size / count, **content, **means)


class _Clock:
    """Seconds of CPU of this process, by stage."""

    def __init__(self) -> None:
        self.seconds = defaultdict[str, float](float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.process_time()
        try:
            yield
        finally:
            self.seconds[stage] += time.process_time() - began


def _features(
    source: Source,
    index: int,
    config: Config,
    tokenizer: Tokenizer,
    number: int,
    budgets: dict[str, int],
    clock: _Clock,
) -> tuple[Sample, Usable] | None:
    """What `features.FeatureSource` makes of a sample, by stages; None: it cannot be used."""
    try:
        with clock("read"):
            sample = source[index]
        with clock("decode"):
            shown = decoded(sample, config, number, index, place=0)
        with clock("tokenise"):
            tokens, fitting, _ = tokenised(shown, config, tokenizer, budgets)
        with clock("resize"):
            made = {**tokens, **cut_patches(shown, fitting)}
    except (UserError, TooLong):
        return None
    except TransformFailed as error:
        raise UserError(f"source {config.data.sources[number].name}, sample {index}: {error}") from error
    ids = np.zeros(len(made["text_tokens"]), np.int32)
    usable = Usable("", {**made, "text_source_ids": ids, "text_sample_ids": ids})
    with clock("send"):
        sent = pickle.dumps(usable, pickle.HIGHEST_PROTOCOL)
    with clock("receive"):
        pickle.loads(sent)
    return sample, usable


def _pack(samples: Sequence[Usable], config: Config, tokenizer: Tokenizer, clock: _Clock) -> None:
    """Times what the trainer's process does with features: rows of them, their costs, arrays; as for all `samples`."""
    if not samples:
        return
    spec = dataclasses.replace(batch_spec(config), rows=1)
    watch = SampleWatch(Quarantine(), 1.0)
    endless = grain.MapDataset.source(list(samples)).repeat()
    rows = iter(PackedRows(endless, spec, config.data.packing_lookahead, 0, watch))
    next(rows)  # reads as many as wait
    own, packed = _Clock(), 0
    for _ in range(ROWS):
        with own("pack"):
            row = next(rows)
            row_cost(config.model, row)
            spec.build([row], tokenizer.token_id("<IMG_CONTEXT>"))
        packed += len(row)
    clock.seconds["pack"] += own.seconds["pack"] / packed * len(samples)


def _bytes(sample: Sample) -> int:
    """Of encoded images and of texts; a source that draws its images reads none."""
    images = (
        len(image) if isinstance(image, bytes) else 0 if isinstance(image, Image.Image) else image.stat().st_size
        for image in sample.images
    )
    return sum(images) + sum(len(text.encode()) for turn in sample.turns for text in turn)


def _processor() -> str:
    """Example: AMD EPYC 9B14"""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"
