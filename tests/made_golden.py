"""Golden folders of any size: random weights and inputs, and this project's outputs in place of the released ones."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from golden_cases import FOLDER
from safetensors.numpy import save_file

from navil_jax.convert.params import tensors_from_params
from navil_jax.convert.verify import compare, golden
from navil_jax.convert.verify.golden import Case
from navil_jax.model import params as model_params

SPECIAL_IDS = {token: 300 + i for i, token in enumerate(reversed(golden.SPECIAL_TOKENS))}
VOCABULARY, STEPS = 320, 3
Arrays = dict[str, np.ndarray]


def make_golden(folder: Path, like: str, seed: int, **sizes: Any) -> Path:
    """Writes a folder like the golden case `like`, of another size and seed.

    Args:
      folder: new.
      like: a case of tests/golden, whose config.json is taken over.
      seed: of weights and inputs.
      sizes: keys of the language model's config that change.
    """
    folder.mkdir()
    released = json.loads((FOLDER / like / "config.json").read_text())
    released.get("llm_config", released).update(vocab_size=VOCABULARY, **sizes)
    (folder / "config.json").write_text(json.dumps(released))
    rng = np.random.default_rng(seed)
    images = "llm_config" in released
    info = {"special_tokens": SPECIAL_IDS} if images else {}
    (folder / "golden.json").write_text(json.dumps(info))
    save_file({}, folder / "golden.safetensors")
    config = golden.golden_config(folder)
    params = model_params.initialise(config, seed)
    save_file(dict(tensors_from_params(config, params)), folder / "model.safetensors")

    arrays = image_inputs(rng) if images else text_inputs(rng)
    case = golden.load_case(folder)
    outputs, info = made_outputs(dataclasses.replace(case, arrays=arrays, info=info))
    (folder / "golden.json").write_text(json.dumps(info))
    save_file(arrays | outputs, folder / "golden.safetensors")
    return folder


def image_inputs(rng: np.random.Generator) -> Arrays:
    """Two scales of 4 x 2 and 6 x 10 patches within a short text."""
    grids, prompt = [(1, 4, 2), (1, 6, 10)], [1, 7, SPECIAL_IDS["<img>"]]
    for _, rows, cols in grids:
        prompt += ([SPECIAL_IDS["<IMG_CONTEXT>"]] * (cols // 2) + [SPECIAL_IDS["<IMG_LINE_BREAK>"]]) * (rows // 2)
    prompt += [SPECIAL_IDS["</img>"], *rng.integers(3, 300, 6)]
    answer = rng.integers(3, 300, 4).tolist()
    tokens = np.array([[*prompt, *answer]])
    labels = np.where(np.arange(tokens.size) >= len(prompt), tokens, compare.IGNORED)
    return {
        "inputs.input_ids": tokens,
        "inputs.image_grid_thw": np.array(grids),
        "inputs.pixel_u8": rng.integers(0, 256, (4 * 2 + 6 * 10, 3, 16, 16), np.uint8),
        "inputs.labels": labels,
        "inputs.labels_all": tokens,
        "inputs.loss_weight_all": rng.random(tokens.shape, np.float32),
        "gen.input_ids": np.array([prompt]),
        "other_text.input_ids": rng.integers(3, 300, (1, 9)),
    }


def text_inputs(rng: np.random.Generator) -> Arrays:
    """Two texts and a generation, with other names and lengths than those of the public cases."""
    lengths = {"short": 5, "middle": 19, "gen": 7}
    return {f"{name}.input_ids": rng.integers(3, 300, (1, length)) for name, length in lengths.items()}


def made_outputs(case: Case) -> tuple[Arrays, dict[str, Any]]:
    """What this project computes, under the golden names."""
    info, arrays = copy.deepcopy(case.info), dict(case.arrays)
    if case.has_images:
        losses = ("plain", "weighted_all_labels_all")
        layers = [f"llm.layer_{i}" for i in range(case.config.decoder.depth)]
        names = ["vision.patch_embeds", "vision.mlp1", *layers, "logits", "other_text.logits"]
        nothing = {"loss": 0.0, "text_acc1": 0.0}
    else:
        losses = ("middle",)
        names = [f"{text}.{tensor}" for text in ("short", "middle") for tensor in ("layer_0", "logits")]
        nothing = 0.0
    arrays |= dict.fromkeys([*names, "gen.logits"], np.zeros(0, np.float32))
    arrays["gen.tokens"] = np.zeros((1, STEPS), np.int64)
    tensors = dict(tensors_from_params(case.config, case.params))
    info |= {"loss": dict.fromkeys(losses, nothing)}
    info |= {f"grad_{name}": dict.fromkeys(tensors, (0.0, 0.0)) for name in losses}
    outputs: Arrays = {}
    for pair in compare.all_pairs(dataclasses.replace(case, arrays=arrays, info=info)):
        if pair.tensor in arrays:
            outputs[pair.tensor] = np.ascontiguousarray(pair.ours)
    for name in losses:
        if case.has_images:
            (loss, accuracy), gradients = compare.train(case, name)
            info["loss"][name] = {"loss": float(loss), "text_acc1": float(accuracy)}
        else:
            loss, gradients = compare.text_training(case, name)
            info["loss"][name] = float(loss)
        info[f"grad_{name}"] = compare.gradient_numbers(case, gradients)
    return outputs, info
