"""Where the questions of a split are: the names that files and folders have as published."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from navil_jax.errors import UserError
from navil_jax.evaluate.questions.official import read_json, read_mme_release
from navil_jax.evaluate.questions.parquet import read_parquet
from navil_jax.evaluate.questions.record import Record
from navil_jax.evaluate.questions.tsv import read_tsv

DEPTH = 4  # folders below the one that is named
GQA_IMAGES = "testdev_balanced_images"


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a benchmark as published.

    Attributes:
      tsv: name of VLMEvalKit's file.
      parquet: what names of the hub's files begin with.
      within: expression that the path of such a file has, folders and all.
      files: names of other files.
      hidden: whether its answers are kept back, and a server scores it.
      official: whether the paper's figure is of this split; scores of the others are stand-ins.
    """

    tsv: str = ""
    parquet: str = "test"
    within: str = ""
    files: tuple[str, ...] = ()
    hidden: bool = False
    official: bool = True


_DOC, _INFO, _EN = r"DocVQA/", r"InfographicVQA/", r"(^|/)en/|MMBench"
_MERGED = r"^(?!.*no.?mask)"
# Benchmark -> split -> its files; the first split is taken where none is named.
SPLITS: Mapping[str, Mapping[str, Split]] = {
    "mmvet": {"test": Split("MMVet.tsv", files=("mm-vet.json", "llava-mm-vet.jsonl"))},
    "mmmu": {
        "val": Split("MMMU_DEV_VAL.tsv", "validation"),
        "dev": Split("MMMU_DEV_VAL.tsv", "dev", official=False),
        "test": Split("MMMU_TEST.tsv", hidden=True, official=False),
    },
    "mmbench": {
        "dev": Split("MMBench_DEV_EN.tsv", "dev", _EN, ("mmbench_dev_20230712.tsv",), official=False),
        "test": Split("MMBench_TEST_EN.tsv", "test", _EN, ("mmbench_test_en_20231003.tsv",), hidden=True),
    },
    "mme": {"test": Split("MME.tsv")},
    "mathvista": {
        "testmini": Split("MathVista_MINI.tsv", "testmini"),
        "test": Split(hidden=True, official=False),
    },
    "ocrbench": {"test": Split("OCRBench.tsv")},
    "ccbench": {"test": Split("CCBench.tsv", within=r"(^|/)cc/|CCBench", files=("CCBench_legacy.tsv",))},
    "textvqa": {
        "val": Split("TextVQA_VAL.tsv", "validation"),
        "test": Split("TextVQA_TEST.tsv", hidden=True, official=False),
    },
    "scienceqa": {
        "test": Split("ScienceQA_TEST.tsv", within=r"ScienceQA-IMG/", files=("scienceqa_test_img.jsonl",)),
    },
    "gqa": {
        "testdev": Split(
            "GQA_TestDev_Balanced.tsv",
            "testdev",
            r"testdev_balanced_instructions/",
            ("llava_gqa_testdev_balanced_qwen_format.jsonl",),
        )
    },
    "docvqa": {
        "val": Split("DocVQA_VAL.tsv", "validation", _DOC, ("val_v1.0.json", "val_v1.0_withQT.json"), official=False),
        "test": Split("DocVQA_TEST.tsv", "test", _DOC, ("test_v1.0.json",), hidden=True),
    },
    "ai2d": {
        "test": Split("AI2D_TEST.tsv", within=_MERGED, files=("test_vlmevalkit.jsonl",)),
        "test_no_mask": Split("AI2D_TEST_NO_MASK.tsv", within=r"no.?mask", official=False),
    },
    "chartqa": {"test": Split("ChartQA_TEST.tsv", files=("test_human.jsonl", "test_augmented.jsonl"))},
    "infovqa": {
        "val": Split("InfoVQA_VAL.tsv", "validation", _INFO, ("infographicsVQA_val_v1.0_withQT.json",), official=False),
        "test": Split("InfoVQA_TEST.tsv", "test", _INFO, ("infographicsVQA_test_v1.0.json",), hidden=True),
    },
}


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions of a split.

    Attributes:
      files: where they were read from.
      left_out: how many rows of the files are not asked, and why; "" for none.
    """

    benchmark: str
    split: str
    records: list[Record]
    files: tuple[Path, ...]
    left_out: str = ""

    @property
    def layout(self) -> Split:
        return SPLITS[self.benchmark][self.split]


def read_questions(benchmark: str, path: Path, split: str = "") -> Questions:
    """Finds the files of a split in a folder, or takes the one that is named, and reads them.

    Args:
      split: "": the first of the benchmark.

    Raises:
      UserError: no such split or files, broken files, or two questions with one id.
    """
    splits = SPLITS[benchmark]
    split = split or next(iter(splits))
    if split not in splits:
        raise UserError(f"--split {split}: {benchmark} has {', '.join(splits)}")
    if not path.exists():
        raise UserError(f"--data {path}: no such file or folder")
    files = (path,) if path.is_file() else _find(benchmark, path, split, splits[split])
    records = _read(benchmark, files, path)
    wanted, left_out = _of_split(benchmark, records, split)
    seen: set[str | int] = set()
    for record in wanted:
        if record.id in seen:
            raise UserError(f"--data {path}: id {record.id} stands twice; name one of: {', '.join(map(str, files))}")
        seen.add(record.id)
    if not wanted:
        raise UserError(f"--data {path}: has no question of {benchmark}, split {split}")
    if blind := [record.id for record in wanted if not record.images]:
        more = (
            f"; the images of GQA are a folder {GQA_IMAGES} beside that of the questions" if benchmark == "gqa" else ""
        )
        raise UserError(f"--data {path}: {len(blind):,} questions have no image, the first is {blind[0]}{more}")
    return Questions(benchmark, split, wanted, files, left_out)


def _find(benchmark: str, folder: Path, split: str, layout: Split) -> tuple[Path, ...]:
    """Files of one kind: VLMEvalKit's, else the hub's, else the makers' own."""
    there = sorted(file for depth in range(DEPTH + 1) for file in folder.glob("/".join(["*"] * depth + ["*.*"])))
    by_name = {file.name: file for file in reversed(there)}
    named = [by_name[name] for name in (layout.tsv, *layout.files) if name in by_name]
    if named and named[0].suffix == ".tsv":
        return (named[0],)
    parts = re.compile(rf"{re.escape(layout.parquet)}-\d+-of-\d+\.parquet")
    inside = [
        f for f in there if parts.fullmatch(f.name) and re.search(layout.within, f"{folder.name}/{_below(folder, f)}")
    ]
    if inside:
        return tuple(inside)
    if named:
        return tuple(named) if benchmark == "chartqa" else (named[0],)
    if benchmark == "mme" and any(file.parent.name == "Your_Results" for file in there):
        return (folder,)
    names = [name for name in (layout.tsv, f"{layout.parquet}-*.parquet", *layout.files) if name]
    raise UserError(f"--data {folder}: has no files of {benchmark}, split {split}: {', '.join(names)}")


