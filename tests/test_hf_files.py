"""The files of an exported folder beside the weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from byte_level_files import LAYOUTS, grown

from navil_jax.config import SPECIAL_TOKENS, Config, DataConfig, ImageConfig, SourceConfig
from navil_jax.config.flags import load_config
from navil_jax.convert.hf_config import image_config, model_config, prompt_config, read_config, to_hf_config
from navil_jax.convert.hf_files import model_card, preprocessor_config, write_companions
from navil_jax.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_files
from navil_jax.data.tokenizers.base import with_special_tokens

FOLDER = Path(__file__).parent / "golden"
RELEASED = load_tokenizer(FOLDER / "prompts" / "tokenizer")


def write(folder: Path, name: str, tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    """Exports a golden case's companions; returns the JSON files' contents."""
    original = read_config(FOLDER / name)
    data = DataConfig(sources=(SourceConfig("easy_vqa", 2.0),), **prompt_config(original))
    special = tokenizer.special_token_ids if "llm_config" in original else ()
    model = model_config(original, special)
    config = dataclasses.replace(Config(model=model, images=image_config(original), data=data), **changes)
    hf = to_hf_config(config, original)
    names = write_companions(
        folder, hf, config, tokenizer.files(), "/secret/runs/cats", 1200, {"name": "/secret/base-2b"}
    )
    assert names == sorted(path.name for path in folder.iterdir())
    assert not any(b"/secret" in path.read_bytes() for path in folder.iterdir())
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_a_released_model_s_folder(tmp_path: Path) -> None:
    files = write(tmp_path, "internlm2_small", RELEASED)
    assert files["config.json"] == read_config(FOLDER / "internlm2_small") == read_config(tmp_path)
    assert load_tokenizer(tmp_path).files() == RELEASED.files()
    assert files["generation_config.json"] == {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": RELEASED.token_id("<|im_end|>"),
        "pad_token_id": 2,
    }
    images = files["preprocessor_config.json"]
    assert (images["min_pixels"], images["max_pixels"]) == (24 * 256, 96 * 256)
    assert (images["patch_size"], images["merge_size"], images["temporal_patch_size"]) == (16, 2, 1)


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json"])
def test_files_that_a_byte_level_tokenizer_lacks_follow_from_its_others(tmp_path: Path, layout: str) -> None:
    plain = tokenizer_from_files(LAYOUTS[layout])
    files = write(tmp_path, "text_only_qwen3", plain)
    added = files["added_tokens.json"]
    assert added == {token: plain.token_id(token) for token in added}
    assert "<|im_end|>" in added
    assert files["special_tokens_map.json"] == {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    ids = {"eos_token_id": plain.token_id("<|im_end|>"), "pad_token_id": plain.token_id("<|endoftext|>")}
    assert files["generation_config.json"] == {"_from_model_config": True, **ids}
    again = load_tokenizer(tmp_path)
    assert (again.encode("<think>a", True), again.vocab_size) == (plain.encode("<think>a", True), plain.vocab_size)


def test_a_grown_tokenizer_s_folder(tmp_path: Path) -> None:
    files = write(tmp_path, "qwen3_small", grown())
    ids = dict(zip(SPECIAL_TOKENS, grown().special_token_ids, strict=True))
    assert ids.items() <= files["added_tokens.json"].items()
    assert set(SPECIAL_TOKENS) <= set(files["special_tokens_map.json"]["additional_special_tokens"])
    again = load_tokenizer(tmp_path)
    assert again.special_token_ids == grown().special_token_ids
    assert with_special_tokens(again) is again


def test_a_language_model_has_no_preprocessing(tmp_path: Path) -> None:
    assert "preprocessor_config.json" not in write(tmp_path, "text_only_internlm2", RELEASED)
    assert "text-generation" in (tmp_path / "README.md").read_text()


def test_sizes_of_images_are_those_of_the_paper() -> None:
    config = load_config(Path(__file__).parents[1] / "configs" / "navil_2b.py")
    images = preprocessor_config(dataclasses.replace(config, images=ImageConfig()))
    assert (images["min_pixels"], images["max_pixels"]) == (65536, 6291456)


def test_the_model_card_tells_where_the_weights_come_from(tmp_path: Path) -> None:
    write(tmp_path, "internlm2_small", RELEASED)
    card = (tmp_path / "README.md").read_text()
    for said in ("checkpoint cats after 1,200 training steps", "base-2b", "easy_vqa (weight 2)", "navil_jax"):
        assert said in card
    assert "24 to 96 patches, each scale 0.7071 of the next" in card
    assert "| First parameters | fresh |" in model_card(Config(), "x", 0)
    assert "not trained here" in model_card(Config(), "x", 0)
    assert "| older |" in model_card(Config(init_from="/a/b/older/"), "x", 0)
    assert "one scale" in model_card(Config(images=ImageConfig(multiscale=False)), "x", 0)
    assert "a &#124; b" in model_card(Config(data=DataConfig(system_message="a | b")), "x", 0)
