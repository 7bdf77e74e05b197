"""A plan in words."""

from navil_jax.console import table
from navil_jax.study.planner import Advice, Stage, effective_samples, repeating
from navil_jax.study.results import size

STAGE_COLUMNS = ("stage", "samples", "steps x batch", "max patches", "image tokens", "all tokens", "epochs")


def describe(advice: Advice) -> str:
    """What `study plan` prints."""
    encoder, optimum = advice.encoder, advice.optimum
    lines = [
        f"LLM {size(advice.llm)}: encoder of {size(optimum.value)} parameters "
        f"({size(optimum.low)} to {size(optimum.high)}), from {advice.line.note} ({advice.line.of})",
        f"  depth {encoder.depth}, width {encoder.width}, {encoder.heads} heads of 64, MLP {encoder.mlp_dim}: "
        f"12 x depth x width^2 = {size(encoder.parameters)}",
    ]
    if advice.extrapolates:
        lines.append(f"  EXTRAPOLATED: the LLM is {advice.extrapolates}; measure two encoders before a large run")
    lines.append(f"\nstages, {size(advice.samples)} samples shared out as in the paper:")
    lines.append(table(STAGE_COLUMNS, [_stage(stage) for stage in advice.stages], indent=2))
    total = sum(stage.tokens for stage in advice.stages)
    each = total / sum(stage.samples for stage in advice.stages)
    lines.append(f"  together {size(total)} tokens, {each:,.0f} per sample (paper: 1,078 in the 2B, 756 in the 9B)")
    lines += _data(advice)
    if advice.loss is None:
        lines.append(f"\nexpected loss: not known, {'; '.join(advice.loss_notes)}")
    else:
        lines.append(f"\nexpected loss {advice.loss}")
        lines += [f"  {note}" for note in advice.loss_notes]
    return "\n".join(lines)


def _stage(stage: Stage) -> tuple[str, ...]:
    """A row of the table."""
    return (
        stage.recipe.name,
        size(stage.samples),
        f"{stage.steps:,} x {stage.batch_samples:,}",
        f"{stage.recipe.max_patches:,}",
        size(stage.image_tokens),
        size(stage.tokens),
        "-" if stage.epochs is None else f"{stage.epochs:.2g}",
    )


def _data(advice: Advice) -> list[str]:
    if advice.have is None:
        return ["  epochs: say with --have how many different samples there are"]
    lines = [f"\n{size(advice.have)} different samples at hand, if a stage may use them all:"]
    epochs = [(stage.recipe.name, stage.epochs) for stage in advice.stages if stage.epochs is not None]
    lines += [f"  {name}: {each:.2g} epochs; {repeating(each)}" for name, each in epochs]
    worth = effective_samples(advice.samples, advice.have)
    if worth < 0.99 * advice.samples:
        lines.append(f"  together they are worth {size(worth)} new samples (decay measured on text, not on images)")
    return lines
