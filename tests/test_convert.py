"""Checkpoints in and out: byte-equal round trips, the initialised model, faults, meshes."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax import nnx
from golden_cases import TEXT_CASES
from made_runs import copy_case
from quick_xla import QUICK
from safetensors.numpy import load_file, save_file

import navil_jax
from navil_jax.config import ModelConfig
from navil_jax.convert import __main__ as convert
from navil_jax.convert import exporting, param_files
from navil_jax.convert.importing import import_checkpoint
from navil_jax.convert.opened import open_checkpoint
from navil_jax.convert.param_files import ParamsWriter
from navil_jax.convert.partial import partial_folder
from navil_jax.convert.verify.golden import build_batch, in_order, sample_features
from navil_jax.errors import UserError
from navil_jax.model import params as model_params
from navil_jax.train.checkpoint import Checkpoints
from navil_jax.train.checksums import check_all

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = str(GOLDEN / "prompts" / "tokenizer")
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/model.safetensors"))
RECIPE = """
from navil_jax.config import Config, DecoderConfig, ImageConfig, ModelConfig, VisionConfig
def get_config():
    return Config(images=ImageConfig(min_patches=16, max_patches=64), model=ModelConfig(
        vision=VisionConfig(depth=2, width=16, mlp_dim=24, num_heads=2, window_size=4),
        decoder=DecoderConfig({fields}),
        special_token_ids=(), compute_dtype="float32", remat="none"))
