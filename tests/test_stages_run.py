"""A tiny model through all stages, killed in each and continued, exported, read again, and fine-tuned."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from made_data import talk, write_lines
from made_runs import copy_case
from PIL import Image

from navil_jax import chat, load_pretrained
from navil_jax.config import DataConfig, DecoderConfig, ImageConfig, ModelConfig, SourceConfig, VisionConfig
from navil_jax.config.continuing import check_continues
from navil_jax.config.flags import load_config
from navil_jax.convert import __main__ as convert
from navil_jax.convert.opened import open_checkpoint, open_start
from navil_jax.data.run import open_run
from navil_jax.errors import UserError
from navil_jax.model.params import flatten
from navil_jax.train import trainer
from navil_jax.train.__main__ import train
from navil_jax.train.checkpoint import Checkpoints
from navil_jax.train.metrics import read_log
from navil_jax.train.profiling import Profiler

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("s1_1", "s1_2", "s2")
COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
MODEL = ModelConfig(
    vision=VisionConfig(depth=1, width=16, mlp_dim=24, num_heads=2),
    decoder=DecoderConfig(
        depth=3,
        width=64,
        mlp_dim=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=600,
        max_positions=64,
        rope_scaling="dynamic",
        rope_factor=2.0,
        pad_token_id=2,
    ),
    special_token_ids=(),
    compute_dtype="float32",
    remat="none",
)


class Killed(Exception):
    """The process is gone."""


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """All runs of this module use one device."""
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = trainer.make_mesh
        patch.setattr(trainer, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(24):
        name, rgb = list(COLORS.items())[number % 3]
        Image.new("RGB", (32, 32), tuple(c - number for c in rgb)).save(folder / f"{number}.png")
        records.append({"image": f"{number}.png", "conversations": talk("<image>\nWhich color?", name)})
    write_lines(folder / "train.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A language model with its tokenizer, made into a NaViL."""
    folder = tmp_path_factory.mktemp("language")
    language = copy_case("text_only_internlm2", folder / "model")
    added = json.loads((language / "added_tokens.json").read_text())
    (language / "added_tokens.json").write_text(json.dumps({t: number for t, number in added.items() if number < 546}))
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (language / file).write_text((language / file).read_text())
    recipe = folder / "recipe.py"
    recipe.write_text(f"from navil_jax.config import *\ndef get_config(): return Config(model={MODEL!r})\n")
    assert convert.main(["init", str(language), str(folder / "run"), "--config", str(recipe)]) == 0
    return folder / "run"


def small(name, workdir, before, data):
    """A recipe with a tiny model, rows and images; its rules, schedule and stage of training stay."""
    config = load_config(CONFIGS / f"{name}.py")
    mine = SourceConfig("mine", kind="llava", path=str(data / "train.jsonl"), root=str(data))
    return dataclasses.replace(
        config,
        workdir=str(workdir),
        init_from=str(before),
        steps=4,
        batch_samples=6,
        model=dataclasses.replace(MODEL, lora_rank=config.model.lora_rank and 2),
        images=ImageConfig(min_patches=4, max_patches=16),
        data=DataConfig(sources=(mine,), rows=2, visual_slots=12, text_slots=120, patch_slots=40, packing_lookahead=4),
        optimizer=dataclasses.replace(
            config.optimizer, warmup_steps=1, peak_learning_rate=1e-2, ema_decay=0.9, microbatches=1
        ),
        log_every=1,
        eval_every=0,
        checkpoint_every=2,
    )


def run_stages(folder, stages, before, data, kill_at=0):
    """Workdirs of the stages; with `kill_at` each run dies before that step and is started again."""
    for stage in stages:
        config = small(f"navil_2b_{stage}", folder / stage, before, data)
        if kill_at:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Profiler, "begin", lambda _, step: die() if step == kill_at else None)
                with pytest.raises(Killed):
                    train(config)
        assert train(config) == 0
        before = folder / stage
    return [folder / stage for stage in stages]


def die():
    raise Killed


