"""A tiny model with random weights that answers, for tests."""

import functools

from golden_cases import FOLDER

from navil_jax.config import Config, DataConfig, DecoderConfig, ImageConfig, ModelConfig, VisionConfig
from navil_jax.data.tokenizers import load_tokenizer
from navil_jax.generate.assistant import Assistant
from navil_jax.generate.engine import Engine
from navil_jax.model import params as model_params

TOKENIZER = load_tokenizer(FOLDER / "prompts" / "tokenizer")
MODEL = ModelConfig(
    vision=VisionConfig(depth=1, width=16, mlp_dim=32, num_heads=2),
    decoder=DecoderConfig(
        depth=2, width=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=600, rope_theta=1e4
    ),
    special_token_ids=TOKENIZER.special_token_ids,
)
CONFIG = Config(model=MODEL, images=ImageConfig(min_patches=4, max_patches=4096), data=DataConfig(system_message="Hi."))


@functools.cache
def random_params() -> model_params.Params:
    return model_params.initialise(MODEL, seed=1)


@functools.cache
def assistant() -> Assistant:
    return Assistant(CONFIG, TOKENIZER, Engine(MODEL, random_params()))
