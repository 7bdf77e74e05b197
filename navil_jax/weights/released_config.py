"""The config.json of a released NaViL, InternLM2 or Qwen3 checkpoint -> ModelConfig and ImageConfig."""

import json
from pathlib import Path
from typing import Any

from navil_jax.config import DecoderConfig, ImageConfig, ModelConfig, VisionConfig
from navil_jax.errors import UserError

FAMILIES = {"internlm2": "internlm2", "qwen3": "qwen3"}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
      UserError: it is missing or no JSON.
    """
    file = folder / "config.json"
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file}: not found; give the folder of a checkpoint") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {error.lineno}: not valid JSON ({error.msg})") from error


def model_config(released: dict[str, Any], special_token_ids: tuple[int, ...] = (), **settings: Any) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      released: the parsed file; a NaViL config has vision_config and llm_config, a language model is flat.
      special_token_ids: from the checkpoint's tokenizer, in the order of SPECIAL_TOKENS; empty without vision.
      settings: further fields of ModelConfig (dtypes, remat, attention).

    Raises:
      UserError: an architecture or setting that cannot be computed.
    """
    if "llm_config" not in released:
        return ModelConfig(vision=None, decoder=_decoder(released, experts=False), special_token_ids=(), **settings)
    return ModelConfig(
        vision=_vision(released["vision_config"]),
        decoder=_decoder(released["llm_config"], experts=True),
        special_token_ids=special_token_ids,
        **settings,
    )


def image_config(released: dict[str, Any]) -> ImageConfig:
    """How the checkpoint prepares pictures."""
    return ImageConfig(
        min_patches=released["min_dynamic_patch"],
        max_patches=released["max_dynamic_patch"],
        scale_factor=released["scale_downsample_ratio"],
    )


def _decoder(released: dict[str, Any], experts: bool) -> DecoderConfig:
    family = FAMILIES.get(released.get("model_type", ""))
    if family is None:
        raise UserError(f"model_type {released.get('model_type')!r} is not one of {sorted(FAMILIES)}")
    scaling = released.get("rope_scaling") or {"type": "none", "factor": 1.0}
    if scaling.get("type") not in ("none", "linear", "dynamic"):
        raise UserError(f"rope_scaling {scaling} is not supported; use linear, dynamic or null")
    heads = released["num_attention_heads"]
    return DecoderConfig(
        family=family,
        depth=released["num_hidden_layers"],
        width=released["hidden_size"],
        mlp_dim=released["intermediate_size"],
        num_heads=heads,
        num_kv_heads=released["num_key_value_heads"],
        head_dim=released.get("head_dim") or released["hidden_size"] // heads,
        vocab_size=released["vocab_size"],
        norm_eps=released["rms_norm_eps"],
        rope_theta=float(released["rope_theta"]),
        rope_scaling=scaling["type"],
        rope_factor=float(scaling["factor"]),
        max_positions=released["max_position_embeddings"],
        attention_bias=released.get("bias", released.get("attention_bias", False)),
        qk_norm=family == "qwen3",
        attention_experts=experts,
        ffn_experts=experts,
        serial_visual_output=family == "internlm2",
        tie_embeddings=released.get("tie_word_embeddings", False),
        pad_token_id=released.get("pad_token_id"),
    )


def _vision(released: dict[str, Any]) -> VisionConfig:
    if released.get("qk_normalization"):
        raise UserError("vision_config.qk_normalization is true, which the released code cannot run either")
    full = released.get("fullatt_block_indexes")
    return VisionConfig(
        depth=released["num_hidden_layers"],
        width=released["hidden_size"],
        mlp_dim=released["intermediate_size"],
        num_heads=released["num_attention_heads"],
        patch_size=released["patch_size"],
        merge_size=round(1 / released["downsample_ratio"]),
        norm=released["norm_type"],
        norm_eps=released["layer_norm_eps"],
        qkv_bias=released["qkv_bias"],
        full_attention_layers=None if full is None else tuple(full),
        window_size=released["window_size"],
        layer_scale_init=released.get("initializer_factor", 0.1),
    )
