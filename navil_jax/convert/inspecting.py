"""Says what a checkpoint holds, from its headers: no tensor is read."""

import argparse
import json
import math
from collections import Counter
from typing import Any

from navil_jax.config import Config, DecoderConfig, VisionConfig
from navil_jax.console import say, table
from navil_jax.convert.groups import GROUPS, UNKNOWN, tensor_groups
from navil_jax.convert.names import name_table
from navil_jax.convert.opened import OpenCheckpoint, open_checkpoint
from navil_jax.convert.stored import StoredTensor
from navil_jax.paths import given_path

EXAMPLES = """
a released model, a language model to start from, and a run of this program:
  python -m navil_jax.convert inspect NaViL-2B
  python -m navil_jax.convert inspect internlm2-1_8b
  python -m navil_jax.convert inspect runs/2b

for a script:
  python -m navil_jax.convert inspect NaViL-2B --json | jq .parameters.total

Active parameters are those that a token is multiplied with. A text token: attention, ffn, norms and head. A visual
token: vision encoder, connector, and the visual attention and ffn with the norms; in InternLM2 models the output
projection of text too, as the visual one comes after it.

Exit status: 0 whole, 1 something is missing, unexpected or of a wrong shape, 2 not a checkpoint (one line says why).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    text = "workdir of a run, or a folder in the Hugging Face layout"
    parser.add_argument("folder", type=given_path, metavar="FOLDER", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--tokenizer", type=given_path, metavar="DIR", help="folder of the tokenizer, if there is none")


def run(options: argparse.Namespace) -> int:
    """Prints what the folder holds. Returns 0 if it is whole, else 1."""
    with open_checkpoint(options.folder, options.tokenizer or "") as checkpoint:
        said = describe(checkpoint)
    if options.json:
        print(json.dumps(said))
    else:
        _print(said)
    return 0 if said["whole"] else 1


def describe(checkpoint: OpenCheckpoint) -> dict[str, Any]:
    """Everything that is known without reading a tensor, as JSON has it."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    counts = _count(checkpoint)
    return {
        "whole": not checkpoint.problems,
        "path": str(checkpoint.path),
        "format": checkpoint.kind,
        "step": checkpoint.step,
        "architecture": _architecture(config),
        "parameters": {"total": sum(counts.values()), "groups": counts, **_active(checkpoint, counts)},
        "dtypes": checkpoint.dtypes,
        "tensors": len(checkpoint.info),
        "files": _files(checkpoint),
        "vocabulary": config.model.decoder.vocab_size,
        "tokenizer": None if tokenizer is None else {"ids": tokenizer.vocab_size},
        "special_token_ids": list(config.model.special_token_ids),
        "problems": checkpoint.problems,
        "warnings": checkpoint.warnings,
    }


def _architecture(config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "kind": "NaViL" if model.vision else "language model",
        "family": model.decoder.family,
        "decoder": _decoder_sizes(model.decoder),
        "vision": _vision_sizes(model.vision) if model.vision else None,
        "images": {"min_patches": config.images.min_patches, "max_patches": config.images.max_patches}
        if model.vision
        else None,
    }


