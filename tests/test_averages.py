"""Running averages: what a run's evaluations use is what is started from, talked with, exported and verified."""

import dataclasses
import functools
import io
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import FOLDER
from tiny import tiny_model

from navil_jax import chat, load_pretrained
from navil_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from navil_jax.convert import __main__ as convert
from navil_jax.convert.loading import load_assistant
from navil_jax.convert.opened import open_checkpoint, open_start
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.errors import UserError
from navil_jax.model import lora
from navil_jax.model import params as model_params
from navil_jax.model.params import flatten, unflatten
from navil_jax.sharding import make_mesh
from navil_jax.train.checkpoint import Checkpoints, Record
from navil_jax.train.start import first_params

TOKENIZER = load_tokenizer(FOLDER / "prompts" / "tokenizer")
FIELDS = {"special_token_ids": TOKENIZER.special_token_ids, "compute_dtype": "bfloat16", "param_dtype": "bfloat16"}
MODEL = tiny_model("internlm2", {"vocab_size": 600, "depth": 1}, **FIELDS)
WITH_UPDATES = dataclasses.replace(MODEL, lora_rank=2)
NORM, VISUAL, TEXT = (
    "decoder/final_norm/scale",
    "decoder/layers/ffn/visual/up/kernel",
    "decoder/layers/ffn/text/up/kernel",
)


def config(model: ModelConfig = MODEL, eval_ema: bool = True, **optimizer: float) -> Config:
    return Config(model=model, optimizer=OptimizerConfig(**{"ema_decay": 0.9, **optimizer}), eval_ema=eval_ema)


def is_trained(name: str, model: ModelConfig) -> bool:
    return "lora" in name if model.lora_rank else any(part in name for part in ("visual", "norm", "vision"))


@functools.cache
def saved(model: ModelConfig) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Parameters, and of the trained ones what their averages differ by, by name."""
    rng = np.random.default_rng(1)
    leaves = flatten(model_params.shapes(model))
    params = {name: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for name, leaf in leaves.items()}
    trained = {name: leaf.shape for name, leaf in leaves.items() if is_trained(name, model)}
    return params, {name: jnp.asarray(rng.normal(0.1, size=shape), jnp.float32) for name, shape in trained.items()}


def arrays(model: ModelConfig) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Parameters, and averages of the trained ones that bfloat16 cannot hold, by name."""
    params, differences = saved(model)
    return params, {name: params[name].astype(jnp.float32) + value for name, value in differences.items()}


