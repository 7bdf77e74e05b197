"""Checkpoints come back bit for bit, appear only when complete, and say in one line what is wrong with them."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from navil_jax.config import Config, ImageConfig, ModelConfig
from navil_jax.config.continuing import check_continues, check_same_model, with_model_of
from navil_jax.config.flags import apply_overrides
from navil_jax.data.streams import Steps
from navil_jax.errors import UserError
from navil_jax.train.checkpoint import Checkpoints, Record
from navil_jax.train.checksums import check_all
from navil_jax.train.optimizer import make_optimizer, split_trainable

RECORD = Record(Config(steps=9), {"tokenizer.model": bytes(range(256))}, {"loss": 1.5}, {}, {"data.sources.0": "0a"})


def make_state(seed=0, width=6):
    params = {
        "decoder": {"layer": {"kernel": jax.random.normal(jax.random.key(seed), (4, width))}},
        "bias": jnp.ones(width),
    }
    trainable, _ = split_trainable(Config().optimizer, params)
    optimizer = make_optimizer(Config().optimizer, 10, trainable)
    return params, jax.jit(optimizer.init)(trainable)


def make_iterator():
    return iter(Steps({0: grain.MapDataset.range(100).shuffle(seed=3).to_iter_dataset()}, 1, 1))


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def write(folder, steps=(3,), keep=2):
    params, state = make_state()
    iterator = make_iterator()
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            next(iterator)
            checkpoints.save(step, params, RECORD, state, iterator)
    return params, state, iterator


def test_folders_that_are_called_otherwise_are_told(tmp_path):
    write(tmp_path, steps=(3, 5))
    (tmp_path / "3").rename(tmp_path / "3_best")
    (tmp_path / "notes").mkdir()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.strangers() == ["3_best"]
        assert checkpoints.latest_step == 5


def test_everything_comes_back(tmp_path):
    params, state, iterator = write(tmp_path / "c")
    expected = [next(iterator) for _ in range(5)]
    fresh = make_iterator()
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest_step == 3
        assert checkpoints.record() == RECORD
        restored = checkpoints.restore(abstract(params), abstract(state), {}, fresh)
    assert jax.tree.structure(restored) == jax.tree.structure((params, state, {}))
    jax.tree.map(np.testing.assert_array_equal, restored, (params, state, {}))
    assert [next(fresh) for _ in range(5)] == expected


def test_parameters_alone_in_another_sharding_and_dtype(tmp_path):
    params, _, _ = write(tmp_path)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("fsdp",)), jax.sharding.PartitionSpec("fsdp"))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding), params)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_params(target)
    assert restored["bias"].sharding == sharding
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), restored, params)


def test_old_checkpoints_are_dropped_and_a_step_is_written_once(tmp_path):
    write(tmp_path, steps=(1, 2, 3, 3), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_saved_values_are_those_of_the_save_even_if_donated(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    params = {"w": jnp.zeros((512, 512))}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for number in (1, 2, 3):
            params = {"w": step(params["w"])}
            checkpoints.save(number, params, RECORD)
    shutil.rmtree(tmp_path / "3")
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_params(abstract({"w": jnp.zeros((512, 512))}))
    assert np.all(np.asarray(restored["w"]) == 2)


def test_no_folder_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="none: no such checkpoint folder"):
        Checkpoints(tmp_path / "none")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step is None
        with pytest.raises(UserError, match="holds no complete checkpoint"):
            checkpoints.record()
        with pytest.raises(UserError, match="holds no complete checkpoint"):
            checkpoints.restore_params(abstract(make_state()[0]))


@pytest.mark.parametrize("missing", ["params", "optimizer", "iterator", "params/manifest.ocdbt", "params/_METADATA"])
def test_half_written_checkpoint(tmp_path, missing):
    params, state, _ = write(tmp_path, steps=(1, 2, 3), keep=3)
    for step, advice in ((3, "delete this folder to use step 1, which is whole"), (1, "no older one that is whole")):
        path = tmp_path / str(step) / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(tmp_path / "2" / "record", ignore_errors=True)
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=advice) as error:
            checkpoints.restore(abstract(params), abstract(state), {}, make_iterator())
        assert str(error.value).startswith(f"{tmp_path}/{step}: ")
        assert "\n" not in str(error.value)
        shutil.rmtree(tmp_path / str(step))
        shutil.rmtree(tmp_path / "2", ignore_errors=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the steps 1 and 2, and what the latter holds."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, write(folder, steps=(1, 2))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), fault=st.sampled_from(["bit", "64 bytes", "truncated", "emptied", "deleted"]))
def test_no_damage_is_read_unseen(whole, data, fault):
    """Any file of the newest checkpoint: all comes back as it was saved, or one line says what is damaged."""
    folder, (params, state, iterator) = whole
    with tempfile.TemporaryDirectory() as temporary:
        copy = shutil.copytree(folder, Path(temporary) / "copy")
        files = sorted(file for file in (copy / "2").rglob("*") if file.is_file() and file.stat().st_size)
        damage(data.draw(st.sampled_from(files)), fault, data.draw(st.floats(0, 1, exclude_max=True)))
        fresh, said = make_iterator(), ""
        try:
            with Checkpoints(copy) as checkpoints:
                step, record = checkpoints.latest_step, checkpoints.record()
                restored = checkpoints.restore(abstract(params), abstract(state), {}, fresh)
        except UserError as error:
            said = str(error)
    if said:
        assert said.startswith(f"{copy}/2: ")
        assert "\n" not in said
        assert "delete this folder to use step 1, which is whole" in said
    elif step == 2:
        assert record == RECORD
        jax.tree.map(np.testing.assert_array_equal, restored, (params, state, {}))
        assert fresh.get_state() == iterator.get_state()


def test_a_file_of_the_record_or_the_iterator_has_a_checksum(tmp_path):
    write(tmp_path)
    for file, old, new in (
        ("record/metadata", '"loss": 1.5', '"loss": 1.6'),
        ("iterator/stream_0-of-1.json", "1", "2"),
    ):
        path = tmp_path / "3" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match="is not what was written"):
            check_all(path.parents[1])
        path.write_text(text)
    check_all(path.parents[1])


def damage(file, fault, place):
    content = bytearray(file.read_bytes())
    at = int(place * len(content))
    if fault == "deleted":
        file.unlink()
        return
    if fault == "bit":
        content[at] ^= 1 << at % 8
    elif fault == "64 bytes":
        content[at : at + 64] = bytes(255 - byte for byte in content[at : at + 64])
    file.write_bytes({"truncated": content[:at], "emptied": b""}.get(fault, content))


@pytest.mark.parametrize("item", ["params", "optimizer", "ema"])
def test_a_changed_bit_of_an_array_is_named_by_its_parameter(tmp_path, item):
    params = {"decoder": {"kernel": jax.random.normal(jax.random.key(0), (40, 30))}, "bias": jnp.ones(3)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (4, 7):
            checkpoints.save(step, params, RECORD, params, make_iterator(), params)
    value, changed = np.asarray(params["decoder"]["kernel"]).tobytes(), 0
    for file in (tmp_path / "7" / item).rglob("d/*"):
        content = bytearray(file.read_bytes())
        if (at := content.find(value)) >= 0:
            content[at + 5] ^= 64
            file.write_bytes(content)
            changed += 1
    assert changed == 1
    wanted = abstract(params)
    message = rf"^{tmp_path}/7: cannot be read \({item}: decoder/kernel was changed on disk.*step 4, which is whole$"
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(wanted, wanted, wanted, make_iterator())


def test_unfinished_write_is_not_a_checkpoint(tmp_path):
    write(tmp_path)
    shutil.copytree(tmp_path / "3", tmp_path / "4.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step == 3


def test_checkpoint_of_another_model_names_parameters_and_shapes(tmp_path):
    write(tmp_path)
    params, state = make_state(width=8)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"bias is \(6,\) there and \(8,\) here; decoder/layer/kernel is \(4, 6\)"):
            checkpoints.restore_params(abstract(params))
        with pytest.raises(
            UserError, match=r"params are those of another model.*extra is absent there and \(2,\) here"
        ):
            checkpoints.restore(
                abstract(make_state()[0] | {"extra": jnp.ones(2)}), abstract(state), {}, make_iterator()
            )
        with pytest.raises(UserError, match="optimizer are those of another model or recipe"):
            checkpoints.restore(abstract(make_state()[0]), abstract(state), {}, make_iterator())


def test_parameters_alone_can_be_started_from_but_not_continued(tmp_path):
    params, state = make_state()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(0, params, RECORD)
        checkpoints.wait()
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(abstract(params)), params)
        with pytest.raises(UserError, match=r"optimizer is missing.*start from it with config\.init_from"):
            checkpoints.restore(abstract(params), abstract(state), {}, make_iterator())


def test_missing_tokenizer(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state()[0], dataclasses.replace(RECORD, tokenizer={}))
        checkpoints.wait()
        with pytest.raises(UserError, match="holds no tokenizer"):
            checkpoints.record()


def test_only_a_continuation_may_use_the_folder():
    saved = Config()
    longer = dataclasses.replace(saved, steps=2000, workdir="b", mesh=dataclasses.replace(saved.mesh, data=2))
    check_continues(saved, longer, "folder")
    model = dataclasses.replace(saved.model, decoder=dataclasses.replace(saved.model.decoder, depth=3))
    with pytest.raises(
        UserError, match=r"^folder: holds a run with another config: model\.decoder\.depth was 24 and is 3"
    ):
        check_continues(saved, dataclasses.replace(saved, model=model), "folder")
    with pytest.raises(UserError, match=r"seed was 0 and is 1; set config\.workdir to a new folder, or change it in"):
        check_continues(saved, dataclasses.replace(saved, seed=1), "folder")


def test_only_the_same_data_continue():
    saved, key = Config(), "data.sources.0.fingerprint"
    assert check_continues(saved, saved, "folder", ({key: "0a"}, {key: "0a"})) == {}
    for before, shown in (({key: "0a"}, "0a"), ({}, "None")):
        with pytest.raises(UserError, match=f"another config: {key} was {shown} and is 0b; set"):
            check_continues(saved, saved, "folder", (before, {key: "0b"}))
        asked = dataclasses.replace(saved, resume_with="data.sources")
        assert check_continues(saved, asked, "folder", (before, {key: "0b"})) == {key: (before.get(key), "0b")}


def test_only_the_same_held_out_data_continue():
    saved, key = Config(), "data.sources.0.held_out.fingerprint"
    assert check_continues(saved, saved, "folder", ({}, {key: "0b"})) == {}  # begun before these were known
    for now, shown in (({key: "0b"}, "0b"), ({}, "None")):
        with pytest.raises(UserError, match=f"another config: {key} was 0a and is {shown}; set"):
            check_continues(saved, saved, "folder", ({key: "0a"}, now))
    for name in (key, "data.sources.0.held_out", "data.sources"):
        asked = dataclasses.replace(saved, resume_with=name)
        assert check_continues(saved, asked, "folder", ({key: "0a"}, {key: "0b"})) == {key: ("0a", "0b")}


def with_optimizer(config, **fields):
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **fields))


def test_schedules_change_when_asked_alone():
    saved = with_optimizer(Config(), schedule="cosine")
    faster = with_optimizer(saved, peak_learning_rate=1.0)
    with pytest.raises(
        UserError, match=r"5e-05 and is 1\.0; .* with config\.resume_with=optimizer\.peak_learning_rate$"
    ):
        check_continues(saved, faster, "folder")
    asked = dataclasses.replace(faster, resume_with="data.sources, optimizer.peak_learning_rate")
    assert check_continues(saved, asked, "folder") == {"optimizer.peak_learning_rate": (5e-5, 1.0)}
    with pytest.raises(UserError, match=r"data\.seed was 0 and is 1"):
        check_continues(saved, dataclasses.replace(asked, data=dataclasses.replace(saved.data, seed=1)), "folder")
    longer = dataclasses.replace(saved, steps=2000)
    with pytest.raises(UserError, match=r"steps was 1000 and is 2000; .* config\.resume_with=steps$"):
        check_continues(saved, longer, "folder")
    assert check_continues(saved, dataclasses.replace(longer, resume_with="steps"), "folder") == {"steps": (1000, 2000)}
    assert check_continues(saved, with_optimizer(saved, not_finite="skip", microbatches=2), "folder") == {}


@pytest.mark.parametrize(
    "name", ["o", "optimizer.peak", "optimizer.", "peak_learning_rate", "data.source", "optimiser"]
)
def test_resume_with_takes_whole_names_alone(name):
    saved = Config()
    asked = dataclasses.replace(with_optimizer(saved, peak_learning_rate=1.0), resume_with=name)
    with pytest.raises(UserError, match=rf"^config\.resume_with: no key '{name}', the nearest one is '"):
        check_continues(saved, asked, "folder")
    with pytest.raises(UserError, match=r"^config\.resume_with: no key "):
        apply_overrides(saved, {"resume_with": f"steps,{name}"})


def test_resume_with_takes_groups():
    asked = dataclasses.replace(
        with_optimizer(Config(), peak_learning_rate=1.0), resume_with="optimizer,data.sources.3"
    )
    assert check_continues(Config(), asked, "folder") == {"optimizer.peak_learning_rate": (5e-5, 1.0)}


@pytest.mark.parametrize("changed", [{"ema_decay": 0.5}, {"algorithm": "muon"}])
def test_what_would_not_fit_the_saved_state_never_changes(changed):
    config = dataclasses.replace(with_optimizer(Config(), **changed), resume_with="optimizer,model")
    with pytest.raises(UserError, match=r"set config\.workdir to a new folder$"):
        check_continues(Config(), config, "folder")


def test_model_and_prompt_of_another_run():
    saved = Config(model=tiny_model("qwen3", remat="dots"), images=ImageConfig(max_patches=300))
    saved = dataclasses.replace(saved, data=dataclasses.replace(saved.data, template="qwen3-chat", rows=3))
    own = Config(model=ModelConfig(lora_rank=4, param_dtype="bfloat16"), init_from="x", init_model=True)
    taken = with_model_of(own, saved)
    assert taken.model == dataclasses.replace(
        saved.model, lora_rank=4, param_dtype="bfloat16", remat=own.model.remat, compute_dtype="bfloat16"
    )
    assert (taken.images, taken.data.template, taken.data.rows) == (saved.images, "qwen3-chat", own.data.rows)


def test_running_average_comes_back_and_is_asked_for(tmp_path):
    params, state = make_state()
    iterator, ema = make_iterator(), {"bias": jnp.arange(6.0)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, params, RECORD, state, iterator, ema)
        checkpoints.wait()
        restored = checkpoints.restore(abstract(params), abstract(state), abstract(ema), make_iterator())
        jax.tree.map(np.testing.assert_array_equal, restored, (params, state, ema))
        with pytest.raises(UserError, match="its ema are those of another model"):
            checkpoints.restore(abstract(params), abstract(state), {"bias": abstract(jnp.ones(3))}, make_iterator())


def test_only_the_same_model_may_start_with_the_parameters():
    saved = Config()
    other = dataclasses.replace(saved, steps=5, seed=1, model=dataclasses.replace(saved.model, remat="none"))
    check_same_model(saved, other, "folder")
    decoder = dataclasses.replace(saved.model.decoder, rope_theta=2.0)
    with pytest.raises(
        UserError, match=r"^folder: holds another model: model\.decoder\.rope_theta was 1000000\.0 and is 2"
    ):
        check_same_model(
            saved, dataclasses.replace(saved, model=dataclasses.replace(saved.model, decoder=decoder)), "folder"
        )


def test_a_checkpoint_of_before_there_were_streams_goes_on(tmp_path):
    """Each process that wrote it was a stream."""
    params, state, iterator = write(tmp_path)
    for path in (tmp_path / "3" / "iterator").glob("stream_0-of-1.*"):
        path.rename(path.with_name(path.name.replace("stream", "process")))
    fresh = make_iterator()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.streams == 1
        checkpoints.restore(abstract(params), abstract(state), {}, fresh)
    assert fresh.get_state() == iterator.get_state()
    assert next(fresh) == next(iterator)


def test_a_stream_that_is_missing_is_told(tmp_path):
    write(tmp_path)
    folder = tmp_path / "3" / "iterator"
    for path in folder.glob("stream_0-of-1.*"):
        path.rename(path.with_name(path.name.replace("of-1", "of-2")))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"read \(holds 1 of 2 streams"),
    ):
        assert checkpoints.streams
