"""README and docs: commands run or are parsed, examples run, and the files, keys, tests and links they name exist."""

import argparse
import ast
import contextlib
import functools
import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from made_runs import copy_case
from PIL import Image

from launch.__main__ import ROADS
from navil_jax.config import Config
from navil_jax.config.flags import apply_overrides, describe, found_recipe, load_config
from navil_jax.study.grid import load_study

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "WORKSPACE.md")), *sorted(DOCS.glob("*.md"))]
# Above a block: why no test runs it. What is ours in it is parsed all the same.
MARKERS = {
    "needs: a server",
    "needs: cloud",
    "needs: weights",
    "needs: tpu",
    "needs: torch",
    "needs: VLMEvalKit",
    "minutes",
}
BLOCK = re.compile(
    r"^(?:<!-- (?P<marker>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
KEYS = set(re.findall(r"^  ([\w.]+) = ", describe(Config), re.MULTILINE))


def page_name(page: Path) -> str:
    return page.name


class Block(NamedTuple):
    page: Path
    marker: str
    language: str
    text: str


BLOCKS = [
    Block(page, found["marker"] or "", found["language"], found["text"])
    for page in PAGES
    for found in BLOCK.finditer(page.read_text())
]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of every command; lines that end with a backslash go on, and && stands between two."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            if words := shlex.split(part, comments=True):
                yield words


SHELL = [(block, words) for block in BLOCKS if block.language in ("bash", "sh") for words in commands(block)]


def is_python(words: list[str]) -> bool:
    return Path(words[0]).name in ("python", "python3")


def module_of(words: list[str]) -> str:
    """What a command runs of this repository: `navil_jax.train`, `benchmarks.images`, or nothing."""
    ours = is_python(words) and words[1:2] == ["-m"] and words[2].split(".")[0] in ("navil_jax", "benchmarks")
    return words[2] if ours else ""


def test_every_block_has_a_known_language_and_marker():
    assert {block.language for block in BLOCKS} <= {"bash", "python", "json"}
    assert {block.marker for block in BLOCKS} <= MARKERS | {""}
    assert len(SHELL) > 60


# Commands that are parsed.


class Parsed(SystemExit):
    """Raised by a parser in the place of returning, so that the command does not run."""

    def __init__(self, options: argparse.Namespace, rest: list[str]):
        super().__init__()
        self.options, self.rest = options, rest


@pytest.fixture
def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command ends when its arguments are read."""
    original, open_calls = argparse.ArgumentParser.parse_known_args, []

    def parse_known_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        open_calls.append(self)  # parsers of subcommands are called by the first one
        try:
            found = original(self, args, namespace)
        finally:
            open_calls.pop()
        if not open_calls:
            raise Parsed(*found)
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)


def parsed(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Parsed:
    """What the parser of a command makes of its arguments; AssertionError if it takes them for wrong."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    is_file = module.endswith(".py")
    with contextlib.suppress(ModuleNotFoundError):
        module = f"{module}.__main__" if importlib.util.find_spec(f"{module}.__main__") else module
    main = runpy.run_path(str(ROOT / module))["main"] if is_file else importlib.import_module(module).main
    try:
        main()
    except Parsed as found:
        return found
    raise AssertionError(f"{module} read no arguments")


def check_config(module: str, arguments: list[str]) -> None:
    """Recipes that a command names exist, and so do the keys that it changes, with values of their type."""
    recipe, overrides, rest = None, {}, iter(arguments)
    for argument in rest:
        key, _, value = argument.partition("=")
        if key == "--config":
            recipe = Path(value or next(rest))
        elif key.startswith("--config."):
            overrides[key.removeprefix("--config.")] = value
    if recipe and module == "navil_jax.study":
        load_study(found_recipe(recipe, "study"))
    else:
        apply_overrides(load_config(recipe) if recipe else Config(), overrides)


def check(words: list[str], marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a command of ours would refuse these arguments, or if another one stands in a block without a marker."""
    if module := module_of(words):
        arguments = words[3:]
        if module == "benchmarks.parity":
            assert arguments == []
        elif "--help" not in arguments:
            rest = parsed(module, arguments, monkeypatch).rest
            assert [argument for argument in rest if not argument.startswith("--config.")] == []
            assert not rest or module == "navil_jax.convert"
        check_config(module, arguments)
    elif is_python(words) and words[1] == "launch/local.py":
        check(parsed(words[1], words[2:], monkeypatch).options.command, marked, monkeypatch)
    elif is_python(words) and words[1:3] == ["-m", "launch"]:
        if "--help" not in words:
            found = parsed("launch", words[3:], monkeypatch).options
            road = ROADS[found.road]
            assert found.action in road.actions
            assert ("--" in words) == (found.action in road.takes_command)
        if "--" in words:
            check(words[words.index("--") + 1 :], marked, monkeypatch)
    else:
        known = {"venv", "pip", "pytest", "ruff", "mypy", "tests/resolutions.py"}
        assert marked or known & {Path(words[0]).name, *words[1:3]}, "this program is not known: mark the block"
    for name in (words[i + 1] for i, word in enumerate(words) if word == "-r"):
        assert (ROOT / name).is_file()


@pytest.mark.usefixtures("only_parse")
def test_every_command_takes_the_arguments_that_it_is_shown_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    wrong = []
    for block, words in SHELL:
        try:
            check(words, bool(block.marker), monkeypatch)
        except (Exception, SystemExit) as error:
            wrong.append(f"{block.page.name}: {shlex.join(words)}: {error!r}")
    assert wrong == []


@pytest.mark.usefixtures("only_parse")
@pytest.mark.parametrize(
    "line",
    [
        "python -m navil_jax.train --config configs/none.py",
        "python -m navil_jax.train --config configs/demo.py --config.step=2",
        "python -m navil_jax.chat --checkpoint runs/demo --picture a.png",
        "python -m navil_jax.convert import NaViL-2B runs/x --config.steps=2 --fast",
        "python -m navil_jax.study run --config configs/study/none.py",
        "python launch/local.py --processes 2 -- python -m navil_jax.train --config configs/demo.py --fast",
        "python -m launch queued fly",
        "python -m launch walk up",
        "python -m launch queued up",
        "python -m launch queued stop -- python -m navil_jax.train --config configs/demo.py",
        "python -m launch queued up -- python -m navil_jax.train --config configs/none.py",
        "gcloud compute tpus list",
    ],
)
def test_a_command_that_would_fail_is_found(line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((Exception, SystemExit)):
        check(shlex.split(line), False, monkeypatch)


# Commands and examples that are run.

# Beginnings of commands that take seconds, on the files of `desk`.
CHEAP = (
    "navil_jax.convert export runs/navil-2b",
    "navil_jax.convert import NaViL-2B",
    "navil_jax.convert inspect",
    "navil_jax.convert verify runs/navil-2b",
    "navil_jax.data convert --from llava",
    "navil_jax.data doctor --source",
    "navil_jax.data tokens",
    "navil_jax.study fit",
    "navil_jax.study plan",
)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the docs take to be there; tiny models stand in for NaViL-2B and for the demo's run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    Image.new("RGB", (96, 64), "blue").save("image.png")
    (tmp_path / "images").mkdir()
    for name in ("cat.png", "a.jpg", "images/a.jpg"):
        Image.open("image.png").save(name)
    talk = '[{"from": "human", "value": "<image>\\\\nWhich colour?"}, {"from": "gpt", "value": "Blue."}]'
    Path("train.jsonl").write_text(f'{{"image": "a.jpg", "conversations": {talk}}}\n'.replace("\\\\n", "\\n"))
    copy_case("internlm2_small", tmp_path / "NaViL-2B")
    assert run("navil_jax.convert", "import", "NaViL-2B", "runs/demo") == 0
    return tmp_path


def run(module: str, *arguments: str) -> int:
    package = importlib.util.find_spec(module)
    inner = f"{module}.__main__" if package and package.submodule_search_locations else module
    try:
        return importlib.import_module(inner).main(list(arguments))
    except SystemExit as end:  # --help
        return int(end.code or 0)


@pytest.mark.slow
@pytest.mark.usefixtures("desk")
def test_cheap_commands_run():
    status = {}
    for _, words in SHELL:
        module = module_of(words)
        if (
            "DataflowRunner" not in words
            and module.startswith("navil_jax")
            and ("--help" in words or " ".join(words[2:]).startswith(CHEAP))
        ):
            if words[3:4] in (["import"], ["export"], ["plan"]):  # more than one page makes the same
                shutil.rmtree(words[-1], ignore_errors=True)
                for made in Path().glob("configs/my*"):
                    made.unlink()
            status[shlex.join(words[2:])] = run(module, *words[3:])
        elif words[1:] == ["-m", "launch", "--help"]:
            done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True)
            status[shlex.join(words)] = done.returncode
    assert [start for start in CHEAP if not any(command.startswith(start) for command in status)] == []
    assert {command: code for command, code in status.items() if code} == {}


@pytest.mark.slow
@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=page_name)
def test_python_examples_run(page: Path):
    """Those of a page one after another."""
    names: dict[str, object] = {}
    for block in BLOCKS:
        if block.page == page and block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)


def test_python_examples_are_short():
    assert [block for block in BLOCKS if block.language == "python" and block.text.count("\n") > 15] == []


# What pages name.


@functools.cache
def spans(page: Path) -> list[str]:
    """Inline code of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text()))]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_file_that_a_page_names_exists(page: Path):
    folders = ("navil_jax", "configs", "tests", "docs", "launch", "benchmarks")
    file = re.compile(rf"(?:{'|'.join(folders)})/[\w/.-]+\.\w+|[\w/]+/\w+\.py")  # the last: in navil_jax/
    named = {span for span in spans(page) if file.fullmatch(span)} - {
        "configs/my.py",
        "launch/settings.toml",
    }
    assert [name for name in named if not any((folder / name).exists() for folder in (ROOT, ROOT / "navil_jax"))] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_leads_somewhere(page: Path):
    """Pages of docs/ link within it, as the site holds nothing else."""
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
    if page.parent == DOCS:
        assert [link for link in links if not (page.parent / link).resolve().is_relative_to(DOCS)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_config_key_that_a_page_names_exists(page: Path):
    text = page.read_text()
    named = re.findall(r"--config\.([a-z][\w.]*\w)", text)
    groups = "data|images|mesh|model|optimizer"
    for span in spans(page):
        if found := re.fullmatch(rf"(?:config\.)?((?:{groups})\.[a-z0-9_.N]+)(=.*)?", span):
            named.append(found[1])
    wrong = {
        key for key in named if not key.endswith((".safetensors", ".fingerprint"))
    }  # files, and a key of checkpoints
    wrong = {key for key in (re.sub(r"\.\d+(?=\.|$)", ".N", key) for key in wrong) if key not in KEYS}
    assert {key for key in wrong if not any(known.startswith(f"{key}.") for known in KEYS)} == set()


def defined_in(file: Path) -> set[str]:
    """`test_x` and `TestY::test_z` of a test file."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_test_that_a_page_names_exists(page: Path):
    named = re.findall(r"`(test_\w+)::([\w:]+)`", page.read_text())
    assert len(named) > 20 or page.name != "differences.md"
    missing = [f"{file}::{test}" for file, test in named if test not in defined_in(ROOT / "tests" / f"{file}.py")]
    assert missing == []


def test_every_difference_has_a_test():
    text = (DOCS / "differences.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| what"))]
    assert [row for row in rows if "`test_" not in row] == []


def test_the_map_names_every_module():
    words = set(re.findall(r"[\w/]+", " ".join(spans(ROOT / "WORKSPACE.md")).replace(".py", "")))
    words |= {part for word in words for part in word.split("/")}
    modules = [path for path in (ROOT / "navil_jax").rglob("*.py") if not path.name.startswith("__")]
    inner = ("data/formats", "data/toy", "data/tokenizers", "convert/families", "convert/verify")  # named as a whole
    outer = [path for path in modules if not path.parent.as_posix().endswith(inner)]
    assert len(outer) > 80
    assert [path.as_posix() for path in outer if path.stem not in words] == []


def test_what_the_map_names_in_a_module_is_there():
    """Such as `data/sources.SOURCES`."""
    wrong, right = [], []
    for span in spans(ROOT / "WORKSPACE.md"):
        match = re.fullmatch(r"([a-z_]+/[\w/]+)\.(?!py$|md$|sh$|toml$|txt$)(\w+)(\(.*\))?", span)
        if match:
            module = ROOT / "navil_jax" / match[1]
            file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            there = file.is_file() and re.search(rf"^(class |def )?{match[2]}\b", file.read_text(), re.MULTILINE)
            (right if there else wrong).append(span)
    assert wrong == []
    assert len(right) > 10


def test_the_site_has_every_page():
    site = (ROOT / "zensical.toml").read_text()
    assert sorted(re.findall(r'"(\w+\.md)"', site)) == sorted(page.name for page in PAGES if page.parent == DOCS)


def test_readme_names_every_extra_and_console_script():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {*project["optional-dependencies"], *project["scripts"]} - {"dev"}
    assert named - set(spans(ROOT / "README.md")) == set()


def test_diagrams_are_those_that_their_script_draws():
    for name, draw in runpy.run_path(str(DOCS / "diagrams.py"))["DRAWINGS"].items():
        assert (DOCS / "images" / name).read_text() == draw()


def test_pictures_of_pages_keep_their_colours(tmp_path: Path):
    """A small mark, a large ground and the shades of letters, on white."""
    drawn = Image.new("RGB", (390, 800), "white")
    drawn.paste((238, 241, 246), (0, 300, 390, 800))
    drawn.paste(Image.linear_gradient("L").resize((300, 200)), (40, 320))
    drawn.paste((26, 127, 55), (10, 55, 15, 95))
    drawn.save(tmp_path / "page.png")
    runpy.run_path(str(DOCS / "gallery.py"))["keep"](tmp_path / "page.png", tmp_path / "kept.png", 390)
    kept = Image.open(tmp_path / "kept.png").convert("RGB")
    for place in ((12, 70), (200, 700), (300, 100)):
        assert all(abs(a - b) < 3 for a, b in zip(kept.getpixel(place), drawn.getpixel(place), strict=True))
