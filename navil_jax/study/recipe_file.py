"""Recipe files for a plan: one per stage, each starting from the one before."""

from pathlib import Path

from navil_jax.config import DecoderConfig
from navil_jax.errors import UserError
from navil_jax.study.known_llms import KnownLlm
from navil_jax.study.planner import Advice, Shape, Stage

# Parameters that each stage trains, besides the norms and biases among them (docs/recipe.md).
_VISUAL = r"vision/.*|connector/.*|decoder/layers/.*/visual/.*|decoder/special_embed/.*"
_TRAINED = {"S1.1": _VISUAL, "S1.2": rf"{_VISUAL}|decoder/layers/(qkv|out)/text/.*", "S2": ".*"}
_WEIGHT_DECAY = {"S1.1": 0.05, "S1.2": 0.1, "S2": 0.01}
_SLOTS = 16_384  # of a row
_PATCH_SLOTS = 49_152  # the largest image of the paper with all its scales
_FILL = 0.92  # of a row's slots that hold tokens

_TEMPLATE = '''"""{title}

Made by `python -m navil_jax.study plan`. Fill in: `data.sources` (docs/data.md), and before the first stage
  python -m navil_jax.convert init FOLDER_OF_{llm} runs/{name}_init --config {first}
"""

from navil_jax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    ImageConfig,
    ModelConfig,
    OptimizerConfig,
    RuleConfig,
    SourceConfig,
    VisionConfig,
)

TRAINED = r"{trained}"
UNDECAYED = r".*/(bias|scale|ls1|ls2)"


def get_config() -> Config:
    return Config(
        workdir="runs/{name}_{stage}",
        init_from="runs/{name}_{before}",
        steps={steps},
        batch_samples={batch_samples},
        model=ModelConfig(
            vision=VisionConfig(depth={depth}, width={width}, mlp_dim={mlp_dim}, num_heads={heads}),
            decoder=DecoderConfig(
{decoder}
            ),
            special_token_ids=tuple(range({first_id}, {end_id})),
        ),
        images=ImageConfig(max_patches={max_patches}, multiscale={multiscale}),
        data=DataConfig(
            sources=(SourceConfig("{stage}", kind="meta", path="data/{name}_{stage}.json"),),
            rows={rows},
            visual_slots={visual_slots},
            text_slots={text_slots},
            patch_slots={patch_slots},
            template="{template}",
        ),
        optimizer=OptimizerConfig(
            peak_learning_rate={rate},
            schedule="{schedule}",
            weight_decay={weight_decay},
            rules=(
                RuleConfig(rf"(?=({{TRAINED}})$){{UNDECAYED}}", weight_decay=False),
                RuleConfig(rf"(?=({{TRAINED}})$)(?!{{UNDECAYED}}$).*"),
                RuleConfig(rf"(?!({{TRAINED}})$).*", trainable=False),
            ),
        ),
    )
'''


def write_recipes(path: Path, advice: Advice, llm: KnownLlm) -> list[Path]:
    """Writes `NAME.py` for the first stage, and `NAME_s1_2.py` and `NAME_s2.py` beside it.

    Raises:
      UserError: the path is no Python file, or one of the files exists.
    """
    if path.suffix != ".py":
        raise UserError(f"--out: {path}: a recipe is a Python file, give a name that ends in .py")
    keys = [stage.recipe.name.lower().replace(".", "_") for stage in advice.stages]
    paths = [path, *(path.with_name(f"{path.stem}_{key}.py") for key in keys[1:])]
    if existing := [file for file in paths if file.exists()]:
        raise UserError(f"--out: {existing[0]} exists; give another name or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, stage, key, before in zip(paths, advice.stages, keys, ["init", *keys], strict=False):
        file.write_text(_text(path, advice.encoder, stage, key, before, llm))
    return paths


def _text(first: Path, encoder: Shape, stage: Stage, key: str, before: str, llm: KnownLlm) -> str:
    recipe, last = stage.recipe, stage.recipe.name == "S2"
    visual_slots = _visual_slots(stage)
    return _TEMPLATE.format(
        title=f"{llm.name} with an encoder of {encoder.depth} x {encoder.width}, stage {recipe.name}.",
        llm=llm.name.upper().replace("-", "_").replace(".", "_"),
        name=first.stem,
        first=first,
        stage=key,
        before=before,
        steps=stage.steps,
        batch_samples=recipe.batch_samples,
        depth=encoder.depth,
        width=encoder.width,
        mlp_dim=encoder.mlp_dim,
        heads=encoder.heads,
        decoder=_decoder(llm.decoder),
        first_id=llm.special_token_ids[0],
        end_id=llm.special_token_ids[-1] + 1,
        max_patches=recipe.max_patches,
        multiscale=recipe.multiscale,
        rows=_rows(stage, visual_slots),
        visual_slots=visual_slots,
        text_slots=_SLOTS - visual_slots,
        patch_slots=_PATCH_SLOTS,
        template=llm.template,
        trained=_TRAINED[recipe.name],
        rate="2e-5" if last else "5e-5",
        schedule="cosine" if last else "constant",
        weight_decay=_WEIGHT_DECAY[recipe.name],
    )


def _visual_slots(stage: Stage) -> int:
    """Visual slots of a row: the share of visual tokens, in 512s, and room for the largest image."""
    share = stage.visual_tokens / (stage.visual_tokens + stage.text_tokens)
    room = stage.recipe.max_patches // 2 + 256  # scales together are less than twice the largest, four patches a token
    return max(min(round(_SLOTS * share / 512) * 512, _SLOTS - 2048), -(-room // 512) * 512)


def _rows(stage: Stage, visual_slots: int) -> int:
    """Rows that hold a batch's samples at `_FILL`, in 64s."""
    per_row = min(
        _FILL * visual_slots / stage.visual_tokens, _FILL * (_SLOTS - visual_slots) / max(stage.text_tokens, 1)
    )
    return max(64, round(stage.recipe.batch_samples / per_row / 64) * 64)


def _decoder(decoder: DecoderConfig) -> str:
    """The fields that differ from the defaults, a line each."""
    default = DecoderConfig()
    fields = {name: value for name, value in vars(decoder).items() if value != getattr(default, name)}
    return "\n".join(f"                {name}={value!r}," for name, value in fields.items()).replace("'", '"')
