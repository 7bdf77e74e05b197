"""Samples of a bucket are read by many requests at a time, however many threads make their features."""

import contextlib
import dataclasses
import io
import threading
from collections.abc import Iterator
from concurrent.futures.thread import _threads_queues  # of all pools, which Python waits for at its end
from pathlib import Path

import fsspec
import numpy as np
import pytest
from bucket_server import BucketServer, serve
from made_data import tar_bytes
from made_sources import TOKENIZER, assert_equal, config
from PIL import Image

from navil_jax.batch import Batch
from navil_jax.config import Config, SourceConfig
from navil_jax.data.convert import convert
from navil_jax.data.formats import files
from navil_jax.data.pipeline import make_dataset, reading_threads
from navil_jax.data.sample import Source
from navil_jax.data.sources import open_source

TOGETHER = 16  # requests; the recipe has two threads


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[BucketServer]:
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))
    with serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("gs").clear_instance_cache()  # those of other tests have another server
        files.filesystem_of.cache_clear()
        before = set(_threads_queues)
        yield server
        for thread in set(_threads_queues) - before:  # without the server, readers would try again for minutes
            thread.join(timeout=3)
    files.filesystem_of.cache_clear()


def tar(samples: int) -> bytes:
    """Pairs of an image of 36 kB and a caption, so that a file is more than what a reader fetches with its end."""
    members = {}
    for number in range(samples):
        encoded, rng = io.BytesIO(), np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 256, (100, 120, 3), np.uint8)).save(encoded, "PNG", compress_level=0)
        members |= {f"{number:03}.png": encoded.getvalue(), f"{number:03}.txt": b"A word."}
    return tar_bytes(members)


def first_batch(settings: Config, source: Source) -> Batch:
    """Ends the reading of others while the server is still there."""
    with contextlib.closing(iter(make_dataset(settings, [source], TOKENIZER))) as batches:
        return next(batches)


@pytest.mark.parametrize("kind", ["webdataset", "array_record"])
def test_many_requests_are_open_at_a_time(bucket: BucketServer, tmp_path: Path, kind: str) -> None:
    local = tmp_path / "a.tar"
    local.write_bytes(tar(48))
    path, entry = "gs://bucket/a.tar", SourceConfig("a", kind="webdataset", path=str(local))
    if kind == "array_record":
        convert(open_source(entry, "train"), str(tmp_path / "shards"), 1)
        (local,) = (tmp_path / "shards").glob("*.array_record")
        path, entry = f"gs://bucket/{local.name}", dataclasses.replace(entry, kind=kind, path=str(local))
    bucket.put(path.removeprefix("gs://"), local.read_bytes())
    near, far = config(sources=(entry,)), config(sources=(dataclasses.replace(entry, path=path),))
    assert (reading_threads(near), reading_threads(far), reading_threads(far, 4)) == (2, 64, 16)
    expected = first_batch(near, open_source(near.data.sources[0], "train"))
    source = open_source(far.data.sources[0], "train")
    assert source[0].images  # opens the file, which is a request of its own
    passed = threading.Event()

    def open_the_gate() -> None:
        passed.set()
        bucket.gate = None

    bucket.gate = threading.Barrier(TOGETHER, open_the_gate)
    assert_equal(first_batch(far, source), expected)
    assert passed.is_set()  # so many requests waited for each other


def test_workers_get_samples_that_were_fetched_by_others(bucket: BucketServer, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(12))
    bucket.put("bucket/a.tar", tar(12))
    entry = SourceConfig("a", kind="webdataset", path=str(tmp_path / "a.tar"))
    near = config(sources=(entry,))
    far = config(sources=(dataclasses.replace(entry, path="gs://bucket/a.tar"),), workers=1)
    assert_equal(*(first_batch(settings, open_source(settings.data.sources[0], "train")) for settings in (near, far)))
