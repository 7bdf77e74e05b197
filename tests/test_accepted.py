"""Folders from the world: what the transformers library accepts is read, what is wrong is one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from golden_cases import FOLDER
from made_runs import copy_case
from safetensors.numpy import load_file, save_file

from navil_jax import load_pretrained
from navil_jax.convert import __main__ as convert
from navil_jax.convert.opened import open_checkpoint
from navil_jax.convert.stored import cast, count_not_finite
from navil_jax.errors import UserError

TIED, EMBEDDING, HEAD = "text_only_qwen3", "model.embed_tokens.weight", "lm_head.weight"


def with_tensors(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    source = copy_case(name, folder)
    tensors = load_file(source / "model.safetensors")
    changed = change(tensors)
    save_file(tensors if changed is None else changed, source / "model.safetensors")
    return source


def with_config(folder: Path, name: str, **keys: Any) -> Path:
    source = copy_case(name, folder)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **keys}))
    return source


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert convert.main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert len(error) < 1000
    return error


def test_a_tied_head_in_the_file_is_the_embedding(tmp_path, capsys):
    source = with_tensors(tmp_path / "a", TIED, lambda t: t.update({HEAD: t[EMBEDDING].copy()}))
    assert convert.main(["import", str(source), str(tmp_path / "run")]) == 0
    assert f"{HEAD} is not read, it is the embedding" in capsys.readouterr().out
    with open_checkpoint(tmp_path / "run") as ours, open_checkpoint(FOLDER / TIED) as theirs:
        assert ours.info.keys() == theirs.info.keys()
    other = with_tensors(tmp_path / "b", TIED, lambda t: t.update({HEAD: t[EMBEDDING] + np.float32(1e-6)}))
    assert f"but {HEAD} and {EMBEDDING} differ; set tie_word_embeddings" in refused(
        capsys, "import", other, tmp_path / "c"
    )
    assert not (tmp_path / "c").exists()


def test_frequencies_of_the_rotation_are_computed(tmp_path, capsys):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = with_tensors(tmp_path / "a", TIED, lambda t: t.update({name: np.ones(4, np.float32)}))
    assert convert.main(["import", str(source), str(tmp_path / "run")]) == 0
    assert f"{name} is not read, it is computed" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["model.", "language_model.", "base_model.model.", "module."])
def test_names_with_a_prefix_are_one_line(prefix, tmp_path, capsys):
    source = with_tensors(tmp_path / "a", TIED, lambda t: {prefix + name: value for name, value in t.items()})
    assert f"all names of tensors begin with {prefix};" in refused(capsys, "import", source, tmp_path / "run")


def test_names_without_their_prefix_and_adapters_are_one_line(tmp_path, capsys):
    source = with_tensors(tmp_path / "a", TIED, lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    assert "its tensors are named without model.;" in refused(capsys, "import", source, tmp_path / "run")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    source = with_tensors(tmp_path / "b", TIED, lambda t: {name: t[EMBEDDING]})
    assert "an adapter (lora_A, lora_B), not a model" in refused(capsys, "import", source, tmp_path / "run")


def test_integers_are_no_weights(tmp_path, capsys):
    source = with_tensors(tmp_path / "a", TIED, lambda t: t.update({EMBEDDING: t[EMBEDDING].astype(np.int64)}))
    message = f"{EMBEDDING} is int64, and weights are floating-point numbers"
    assert message in refused(capsys, "import", source, tmp_path / "run", "--dtype", "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision_is_converted_when_asked(dtype, tmp_path, capsys):
    def halve(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors[EMBEDDING][0, :2] = 65504, 6e-8
        return {name: value.astype(np.float16) for name, value in tensors.items()}

    source = with_tensors(tmp_path / "a", TIED, halve)
    assert "float16, which cannot be trained; choose --dtype float32" in refused(
        capsys, "import", source, tmp_path / "r"
    )
    assert convert.main(["import", str(source), str(tmp_path / "run"), "--dtype", dtype]) == 0
    with open_checkpoint(tmp_path / "run") as opened:
        wanted = load_file(source / "model.safetensors")[EMBEDDING].astype(dtype)
        assert opened.tensors[EMBEDDING].tobytes() == wanted.tobytes()


def test_overflow_is_refused(tmp_path, capsys):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[EMBEDDING][0, 0] = 3.4e38

    source = with_tensors(tmp_path / "a", TIED, spoil)
    message = "1 values of float32 are beyond the range of bfloat16; choose a wider dtype"
    assert message in refused(capsys, "import", source, tmp_path / "x", "--dtype", "bfloat16")
    assert convert.main(["import", str(source), str(tmp_path / "run")]) == 0
    assert message in refused(capsys, "export", tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_by_name(value, tmp_path, capsys):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"][1:3] = value

    source = with_tensors(tmp_path / "a", TIED, spoil)
    said = "model.safetensors: model.norm.weight: 2 of 64 values are infinite or no numbers"
    assert said in refused(capsys, "import", source, tmp_path / "run")
    with pytest.raises(UserError, match="decoder/final_norm/scale: 2 of 64 values are infinite or no numbers"):
        load_pretrained(source)


def test_weights_of_two_kinds_in_one_folder_say_which_are_read(tmp_path, caplog):
    source = with_tensors(tmp_path / "a", TIED, lambda tensors: None)
    with caplog.at_level("WARNING"), open_checkpoint(source):
        assert not caplog.messages
    (source / "pytorch_model.bin").touch()
    (source / "other.safetensors").touch()
    with caplog.at_level("WARNING"), open_checkpoint(source):
        (said,) = caplog.messages
    assert (
        said
        == f"{source}: the weights are read from model.safetensors, and not from other.safetensors, pytorch_model.bin"
    )


def test_a_key_that_stands_twice_is_named(tmp_path, capsys):
    source = with_tensors(tmp_path / "a", TIED, lambda tensors: None)
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", '{"hidden_size": 7, ', 1))
    assert "config.json: cannot be read ('hidden_size' stands twice in one object)" in refused(
        capsys, "import", source, tmp_path / "run"
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_infinities_are_counted(dtype):
    value = np.array([0, 1, -2, np.inf, -np.inf, np.nan], dtype)
    assert count_not_finite(value) == 3
    assert cast("x", value, "bfloat16").tobytes() == value.astype(ml_dtypes.bfloat16).tobytes()
    with pytest.raises(UserError, match="x: 1 values of float64 are beyond the range of float16"):
        cast("x", np.array([7e4, 6e4]), "float16")


def test_rotation_as_version_5_says_it(tmp_path, capsys):
    rope = {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}
    source = with_config(tmp_path / "a", TIED, rope_parameters=rope, dtype="bfloat16", torch_dtype=None)
    message = "rope_scaling beside another one in rope_parameters"
    assert message in refused(capsys, "import", source, tmp_path / "run")
    config = json.loads((source / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    (source / "config.json").write_text(json.dumps(config))
    with open_checkpoint(source) as opened:
        decoder = opened.config.model.decoder
    assert (decoder.rope_theta, decoder.rope_scaling, decoder.rope_factor) == (1e6, "linear", 4.0)
    assert convert.main(["import", str(source), str(tmp_path / "run")]) == 0
    assert convert.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"dtype": "float32"}


def config_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


def header(length: int, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text)


def shards(folder: Path, named: dict[str, str], *groups: list[str]) -> None:
    """Two files of tensors and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, names in enumerate(groups, 1):
        save_file({name: tensors[name] for name in names}, folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))


