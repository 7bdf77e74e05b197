"""Checks a checkpoint against released outputs, or two checkpoints of any format against each other."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax

from navil_jax.config import SPECIAL_TOKENS, Config, ModelConfig
from navil_jax.config.continuing import FREE_MODEL_KEYS
from navil_jax.config.plain import differences
from navil_jax.config.ranges import NotNegative, Seed, read_as
from navil_jax.console import table
from navil_jax.convert.opened import OpenCheckpoint, open_checkpoint
from navil_jax.convert.stored import DTYPES, listed
from navil_jax.convert.verify.compare import all_pairs
from navil_jax.convert.verify.golden import golden_config, load_case
from navil_jax.convert.verify.outputs import (
    Allowed,
    OutputReport,
    float32,
    made_batch,
    made_logits,
    made_pairs,
    report,
)
from navil_jax.convert.verify.tensors import WeightReport, compare_weights, largest, rounding
from navil_jax.errors import UserError
from navil_jax.paths import given_path

SHOWN_TENSORS = 5  # of those out of tolerance
EXAMPLES = """
a checkpoint computes what the released code computed on tests/golden/internlm2_small:
  python -m navil_jax.convert verify runs/small --golden tests/golden/internlm2_small

an export holds the same weights, byte for byte, and computes the same:
  python -m navil_jax.convert verify runs/2b NaViL-2B-mine

a model that does not fit into memory, tensor by tensor:
  python -m navil_jax.convert verify NaViL-9B runs/navil-9b --weights-only

an export in bfloat16 of a float32 run; differences up to the rounding are good:
  python -m navil_jax.convert verify runs/2b NaViL-2B-bf16

A golden folder has config.json, golden.json, golden.safetensors and images as those in tests/golden, of any size.
Weights of one dtype must have equal bytes. Outputs are computed in float32 and may differ as golden data allows (1e-4
for logits). Where dtypes differ, weights may differ by the rounding, and outputs by a multiple of it; the report says
so.

The last line is one JSON object with all figures; "ok" is the verdict.
Exit status: 0 within tolerance, 1 not, 2 bad input (one line says what).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("checkpoint", type=given_path, metavar="CHECKPOINT", help="workdir of a run, or a PyTorch folder")
    add("other", nargs="?", type=given_path, metavar="OTHER", help="a second checkpoint, to compare with")
    add("--golden", type=given_path, metavar="FOLDER", help="a golden folder, to compare with")
    add(
        "--tolerance",
        type=read_as(NotNegative),
        metavar="X",
        help="largest difference of weights and of outputs (default: see below)",
    )
    add("--weights-only", action="store_true", help="of two checkpoints, compare the weights alone, tensor by tensor")
    add("--tokenizer", default="", metavar="DIR", help="folder of the tokenizer, for PyTorch folders without one")
    add(
        "--ema", action=argparse.BooleanOptionalAction, help="of runs, the running averages (default: as they evaluate)"
    )
    text = "of the made text and image that two models are run on (default: 0)"
    add("--seed", type=read_as(Seed), default=0, help=text)


def run(options: argparse.Namespace) -> int:
    """Prints the report and its JSON line. Returns 0 within tolerance, else 1."""
    if (options.other is None) == (options.golden is None):
        raise UserError("give a second checkpoint, or a golden folder with --golden; verify --help has examples")
    with jax.default_matmul_precision("highest"):
        verdict = _against_golden(options) if options.golden else _against_other(options)
    _print(verdict)
    return 0 if verdict.ok else 1


