"""`convert inspect`: sizes, counts and faults of a folder, without reading tensors."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_cases import FOLDER, IMAGE_CASES, TEXT_CASES, load_case
from made_runs import saved_run
from safetensors.numpy import load_file, save_file

from navil_jax.convert import __main__ as convert
from navil_jax.convert.groups import GROUPS, group_of, tensor_groups
from navil_jax.convert.reader import TensorFolder
from navil_jax.model import params as model_params

IMAGE = FOLDER / "internlm2_small"


def inspect(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, dict[str, Any]]:
    status = convert.main(["inspect", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", IMAGE_CASES + TEXT_CASES)
def test_golden_folders(name: str, capsys: pytest.CaptureFixture):
    status, said = inspect(capsys, FOLDER / name)
    tensors = load_file(FOLDER / name / "model.safetensors")
    assert status == 0
    assert said["whole"]
    assert said["warnings"] == said["problems"] == []
    assert said["tensors"] == len(tensors)
    parameters = said["parameters"]
    assert parameters["total"] == sum(parameters["groups"].values()) == sum(t.size for t in tensors.values())
    assert said["dtypes"] == {"float32": 4 * parameters["total"]}
    assert said["files"] == {"model.safetensors": 4 * parameters["total"]}
    assert said["architecture"]["kind"] == ("NaViL" if name in IMAGE_CASES else "language model")
    assert (parameters["active_per_visual_token"] is None) == (name in TEXT_CASES)


def test_counts_by_name(capsys: pytest.CaptureFixture):
    """Counted once more by the names of the tensors, with those that a token meets."""
    groups, active_text, active_visual = (
        inspect(capsys, IMAGE)[1]["parameters"][key]
        for key in ("groups", "active_per_text_token", "active_per_visual_token")
    )
    sizes = {name: tensor.size for name, tensor in load_file(IMAGE / "model.safetensors").items()}

    def count(*parts: str) -> int:
        return sum(size for name, size in sizes.items() if any(part in name for part in parts))

    assert groups["visual ffn"] == count("feed_forward_ve")
    assert groups["text ffn"] == count("feed_forward.")
    assert groups["visual attention"] == count("wqkv_ve", "wo_ve")
    assert groups["text attention"] == count("wqkv.", "wo.")
    assert groups["vision"] == count("vision_model")
    assert groups["connector"] == count("mlp1.")
    assert groups["special tokens"] == count("special_token_embedding")
    assert groups["norms"] == count("attention_norm", "ffn_norm", "model.norm")
    norms = groups["norms"]
    assert active_text == count("wqkv.", "wo.", "feed_forward.", "output.") + norms
    assert active_visual == count("vision_model", "mlp1.", "_ve", "wo.") + norms


@pytest.mark.parametrize("name", ["internlm2_windowed", "qwen3_small", "text_only_internlm2_linear"])
def test_every_parameter_has_one_group(name: str):
    config = load_case(name).config
    params = model_params.flatten(model_params.shapes(config))
    assert {group_of(param) for param in params} <= set(GROUPS)
    assert set(tensor_groups(config)) == set(TensorFolder(FOLDER / name))


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    case = load_case(IMAGE.name)
    status, said = inspect(capsys, saved_run(tmp_path / "run", case.config, case.params))
    assert status == 0
    assert said["format"] == "orbax"
    assert said["step"] == 3
    assert said["tokenizer"] == {"ids": 558}
    ours, theirs = said["parameters"], inspect(capsys, IMAGE)[1]["parameters"]
    assert ours == theirs


def test_problems_and_unknown_fields(tmp_path: Path, capsys: pytest.CaptureFixture):
    config = json.loads((IMAGE / "config.json").read_text())
    config["llm_config"]["new_trick"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(IMAGE / "model.safetensors")
    tensors["extra.weight"] = tensors.pop("mlp1.3.bias")
    tensors["vision_model.encoder.layers.0.ls1"] = np.zeros(5, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    status, said = inspect(capsys, tmp_path)
    assert status == 1
    assert not said["whole"]
    assert any("mlp1.3.bias is missing" in line for line in said["problems"])
    assert any("extra.weight is not of this model" in line for line in said["problems"])
    assert any("ls1 has shape [5]" in line for line in said["problems"])
    assert any("llm_config.new_trick" in line for line in said["warnings"])
    assert said["parameters"]["groups"]["not of this model"] == math.prod(tensors["extra.weight"].shape)

    assert convert.main(["inspect", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "problem: mlp1.3.bias is missing" in text
    assert "new_trick" in text


def test_shards_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture):
    shutil.copy(FOLDER / "text_only_qwen3" / "config.json", tmp_path)
    tensors = list(load_file(FOLDER / "text_only_qwen3" / "model.safetensors").items())
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, (tensors[:9], tensors[9:]), strict=True):
        save_file(dict(part), tmp_path / file)
    status, said = inspect(capsys, tmp_path)
    assert status == 0
    assert said["files"] == {
        file: sum(tensor.nbytes for _, tensor in part)
        for file, part in zip(files, (tensors[:9], tensors[9:]), strict=True)
    }


def test_the_table(capsys: pytest.CaptureFixture):
    assert convert.main(["inspect", str(IMAGE)]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["depth", "3", "3"] in lines
    assert ["full_attention_layers", "all"] in lines
    assert ["norms", "448", "0.1%"] in lines
    assert text.rstrip().endswith("90 tensors: whole")


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert convert.main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
