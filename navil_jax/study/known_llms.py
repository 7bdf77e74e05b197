"""Language models that a NaViL can start from, as `DecoderConfig`s."""

import dataclasses

import numpy as np

from navil_jax.config import DecoderConfig
from navil_jax.errors import UserError

QWEN3_SPECIAL_IDS = tuple(range(151_669, 151_681))
INTERNLM2_SPECIAL_IDS = tuple(range(92_544, 92_556))
NEAR = 1.35  # a known model within this factor of a given size stands for it


@dataclasses.dataclass(frozen=True)
class KnownLlm:
    """A released language model."""

    name: str
    parameters: float
    decoder: DecoderConfig
    special_token_ids: tuple[int, ...]
    template: str


def _internlm2(name: str, parameters: float, depth: int, width: int, mlp: int, heads: int) -> KnownLlm:
    decoder = DecoderConfig(
        depth=depth,
        width=width,
        mlp_dim=mlp,
        num_heads=heads,
        rope_scaling="dynamic",
        rope_factor=2.0,
        pad_token_id=2,
    )
    return KnownLlm(name, parameters, decoder, INTERNLM2_SPECIAL_IDS, "internlm2-chat")


def _qwen3(name: str, parameters: float, depth: int, width: int, mlp: int, heads: int, tied: bool) -> KnownLlm:
    decoder = DecoderConfig(
        family="qwen3",
        depth=depth,
        width=width,
        mlp_dim=mlp,
        num_heads=heads,
        vocab_size=151_936,
        norm_eps=1e-6,
        max_positions=40_960,
        qk_norm=True,
        serial_visual_output=False,
        tie_embeddings=tied,
    )
    return KnownLlm(name, parameters, decoder, QWEN3_SPECIAL_IDS, "qwen3-chat")


KNOWN = (
    _qwen3("qwen3-0.6b", 0.6e9, 28, 1024, 3072, 16, tied=True),
    _qwen3("qwen3-1.7b", 1.7e9, 28, 2048, 6144, 16, tied=True),
    _internlm2("internlm2-1.8b", 1.8e9, 24, 2048, 8192, 16),
    _qwen3("qwen3-4b", 4.0e9, 36, 2560, 9728, 32, tied=True),
    _internlm2("internlm2-7b", 7.0e9, 32, 4096, 14_336, 32),
    _qwen3("qwen3-8b", 8.0e9, 36, 4096, 12_288, 32, tied=False),
    _qwen3("qwen3-14b", 14.0e9, 40, 5120, 17_408, 40, tied=False),
    _internlm2("internlm2-20b", 20.0e9, 48, 6144, 16_384, 48),
)


def nearest_llm(parameters: float) -> KnownLlm:
    """The known model nearest in size. Raises `UserError` if none is within a factor of `NEAR`."""
    best = min(KNOWN, key=lambda llm: abs(np.log(llm.parameters / parameters)))
    if not 1 / NEAR < best.parameters / parameters < NEAR:
        names = ", ".join(llm.name for llm in KNOWN)
        raise UserError(f"--out: no language model of about this size is known ({names}); give the size of one of them")
    return best
