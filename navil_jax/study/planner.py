"""Advice from laws: which encoder for which LLM, how much data per stage, what loss to expect."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from navil_jax.config import Config, ImageConfig, stages
from navil_jax.data.prompt import image_tokens
from navil_jax.errors import UserError
from navil_jax.study import laws
from navil_jax.study.analysis import Analysis
from navil_jax.study.fitted import TAIL, Fitted, by_llm, treatments
from navil_jax.study.laws import EncoderLine, TooFew, Value
from navil_jax.study.results import Curve

HEAD_DIM = 64
ASPECT = 60  # width / depth of the paper's encoders: 24 x 1472, 32 x 1792
LARGEST_DEPTH = 96
# Repeated data lose their worth by exp(-repetitions / 15.4) (Muennighoff et al. 2023, on text); 4 epochs cost little.
REPEAT_DECAY = 15.4
CHEAP_EPOCHS = 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """A vision encoder of 12 * depth * width^2 parameters in its layers."""

    depth: int
    width: int

    @property
    def heads(self) -> int:
        return self.width // HEAD_DIM

    @property
    def mlp_dim(self) -> int:
        return 4 * self.width

    @property
    def parameters(self) -> int:
        return 12 * self.depth * self.width**2


def encoder_shape(parameters: float) -> Shape:
    """The shape nearest to a size, rather larger than smaller, of about the paper's aspect, with heads of 64.

    Example: 6e8 -> 24 x 1472 (624M), 1.22e9 -> 32 x 1792 (1.23B)
    """
    depths = (*range(1, 8), *range(8, LARGEST_DEPTH + 1, 4))
    shapes = [Shape(depth, HEAD_DIM * heads) for depth in depths for heads in range(1, 129)]

    def distance(shape: Shape) -> float:
        aspect = shape.width / shape.depth / ASPECT
        excess = math.log(shape.parameters / parameters)
        return max(excess, -1.6 * excess) + 0.2 * abs(math.log(aspect))

    return min(shapes, key=distance)


# LLM size -> the lengths of its stages in the paper
PAPER_LENGTHS = {1.8e9: stages.NAVIL_2B, 8e9: stages.NAVIL_9B}


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage needs."""

    recipe: stages.Stage
    batch_samples: int
    multiscale: bool
    samples: int
    steps: int  # of batch_samples
    visual_tokens: int  # of one sample
    text_tokens: int  # of one sample, line breaks included
    epochs: float | None  # over the data at hand; None: not said how many they are

    @property
    def image_tokens(self) -> int:
        return self.samples * self.visual_tokens

    @property
    def tokens(self) -> int:
        return self.samples * (self.visual_tokens + self.text_tokens)


@dataclasses.dataclass(frozen=True)
class Advice:
    """A plan for one LLM."""

    llm: float
    samples: float
    optimum: Value  # encoder parameters
    encoder: Shape
    extrapolates: str  # how far outside the measured LLM sizes; "" inside
    line: Fitted
    stages: tuple[Stage, ...]
    have: float | None
    loss: Value | None
    loss_notes: tuple[str, ...]


def advise(
    analysis: Analysis, llm: float, samples: float, have: float | None, image: tuple[int, int], words: int
) -> Advice:
    """Plans a model.

    Args:
      analysis: of the published points or of pilot runs.
      llm: parameters of the language model.
      samples: of all stages together; shared out as in the paper.
      have: different samples at hand; None: not known.
      image: width and height in pixels of a typical image.
      words: text tokens of a typical sample, without those that belong to its image.

    Raises:
      UserError: the results hold no line of optimal encoders.
    """
    line = next((fit for fit in analysis.line if isinstance(fit.found, EncoderLine)), None)
    if line is None or not isinstance(line.found, EncoderLine):
        reasons = "; ".join(fit.note for fit in analysis.line) or "no optimal encoders are known"
        raise UserError(f"the results do not say which encoder is optimal ({reasons}); plan from the published points")
    optimum = Value.of(line.found.encoder(llm))
    known = [fit.llm for fit in analysis.optimal if fit.values and fit.llm]
    loss, notes = _expected(analysis, llm, effective_samples(samples, have))
    return Advice(
        llm=llm,
        samples=samples,
        optimum=optimum,
        encoder=encoder_shape(optimum.value),
        extrapolates=outside(llm, min(known), max(known)),
        line=line,
        stages=tuple(_stages(llm, samples, have, image, words)),
        have=have,
        loss=loss,
        loss_notes=notes,
    )


def outside(value: float, low: float, high: float) -> str:
    """How far a value lies outside a range; "" inside, with a tenth of tolerance."""
    if value < low / 1.1:
        return f"{low / value:.2g} times below the smallest measured"
    if value > high * 1.1:
        return f"{value / high:.2g} times above the largest measured"
    return ""


def _stages(llm: float, samples: float, have: float | None, image: tuple[int, int], words: int) -> list[Stage]:
    lengths = PAPER_LENGTHS[min(PAPER_LENGTHS, key=lambda size: abs(math.log(size / llm)))]
    total = sum(length.samples for length in lengths.values())
    found = []
    for recipe, length in lengths.items():
        steps = max(1, round(samples * length.samples / total / length.batch_samples))
        count = image_tokens(
            *image, Config(images=ImageConfig(max_patches=recipe.max_patches, multiscale=length.multiscale))
        )
        seen = steps * length.batch_samples
        stage = Stage(
            recipe=recipe,
            batch_samples=length.batch_samples,
            multiscale=length.multiscale,
            samples=seen,
            steps=steps,
            visual_tokens=count.visual_tokens,
            text_tokens=count.text_tokens + words,
            epochs=seen / have if have else None,
        )
        found.append(stage)
    return found


