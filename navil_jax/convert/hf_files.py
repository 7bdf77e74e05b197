"""Files of a folder in the Hugging Face (hf) format beside the weights: config, tokenizer, preprocessing, card."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from navil_jax.config import Config
from navil_jax.convert.kept import CARD, MERGED, named_code
from navil_jax.errors import UserError

END = "<|im_end|>"
TOKENIZER_CONFIG, ADDED_TOKENS, TOKENS_MAP = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
CORE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_companions(
    folder: Path,
    hf: Mapping[str, Any],
    config: Config,
    tokenizer: Mapping[str, bytes],
    source: str,
    step: int,
    origin: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes all files of a folder in the Hugging Face format but the weights.

    config.json, the tokenizer's files as they are held, and what follows from them: special_tokens_map.json and
    added_tokens.json where the tokenizer has none, preprocessor_config.json for a model with vision,
    generation_config.json and README.md. What was kept of an imported folder (`kept`) is written as it was.

    Args:
      folder: exists.
      hf: the config.json, from `hf_config.to_hf_config`.
      config: of the checkpoint.
      tokenizer: file name -> content.
      source: what the checkpoint is called; of a path, the last part is told.
      step: finished training steps of the checkpoint.
      origin: of the checkpoint, see `checkpoint.Record`.

    Returns:
      The names of the files.
    """
    origin = origin or {}
    kept = dict(origin.get("files", {}))
    before = json.loads(kept.pop(MERGED, "{}"))
    files = {**{name: text.encode() for name, text in kept.items()}, **tokenizer}
    files.setdefault(TOKENS_MAP, _encoded(_tokens_map(tokenizer)))
    if "tokenizer.model" not in tokenizer:
        files.setdefault(ADDED_TOKENS, _encoded(_added_tokens(tokenizer)))
    files["config.json"] = _encoded(hf)
    files.setdefault("generation_config.json", _encoded(generation_config(hf, tokenizer)))
    if config.model.vision is not None:
        files[MERGED] = _encoded({**before, **preprocessor_config(config)})
    missing = [name for name in named_code(hf, _parsed(tokenizer, TOKENIZER_CONFIG)) if name not in files]
    card = model_card(config, source, step, origin.get("name", ""), origin.get("license", ()), missing)
    files[CARD] = card.encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return sorted(files)


def generation_config(hf: Mapping[str, Any], tokenizer: Mapping[str, bytes]) -> dict[str, Any]:
    """How an answer ends: at `<|im_end|>` alone (released behaviour), or as config.json says if there is no such token.

    Example: {"_from_model_config": true, "bos_token_id": 1, "eos_token_id": 92542, "pad_token_id": 2}
    """
    language, added = hf.get("llm_config", hf), _added_tokens(tokenizer)
    ids = {key: language.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids["eos_token_id"] = added.get(END, ids["eos_token_id"])
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = added.get(_tokens_map(tokenizer).get("pad_token", ""))
    return {"_from_model_config": True, **{key: value for key, value in ids.items() if value is not None}}


def preprocessor_config(config: Config) -> dict[str, Any]:
    """What the released image processor is built with; sizes in pixels of a whole image.

    It resizes only if the pixels leave [min_pixels, max_pixels], pads with black to whole merged units, and scales to
    [-1, 1]. No class is named: the transformers library's own processor of these fields does not pad.
    """
    vision = config.model.encoder
    pixels = vision.patch_size**2
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": False,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "max_pixels": config.images.max_patches * pixels,
        "merge_size": vision.merge_size,
        "min_pixels": config.images.min_patches * pixels,
        "patch_size": vision.patch_size,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "temporal_patch_size": 1,
    }


def other_preprocessing(folder: Path, config: Config) -> list[str]:
    """What a folder's preprocessor_config.json says otherwise than its config.json, which counts.

    Raises:
      UserError: it is no JSON object.
    """
    file = folder / MERGED
    if config.model.vision is None or not file.is_file():
        return []
    try:
        said = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); restore it, or remove it") from error
    if not isinstance(said, dict):
        raise UserError(f"{file}: not a JSON object; restore it, or remove it")
    wanted = preprocessor_config(config)
    keys = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "rescale_factor")
    others = [key for key in keys if key in said and said[key] != wanted[key]]
    return [f"{file}: {key} is {json.dumps(said[key])[:60]}, and {wanted[key]} counts" for key in others]


