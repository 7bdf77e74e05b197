"""The three stages of the paper for any of its models (paper, section 4 and the table of training settings).

    init -> S1.1 (visual weights) -> S1.2 (and the text's attention) -> S2 (all)

A stage's length is counted in samples: `steps * batch_samples`. How many optimizer steps that takes depends on how
many samples share the packed rows of a step; `data.rows` is chosen so that it is about `steps`.
"""

import dataclasses

from navil_jax.config import Config, ImageConfig, OptimizerConfig, RuleConfig, SourceConfig

# What a stage trains: regular expressions of parameter names.
S1_1 = r"vision/.*|connector/.*|decoder/layers/.*/visual/.*|decoder/special_embed/.*"
S1_2 = rf"{S1_1}|decoder/layers/(qkv|out)/text/.*"
S2 = r".*"

# 16,384 slots. Of images with captions nearly all are visual; instructions have longer texts, and the largest image
# of the paper with all its scales (24,576 patches, 48,768 with the smaller copies) takes 12,193 visual ones.
# With large images some rows cost much more attention than others, and the devices of a step wait for the slowest.
BALANCE_WINDOW = 8
CAPTION_ROW = {"visual_slots": 14_336, "text_slots": 2_048, "patch_slots": 57_344}
INSTRUCTION_ROW = {"visual_slots": 12_288, "text_slots": 4_096, "patch_slots": 49_152}


def s1_1(base: Config, model: str, steps: int, batch_samples: int, rows: int, multiscale: bool = True) -> Config:
    """Web and synthetic captions: the visual weights learn beside a frozen language model."""
    settings = _settings(base, model, "init", "s1_1", steps, batch_samples, rows, CAPTION_ROW)
    return dataclasses.replace(
        settings,
        images=ImageConfig(max_patches=4_096, multiscale=multiscale),
        optimizer=OptimizerConfig(weight_decay=0.05, rules=rules(S1_1)),
    )


def s1_2(base: Config, model: str, steps: int, batch_samples: int, rows: int) -> Config:
    """Better captions: the text's attention projections join."""
    return dataclasses.replace(
        _settings(base, model, "s1_1", "s1_2", steps, batch_samples, rows, CAPTION_ROW, BALANCE_WINDOW),
        images=ImageConfig(max_patches=12_288),
        optimizer=OptimizerConfig(weight_decay=0.1, rules=rules(S1_2)),
    )


def s2(base: Config, model: str, steps: int, batch_samples: int, rows: int) -> Config:
    """Instructions: everything is trained."""
    optimizer = OptimizerConfig(peak_learning_rate=2e-5, schedule="cosine", weight_decay=0.01, rules=rules(S2))
    settings = _settings(base, model, "s1_2", "s2", steps, batch_samples, rows, INSTRUCTION_ROW, BALANCE_WINDOW)
    return dataclasses.replace(settings, images=ImageConfig(max_patches=24_576), optimizer=optimizer)


def rules(trained: str) -> tuple[RuleConfig, ...]:
    """Those that train the parameters whose names match `trained`; norms, biases and layer scales do not decay."""
    undecayed = ("bias", "scale", "ls1", "ls2")
    others = "".join(rf"(?<!/{ending})" for ending in undecayed)
    return (
        RuleConfig(rf"(?=({trained})$).*/({'|'.join(undecayed)})", weight_decay=False),
        RuleConfig(rf"(?=({trained})$).*{others}"),
        RuleConfig(rf"(?!({trained})$).*", trainable=False),
    )


def _settings(
    base: Config,
    model: str,
    before: str,
    stage: str,
    steps: int,
    batch_samples: int,
    rows: int,
    row: dict[str, int],
    balance_window: int = 1,
) -> Config:
    """Where the stage begins and is kept, the meta file of its data (docs/data.md), its length and its rows."""
    source = SourceConfig(stage, kind="meta", path=f"data/{model}_{stage}.json")
    return dataclasses.replace(
        base,
        workdir=f"runs/{model}_{stage}",
        init_from=f"runs/{model}_{before}",
        steps=steps,
        batch_samples=batch_samples,
        data=dataclasses.replace(base.data, sources=(source,), rows=rows, balance_window=balance_window, **row),
    )
