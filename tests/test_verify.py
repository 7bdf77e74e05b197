"""`convert verify`: good checkpoints pass, every fault is found and named, the last line is JSON."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from golden_cases import FOLDER, load_case
from hypothesis import given, settings
from hypothesis import strategies as st
from made_golden import make_golden
from made_runs import saved_run
from safetensors.numpy import load_file, save_file

from navil_jax.convert import __main__ as convert
from navil_jax.convert.verify import tensors as tensor_differences
from navil_jax.convert.verify.compare import Pair, by_group, forward_pairs, text_pairs, text_training_pairs
from navil_jax.convert.verify.golden import load_case as load_golden
from navil_jax.convert.verify.outputs import Allowed, distributions, made_batch, report
from navil_jax.convert.verify.tensors import compare_tensor, rounding
from navil_jax.errors import UserError

TEXT, IMAGE = FOLDER / "text_only_qwen3", FOLDER / "internlm2_small"
UP = "model.layers.1.mlp.up_proj.weight"
W3 = "model.layers.0.feed_forward.w3.weight"  # of the made folder


def verify(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON object of the last line, and the text before it."""
    status = convert.main(["verify", *map(str, arguments)])
    text, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    return status, json.loads(last), text


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line of an error."""
    assert convert.main(["verify", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def changed(folder: Path, like: Path, change: Any) -> Path:
    """A copy of a PyTorch folder whose dict of tensors went through `change`."""
    folder.mkdir()
    shutil.copy(like / "config.json", folder)
    tensors = load_file(like / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def perturb(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][3, 5] += 0.5

    return change


def as_bfloat16(tensors: dict[str, np.ndarray]) -> None:
    tensors.update({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden folder of one layer."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_golden(tmp_path_factory.mktemp("golden") / "made", "text_only_internlm2", seed=5, **sizes)


class TestGolden:
    @pytest.mark.slow
    @pytest.mark.parametrize("folder", [TEXT, IMAGE], ids=lambda folder: folder.name)
    def test_a_golden_folder_computes_its_own_outputs(self, folder: Path, capsys: pytest.CaptureFixture):
        status, said, text = verify(capsys, folder, "--golden", folder)
        assert status == 0
        assert said["ok"] is said["outputs"]["ok"] is True
        groups = said["outputs"]["groups"]
        assert {"logits", "gradients", "losses", "generated tokens", "generation logits"} <= set(groups)
        assert all(0 <= group["difference"] <= group["tolerance"] <= 1e-4 for group in groups.values())
        assert said["outputs"]["top1"] == 1
        assert 0 <= said["outputs"]["kl_mean"] <= said["outputs"]["kl_max"] < 1e-8
        assert said["outputs"]["generated_tokens_equal"] is True
        assert "within tolerance" in text

    @pytest.mark.slow
    def test_a_checkpoint_of_this_program(self, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        case = load_golden(made)
        status, said, _ = verify(capsys, saved_run(tmp_path / "run", case.config, case.params), "--golden", made)
        assert status == 0
        assert said["weights"]["byte_equal"] == said["weights"]["tensors"] == 10
        assert said["outputs"]["tensors"] == 17

    @pytest.mark.slow
    def test_a_perturbed_weight_fails_and_is_named(self, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        status, said, text = verify(capsys, changed(tmp_path / "x", made, perturb(W3)), "--golden", made)
        assert status == 1
        assert said["ok"] is said["weights"]["ok"] is said["outputs"]["ok"] is False
        assert said["weights"]["out_of_tolerance"] == [W3]
        assert said["weights"]["groups"]["text ffn"]["absolute"] == pytest.approx(0.5, abs=1e-6)
        assert not said["outputs"]["groups"]["logits"]["ok"]
        assert said["outputs"]["kl_max"] > 1e-6
        assert "NOT within tolerance" in text
        assert W3 in text

    @pytest.mark.slow
    def test_bfloat16_is_allowed_its_rounding_and_no_more(
        self, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ):
        status, said, text = verify(capsys, changed(tmp_path / "rounded", made, as_bfloat16), "--golden", made)
        assert status == 0
        assert "rounded weights" in said["outputs"]["tolerance"]
        assert "bfloat16" in text
        assert said["outputs"]["groups"]["logits"]["difference"] > 1e-4

        def break_it(tensors: dict[str, np.ndarray]) -> None:
            tensors[W3] = tensors[W3][::-1].copy()
            as_bfloat16(tensors)

        status, said, _ = verify(capsys, changed(tmp_path / "broken", made, break_it), "--golden", made)
        assert status == 1
        assert said["weights"]["out_of_tolerance"] == [W3]
        assert not said["outputs"]["groups"]["logits"]["ok"]

    @pytest.mark.slow
    def test_nan_fails_and_the_line_stays_json(self, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        def spoil(tensors: dict[str, np.ndarray]) -> None:
            tensors["model.norm.weight"][:] = np.nan

        status, said, _ = verify(capsys, changed(tmp_path / "x", made, spoil), "--golden", made)
        assert status == 1
        assert said["weights"]["out_of_tolerance"] == ["model.norm.weight"]
        assert said["weights"]["groups"]["norms"]["absolute"] is None
        assert said["outputs"]["groups"]["logits"]["difference"] is None
        assert said["outputs"]["groups"]["decoder layers"]["ok"]

    def test_another_model_is_refused_by_its_fields(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        other = changed(tmp_path / "x", TEXT, lambda tensors: None)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0, "rms_norm_eps": 1e-3}))
        message = refused(capsys, other, "--golden", TEXT)
        assert "model.decoder.rope_theta is 5000.0, golden has" in message
        assert "model.decoder.norm_eps is 0.001" in message

    def test_a_missing_tensor_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        folder = changed(tmp_path / "x", TEXT, lambda tensors: tensors.pop(UP))
        assert f"{UP} is missing" in refused(capsys, folder, "--golden", TEXT)

    def test_an_incomplete_golden_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        folder = shutil.copytree(TEXT, tmp_path / "golden")
        arrays = load_file(folder / "golden.safetensors")
        save_file(
            {name: array for name, array in arrays.items() if name != "text1.input_ids"}, folder / "golden.safetensors"
        )
        case = load_golden(folder)
        with pytest.raises(UserError, match=r"golden.safetensors: has no text1.input_ids"):
            text_training_pairs(case, "text1")
        (folder / "golden.safetensors").write_bytes(b"no tensors")
        assert "golden.safetensors: not a readable safetensors file" in refused(capsys, TEXT, "--golden", folder)
        (folder / "golden.json").write_text("{")
        assert "golden.json: line 1: not valid JSON" in refused(capsys, TEXT, "--golden", folder)

    def test_no_golden_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        assert "not a golden folder" in refused(capsys, TEXT, "--golden", tmp_path)


@pytest.mark.slow
def test_a_golden_folder_of_another_size_with_images(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Names, sizes, grids and ids are read from the folder, and its numbers matter."""
    sizes = {"hidden_size": 32, "num_key_value_heads": 1, "num_hidden_layers": 2, "intermediate_size": 48}
    folder = make_golden(tmp_path / "made", "internlm2_small", seed=5, **sizes)
    status, said, _ = verify(capsys, folder, "--golden", folder)
    assert status == 0
    assert said["outputs"]["tensors"] == 168
    arrays = load_file(folder / "golden.safetensors")
    arrays["vision.mlp1"][0, 0, 0] += 0.001
    save_file(arrays, folder / "golden.safetensors")
    groups = by_group(forward_pairs(load_golden(folder)))
    assert [name for name, group in groups.items() if not group.within] == ["connector"]