def _decoder_sizes(decoder: DecoderConfig) -> dict[str, Any]:
    names = (
        *("depth", "width", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_scaling"),
        *("rope_factor", "max_positions", "norm_eps", "qkv_bias", "out_bias", "qk_norm", "tie_embeddings"),
        *("attention_experts", "ffn_experts"),
    )
    return {name: getattr(decoder, name) for name in names}


def _vision_sizes(vision: VisionConfig) -> dict[str, Any]:
    names = (
        *("depth", "width", "mlp_dim", "num_heads", "head_dim", "patch_size", "merge_size", "norm", "norm_eps"),
        *("qkv_bias", "full_attention_layers", "window_size"),
    )
    return {name: getattr(vision, name) for name in names}


def _count(checkpoint: OpenCheckpoint) -> dict[str, int]:
    """Group -> parameters in the folder; groups without any are left out."""
    groups = tensor_groups(checkpoint.config.model)
    counts: Counter[str] = Counter()
    for name, tensor in checkpoint.info.items():
        counts[groups.get(name, UNKNOWN)] += math.prod(tensor.shape)
    return {group: counts[group] for group in (*GROUPS, UNKNOWN) if counts[group]}


def _active(checkpoint: OpenCheckpoint, counts: dict[str, int]) -> dict[str, int | None]:
    """Parameters that one token is multiplied with; None for visual tokens of a language model."""
    model = checkpoint.config.model
    count = Counter(counts)
    head = count["embedding" if model.decoder.tie_embeddings else "head"]
    text = count["text attention"] + count["text ffn"] + count["norms"] + head
    if model.vision is None:
        return {"active_per_text_token": text, "active_per_visual_token": None}
    attention = count["visual attention" if model.decoder.attention_experts else "text attention"]
    if model.decoder.attention_experts and model.decoder.serial_visual_output:
        attention += _text_output(checkpoint)
    ffn = count["visual ffn" if model.decoder.ffn_experts else "text ffn"]
    visual = count["vision"] + count["connector"] + attention + ffn + count["norms"]
    return {"active_per_text_token": text, "active_per_visual_token": visual}


def _text_output(checkpoint: OpenCheckpoint) -> int:
    """Parameters of the text tokens' output projections."""
    tensors = (
        entry.tensor
        for entry in name_table(checkpoint.config.model)
        if entry.params[0].startswith("decoder/layers/out/text/")
    )
    return sum(math.prod(checkpoint.info[name].shape) for name in tensors if name in checkpoint.info)


def _files(checkpoint: OpenCheckpoint) -> dict[str, int]:
    """Weight file -> bytes of tensors in it; empty for the workdir of a run, where every parameter has its own."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.info.values():
        if isinstance(tensor, StoredTensor):
            sizes[tensor.file.name] += tensor.nbytes
    return dict(sorted(sizes.items()))


def _print(said: dict[str, Any]) -> None:
    architecture, parameters = said["architecture"], said["parameters"]
    where = f"checkpoint of step {said['step']}" if said["format"] == "orbax" else "PyTorch folder"
    say(f"{said['path']}: {where}, {architecture['kind']} of the {architecture['family']} family\n")
    columns = [part for part in ("vision", "decoder") if architecture[part]]
    keys = list(dict.fromkeys(key for part in columns for key in architecture[part]))
    rows = [(key, *(_cell(architecture[part], key) for part in columns)) for key in keys]
    say(table(("sizes", *columns), rows))
    if images := architecture["images"]:
        say(f"images of {images['min_patches']} to {images['max_patches']} patches")

    total = parameters["total"]
    rows = [(group, f"{n:,}", f"{n / total:.1%}") for group, n in parameters["groups"].items()]
    rows.append(("total", f"{total:,}", ""))
    for kind in ("text", "visual"):
        if n := parameters[f"active_per_{kind}_token"]:
            rows.append((f"active per {kind} token", f"{n:,}", f"{n / total:.1%}"))
    say(f"\n{table(('parameters', 'count', 'share'), rows)}\n")
    say(table(("dtype", "bytes"), [(dtype, f"{size:,}") for dtype, size in said["dtypes"].items()]))
    if said["files"]:
        say(f"\n{table(('file', 'bytes'), [(file, f'{size:,}') for file, size in said['files'].items()])}")
    words = f"{said['tokenizer']['ids']:,} ids" if said["tokenizer"] else "none"
    say(f"\ntokenizer: {words}; vocabulary of the model: {said['vocabulary']:,}")
    for kind in ("problems", "warnings"):
        for line in said[kind]:
            say(f"{kind.removesuffix('s')}: {line}")
    say(f"\n{said['tensors']} tensors: " + ("whole" if said["whole"] else f"{len(said['problems'])} problems"))


def _cell(sizes: dict[str, Any], key: str) -> str:
    value = sizes.get(key, "")
    return ",".join(map(str, value)) if isinstance(value, tuple) else "all" if value is None else str(value)