def write(workdir: Path, config: Config, step: int = 5) -> Path:
    params, differences = saved(config.model)
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        record = Record(config, TOKENIZER.files(), {})
        checkpoints.save(step, unflatten(params), record, ema=unflatten(differences) if step else None)
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("averaged") / "run", config())


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, whose evaluations use the parameters themselves."""
    return write(tmp_path_factory.mktemp("raw") / "run", config(eval_ema=False))


def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def started(workdir: Path, model: ModelConfig = MODEL) -> tuple[dict[str, jax.Array], str]:
    """What a next stage begins with, and what is said of it."""
    said = []
    config = Config(model=model, init_from=str(workdir))
    with open_start(config) as opened:
        params = first_params(config, mesh(), opened, said.append)
    return flatten(params), " ".join(said)


def assert_same(ours: dict[str, jax.Array], theirs: dict[str, jax.Array]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, np.asarray(theirs[name]).astype(value.dtype), err_msg=name)


def test_the_next_stage_starts_from_what_was_evaluated(run: Path, raw: Path):
    params, ema = arrays(MODEL)
    begun, said = started(run)
    assert said.startswith("running averages of the parameters of step 5")
    assert {value.dtype.name for value in begun.values()} == {"float32"}  # all of them train
    assert_same(begun, params | ema)
    np.testing.assert_array_equal(begun[VISUAL], ema[VISUAL])
    assert not np.array_equal(begun[VISUAL], params[VISUAL])
    np.testing.assert_array_equal(begun[TEXT], params[TEXT])
    begun, said = started(raw)
    assert said.startswith("parameters of step 5")
    assert_same(begun, params)


def test_a_float32_stage_gets_the_averages_unrounded(run: Path):
    _, ema = arrays(MODEL)
    begun, _ = started(run, dataclasses.replace(MODEL, param_dtype="float32"))
    np.testing.assert_array_equal(begun[VISUAL], ema[VISUAL])


def test_a_run_that_trains_everything_has_averages_alone(tmp_path: Path):
    params, _ = arrays(MODEL)
    ones = {name: jnp.ones(value.shape, jnp.float32) for name, value in params.items()}
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(5, unflatten(params), Record(config(), TOKENIZER.files(), {}), ema=unflatten(ones))
    assert_same(started(tmp_path)[0], {name: value.astype(jnp.float32) + 1 for name, value in params.items()})


@pytest.mark.slow
def test_averages_of_low_rank_updates_go_into_the_kernels(tmp_path: Path):
    workdir = write(tmp_path / "run", config(WITH_UPDATES))
    params, ema = arrays(WITH_UPDATES)
    merged = flatten(lora.merged(unflatten(params | ema), WITH_UPDATES.lora_scale))
    assert not np.array_equal(merged[TEXT], params[TEXT])
    begun, _ = started(workdir)
    loaded = flatten(nnx.to_pure_dict(nnx.state(load_pretrained(workdir, mesh()).model, nnx.Param)))
    for found in (begun, loaded):
        assert found.keys() == merged.keys()
        for name, value in found.items():
            np.testing.assert_allclose(
                value.astype(jnp.float32), merged[name].astype(jnp.float32), rtol=0.01, atol=1e-3
            )


def test_a_converted_checkpoint_has_none(tmp_path: Path):
    """`convert init` keeps the recipe's `ema_decay` in a checkpoint of step 0."""
    begun, said = started(write(tmp_path / "run", config(), step=0))
    assert said.startswith("parameters of step 0")
    assert_same(begun, arrays(MODEL)[0])


def test_averages_that_are_gone_are_told(tmp_path: Path, run: Path):
    workdir = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "5" / "ema")
    with pytest.raises(UserError, match=r"5: ema is missing; .*if half copied"):
        started(workdir)
    assert convert.main(["export", str(workdir), str(tmp_path / "out")]) == 2


def test_chat_computes_with_what_was_evaluated(run: Path, raw: Path, capsys: pytest.CaptureFixture, monkeypatch):
    params, ema = arrays(MODEL)
    assistant = load_assistant(run, mesh())
    found = flatten(assistant.engine.programs.params)
    assert assistant.averaged
    assert found[NORM].dtype == jnp.float32
    assert found[TEXT].dtype == found[VISUAL].dtype == jnp.bfloat16
    assert_same(found, params | ema)
    assert not load_assistant(raw, mesh()).averaged
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for workdir, said in ((run, "the running averages of the parameters answer"), (raw, "")):
        assert chat.main(["--checkpoint", str(workdir)]) == 0
        assert capsys.readouterr().err.startswith(said)


def exported(folder: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(folder) as checkpoint:
        return flatten(checkpoint.params())


@pytest.mark.parametrize(
    ("which", "flag", "averaged"), [("run", [], True), ("run", ["--no-ema"], False), ("raw", ["--ema"], True)]
)
def test_export_writes_and_verify_compares_what_was_evaluated(
    which: str, flag: list[str], averaged: bool, tmp_path: Path, capsys: pytest.CaptureFixture, request
):
    workdir, (params, ema) = request.getfixturevalue(which), arrays(MODEL)
    assert convert.main(["export", str(workdir), str(tmp_path / "out"), *flag]) == 0
    said = capsys.readouterr().out
    assert ("written, with the running averages" in said) is averaged
    asked = said.strip().partition("check it with: verify ")[2].split()
    tensors = exported(tmp_path / "out")
    assert {value.dtype.name for value in tensors.values()} == {"bfloat16"}
    assert_same(tensors, params | ema if averaged else params)
    assert convert.main(["verify", *asked, "--weights-only"]) == 0
    assert (f"{workdir}: the running averages of its parameters" in capsys.readouterr().out) is averaged
    other = "--no-ema" if averaged else "--ema"
    assert convert.main(["verify", str(workdir), str(tmp_path / "out"), "--weights-only", other]) == 1