@dataclasses.dataclass(frozen=True)
class Verdict:
    """All that is said of a checkpoint.

    Attributes:
      names: what was compared.
      problems: what is missing, unexpected or wrongly shaped against the config, of both.
      config: keys of the config that differ -> both values.
      weights: None where there is nothing to compare them with.
      outputs: None if they were not asked for or cannot be computed.
      wants_outputs: whether they were asked for.
      averaged: the checkpoints of which running averages were compared.
    """

    names: dict[str, str]
    problems: list[str]
    config: dict[str, tuple[Any, Any]]
    weights: WeightReport | None
    outputs: OutputReport | None
    wants_outputs: bool = True
    averaged: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        weights = self.weights is None or self.weights.ok
        outputs = self.outputs.ok if self.outputs else not self.wants_outputs
        return weights and outputs and not self.problems and not self.config

    def to_json(self) -> str:
        said = {
            "ok": self.ok,
            **self.names,
            "running_averages": self.averaged,
            "problems": self.problems,
            "config_differences": {key: list(values) for key, values in self.config.items()},
            "weights": self.weights and self.weights.to_json(),
            "outputs": self.outputs and self.outputs.to_json(),
        }
        return json.dumps(_finite(said), allow_nan=False)


def _finite(value: Any) -> Any:
    """nan and infinity, which JSON lacks, become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _against_golden(options: argparse.Namespace) -> Verdict:
    folder = Path(options.golden)
    if options.weights_only:
        raise UserError("--weights-only compares two checkpoints; leave it out with --golden")
    golden = golden_config(folder)
    with open_checkpoint(options.checkpoint, options.tokenizer, options.ema) as opened:
        if opened.problems:
            raise UserError(f"{opened.path}: does not fit the model of its config: {listed(opened.problems)}")
        checkpoint = _with_special_ids(opened, golden.special_token_ids)
        if changed := _model_differences(checkpoint.config.model, golden):
            said = listed([f"{key} is {ours}, golden has {theirs}" for key, (ours, theirs) in changed.items()])
            raise UserError(f"{opened.path}: not the model of {folder}: {said}; take the golden folder of this model")
        weights, dtypes = None, ["float32"]
        if any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
            with open_checkpoint(folder) as reference:
                dtypes = list(reference.dtypes)
                if folder.resolve() != opened.path.resolve():
                    weights = compare_weights(reference, checkpoint, options.tolerance)
        allowed = Allowed(options.tolerance, _rounding(checkpoint, dtypes))
        case = load_case(folder, float32(checkpoint.params()))
    names = {"checkpoint": str(options.checkpoint), "golden": str(folder)}
    outputs = report(all_pairs(case, follow=allowed.rounding > 0), allowed)
    return Verdict(names, [], {}, weights, outputs, averaged=_averaged(checkpoint))


def _rounding(checkpoint: OpenCheckpoint, dtypes: list[str]) -> float:
    """Relative rounding error of the checkpoint's weights, where they have other dtypes than those of the outputs."""
    others = [name for name in checkpoint.dtypes if name not in dtypes]
    return rounding(*(dtype for dtype in DTYPES.values() if dtype.name in others)) if others else 0.0


def _against_other(options: argparse.Namespace) -> Verdict:
    with (
        open_checkpoint(options.checkpoint, options.tokenizer, options.ema) as first,
        open_checkpoint(options.other, options.tokenizer, options.ema) as second,
    ):
        ids = first.config.model.special_token_ids or second.config.model.special_token_ids
        first, second = (_with_special_ids(checkpoint, ids) for checkpoint in (first, second))
        problems = [f"{checkpoint.path}: {said}" for checkpoint in (first, second) for said in checkpoint.problems]
        weights = compare_weights(first, second, options.tolerance)
        outputs = None
        if weights.complete and not problems and not options.weights_only:
            batch = made_batch(first.config.model, options.seed)
            logits = [made_logits(opened.config.model, opened.params(), batch) for opened in (first, second)]
            dtypes = {dtype for name in weights.dtypes for dtype in name.split(" and ")}
            coarse = rounding(*(dtype for dtype in DTYPES.values() if dtype.name in dtypes)) if dtypes else 0.0
            outputs = report(made_pairs(*logits), Allowed(options.tolerance, coarse))
        names = {"checkpoint": str(options.checkpoint), "other": str(options.other)}
        changed = _config_differences(first.config, second.config)
    averaged = _averaged(first, second)
    return Verdict(names, problems, changed, weights, outputs, not options.weights_only, averaged)


def _averaged(*checkpoints: OpenCheckpoint) -> tuple[str, ...]:
    return tuple(str(checkpoint.path) for checkpoint in checkpoints if checkpoint.averaged)