def saved(workdir):
    """Arrays of the newest checkpoint by name, and the state of the data."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        folder = workdir / "checkpoints" / str(checkpoints.latest_step)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = {item: checkpointer.restore(folder / item) for item in ("params", "optimizer", "ema")}
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}
    return arrays, json.loads((folder / "iterator" / "stream_0-of-1.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, init, data):
    return run_stages(tmp_path_factory.mktemp("whole"), STAGES, init, data)


@pytest.mark.slow
def test_stages_killed_and_continued_end_as_those_that_were_not(tmp_path, whole, data):
    """Over both borders; how a first stage goes on is tested in test_train.py."""
    killed = run_stages(tmp_path, STAGES[1:], whole[0], data, kill_at=4)
    for ours, theirs in zip(killed, whole[1:], strict=True):
        assert (ours / "metrics.jsonl").read_text() == (theirs / "metrics.jsonl").read_text()
        (arrays, place), (wanted, wanted_place) = saved(ours), saved(theirs)
        assert place == wanted_place
        assert arrays.keys() == wanted.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)


@pytest.mark.slow
def test_each_stage_trains_its_own_part_of_the_one_before(whole, init):
    before = parameters(init)
    grown = {
        "s1_1": ("visual/", "vision/", "connector/", "special_embed"),
        "s1_2": ("qkv/text", "out/text"),
        "s2": ("",),
    }
    trained = ()
    for stage, workdir in zip(STAGES, whole, strict=True):
        trained += grown[stage]
        after = parameters(workdir)
        for name, value in after.items():
            moved = not np.array_equal(value, before[name])
            assert moved is any(part in name for part in trained) or "embed/embedding" in name, (stage, name)
        before = after


def parameters(workdir):
    with open_checkpoint(workdir) as checkpoint:
        return flatten(checkpoint.params())


@pytest.mark.slow
def test_a_run_counted_in_samples_ends_with_its_samples(whole):
    for workdir in whole:
        lines = [line for line in read_log(workdir / "metrics.jsonl") if "samples" in line]
        seen = [line["samples_seen"] for line in lines]
        assert seen == np.cumsum([line["samples"] for line in lines]).tolist()
        assert seen[-2] < 4 * 6 <= seen[-1]
        assert lines[-1]["tokens_seen"] == sum(line["tokens"] for line in lines)
        assert lines[-1]["text_tokens_seen"] == sum(line["text_tokens"] for line in lines)


@pytest.mark.slow
def test_export_and_reload(tmp_path, whole):
    arrays, _ = saved(whole[-1])
    for folder, flags, share in (("averages", [], 1), ("params", ["--no-ema"], 0)):
        assert convert.main(["export", str(whole[-1]), str(tmp_path / folder), *flags]) == 0
        for name, value in parameters(tmp_path / folder).items():
            wanted = arrays[_key("params", name)] + share * arrays[_key("ema", name)]
            np.testing.assert_array_equal(value, wanted, err_msg=name)
    assert arrays[_key("ema", "decoder/final_norm/scale")].any()


def _key(item, name):
    return "".join(f"['{part}']" for part in (item, *name.split("/")))


@pytest.mark.slow
def test_fine_tuning_by_low_rank_updates(tmp_path, whole, data):
    """The base stays; the export holds base and updates as one, which computes what the run computes."""
    config = small("finetune", tmp_path / "run", whole[-1], data)
    assert config.init_model
    assert train(config) == 0
    arrays, _ = saved(tmp_path / "run")
    base = parameters(whole[-1])
    updates = [name for name in arrays if name.startswith("['optimizer']") and "lora" not in name]
    assert updates == ["['optimizer'][1]['count']"] or all("count" in name for name in updates)
    merged = parameters(tmp_path / "run")
    assert merged.keys() == base.keys()
    moved = {name for name, value in merged.items() if not np.array_equal(value, base[name])}
    assert moved
    assert all(name.endswith("/kernel") and "head" not in name for name in moved)
    assert convert.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    for name, value in parameters(tmp_path / "out").items():
        np.testing.assert_array_equal(value, merged[name], err_msg=name)
    assert load_pretrained(tmp_path / "run").config.model.lora_rank == 0
    ask = ["--checkpoint", str(tmp_path / "run"), "--prompt", "Which color?", "--max-new-tokens", "4"]
    assert chat.main(ask) == 0
    assert chat.main([*ask, "--image", str(data / "0.png")]) == 0


@pytest.mark.slow
def test_data_changed_on_purpose_hold_from_there_on(tmp_path, whole, init, data, capsys):
    shutil.copytree(whole[0], tmp_path / "run")
    config = small("navil_2b_s1_1", tmp_path / "run", init, data)
    sources = (dataclasses.replace(config.data.sources[0], weight=2.0),)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources), steps=5)
    with pytest.raises(UserError, match="resume_with=data"):
        train(config)
    assert train(dataclasses.replace(config, resume_with="data.sources")) == 0
    assert "data.sources.0.weight was 1.0 and is 2.0" in capsys.readouterr().out
    longer, before = ((folder / "metrics.jsonl").read_text() for folder in (tmp_path / "run", whole[0]))
    steps = [line for line in before.split("\n") if '"samples"' in line]
    assert longer.split("\n")[: len(steps)] == steps
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:  # the change is part of the run now
        saved_config = checkpoints.record().config
    assert check_continues(saved_config, dataclasses.replace(saved_config, resume_with=""), "") == {}


def test_a_fine_tuning_recipe_has_the_model_and_tokenizer_of_its_start(tmp_path, init, data):
    recipe = small("finetune", tmp_path / "run", init, data)
    with open_start(recipe) as start:
        opened = open_run(recipe, start)
    config, tokenizer = opened.config, opened.tokenizer
    assert config.model.decoder == MODEL.decoder
    assert config.model.lora_rank == 2
    assert config.model.special_token_ids == tokenizer.special_token_ids
    assert sorted(tokenizer.special_token_ids) == list(range(546, 558))
    with open_start(small("finetune", tmp_path, tmp_path / "nothing", data), planned=True) as start:
        assert start is None