PADDING = 5


def two_rows(folder: Path, like: Path) -> Path:
    """The golden numbers of a released case twice, in rows padded at the right and at the left."""
    shutil.copytree(like, folder)
    arrays = load_file(folder / "golden.safetensors")
    length = arrays["inputs.input_ids"].shape[1]
    doubled = {"inputs.attention_mask": np.ones((1, length), np.int64)}
    for name, value in (arrays | doubled).items():
        if name.startswith("textonly") or "window_index" in name or "cu_" in name:
            arrays[name] = value
        elif value.ndim > 1 and value.shape[:2] == (1, length):
            widths = [(0, 0)] * (value.ndim - 2)
            fill = -100 if "labels" in name else 0
            rows = [np.pad(value[0], [width, *widths], constant_values=fill) for width in ((0, PADDING), (PADDING, 0))]
            arrays[name] = np.stack(rows)
        else:
            arrays[name] = np.concatenate([value, value])
    save_file(arrays, folder / "golden.safetensors")
    info = json.loads((folder / "golden.json").read_text())
    del info["feature_scale"]
    (folder / "golden.json").write_text(json.dumps(info))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internlm2_small", "internlm2_windowed"])
def test_rows_with_images_are_compared_without_their_padding(name, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = two_rows(tmp_path / "golden", FOLDER / name)
    status, said, _ = verify(capsys, FOLDER / name, "--golden", folder)
    assert (status, said["outputs"]["ok"]) == (0, True)
    _, plain, _ = verify(capsys, FOLDER / name, "--golden", FOLDER / name)
    assert said["outputs"]["tensors"] == plain["outputs"]["tensors"] - 2  # the feature scales
    arrays = load_file(folder / "golden.safetensors")
    arrays["logits"][1, -1, 3] += 0.01
    arrays["vision.mlp1"][-1, 0, 0] += 0.01
    save_file(arrays, folder / "golden.safetensors")
    groups = by_group(forward_pairs(load_golden(folder)))
    assert [group for group, found in groups.items() if not found.within] == ["connector", "logits"]


def test_rows_of_text_are_compared(tmp_path: Path):
    folder = shutil.copytree(TEXT, tmp_path / "golden")
    assert {pair.tensor for pair in text_pairs(load_golden(folder), "batch")} >= {"batch.logits"}
    assert all(pair.within_tolerance for pair in text_pairs(load_golden(folder), "batch"))
    arrays = load_file(folder / "golden.safetensors")
    arrays["batch.logits"][0, 2, 0] += 0.01
    save_file(arrays, folder / "golden.safetensors")
    assert not all(pair.within_tolerance for pair in text_pairs(load_golden(folder), "batch"))


def test_images_that_no_row_takes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = shutil.copytree(IMAGE, tmp_path / "golden")
    arrays = load_file(folder / "golden.safetensors")
    arrays["inputs.image_grid_thw"] = arrays["inputs.image_grid_thw"][:-1]
    save_file(arrays, folder / "golden.safetensors")
    assert "has image tokens that are not those of inputs.image_grid_thw" in refused(capsys, IMAGE, "--golden", folder)


def test_golden_names_come_from_the_folder():
    text, image = load_case("text_only_internlm2"), load_golden(IMAGE)
    assert text.texts == ["batch", "long", "text0", "text1"]
    assert text.generations == ["gen", "gen_cross", "gen_long"]
    assert (text.has_images, image.has_images) == (False, True)
    assert image.texts == ["textonly"]
    assert image.generations == ["gen", "gen_forced"]


class TestTwo:
    def test_a_run_and_its_source(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        case = load_case(IMAGE.name)
        run = saved_run(tmp_path / "run", case.config, case.params)
        arguments = ("--tokenizer", FOLDER / "prompts" / "tokenizer")
        status, said, _ = verify(capsys, IMAGE, run, *arguments, "--weights-only")
        assert said["weights"]["byte_equal"] == said["weights"]["tensors"] == 90
        assert said["weights"]["groups"].keys() >= {"visual attention", "vision", "special tokens", "embedding"}
        assert said["outputs"] is None
        prepared = {"images.min_patches", "images.max_patches", "data.system_message"}
        assert set(said["config_differences"]) == prepared  # this run was saved with the defaults
        assert status == 1

    def test_equal_folders_compute_equal_outputs(self, capsys: pytest.CaptureFixture):
        status, said, _ = verify(capsys, IMAGE, IMAGE)
        assert status == 0
        assert said["outputs"]["groups"]["logits"]["difference"] == 0
        assert said["outputs"]["groups"]["logits"]["tensors"] == 2  # a text and an image

    def test_a_perturbed_weight_fails_and_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        other = changed(tmp_path / "x", TEXT, perturb(UP))
        status, said, text = verify(capsys, TEXT, other)
        assert status == 1
        assert said["weights"]["out_of_tolerance"] == [UP]
        assert said["weights"]["byte_equal"] == 34
        assert said["weights"]["groups"]["text ffn"]["worst"] == UP
        assert said["outputs"]["kl_mean"] > 0
        assert f"out of tolerance: {UP}" in text
        status, said, _ = verify(capsys, TEXT, other, "--weights-only", "--tolerance", "0.51")
        assert status == 0
        assert said["weights"]["tolerance"] == "0.51"

    def test_dtypes(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        rounded = changed(tmp_path / "x", TEXT, as_bfloat16)
        status, said, _ = verify(capsys, rounded, TEXT)
        assert status == 0
        assert said["weights"]["dtypes"] == {"bfloat16 and float32": 35}
        assert said["weights"]["tolerance"].startswith("rounding to the coarser dtype")
        assert 0 < said["weights"]["largest_relative"] <= 2**-8
        assert said["weights"]["byte_equal"] == 0
        assert verify(capsys, rounded, TEXT, "--weights-only", "--tolerance", "0")[0] == 1
        assert verify(capsys, rounded, rounded, "--weights-only")[0] == 0

    def test_missing_unexpected_and_wrong_shapes(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        def spoil(tensors: dict[str, np.ndarray]) -> None:
            tensors["new"] = tensors.pop(UP)
            tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].copy()

        status, said, text = verify(capsys, TEXT, changed(tmp_path / "x", TEXT, spoil))
        assert status == 1
        assert said["weights"]["only_first"] == [UP]
        assert said["weights"]["only_second"] == ["new"]
        assert said["weights"]["shapes"] == ["model.norm.weight is [64] and [7]"]
        assert said["outputs"] is None
        assert len(said["problems"]) == 3
        assert "outputs were not computed" in text

    def test_a_config_that_differs_fails(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        other = changed(tmp_path / "x", TEXT, lambda tensors: None)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
        status, said, _ = verify(capsys, TEXT, other)
        assert status == 1
        assert list(said["config_differences"]) == ["model.decoder.rope_theta"]
        assert said["weights"]["ok"]
        assert not said["outputs"]["ok"]

    def test_mistakes(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        assert "give a second checkpoint, or a golden folder" in refused(capsys, TEXT)
        assert "give a second checkpoint, or a golden folder" in refused(capsys, TEXT, TEXT, "--golden", TEXT)
        assert "--tolerance: must be at least 0" in refused(capsys, TEXT, TEXT, "--tolerance", "-1")
        assert "--weights-only compares two checkpoints" in refused(capsys, TEXT, "--golden", TEXT, "--weights-only")
        assert str(tmp_path / "no") in refused(capsys, TEXT, tmp_path / "no")


def compare(a: np.ndarray, b: np.ndarray, tolerance: float | None = None) -> tensor_differences.TensorDifference:
    return compare_tensor("x", "head", a, b, tolerance)


class TestCompareTensor:
    @settings(max_examples=50, deadline=None)
    @given(seed=st.integers(0, 10**6), size=st.integers(0, 40), chunk=st.integers(1, 20), faults=st.integers(0, 5))
    def test_chunks_change_nothing(self, seed: int, size: int, chunk: int, faults: int):
        rng = np.random.default_rng(seed)
        a = rng.normal(size=(size, 2)).astype(np.float32)
        b = a.copy()
        if size:
            b.reshape(-1)[rng.integers(0, 2 * size, faults)] += np.float32(rng.normal())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensor_differences, "CHUNK", chunk)
            found = compare(a, b)
        wide = np.abs(a.astype(np.float64) - b)
        assert found.absolute == wide.max(initial=0)
        ratio = wide / np.maximum(np.maximum(np.abs(a), np.abs(b)), 1e-30)
        assert found.relative == pytest.approx(ratio.max(initial=0), rel=1e-6)
        assert found.equal == found.within == np.array_equal(a, b)
        assert compare(a, b, tolerance=float(wide.max(initial=0))).within

    def test_bytes_count_not_values(self):
        zeros = np.zeros(3, np.float32)
        found = compare(zeros, -zeros)
        assert (found.absolute, found.equal, found.within) == (0, False, False)
        nans = np.full(3, np.nan, np.float32)
        assert compare(nans, nans.copy()).within
        assert not compare(nans, zeros, tolerance=1e9).within

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32)))
    def test_rounding_is_always_in_tolerance(self, values: list[float]):
        exact = np.array(values, np.float32)
        assert compare(exact, exact.astype(ml_dtypes.bfloat16)).within

    def test_twice_the_rounding_is_not(self):
        rounded = np.array([1.0, 3.0], ml_dtypes.bfloat16)
        assert rounding(rounded.dtype, np.dtype(np.float32)) == 2**-8
        assert not compare(np.array([1.0, 3.0 * (1 + 2**-7)], np.float32), rounded).within


class TestDistributions:
    def test_against_numbers_by_hand(self):
        """p = (3/4, 1/4) and q = (1/2, 1/2), then equal ones."""
        first = np.log([[3.0, 1.0], [5.0, 2.0]])
        second = np.log([[1.0, 1.0], [10.0, 4.0]])
        found = distributions([(first, second)])
        expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
        assert found.positions == 2
        assert found.kl_max == pytest.approx(expected)
        assert found.kl_mean == pytest.approx(expected / 2)
        assert found.top1 == 1

    def test_top1(self):
        assert distributions([(np.eye(4), np.eye(4)[[0, 1, 2, 0]])]).top1 == 0.75


def test_nothing_compared_is_not_good():
    assert not report([], Allowed()).ok


def test_a_given_tolerance_replaces_all_others():
    pair = Pair("generated tokens", "x", [1], [2])
    assert not report([pair], Allowed()).ok
    assert report([pair], Allowed(tolerance=1.0)).ok


def test_made_batch_fills_visual_slots():
    config = load_case(IMAGE.name).config
    batch = made_batch(config)
    assert (batch.unit_slots[1] < batch.tokens.shape[1]).sum() == 24
    np.testing.assert_array_equal(batch.tokens, made_batch(config).tokens)
    assert not np.array_equal(batch.tokens, made_batch(config, seed=1).tokens)


def test_help_teaches(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        convert.main(["verify", "--help"])
    text = capsys.readouterr().out
    assert "--golden tests/golden/internlm2_small" in text
    assert "Exit status: 0 within tolerance, 1 not, 2 bad input" in text
