"""Settings of a source reach its tokens and patches, and a run trains on files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import toy_recipe
from made_data import jpeg, talk, write_lines
from PIL import Image

from navil_jax.config import Config, DataConfig, ImageConfig, MeshConfig, ModelConfig, SourceConfig
from navil_jax.data.__main__ import main as convert_main
from navil_jax.data.pipeline import evaluation_batches, make_dataset
from navil_jax.data.sources import expand_sources, open_source
from navil_jax.data.streams import sample_counts
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.sharding import make_mesh
from navil_jax.train.__main__ import train
from navil_jax.train.held_out import HeldOut
from navil_jax.train.metrics import read_log
from navil_jax.train.plots import plot_answers

TOKENIZER = load_tokenizer(Path(__file__).parent / "golden" / "prompts" / "tokenizer")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    return tmp_path


def config(*sources: SourceConfig) -> Config:
    return Config(
        model=ModelConfig(special_token_ids=TOKENIZER.special_token_ids),
        images=ImageConfig(min_patches=4, max_patches=64, multiscale=False),
        data=DataConfig(sources, rows=1, visual_slots=48, text_slots=200, patch_slots=160, system_message="General."),
    )


def seen(config: Config, number: int) -> tuple[str, np.ndarray, int]:
    """Text, different loss weights and images' patches of the first sample of a source."""
    source = open_source(config.data.sources[number], "train")
    batch = next(iter(evaluation_batches(config, source, TOKENIZER, number, limit=1)))
    row = batch.segment_ids[0] == 1
    weights = batch.loss_weights[0, row]
    order = np.argsort(batch.positions[0, row])
    text = TOKENIZER.decode(batch.tokens[0, row][order].tolist())
    return text, np.unique(weights[weights > 0]), int((batch.patch_blocks[0] > 0).sum())


def test_settings_reach_tokens_and_patches(folder: Path) -> None:
    Image.new("RGB", (160, 160)).save(folder / "big.png")
    caption = write_lines(folder / "c.jsonl", [{"image": "big.png", "caption": "x y z"}])
    own = write_lines(folder / "s.jsonl", [{"conversations": talk("q", "x y z", system="Own.")}])
    plain = SourceConfig("plain", kind="llava", path=caption)
    special = dataclasses.replace(plain, prompt="Say.", system_message="Special.", max_patches=16, loss_weight="token")
    brought = SourceConfig("brought", kind="llava", path=own, system_message="Special.")
    mixture = config(plain, special, brought)
    text, weights, patches = seen(mixture, 0)
    assert "General." in text and "Describe the picture." in text
    assert weights[0] < 1
    assert patches > 16
    text, weights, patches = seen(mixture, 1)
    assert "Special." in text and "Say." in text and "General." not in text
    assert weights.tolist() == [1.0]
    assert 4 <= patches <= 16
    text, _, patches = seen(mixture, 2)
    assert "Own." in text and "Special." not in text
    assert patches == 0


def test_bad_samples_of_files_are_skipped_and_counted(folder: Path) -> None:
    good = {"image": "a.jpg", "conversations": talk("<image>q", "a")}
    path = write_lines(folder / "x.jsonl", [good, b"{", good, {"image": "no.jpg", "text": "x"}, good])
    mixture = config(SourceConfig("files", kind="llava", path=path))
    mixture = dataclasses.replace(mixture, data=dataclasses.replace(mixture.data, packing_lookahead=2))
    iterator = iter(make_dataset(mixture, [open_source(mixture.data.sources[0], "train")], TOKENIZER))
    for _ in range(8):
        next(iterator)
    assert sample_counts(iterator)["files/bad"] > 0


@pytest.mark.slow
def test_a_run_trains_on_a_meta_file_and_converted_shards(folder: Path) -> None:
    records = [{"image": "a.jpg", "conversations": talk("<image>\nWhich color?", "red")}] * 8
    write_lines(folder / "a.jsonl", records)
    meta = {"a": {"annotation": "a.jsonl"}, "b": {"annotation": "a.jsonl", "repeat_time": 3}}
    (folder / "m.json").write_text(json.dumps(meta))
    shards = str(folder / "shards")
    assert convert_main(["convert", "--from", "llava", "--path", str(folder / "a.jsonl"), "--out", shards]) == 0
    sources = (
        SourceConfig("m", kind="meta", path=str(folder / "m.json")),
        SourceConfig("shards", kind="array_record", path=shards, held_out=shards),
    )
    toy = toy_recipe.get_config()
    toy = dataclasses.replace(
        toy, workdir=str(folder / "run"), steps=3, data=dataclasses.replace(toy.data, sources=sources)
    )
    assert [entry.name for entry in expand_sources(toy).data.sources] == ["a", "b", "shards"]
    assert train(toy) == 0
    log = read_log(folder / "run" / "metrics.jsonl")
    assert {"eval/shards/loss", "eval/shards/accuracy"} <= {key for line in log for key in line}


def test_without_held_out_samples_there_is_nothing_to_score(folder: Path) -> None:
    path = write_lines(folder / "a.jsonl", [{"text": "a"}])
    mixture = config(SourceConfig("files", kind="llava", path=path))
    evaluator = HeldOut(mixture, make_mesh(MeshConfig()), TOKENIZER)
    scores = evaluator.score({})
    assert (scores, evaluator.metrics(scores), evaluator.rows(scores)) == ([], {}, [])
    plot_answers(folder / "answers.png", evaluator.answers(scores, 4))