def _with_special_ids(checkpoint: OpenCheckpoint, ids: tuple[int, ...]) -> OpenCheckpoint:
    """The checkpoint with these ids of special tokens, or the vocabulary's last ones, where it lacks its tokenizer."""
    model = checkpoint.config.model
    if model.special_token_ids or model.vision is None:
        return checkpoint
    vocab = model.decoder.vocab_size
    model = dataclasses.replace(model, special_token_ids=ids or tuple(range(vocab - len(SPECIAL_TOKENS), vocab)))
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, model=model))


def _model_differences(first: ModelConfig, second: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Keys of what a model computes that differ, with both values."""
    return {
        key: values
        for key, values in differences(Config(model=first), Config(model=second)).items()
        if not key.startswith(FREE_MODEL_KEYS)
    }


def _config_differences(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """Those of the model, and of how images and prompts are prepared for it."""
    model = _model_differences(first.model, second.model)
    if first.model.vision is None and second.model.vision is None:
        return model
    prepared = ("images.", "data.template", "data.system_message")
    return model | {key: both for key, both in differences(first, second).items() if key.startswith(prepared)}


def _print(verdict: Verdict) -> None:
    print(" against ".join(verdict.names.values()))
    for path in verdict.averaged:
        print(f"{path}: the running averages of its parameters")
    for problem in verdict.problems:
        print(f"problem: {problem}")
    for key, (first, second) in verdict.config.items():
        print(f"config: {key} is {first} and {second}")
    if verdict.weights:
        _print_weights(verdict.weights)
    if verdict.outputs:
        _print_outputs(verdict.outputs)
    elif verdict.wants_outputs:
        print("\noutputs were not computed, as the checkpoints do not hold the same tensors")
    print(f"\n{'within tolerance' if verdict.ok else 'NOT within tolerance'}\n{verdict.to_json()}")


def _print_weights(weights: WeightReport) -> None:
    equal = sum(tensor.equal for tensor in weights.tensors)
    print(f"\nweights (tolerance: {weights.tolerance}); {equal} of {len(weights.tensors)} tensors have equal bytes")
    rows = [
        (
            group,
            str(len(tensors)),
            str(sum(tensor.equal for tensor in tensors)),
            f"{tensors[0].absolute:.1e}",
            f"{largest([tensor.relative for tensor in tensors]):.1e}",
            "" if tensors[0].equal else tensors[0].name,
        )
        for group, tensors in weights.groups().items()
    ]
    print(table(("group", "tensors", "equal", "absolute", "relative", "worst tensor"), rows))
    for pair, count in weights.dtypes.items():
        print(f"dtypes: {count} tensors are {pair}")
    for tensor in weights.worst[:SHOWN_TENSORS]:
        print(f"out of tolerance: {tensor.name} (largest difference {tensor.absolute:.1e})")
    if len(weights.worst) > SHOWN_TENSORS:
        print(f"out of tolerance: {len(weights.worst) - SHOWN_TENSORS} more")
    for said, names in (("first", weights.only_first), ("second", weights.only_second)):
        if names:
            print(f"only in the {said}: {listed(names, ', ')}")
    if weights.shapes:
        print(f"shapes differ: {listed(weights.shapes)}")


def _print_outputs(outputs: OutputReport) -> None:
    print(f"\noutputs (tolerance: {outputs.tolerance})")
    rows = [
        (
            name,
            str(group.tensors),
            f"{group.difference:.1e}",
            f"{outputs.limits[name]:.0e}",
            "yes" if group.within else "NO",
            group.worst,
        )
        for name, group in outputs.groups.items()
    ]
    print(table(("group", "tensors", "difference", "tolerance", "good", "worst tensor"), rows))
    if found := outputs.distributions:
        print(
            f"next-token distributions at {found.positions} positions: KL mean {found.kl_mean:.1e}, max "
            f"{found.kl_max:.1e} nats; likeliest token the same at {found.top1:.2%}"
        )
    if outputs.tokens_equal is not None:
        print(f"generated tokens: {'equal' if outputs.tokens_equal else 'NOT equal'}")
