"""Stages of the paper's recipe: what each trains, on which images and rows, and at which learning rates.

    init -> S1.1 (visual weights) -> S1.2 (and the text's attention) -> S2 (all)

Paper, section 4 and the table of training settings. A stage's length is counted in samples: `steps * batch_samples`.
How many optimizer steps that takes depends on how many samples share the packed rows of a step; `rows` is chosen so
that it is about `steps`.
"""

import dataclasses
from typing import Literal

from navil_jax.config import Config, ImageConfig, OptimizerConfig, SourceConfig

ROW_SLOTS = 16_384  # visual and text slots of a row


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a stage is for one model, and the rows that hold its samples."""

    steps: int  # of batch_samples
    batch_samples: int
    rows: int  # of an optimizer step, about as many as hold batch_samples
    multiscale: bool = True
    visual_slots: int | None = None  # of a row; none: the stage's

    @property
    def samples(self) -> int:
        return self.steps * self.batch_samples


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the paper, for any model."""

    name: str
    trainable: tuple[str, ...]
    max_patches: int  # of an image
    weight_decay: float
    visual_slots: int  # of a row
    balance_window: int  # with large images some rows cost much more attention, and devices wait for the slowest
    peak_learning_rate: float = 5e-5
    schedule: Literal["constant", "cosine"] = "constant"

    @property
    def key(self) -> str:
        """The name as files and folders have it: s1_1."""
        return self.name.lower().replace(".", "_")

    def config(self, base: Config, model: str, length: Length) -> Config:
        """The stage's recipe.

        Args:
          base: the model and its prompt template.
          model: in the names of folders, and of the meta file of the stage's data (docs/data.md).

        Example: S1_2.config(base, "my", length) -> from runs/my_s1_1 to runs/my_s1_2, on data/my_s1_2.json
        """
        before = ("init", *(stage.key for stage in STAGES))[STAGES.index(self)]
        visual_slots = length.visual_slots or self.visual_slots
        data = dataclasses.replace(
            base.data,
            sources=(SourceConfig(self.key, kind="meta", path=f"data/{model}_{self.key}.json"),),
            rows=length.rows,
            visual_slots=visual_slots,
            text_slots=ROW_SLOTS - visual_slots,
            patch_slots=base.model.encoder.unit_patches * visual_slots,
            balance_window=self.balance_window,
        )
        optimizer = OptimizerConfig(
            peak_learning_rate=self.peak_learning_rate,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            trainable=self.trainable,
        )
        return dataclasses.replace(
            base,
            workdir=f"runs/{model}_{self.key}",
            init_from=f"runs/{model}_{before}",
            steps=length.steps,
            batch_samples=length.batch_samples,
            images=ImageConfig(max_patches=self.max_patches, multiscale=length.multiscale),
            data=data,
            optimizer=optimizer,
        )


VISUAL = ("vision/**", "connector/**", "decoder/layers/**/visual/**", "decoder/special_embed/**")
TEXT_ATTENTION = ("decoder/layers/qkv/text/**", "decoder/layers/out/text/**")

# Of images with captions nearly all tokens are visual; instructions have longer texts, and the largest image of the
# paper with all its scales (24,576 patches, 48,768 with the smaller copies) takes 12,193 visual slots.
S1_1 = Stage("S1.1", VISUAL, max_patches=4_096, weight_decay=0.05, visual_slots=14_336, balance_window=1)
S1_2 = Stage(
    "S1.2", VISUAL + TEXT_ATTENTION, max_patches=12_288, weight_decay=0.1, visual_slots=14_336, balance_window=32
)
S2 = Stage(
    "S2",
    ("**",),
    max_patches=24_576,
    weight_decay=0.01,
    visual_slots=12_288,
    balance_window=32,
    peak_learning_rate=2e-5,
    schedule="cosine",
)
STAGES = (S1_1, S1_2, S2)

# The lengths of the paper's models.
NAVIL_2B = {
    S1_1: Length(70_000, 7_000, rows=384),
    S1_2: Length(40_000, 4_614, rows=384),
    S2: Length(30_000, 2_234, rows=256),
}
NAVIL_9B = {
    S1_1: Length(50_000, 10_300, rows=512, multiscale=False),
    S1_2: Length(33_000, 1_792, rows=128),
    S2: Length(6_000, 3_520, rows=256),
}