def effective_samples(samples: float, have: float | None) -> float:
    """What samples are worth of which only `have` are different, counted in new samples.

    Example: 8M samples of 2M different ones, 4 epochs -> 7.45M; of 0.5M, 16 epochs -> 5.3M
    """
    if have is None or samples <= have:
        return samples
    repetitions = samples / have - 1
    return have * (1 + REPEAT_DECAY * (1 - math.exp(-repetitions / REPEAT_DECAY)))


def repeating(epochs: float) -> str:
    """When to repeat and when to shrink, for a number of epochs."""
    if epochs <= 1:
        return "no sample is seen twice"
    if epochs <= CHEAP_EPOCHS:
        return "repeat: up to four epochs are worth nearly as much as new data"
    worth = effective_samples(epochs, 1.0) / epochs
    if epochs <= 1 + REPEAT_DECAY:
        return f"repeating is worth {worth:.0%} of new data; take more data, or shrink to {CHEAP_EPOCHS} epochs"
    return (
        f"shrink: repeating is worth {worth:.0%} of new data; {CHEAP_EPOCHS} to {1 + REPEAT_DECAY:.0f} epochs at most"
    )


def _expected(analysis: Analysis, llm: float, samples: float) -> tuple[Value | None, tuple[str, ...]]:
    """Expected held-out loss, and what to keep in mind of it."""
    sets = treatments(analysis.curves)
    if not sets:
        return None, ("no losses with a known encoder",)
    of, members = max(sets, key=lambda entry: len(by_llm(entry[1])))
    best = {size: min(group, key=lambda c: c.losses[-1]) for size, group in by_llm(members).items()}
    try:
        predicted = losses_at(best, samples)
        loss = _across(predicted, llm)
    except TooFew as error:
        return None, (f"too few data: {error}",)
    notes = [f"held-out loss of the study, on its captions and not on yours; {of}, each LLM with its best encoder"]
    measured = max(curve.samples[-1] for curve in best.values())
    if far := outside(samples, min(curve.samples[0] for curve in best.values()), measured):
        notes.append(f"samples are extrapolated, {far}")
    if far := outside(llm, min(best), max(best)):
        notes.append(f"the LLM is extrapolated, {far}")
    return Value.of(loss), tuple(notes)


def losses_at(curves: Mapping[float, Curve], samples: float) -> dict[float, np.ndarray]:
    """Loss of every curve at a data size, [1 + DRAWS] each.

    Between points by interpolation. Beyond the last one all curves fall by the same factor, the geometric mean of what
    the power laws of their tails say: a single tail is too short for an exponent of its own.

    Raises:
      TooFew: a curve that must be carried on has fewer points than the law needs.
    """
    found = {}
    for size, curve in curves.items():
        n, losses, errors = (np.array(part) for part in (curve.samples, curve.losses, curve.errors))
        noise = np.random.default_rng(1).standard_normal((1 + laws.DRAWS, len(n))) * errors
        noise[0] = 0
        place = np.log(min(samples, n[-1]))
        found[size] = np.array([np.interp(place, np.log(n), row) for row in losses + noise])
        if samples > n[-1]:
            found[size] = found[size] * _fall(tuple(curves.values()), n[-1], samples)
    return found


def _fall(curves: tuple[Curve, ...], start: float, end: float) -> np.ndarray:
    """Factor by which losses fall between two data sizes. [1 + DRAWS]"""
    logs = []
    for curve in curves:
        n, losses, errors = (np.array(part) for part in (curve.samples, curve.losses, curve.errors))
        tail = n >= n[-1] / TAIL if np.sum(n >= n[-1] / TAIL) >= 4 else np.full(len(n), True)
        law = laws.fit_power_law(n[tail], losses[tail], errors[tail])
        logs.append(np.log(law.loss(end) / law.loss(start)))
    return np.exp(np.mean(logs, axis=0))


def _across(predicted: dict[float, np.ndarray], llm: float) -> np.ndarray:
    """Loss at an LLM size, linear in ln(size) between measured ones, and beyond by the line through all. [1 + DRAWS]"""
    sizes = np.array(list(predicted))
    if len(sizes) < 2:
        if outside(llm, sizes[0], sizes[0]):
            raise TooFew("one LLM size was measured, and not this one")
        return predicted[sizes[0]]
    x, y = np.log(sizes), np.array(list(predicted.values()))  # [n], [n, 1 + DRAWS]
    if sizes[0] <= llm <= sizes[-1]:
        return np.array([np.interp(np.log(llm), x, column) for column in y.T])
    slope = ((x - x.mean()) @ y) / np.sum((x - x.mean()) ** 2)
    fitted = y.mean(axis=0) + slope * (x[:, None] - x.mean())
    misfit = np.sqrt(np.sum((y - fitted) ** 2, axis=0)[0] / max(len(sizes) - 2, 1))
    noise = np.random.default_rng(2).standard_normal(1 + laws.DRAWS) * misfit
    noise[0] = 0
    return np.maximum(y.mean(axis=0) + slope * (np.log(llm) - x.mean()) + noise, 0)


def check(llm: float, words: int) -> None:
    """Raises `UserError` for numbers that mean a slip."""
    if not 1e4 <= llm <= 1e13:
        raise UserError(f"--llm: {llm:.3g} parameters; write the size as 1.8B or 500M")
    if words < 0:
        raise UserError(f"--words: {words}: must not be negative")


def parse_image(text: str) -> tuple[int, int]:
    """ "640x480" -> (640, 480). Raises `UserError` for anything else."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"--image: {text!r} is not a size; write it as 640x480")
    return int(sides[0]), int(sides[1])
