"""Recipe files for a plan: one per stage (`config.stages`), each starting from the one before."""

from pathlib import Path

from navil_jax.config import DecoderConfig
from navil_jax.config.stages import ROW_SLOTS
from navil_jax.errors import UserError
from navil_jax.study.known_llms import KnownLlm
from navil_jax.study.planner import Advice, Shape, Stage

_FILL = 0.92  # of a row's slots that hold tokens

_TEMPLATE = '''"""{title}

Made by `python -m navil_jax.study plan`. Write the meta file of the data, data/{name}_{key}.json (docs/data.md), and
before the first stage
  python -m navil_jax.convert init FOLDER_OF_{llm} runs/{name}_init --config {first}
"""

from navil_jax.config import Config, DataConfig, DecoderConfig, ModelConfig, VisionConfig
from navil_jax.config.stages import {stage}, Length


def get_config() -> Config:
    model = ModelConfig(
        vision=VisionConfig(depth={depth}, width={width}, mlp_dim={mlp_dim}, num_heads={heads}),
        decoder=DecoderConfig(
{decoder}
        ),
        special_token_ids=tuple(range({first_id}, {end_id})),
    )
    length = Length(
        steps={steps},
        batch_samples={batch_samples},
        rows={rows},
        multiscale={multiscale},
        visual_slots={visual_slots},
    )
    return {stage}.config(Config(model=model, data=DataConfig(template="{template}")), "{name}", length)
'''


def write_recipes(path: Path, advice: Advice, llm: KnownLlm) -> list[Path]:
    """Writes `NAME.py` for the first stage, and `NAME_s1_2.py` and `NAME_s2.py` beside it.

    Raises:
      UserError: the path is no Python file, or one of the files exists.
    """
    if path.suffix != ".py":
        raise UserError(f"--out: {path}: a recipe is a Python file, give a name that ends in .py")
    first, *others = advice.stages
    files = {path: first, **{path.with_name(f"{path.stem}_{stage.recipe.key}.py"): stage for stage in others}}
    if existing := [file for file in files if file.exists()]:
        raise UserError(f"--out: {existing[0]} exists; give another name or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, stage in files.items():
        file.write_text(_text(path, advice.encoder, stage, llm))
    return list(files)


def _text(first: Path, encoder: Shape, stage: Stage, llm: KnownLlm) -> str:
    visual_slots = _visual_slots(stage)
    return _TEMPLATE.format(
        title=f"{llm.name} with an encoder of {encoder.depth} x {encoder.width}, stage {stage.recipe.name}.",
        llm=llm.name.upper().replace("-", "_").replace(".", "_"),
        name=first.stem,
        first=first,
        key=stage.recipe.key,
        stage=stage.recipe.key.upper(),
        steps=stage.steps,
        batch_samples=stage.batch_samples,
        depth=encoder.depth,
        width=encoder.width,
        mlp_dim=encoder.mlp_dim,
        heads=encoder.heads,
        decoder=_decoder(llm.decoder),
        first_id=llm.special_token_ids[0],
        end_id=llm.special_token_ids[-1] + 1,
        multiscale=stage.multiscale,
        rows=_rows(stage, visual_slots),
        visual_slots=visual_slots,
        template=llm.template,
    )


def _visual_slots(stage: Stage) -> int:
    """Visual slots of a row: the share of visual tokens, in 512s, and room for the largest image."""
    share = stage.visual_tokens / (stage.visual_tokens + stage.text_tokens)
    room = stage.recipe.max_patches // 2 + 256  # scales together are less than twice the largest, four patches a token
    return max(min(round(ROW_SLOTS * share / 512) * 512, ROW_SLOTS - 2048), -(-room // 512) * 512)


def _rows(stage: Stage, visual_slots: int) -> int:
    """Rows that hold a batch's samples at `_FILL`, in 64s."""
    per_row = min(
        _FILL * visual_slots / stage.visual_tokens, _FILL * (ROW_SLOTS - visual_slots) / max(stage.text_tokens, 1)
    )
    return max(64, round(stage.batch_samples / per_row / 64) * 64)


def _decoder(decoder: DecoderConfig) -> str:
    """The fields that differ from the defaults, a line each."""
    default = DecoderConfig()
    fields = {name: value for name, value in vars(decoder).items() if value != getattr(default, name)}
    return "\n".join(f"            {name}={value!r}," for name, value in fields.items()).replace("'", '"')