def _below(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _read(benchmark: str, files: tuple[Path, ...], given: Path) -> list[Record]:
    if files[0].is_dir():
        folder = next((file for file in given.rglob("Your_Results") if file.is_dir()), given / "Your_Results").parent
        return read_mme_release(folder)
    kind = files[0].suffix.lower()
    if kind == ".tsv":
        return read_tsv(files[0], benchmark)
    if kind == ".parquet":
        around = [found for file in files for found in sorted(file.parent.parent.glob(f"{GQA_IMAGES}/*.parquet"))]
        return read_parquet(files, benchmark, list(dict.fromkeys(around)) if benchmark == "gqa" else ())
    if kind in (".json", ".jsonl"):
        return [record for file in files for record in read_json(file, benchmark)]
    raise UserError(f"--data {files[0]}: is no .tsv, .parquet, .json or .jsonl file")


def _of_split(benchmark: str, records: list[Record], split: str) -> tuple[list[Record], str]:
    """The records that belong to a split, of files that hold several."""
    if benchmark == "mmmu":
        full = {"val": "validation"}.get(split, split)
        kept = [record for record in records if str(record.row.get("split", full)) == full]
        return kept, _said(len(records) - len(kept), "of other splits")
    if benchmark == "scienceqa":
        kept = [record for record in records if record.images]
        return kept, _said(len(records) - len(kept), "without an image")
    return records, ""


def _said(count: int, why: str) -> str:
    return f"{count:,} questions {why}" if count else ""