def model_card(
    config: Config,
    source: str,
    step: int,
    base: str = "",
    license_lines: Sequence[str] = (),
    missing: Sequence[str] = (),
) -> str:
    """README.md with where the weights come from and how they are loaded.

    Args:
      config, source, step: as in `write_companions`.
      base: what the first parameters came from; of a path, the last part is told.
      license_lines: of the front matter.
      missing: files of code that config.json names and the folder lacks.
    """
    model = config.model
    task = "text-generation" if model.vision is None else "image-text-to-text"
    rows = {
        "Exported from": f"checkpoint {_name(source)} after {step:,} training steps",
        "First parameters": _name(base or config.init_from) or "fresh",
        "Trained on": ", ".join(f"{s.name} (weight {s.weight:g})" for s in config.data.sources) or "not trained here",
        "Converter": f"navil_jax {_version()}",
        "Decoder": f"{model.decoder.family}, {model.decoder.depth} layers of width {model.decoder.width}, "
        f"vocabulary {model.decoder.vocab_size}",
    }
    if model.vision is not None:
        images = config.images
        scales = f"each scale {images.scale_factor:g} of the next" if images.multiscale else _ONE_SCALE
        rows |= {
            "Vision encoder": f"{model.vision.depth} layers of width {model.vision.width}",
            "Images": f"{images.min_patches:,} to {images.max_patches:,} patches, {scales}",
            "Prompt": f"template {config.data.template}, system message {json.dumps(config.data.system_message)}",
        }
    title = _name(source) or "model"
    table = "\n".join(f"| {key} | {value.replace('|', '&#124;')} |" for key, value in rows.items())
    front = "\n".join(("library_name: transformers", f"pipeline_tag: {task}", *license_lines))
    head = f"---\n{front}\n---\n\n# {title}\n\n"
    return f"{head}| | |\n| --- | --- |\n{table}\n{_use(model.vision is not None, missing)}"


def _use(navil: bool, missing: Sequence[str]) -> str:
    """How the folder is loaded."""
    add = f"Copy {', '.join(missing)} of the release into this folder" if missing else ""
    if not navil:
        return f"\n{add}; `AutoModelForCausalLM` then loads it with `trust_remote_code=True`.\n" if add else ""
    code = f"{add}, with the `*.py` beside them (`navil/model/` of [NaViL]({_RELEASE})). " if add else ""
    return f"\n{code}{_USE}"


_ONE_SCALE = "one scale (scale_downsample_ratio 0 in config.json, for which the released code makes one, too)"
_RELEASE = "https://github.com/OpenGVLab/NaViL"
_USE = f"""The package `navil` of [NaViL]({_RELEASE}) must be on the Python path, with transformers 4.51.0.
In this folder:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True, use_fast=False)
model = AutoModel.from_pretrained(".", trust_remote_code=True, torch_dtype=torch.bfloat16).eval()
model.init_special_token_ids(tokenizer)
```

`demo.py` of the release asks it about images.
"""


def _name(path: str) -> str:
    """What may be told of a path: its last part."""
    return Path(path).name


def _version() -> str:
    try:
        return importlib.metadata.version("navil-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed, run from its sources)"


def _encoded(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _parsed(tokenizer: Mapping[str, bytes], file: str) -> dict[str, Any]:
    return json.loads(tokenizer.get(file, b"{}"))


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _tokens_map(tokenizer: Mapping[str, bytes]) -> dict[str, Any]:
    """The special_tokens_map.json that tokenizer_config.json implies."""
    config = _parsed(tokenizer, TOKENIZER_CONFIG)
    table: dict[str, Any] = {key: _text(config[key]) for key in CORE_TOKENS if config.get(key) is not None}
    if config.get("additional_special_tokens"):
        table["additional_special_tokens"] = [_text(token) for token in config["additional_special_tokens"]]
    return table


def _added_tokens(tokenizer: Mapping[str, bytes]) -> dict[str, int]:
    """Token -> id of all tokens beside the pieces, in the order of the ids."""
    listed = _parsed(tokenizer, TOKENIZER_CONFIG).get("added_tokens_decoder", {})
    table = {token["content"]: int(i) for i, token in listed.items()}
    table |= {token["content"]: token["id"] for token in _parsed(tokenizer, "tokenizer.json").get("added_tokens", [])}
    table |= _parsed(tokenizer, ADDED_TOKENS)
    return dict(sorted(table.items(), key=lambda entry: entry[1]))