def twice(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    first, second = names[:10], names[9:]
    index = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in names}
    shards(folder, index, first, second)


def missing_shard(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    shards(folder, {n: f"model-0000{1 if n in names[:10] else 2}-of-00002.safetensors" for n in names}, names[:10])


def folder_for_file(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nested": (config_text("[" * 100_000 + "]" * 100_000), "config.json: cannot be read (nested too deeply)"),
    "digits": (config_text('{"a": ' + "9" * 10_000 + "}"), "config.json: cannot be read"),
    "nested header": (header(200_000, b"[" * 200_000), "its header is damaged (nested too deeply)"),
    "long header": (header(2**40, b"{}"), "truncated, or not a safetensors file"),
    "huge header": (header(2**63, b"{}"), "truncated, or not a safetensors file"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "truncated, or not a safetensors file"),
    "twice": (twice, "is also in model-00001-of-00002.safetensors; remove the file that is wrong"),
    "missing shard": (missing_shard, "model-00002-of-00002.safetensors: missing, and with it"),
    "config is a folder": (folder_for_file("config.json"), "config.json: cannot be read (Is a directory)"),
    "weights are a folder": (folder_for_file("model.safetensors"), "model.safetensors: cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_with_a_fault_is_one_line(fault, tmp_path, capsys):
    source = copy_case(TIED, tmp_path / "a")
    change, said = FAULTS[fault]
    change(source)
    for arguments in (("import", source, tmp_path / "run"), ("inspect", source)):
        assert said in refused(capsys, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 10**9), ("hidden_size", 10**12), ("vocab_size", 2**40)]
)
def test_sizes_that_no_model_has_are_refused_at_once(key, value, tmp_path, capsys):
    source = with_config(tmp_path / "a", TIED, **{key: value})
    assert f"{key} = {value} (more than" in refused(capsys, "import", source, tmp_path / "run")


def test_files_where_folders_belong(tmp_path, capsys):
    source = copy_case(TIED, tmp_path / "a")
    (tmp_path / "file").write_text("x")
    assert "not a folder" in refused(capsys, "import", tmp_path / "file", tmp_path / "run")
    assert "is a file, a folder belongs there" in refused(capsys, "import", source, tmp_path / "file")
    assert "is a file, a folder belongs there" in refused(capsys, "import", source, tmp_path / "file" / "below")
    shutil.rmtree(source)