"""


def command(*arguments) -> int:
    return convert.main([str(argument) for argument in arguments])


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_equal_bytes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert ours[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_round_trip_gives_every_byte_back(name, dtype, tmp_path):
    source = copy_case(name, tmp_path / "source")
    wanted = {key: value.astype(dtype) for key, value in load_file(source / "model.safetensors").items()}
    save_file(wanted, source / "model.safetensors")
    assert command("import", source, tmp_path / "run") == 0
    assert command("export", tmp_path / "run", tmp_path / "out", "--shard-bytes", 100_000) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_equal_bytes(tensors_of(tmp_path / "out"), wanted)
    said = json.loads((source / "config.json").read_text())
    said["dtype" if "dtype" in said else "torch_dtype"] = dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == said
    for file in Path(TOKENIZER).iterdir():
        if file.name != "token_to_id.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run", "source"]


def test_dtype_changes_on_request_only(tmp_path):
    source = copy_case("internlm2_small", tmp_path / "source")
    assert command("import", source, tmp_path / "run", "--dtype", "bfloat16") == 0
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert set(checkpoint.dtypes) == {"bfloat16"}
        assert checkpoint.config.model.param_dtype == "bfloat16"
    assert command("export", tmp_path / "run", tmp_path / "out", "--dtype", "float32") == 0
    wanted = load_file(source / "model.safetensors")
    rounded = {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in wanted.items()}
    assert_equal_bytes(tensors_of(tmp_path / "out"), rounded)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert command("export", tmp_path / "run", tmp_path / "same") == 0
    assert json.loads((tmp_path / "same" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("imported", [True, False])
def test_a_model_of_two_dtypes_is_to_be_loaded_in_the_wider_one(imported, tmp_path):
    """What trained is float32, what was frozen keeps the dtype that it was imported in."""
    source = copy_case("internlm2_small", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["torch_dtype"] = "bfloat16"
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    import_checkpoint(source, tmp_path / "run", dtype="bfloat16")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints, open_checkpoint(tmp_path / "run") as opened:
        record, params = checkpoints.record(), opened.params()
    params["connector"] = jax.tree.map(lambda x: x.astype(np.float32), params["connector"])
    record = record if imported else dataclasses.replace(record, origin={})
    with Checkpoints(tmp_path / "trained" / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(3, params, record)
    assert command("export", tmp_path / "trained", tmp_path / "out") == 0
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["torch_dtype"] == "float32"
    assert said["llm_config"].get("torch_dtype") == ("float32" if imported else None)
    assert {x.dtype.name for x in tensors_of(tmp_path / "out").values()} == {"float32", "bfloat16"}


def test_one_scale_is_exported_and_found_again(tmp_path):
    source = copy_case("internlm2_small", tmp_path / "source")
    import_checkpoint(source, tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints, open_checkpoint(tmp_path / "run") as opened:
        record, params = checkpoints.record(), opened.params()
    images = dataclasses.replace(record.config.images, multiscale=False)
    record = dataclasses.replace(record, config=dataclasses.replace(record.config, images=images))
    with Checkpoints(tmp_path / "one" / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(3, params, record)
    assert command("export", tmp_path / "one", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["scale_downsample_ratio"] == 0
    assert "one scale (scale_downsample_ratio 0" in (tmp_path / "out" / "README.md").read_text()
    assert command("import", tmp_path / "out", tmp_path / "again") == 0
    assert navil_jax.load_pretrained(tmp_path / "again").images == images
    assert command("verify", tmp_path / "one", tmp_path / "again", "--weights-only") == 0


MESHES = ((1, 1), (4, 1), (2, 2), (8, 1), (4, 2))  # fsdp, tensor


@pytest.mark.parametrize("shape", MESHES, ids="{0[0]}x{0[1]}".format)
def test_a_converted_checkpoint_is_restored_on_any_mesh(shape, tmp_path):
    count = shape[0] * shape[1]
    if count > jax.device_count():
        pytest.skip("runs with eight devices below")
    import_checkpoint(GOLDEN / "internlm2_small", tmp_path / "run", TOKENIZER)
    devices = jax.make_mesh((1, *shape), ("data", "fsdp", "tensor"), devices=jax.devices()[:count])
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints, open_checkpoint(tmp_path / "run") as opened:
        model = checkpoints.record().config.model
        shardings = model_params.shardings(model, devices)
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model_params.shapes(model), shardings
        )
        params = checkpoints.restore_params(wanted)
        jax.tree.map(np.testing.assert_array_equal, params, opened.params())
    kernel = params["decoder"]["layers"]["ffn"]["text"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size * count == kernel.size


@pytest.mark.slow
def test_a_converted_checkpoint_is_restored_on_eight_devices():
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {QUICK}"}
    test = f"{__file__}::test_a_converted_checkpoint_is_restored_on_any_mesh"
    command = [sys.executable, "-m", "pytest", "-n", "0", test, "-k", "8x1 or 4x2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "2 passed" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_CASES)
def test_an_initialised_model_computes_its_language_model(name, tmp_path):
    """At step 0 every token, also one with visual weights, is computed as by the pre-trained model."""
    language = copy_case(name, tmp_path / "language")
    for file in ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        text = json.loads((language / file).read_text())
        if file == "added_tokens.json":
            text = {token: number for token, number in text.items() if number < 546}
        (language / file).write_text(json.dumps(text))
    with open_checkpoint(language) as checkpoint:
        plain, decoder = checkpoint.params(), checkpoint.config.model.decoder
        plain_model = dataclasses.replace(checkpoint.config.model, compute_dtype="float32", remat="none")
    fields = dataclasses.asdict(decoder) | {"attention_experts": True, "ffn_experts": True, "vocab_size": 620}
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(fields=", ".join(f"{key}={value!r}" for key, value in fields.items())))
    assert command("init", language, tmp_path / "run", "--config", recipe, "--config.seed=3") == 0

    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert not checkpoint.problems
        params, model = checkpoint.params(), checkpoint.config.model
    grown = np.asarray(params["decoder"]["embed"]["embedding"])
    used = 558
    np.testing.assert_array_equal(grown[:used], plain["decoder"]["embed"]["embedding"][:used])
    np.testing.assert_allclose(
        grown[used:], np.broadcast_to(grown[:used].mean(0), grown[used:].shape), rtol=1e-5, atol=1e-6
    )
    fresh = model_params.flatten(model_params.initialise(model, 3))
    np.testing.assert_array_equal(params["vision"]["layers"]["fc1"]["kernel"], fresh["vision/layers/fc1/kernel"])

    tokens = np.random.default_rng(0).integers(3, used, 24)
    wanted = last_layer(plain_model, plain, sample_features(plain_model, tokens))
    ours = sample_features(model, tokens)
    np.testing.assert_allclose(last_layer(model, params, ours), wanted, atol=2e-5)
    visual = np.arange(24) % 3 == 1
    ours = {name: value[~visual] if name.startswith("text_") else value for name, value in ours.items()}
    ours |= {"visual_tokens": tokens[visual], "visual_positions": np.flatnonzero(visual)}
    np.testing.assert_allclose(last_layer(model, params, ours), wanted, atol=2e-5)


def test_a_navil_made_from_qwen2_is_no_model_of_the_release(tmp_path, capsys):
    language = copy_case("text_only_qwen2", tmp_path / "language")
    with open_checkpoint(language) as checkpoint:
        fields = dataclasses.asdict(checkpoint.config.model.decoder)
    fields |= {"attention_experts": True, "ffn_experts": True, "vocab_size": 620}
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(fields=", ".join(f"{key}={value!r}" for key, value in fields.items())))
    assert command("init", language, tmp_path / "run", "--config", recipe) == 0
    assert command("inspect", tmp_path / "run") == 0
    capsys.readouterr()
    assert command("export", tmp_path / "run", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert "model.decoder.family = qwen2: the release has no NaViL with this decoder" in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def last_layer(config: ModelConfig, params: dict, features: dict) -> np.ndarray:
    """[n, H] of one sample in reading order, embedded by the token table."""
    model = model_params.bind(config, jax.tree.map(jnp.asarray, params))
    batch = build_batch(config, [[features]])
    decoder = model.decoder
    x, _ = decoder(decoder.embed_new(jnp.asarray(batch.tokens)), decoder.layout(batch))
    return in_order(batch, decoder.final_norm(x))


def broken(name: str, folder: Path) -> tuple[Path, str]:
    """A source with one fault, and what the message must name."""
    source = copy_case("internlm2_small", folder)
    weights = source / "model.safetensors"
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(weights)
    if name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return source, "model.safetensors"
    if name == "missing tensor":
        del tensors["mlp1.1.weight"]
    if name == "foreign tensor":
        tensors["lora.weight"] = np.zeros(3, np.float32)
    if name == "wrong shape":
        tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"][:-1]
    if name == "half precision":
        tensors = {key: value.astype(np.float16) for key, value in tensors.items()}
    save_file(tensors, weights)
    if name == "other architecture":
        config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    if name == "small vocabulary":
        config["llm_config"]["vocab_size"] = 500
    if name == "no tokenizer":
        (source / "tokenizer.model").unlink()
    (source / "config.json").write_text(json.dumps(config))
    named = {"missing tensor": "mlp1.1.weight is missing", "foreign tensor": "lora.weight is not of this model"}
    named |= {"wrong shape": "mlp1.1.weight has shape", "half precision": "--dtype", "other architecture": "llava"}
    named |= {"small vocabulary": "vocab", "no tokenizer": "--tokenizer"}
    return source, named[name]


FAULTS = ("truncated", "missing tensor", "foreign tensor", "wrong shape", "half precision", "other architecture")


@pytest.mark.parametrize("fault", [*FAULTS, "small vocabulary", "no tokenizer"])
def test_a_faulty_source_is_one_clear_line_and_leaves_nothing(fault, tmp_path, capsys):
    source, named = broken(fault, tmp_path / "source")
    assert command("import", source, tmp_path / "run") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert named in error
    assert not (tmp_path / "run").exists()


def test_targets_that_hold_something_are_left_alone(tmp_path, capsys):
    source = copy_case("text_only_qwen3", tmp_path / "source")
    assert command("import", source, tmp_path / "run") == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for arguments in (("import", source, tmp_path / "out"), ("export", tmp_path / "run", tmp_path / "out")):
        assert command(*arguments) == 2
        assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_interrupted_import_goes_on(tmp_path, monkeypatch, capsys):
    source = copy_case("internlm2_small", tmp_path / "source")
    monkeypatch.setattr(param_files, "WRITE_BYTES", 30_000)
    monkeypatch.setattr(param_files, "SMALL_BYTES", 10_000)
    calls, write = [], ParamsWriter.write

    def counted(writer, name, layer, value):
        calls.append((name, layer))
        write(writer, name, layer, value)

    def interrupted(writer, name, layer, value):
        if len(calls) == 20:
            raise KeyboardInterrupt
        counted(writer, name, layer, value)

    monkeypatch.setattr(ParamsWriter, "write", interrupted)
    assert command("import", source, tmp_path / "run") == 130
    assert capsys.readouterr().err.endswith("the same command goes on from here\n")
    assert not (tmp_path / "run").exists()
    written = set((tmp_path / "run.partial" / "written.txt").read_text().split())
    assert 0 < len(written) < len({name for name, _ in calls})
    calls.clear()
    monkeypatch.setattr(ParamsWriter, "write", counted)
    assert command("import", source, tmp_path / "run") == 0
    assert len(calls) == len(set(calls))
    assert not written & {name for name, _ in calls}
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert_equal_bytes(dict(checkpoint.tensors), load_file(source / "model.safetensors"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "source"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["imports", "writes"])
def test_ctrl_c_is_one_line_whenever_it_comes(moment, tmp_path):
    """While modules are imported, and once the new folder is begun."""
    arguments = ["import", copy_case("internlm2_small", tmp_path / "source"), tmp_path / "run"]
    call = [sys.executable, "-m", "navil_jax.convert", *map(str, arguments)]
    allow = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(
        call,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=allow if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else None,  # in a shell's background
    )
    if moment == "imports":
        time.sleep(0.3)
    else:
        while not (tmp_path / "run.partial").exists() and process.poll() is None:
            time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert error in ("stopped\n", "stopped; the same command goes on from here\n")  # the first while modules load
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sizes", [(10**9, 10**9, 10**9), (0, 10**9, 50_000), (0, 9_000, 10**9)])
def test_parameters_are_the_same_in_whatever_chunks_they_are_written(sizes, tmp_path, monkeypatch):
    source = copy_case("internlm2_windowed", tmp_path / "source")
    for name, size in zip(("SMALL_BYTES", "CHUNK_BYTES", "WRITE_BYTES"), sizes, strict=True):
        monkeypatch.setattr(param_files, name, size)
    assert command("import", source, tmp_path / "run") == 0
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert_equal_bytes(dict(checkpoint.tensors), load_file(source / "model.safetensors"))
    check_all(epath.Path(tmp_path / "run" / "checkpoints" / "0"))


def test_what_another_command_left_is_removed_and_files_of_the_user_are_not(tmp_path, capsys):
    source = copy_case("text_only_qwen3", tmp_path / "source")
    left = tmp_path / "run.partial"
    left.mkdir()
    (left / "mine").write_text("mine")
    assert command("import", source, tmp_path / "run") == 2
    assert "run.partial: holds files that no interrupted command left" in capsys.readouterr().err
    (left / "purpose.json").write_text('{"import": "another"}')
    assert command("import", source, tmp_path / "run") == 0
    assert "what another command left there is removed" in capsys.readouterr().out
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert_equal_bytes(dict(checkpoint.tensors), load_file(source / "model.safetensors"))


def test_an_export_of_another_run_keeps_no_shard(tmp_path, monkeypatch):
    """Two runs of one name and step, of one shape: only the weights differ."""
    for parent, seed in (("a", 0), ("b", 1)):
        source = copy_case("text_only_qwen3", tmp_path / parent / "source")
        tensors = load_file(source / "model.safetensors")
        save_file({name: value + np.float32(seed) for name, value in tensors.items()}, source / "model.safetensors")
        assert command("import", source, tmp_path / parent / "run") == 0

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_companions", interrupted)
        assert command("export", tmp_path / "a" / "run", tmp_path / "out") == 130
    assert command("export", tmp_path / "b" / "run", tmp_path / "out") == 0
    assert_equal_bytes(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "b" / "source"))


@pytest.mark.parametrize("direction", ["import", "export"])
def test_one_command_at_a_time_writes_a_folder(direction, tmp_path, capsys):
    source = copy_case("text_only_qwen3", tmp_path / "source")
    assert command("import", source, tmp_path / "run") == 0
    arguments = {"import": source, "export": tmp_path / "run"}[direction], tmp_path / "out"
    with partial_folder(tmp_path / "out", {}):
        assert command(direction, *arguments) == 2
        assert "out.partial: another command is writing it" in capsys.readouterr().err
    (tmp_path / "out").rmdir()
    assert command(direction, *arguments) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    source = copy_case("text_only_qwen3", tmp_path / "source")
    (tmp_path / "locked").mkdir(mode=0o500)
    assert command("import", source, tmp_path / "locked" / "run") == 2
    assert "Permission denied; nothing was finished" in capsys.readouterr().err


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(direction, tmp_path, monkeypatch, capsys):
    source = copy_case("text_only_qwen3", tmp_path / "source")
    assert command("import", source, tmp_path / "run") == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    arguments = {"import": (source, tmp_path / "again"), "export": (tmp_path / "run", tmp_path / "again")}[direction]
    assert command(direction, *arguments) == 2
    assert "1,000 are free" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_a_disk_that_gets_full_is_told_and_a_rerun_goes_on(tmp_path, monkeypatch, capsys):
    source = copy_case("text_only_qwen3", tmp_path / "source")
    monkeypatch.setattr(param_files, "WRITE_BYTES", 30_000)
    left = iter(range(3))

    def full(handle):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert command("import", source, tmp_path / "run") == 2
    assert "the disk is full; make space and run the same command" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    assert command("import", source, tmp_path / "run") == 0
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert_equal_bytes(dict(checkpoint.tensors), load_file(source / "model.safetensors"))


def test_what_the_released_code_cannot_compute_is_not_exported(tmp_path, capsys):
    import_checkpoint(GOLDEN / "internlm2_small", tmp_path / "run", TOKENIZER)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        record = checkpoints.record()
    model = record.config.model
    vision = dataclasses.replace(model.vision, window_order=False)
    changed = dataclasses.replace(record.config, model=dataclasses.replace(model, vision=vision))
    with open_checkpoint(tmp_path / "run") as opened:
        params = opened.params()
    with Checkpoints(tmp_path / "other" / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(3, params, dataclasses.replace(record, config=changed))
    assert command("export", tmp_path / "other", tmp_path / "out") == 2
    assert "window_order" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_init_refuses_another_model(tmp_path, capsys):
    language = copy_case("text_only_internlm2", tmp_path / "language")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(fields="depth=7"))
    assert command("init", language, tmp_path / "run", "--config", recipe) == 2
    assert "depth is 3 there and 7 in the recipe" in capsys.readouterr().err
    assert command("init", language, tmp_path / "run", "--config", recipe, "--config.model.decoder.depht=3") == 2
    assert "depth" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["internlm2_small", "qwen3_small_tied"])
def test_both_formats_load_as_the_same_model(name, tmp_path):
    source = copy_case(name, tmp_path / "source")
    import_checkpoint(source, tmp_path / "run")
    first, second = (navil_jax.load_pretrained(folder) for folder in (source, tmp_path / "run"))
    assert first.config.model == second.config.model
    assert first.images == second.images == first.config.images
    assert first.tokenizer.files() == second.tokenizer.files()
    ours, theirs = (nnx.to_pure_dict(nnx.state(loaded.model, nnx.Param)) for loaded in (first, second))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    kernel = first.model.decoder.layers.ffn.text.gate.kernel.get_value()
    assert len(kernel.sharding.device_set) == 4
    with pytest.raises(UserError, match="no such"):
        navil_jax.load_pretrained(tmp_path / "nothing")


def test_a_folder_that_is_no_checkpoint(tmp_path, capsys):
    assert command("import", tmp_path / "none", tmp_path / "run") == 2
    message = f"error: {tmp_path}/none: no such folder; give a Hugging Face folder with config.json"
    assert message in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert command("import", tmp_path / "empty", tmp_path / "run") == 2
    assert "empty: holds neither config.json, as a Hugging Face folder does, nor checkpoints" in capsys.readouterr().err


def test_averages_are_exported_only_where_there_are_some(tmp_path, capsys):
    assert command("import", copy_case("qwen3_small", tmp_path / "source"), tmp_path / "run") == 0
    assert command("export", tmp_path / "run", tmp_path / "out", "--ema") == 2
    assert "holds no running average (config.optimizer.ema_decay)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
