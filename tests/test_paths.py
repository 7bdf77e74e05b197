"""Files of a run in a local folder and on a bucket, and what is said of addresses that will not do."""

import importlib.util
from pathlib import Path

import pytest
from bucket_server import serve

from navil_jax import paths
from navil_jax.config import Config, DataConfig, SourceConfig
from navil_jax.config.flags import apply_overrides
from navil_jax.config.plain import differences
from navil_jax.convert import __main__ as convert
from navil_jax.data.formats.files import join
from navil_jax.data.sources import expand_meta
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.errors import UserError
from navil_jax.paths import RunFiles, absolute, given_path, local_path, new_file, new_folder, path_of

TOKENIZER = Path(__file__).parent / "golden" / "prompts" / "tokenizer"


@pytest.fixture(scope="module")
def bucket():
    pytest.importorskip("gcsfs")
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


def test_local_files_are_written_in_place(tmp_path):
    with RunFiles(tmp_path / "run") as files:
        (files.local / "metrics.jsonl").write_text("1\n")
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == "1\n"
        files.upload()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_bucket_gets_what_changed(bucket):
    bucket.put("bucket/run/metrics.jsonl", b"1\n")
    bucket.put("bucket/run/checkpoints/3/params", b"large")
    with RunFiles("gs://bucket/run") as files:
        assert [path.name for path in files.local.iterdir()] == ["metrics.jsonl"]
        with (files.local / "metrics.jsonl").open("a") as file:
            file.write("2\n")
        assert bucket.objects["bucket/run/metrics.jsonl"] == b"1\n"
        (files.local / "tensorboard").mkdir()
        (files.local / "tensorboard" / "events").write_bytes(b"e")
        files.upload()
        assert bucket.objects["bucket/run/metrics.jsonl"] == b"1\n2\n"
        assert bucket.objects["bucket/run/tensorboard/events"] == b"e"
        written = dict(bucket.generations)
        files.upload()
        assert bucket.generations == written
    assert not files.local.exists()


def test_what_an_error_leaves_is_uploaded(bucket):
    with pytest.raises(RuntimeError), RunFiles("gs://bucket/failed") as files:
        (files.local / "quarantine.jsonl").write_text("{}\n")
        raise RuntimeError
    assert bucket.objects["bucket/failed/quarantine.jsonl"] == b"{}\n"


def test_a_tokenizer_on_a_bucket(bucket):
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.save("gs://bucket/words")
    assert load_tokenizer("gs://bucket/words").files() == tokenizer.files()
    with pytest.raises(UserError, match="gs://bucket/none: no such folder with a tokenizer"):
        load_tokenizer("gs://bucket/none")


def test_what_another_host_writes_is_seen(bucket):
    folder = path_of("gs://bucket/shared")
    assert not folder.exists()
    for name in ("first", "second"):
        bucket.put(f"bucket/shared/{name}", b"x")
        assert (folder / name).exists()
        assert folder.is_dir()
        assert name in [path.name for path in folder.iterdir()]


def test_absolute_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert str(absolute(path_of("runs/x"))) == f"{tmp_path}/runs/x"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    assert str(absolute(path_of("gs://bucket/x"))) == "gs://bucket/x"


def test_addresses_that_will_not_do(monkeypatch):
    with pytest.raises(UserError, match=r"^memory://run: runs are kept in local folders or at gs://$"):
        path_of("memory://run")
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^gs://b/run: needs a package that is not installed: pip install gcsfs$"):
        path_of("gs://b/run")
    with pytest.raises(UserError, match=r"^gs://b/x: only local folders will do here; copy with: gcloud storage cp"):
        local_path("gs://b/x")


def test_converting_takes_local_folders(capsys):
    assert convert.main(["import", "gs://bucket/NaViL-2B", "runs/x"]) == 2
    assert "error: gs://bucket/NaViL-2B: only local folders will do here" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(data=DataConfig(sources=(SourceConfig("a", kind="llava", path="x"),)))
    keys = ("workdir", "init_from", "data.tokenizer", "data.quarantine")
    keys += tuple(f"data.sources.0.{name}" for name in ("path", "held_out", "root"))
    changed = differences(config, apply_overrides(config, dict.fromkeys(keys, "~/x")))
    assert {key: new for key, (_, new) in changed.items()} == dict.fromkeys(keys, f"{tmp_path}/x")
    assert {str(read("~/x")) for read in (path_of, local_path, given_path, new_file, new_folder)} == {f"{tmp_path}/x"}
    assert join("~/images", "a.png") == f"{tmp_path}/images/a.png"
    assert join("images", "~/a.png") == f"{tmp_path}/a.png"
    (tmp_path / "m.json").write_text('{"a": {"annotation": "~/a.jsonl", "root": "~/images", "length": 1}}')
    (part,) = expand_meta(SourceConfig("m", kind="meta", path=f"{tmp_path}/m.json"))
    assert (part.path, part.root) == (f"{tmp_path}/a.jsonl", f"{tmp_path}/images")
