"""Every command refuses a wrong option, value or file with one line on stderr and status 2, before it does anything."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import pytest

RECIPE = "configs/demo.py"
WARMUP = "--config.optimizer.warmup_steps=1000"
BUILT_IN = ("--from", "scenes", "--out", "o")
LLAVA = ("--from", "llava", "--path", "train.jsonl", "--out", "o")

# Command -> (arguments, what the line says).
PROBES: dict[str, list[tuple[Sequence[str], str]]] = {
    "generate": [
        ((), "the following arguments are required: FILE, --checkpoint, --out"),
        (("none.jsonl", "--checkpoint", "folder", "--out", "o"), "none.jsonl: no such file"),
        (("train.jsonl", "--checkpoint", "folder", "--out", "folder"), "--out: folder: is a folder"),
        (("train.jsonl", "--checkpoint", "folder", "--out", "train.jsonl"), "is the file of requests"),
        (("train.jsonl", "--checkpoint", "c", "--out", "o", "--slots", "0"), "--slots: must be at least 1, not 0"),
        (("train.jsonl", "--checkpoint", "c", "--out", "o", "--top-p", "2"), "--top-p: must be above 0 and at most 1"),
    ],
    "serve": [
        ((), "the following arguments are required: --checkpoint"),
        (("--checkpoint", "folder", "--port", "0"), "--port: must be at least 1"),
        (("--checkpoint", "folder", "--port", "70000"), "--port: must be at least 1 and at most 65,535"),
        (("--checkpoint", "folder", "--images", "none"), "--images none: no such folder"),
        (("--checkpoint", "folder", "--host", "300.1.2.3"), "cannot listen there"),
        (("--checkpoint", "folder", "--max-tokens", "0"), "--max-tokens: must be at least 1"),
    ],
    "train": [
        ((), "--config"),
        (("--config", "none.py"), "none.py: no such config file"),
        (("--config", "folder"), "folder: no such config file"),
        (("--config", "text"), "text:1: syntax error"),
        (("--config", "image.png"), "image.png"),
        (("--config", RECIPE, "--step=1"), "unrecognized arguments: --step=1"),
        (("--config", RECIPE, "extra"), "unrecognized arguments: extra"),
        (("--config", RECIPE, "--config.step=1"), "config.step: no such key, the nearest one is config.steps"),
        (("--config", RECIPE, "--config.steps"), "--config.steps: no value given"),
        (
            ("--config", RECIPE, "--config.steps=5", "--config.steps=6"),
            "--config.steps: is given twice, as '5' and '6'",
        ),
        (("--config", RECIPE, "--config", RECIPE), "--config: is given twice"),
        (("--config", RECIPE, "--config.steps=\u0663"), "is not int"),
        (("--config", RECIPE, "--config.data.sources.9.name=x"), "there are 4 entries, numbered from 0"),
        (("--config", RECIPE, "--config.workdir=o", "--config.steps=9", WARMUP), "warmup_steps: 1000 must be below"),
        (("--config", RECIPE, "--config.steps=x"), "config.steps: 'x' is not int"),
        (("--config", RECIPE, "--config.steps=0"), "config.steps: must be at least 1, not 0"),
        (("--config", RECIPE, "--config.steps=1" + "0" * 5000), "config.steps"),
        (("--config", RECIPE, "--config.seed=-1"), "config.seed: must be at least 0"),
        (("--config", RECIPE, "--config.seed=4294967296"), "config.seed: must be at least 0 and at most 4,294,967,295"),
        (("--config", RECIPE, "--config.mesh.data=0"), "config.mesh.data: must be at least 1, or -1, not 0"),
        (("--config", RECIPE, "--config.data.threads=100000"), "config.data.threads"),
        (("--config", RECIPE, "--config.optimizer.b1=nan"), "config.optimizer.b1"),
        (("--config", RECIPE, "--config.resume_with=o"), "config.resume_with: no key 'o'"),
        (("--config", RECIPE, "--config.workdir="), "config.workdir: no folder for the run is given"),
        (("--config", RECIPE, "--config.workdir=text"), "text"),
        (("--config", RECIPE, "--config.init_from=none"), "none: no such folder"),
        (("--config", RECIPE, "--config.init_from=text"), "text"),
        (("--config", RECIPE, "--config.init_from=folder"), "folder: holds neither config.json"),
        (("--config", RECIPE, "--config.mesh.data=3"), "does not make"),
        (("--config", "deep.py"), "deep.py"),
        (("--config", "latin.py"), "latin.py"),
    ],
    "data": [
        (("convrt",), "no command 'convrt'; nearest is 'convert'"),
        (("convert",), "--from"),
        (("convert", *BUILT_IN, "--shards", "-1"), "--shards: must be at least 1, not -1"),
        (("convert", *BUILT_IN, "--shards", "0"), "--shards: must be at least 1, not 0"),
        (("convert", *BUILT_IN, "--shards", "\u0663"), "is not a whole number"),
        (("convert", *BUILT_IN, "--shards", "2", "--shards=3"), "--shards: is given twice"),
        (("convert", *BUILT_IN, "--shards", "x"), "--shards: 'x' is not a whole number"),
        (("convert", *BUILT_IN, "--split", "all"), "--split: invalid choice: 'all'"),
        (("convert", "--from", "scens", "--out", "o"), "no kind of data named 'scens'; nearest is 'scenes'"),
        (("convert", "--from", "llava", "--path", "", "--out", "o"), "--path: is empty"),
        (("convert", "--from", "llava", "--path", "none.jsonl", "--out", "o"), "none.jsonl: no such file"),
        (("convert", "--from", "parquet", "--path", "text", "--out", "o"), "text"),
        (("convert", "--from", "meta", "--path", "deep.json", "--out", "o"), "deep.json"),
        (("convert", "--from", "meta", "--path", "folder", "--out", "o"), "folder"),
        (("convert", *LLAVA, "--split", "test"), "--split: has no effect on data of kind llava"),
        (("convert", *LLAVA[:-1], "text"), "text"),
        (("convert", *LLAVA, "--rot", "x"), "unrecognized arguments: --rot"),
        (("doctor",), "no data given"),
        (("doctor", "--source", "llava:none.jsonl"), "none.jsonl"),
        (
            ("doctor", "--source", "llava:train.jsonl", "--workers", "99999"),
            "--workers: must be at least 0 and at most",
        ),
        (("doctor", "--source", "llava:train.jsonl", "--samples", "-1"), "--samples: must be at least 0, not -1"),
        (("doctor", "--source", "llava:train.jsonl", "--out", "text"), "--out: text: is a file"),
        (("doctor", "--source", "llava:train.jsonl", "--out", "gs://a/b"), "only local folders"),
        (("preview", "--config", RECIPE, "--rows", "0"), "--rows: must be at least 1, not 0"),
        (("preview", "--config", RECIPE, "--out", "folder"), "--out: folder: is a folder"),
        (("tokens",), "--image: no image given"),
        (("tokens", "--image", "text"), "text: not an image"),
        (("tokens", "--image", "folder"), "folder"),
        (("tokens", "--image", "none.png"), "none.png"),
        (("tokens", "--image", "image.png", "--out", "text/a.png"), "--out: text: is a file"),
        (("tokens", "--image", "image.png", "--out", "a.txt"), "--out: a.txt: cannot be drawn; end its name in .png"),
        (("tokens", "--image", "image.png", "--config.images.scale_factor=2"), "config.images.scale_factor"),
    ],
    "convert": [
        ((), "COMMAND"),
        (("inport", "a", "b"), "invalid choice: 'inport'"),
        (("init", "none", "out", "--config", RECIPE), "none"),
        (("init", "folder", "out", "--config", "none.py"), "none.py: no such config file"),
        (("init", "folder", "out", "--config", RECIPE, "--seed", "1"), "--seed"),
        (("import", "none", "out"), "none"),
        (("import", "folder", "out"), "folder"),
        (("import", "folder", "text"), "target: text: is a file, a folder belongs there"),
        (("import", "folder", "out", "--dtype", "int8"), "--dtype: invalid choice: 'int8'"),
        (("import", "deep", "out"), "nested too deeply"),
        (("export", "none", "out"), "none"),
        (("export", "folder", "out", "--shard-bytes", "-5"), "--shard-bytes: must be at least 1, not -5"),
        (("export", "folder", ""), "target: is empty, name a file or folder"),
        (("export", "folder", "out", "--shards", "2"), "unrecognized arguments: --shards 2"),
        (("verify", "folder"), "give a second checkpoint, or a golden folder"),
        (("verify", "none", "folder"), "none"),
        (("verify", "a", "b", "--tolerance", "nan"), "--tolerance: must be at least 0, not nan"),
        (("verify", "a", "b", "--seed", "-1"), "--seed: must be at least 0, not -1"),
        (("verify", "folder", "--golden", "none"), "none"),
        (("inspect", "none"), "none: no such folder"),
        (("inspect", "text"), "text"),
        (("inspect", "folder"), "folder: holds neither config.json"),
        (("inspect", "deep"), "nested too deeply"),
    ],
    "chat": [
        ((), "--checkpoint"),
        (("--checkpoint", ""), "--checkpoint: is empty"),
        (("--checkpoint", "none"), "none: no such folder"),
        (("--checkpoint", "folder"), "folder: holds neither"),
        (("--checkpoint", "folder", "--image", "none.png"), "none.png"),
        (("--checkpoint", "folder", "--image", "text"), "text: not an image"),
        (("--checkpoint", "folder", "--top-p", "2"), "--top-p: must be above 0 and at most 1, not 2"),
        (("--checkpoint", "folder", "--top-k", "-1"), "--top-k: must be at least 0, not -1"),
        (("--checkpoint", "folder", "--temperature", "-1"), "--temperature: must be at least 0, not -1"),
        (("--checkpoint", "folder", "--temperature", "nan"), "--temperature: must be at least 0, not nan"),
        (("--checkpoint", "folder", "--temperature", "inf"), "--temperature: must be at least 0, not inf"),
        (("--checkpoint", "folder", "--seed", "-1"), "--seed: must be at least 0, not -1"),
        (("--checkpoint", "folder", "--max-new-tokens", "0"), "--max-new-tokens: must be at least 1, not 0"),
        (("--checkpoint", "folder", "--promt", "x"), "the nearest option is --prompt"),
    ],
    "evaluate": [
        ((), "--checkpoint"),
        (("--checkpoint", "none"), "none: no such folder"),
        (("--checkpoint", "folder", "--samples", "-1"), "--samples: must be at least 0, not -1"),
        (("--checkpoint", "folder", "--out", "text"), "--out: text: is a file"),
        (("--checkpoint", "folder", "--evaluators", ""), "--evaluators: '' has an empty name"),
        (("--checkpoint", "folder", "--evaluators", "a,"), "--evaluators: 'a,' has an empty name"),
        (("--checkpoint", "folder", "--evaluators", "a, a"), "--evaluators: 'a, a' has a name twice"),
        (("--checkpoint", "folder", "--out", "gs://a/b"), "only local folders"),
        (("--checkpoint", "folder", "--config.eval_ema=maybe"), "config.eval_ema: 'maybe' is not true | false"),
    ],
    "plan": [
        ((), "--config"),
        (("--config", RECIPE), "--topology: which slice?"),
        (("--config", RECIPE, "--topology", "v9z-8"), "v9z"),
        (("--config", RECIPE, "--topology", "v5p-7"), "v5p-7"),
        (("--config", RECIPE, "--topology", "v5p-8", "--batch", "-1"), "--batch: must be at least 0, not -1"),
        (("--config", RECIPE, "--topology", "v5p-8", "--slices", "0"), "--slices: must be at least 1, not 0"),
        (("--config", RECIPE, "--topology", "v5p-8", "--mesh", "data=0"), "--mesh: 'data=0' is no AXIS=SIZE"),
        (("--config", RECIPE, "--topology", "v5p-8", "--mesh", "data=--1"), "--mesh: 'data=--1' is no AXIS=SIZE"),
        (("--config", RECIPE, "--topology", "v5p-8", "--mesh", "data=-1"), "config.mesh: at most one axis"),
        (
            ("--config", RECIPE, "--topology", "v5p-8", "--slices", "0"),
            "--slices: must be at least 1",
        ),
        (("--config", RECIPE, "--topology", "v5p-8", "--mixture", "x"), "--mixture: invalid choice: 'x'"),
        (("--config", RECIPE, "--topology", "v5p-8", "--json", "folder"), "--json: folder: is a folder"),
        (("--config", RECIPE, "--topology", "v5p-8", "--png", "text/a.png"), "--png: text: is a file"),
    ],
    "study": [
        ((), "COMMAND"),
        (("rn",), "invalid choice: 'rn'"),
        (("run", "--config", "none.py"), "none.py: no such study file"),
        (("run", "--config", "text"), "text"),
        (("run", "--config", RECIPE), "get_study"),
        (("run", "--config", "configs/study/tiny.py", "--jobs", "0"), "--jobs: must be at least 1"),
        (("run", "--config", "configs/study/tiny.py", "--shard", "2/2"), "--shard: '2/2' is not I/N"),
        (("run", "--config", "configs/study/tiny.py", "--out", "text"), "--out: text: is a file"),
        (("fit", "none.jsonl"), "none.jsonl"),
        (("fit", "text"), "text"),
        (("fit", "folder"), "folder"),
        (("fit", "image.png"), "image.png"),
        (("fit", "--out", "folder"), "--out: folder: is a folder"),
        (("plot",), "--out"),
        (("plot", "--out", "text"), "--out: text: is a file"),
        (("report", "--out", "text/a.html"), "--out: text: is a file"),
        (("report", "deep.json", "--out", "a.html"), "deep.json"),
        (("plan", "--llm", "x", "--samples", "1M"), "--llm"),
        (("plan", "--llm", "1B", "--samples", "-1"), "--samples"),
        (("plan", "--llm", "1B", "--samples", "nan"), "--samples"),
        (("plan", "--llm", "1B", "--samples", "1M", "--words", "-1"), "--words: must be at least 0, not -1"),
        (("plan", "--llm", "1B", "--samples", "1M", "--image", "0x5"), "--image"),
        (("plan", "--llm", "1.8B", "--samples", "1M", "--topology", "v9z-8"), "v9z"),
        (("extrapolate", "none"), "none"),
        (("extrapolate", "text"), "text"),
        (("extrapolate", "folder", "--to", "x"), "--to"),
        (("extrapolate", "folder"), "folder"),
    ],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of the wrong kinds."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "folder").mkdir()
    (folder / "text").write_text("this is text: no recipe, image or table\n")
    (folder / "train.jsonl").write_text('{"caption": "red"}\n')
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe not whole")
    (folder / "deep").mkdir()
    for name in ("deep.json", "deep/config.json"):
        (folder / name).write_text("[" * 100_000)
    (folder / "deep.py").write_text("x = " + "[" * 5000)
    (folder / "latin.py").write_bytes(b"x = 'caf\xe9'\n")
    return folder


def main_of(command: str):
    module = importlib.import_module("navil_jax.chat" if command == "chat" else f"navil_jax.{command}.__main__")
    return module.main


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [(command, arguments, said) for command, probes in PROBES.items() for arguments, said in probes],
)
def test_a_mistake_is_one_line(command, arguments, said, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    assert main_of(command)(list(arguments)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")


@pytest.mark.parametrize("command", PROBES)
def test_no_mistake_leaves_files_behind(command, files):
    assert not [name for name in ("o", "out", "a.html") if (files / name).exists()]
