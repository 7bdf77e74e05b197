"""The loss curve of a running run, drawn onward: is going on likely to pay?"""

import dataclasses
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from navil_jax.errors import UserError
from navil_jax.study import laws
from navil_jax.study.laws import PowerLaw, TooFew, Value
from navil_jax.train.metrics import read_log

BINS = 24  # equal parts of ln(step) whose means are fitted
TAIL = 16  # the law is fitted to the steps from the last one down to this part of it
LEAST_POINTS = 8  # measured ones in the tail
WORTH = 0.01  # of the loss: a gain that a doubling should bring


@dataclasses.dataclass(frozen=True)
class Projection:
    """A curve with its law.

    Attributes:
      steps, losses: the means of the bins.
      errors: their standard errors.
      law: of the loss over steps.
      last: last step.
      to: step that it is drawn to.
      noise: standard error of the newest mean: smaller differences cannot be seen.
    """

    steps: np.ndarray
    losses: np.ndarray
    errors: np.ndarray
    law: PowerLaw
    last: float
    to: float

    @property
    def noise(self) -> float:
        return float(self.errors[-1])

    def gain(self, doublings: int) -> Value:
        """Loss that so many further doublings of the steps save."""
        return Value.of(self.law.loss(self.last) - self.law.loss(self.last * 2**doublings))

    def verdict(self) -> str:
        """Whether the next doubling pays, and why."""
        gain, now = self.gain(1), float(self.law.loss(self.last)[0])
        seen = 2 * self.noise
        wanted = max(WORTH * now, seen)
        if (miss := abs(now - float(self.losses[-1]))) > max(2 * seen, gain.value):
            return f"undecided: the power law misses the newest loss, {self.losses[-1]:.3g}, by {miss:.2g}"
        if gain.low > wanted:
            return f"going on is likely to pay: the next doubling saves more than {wanted:.2g}"
        if gain.high < wanted:
            return f"going on is unlikely to pay: the next doubling saves less than {wanted:.2g}"
        return f"undecided: the next doubling may save more or less than {wanted:.2g}"


def project(steps: np.ndarray, losses: np.ndarray, to: float) -> Projection:
    """Fits a power law to a noisy curve.

    Single steps are averaged in equal parts of ln(step); the errors of the means allow for neighbours that go together.

    Args:
      steps: [n], rising.
      losses: [n], of single steps or evaluations.
      to: step to extrapolate to.

    Raises:
      TooFew: fewer than `LEAST_POINTS` points, or bins, in the tail.
    """
    tail = steps >= steps[-1] / TAIL
    steps, losses = steps[tail].astype(np.float64), losses[tail].astype(np.float64)
    if len(steps) < LEAST_POINTS:
        raise TooFew(f"{len(steps)} points from step {steps[-1] / TAIL:.0f} on, at least {LEAST_POINTS} are needed")
    edges = np.geomspace(steps[0], steps[-1] * 1.0001, BINS + 1)
    place = np.digitize(steps, edges)
    groups = [np.flatnonzero(place == bin_) for bin_ in np.unique(place)]
    x = np.array([np.exp(np.log(steps[group]).mean()) for group in groups])
    y = np.array([losses[group].mean() for group in groups])
    counts = np.array([len(group) for group in groups])
    errors = _deviation(losses) * np.sqrt(_memory(losses)) / np.sqrt(counts)
    law = laws.fit_power_law(x, y, errors)
    return Projection(x, y, errors, law, float(steps[-1]), float(to))


def _deviation(losses: np.ndarray) -> float:
    """Standard deviation of single points around the trend, from differences of neighbours' means."""
    trend = _trend(losses)
    return float(np.sqrt(np.mean((losses - trend) ** 2) * len(losses) / max(len(losses) - 4, 1)))


def _trend(losses: np.ndarray) -> np.ndarray:
    """A cubic in ln(place)."""
    x = np.log(np.arange(len(losses)) + len(losses) / TAIL)
    return np.polyval(np.polyfit(x, losses, 3), x)


def _memory(losses: np.ndarray) -> float:
    """How many times more variance a mean has because neighbours go together: (1 + r) / (1 - r), at least 1."""
    rest = losses - _trend(losses)
    variance = np.mean(rest**2)
    r = np.mean(rest[1:] * rest[:-1]) / variance if variance > 0 else 0.0
    return float((1 + np.clip(r, 0, 0.9)) / (1 - np.clip(r, 0, 0.9)))


def extrapolate(workdir: Path, metric: str, to: int | None, out: Path) -> str:
    """Draws the curve of a run onward into a PNG and returns what it says.

    Args:
      metric: a key of metrics.jsonl; "": the training loss.
      to: step to draw to; None: four times the steps so far.

    Raises:
      UserError: no log, no such metric, or too few steps.
    """
    path = workdir / "metrics.jsonl"
    lines = read_log(path)
    if not lines:
        raise UserError(f"{path}: no log of a run; give the workdir of one that has begun")
    name = metric or "loss"
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    if not points:
        known = sorted({key for line in lines for key in line if key.endswith("loss")})
        raise UserError(f"--metric: no {name!r} in {path}; losses in it are {', '.join(known)}")
    steps, losses = np.array(points, np.float64).T
    target = to or 4 * steps[-1]
    if target <= steps[-1]:
        raise UserError(f"--to: {target:.0f} is not beyond the last step, {steps[-1]:.0f}")
    try:
        found = project(steps, losses, target)
    except TooFew as error:
        raise UserError(f"{path}: too few data for a law: {error}; wait, or take another --metric") from error
    warnings = _schedule(lines)
    _draw(found, steps, losses, name, warnings, out)
    return "\n".join([*_said(found, name), *warnings, f"drawn: {out}"])


def _said(found: Projection, name: str) -> list[str]:
    now = Value.of(found.law.loss(found.last))
    return [
        f"{name} at step {found.last:,.0f}: {now}; noise of its mean {found.noise:.2g}",
        f"law: exponent {Value.of(found.law.exponent)}, irreducible {Value.of(found.law.floor)}",
        *(f"after {n} more doubling{'s' * (n > 1)}: {found.gain(n)} less" for n in (1, 2)),
        f"at step {found.to:,.0f}: {Value.of(found.law.loss(found.to))}",
        found.verdict(),
    ]


def _schedule(lines: list[dict]) -> list[str]:
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    if rates and rates[-1] < 0.95 * max(rates):
        return ["the learning rate has begun to fall: part of the gain so far is the schedule's, which ends"]
    return []


def _draw(found: Projection, steps: np.ndarray, losses: np.ndarray, name: str, warnings: list[str], out: Path) -> None:
    figure = Figure(figsize=(8, 4.5), dpi=120)
    axis = figure.subplots()
    axis.plot(steps, losses, color="0.85", linewidth=0.8, label="logged")
    axis.errorbar(found.steps, found.losses, 1.96 * found.errors, fmt="o", markersize=4, label="means")
    x = np.geomspace(found.steps[0], found.to, 80)
    draws = np.array([found.law.loss(place) for place in x])
    axis.plot(x, draws[:, 0], color="C1", label="power law")
    axis.fill_between(x, *np.quantile(draws[:, 1:], [0.025, 0.975], axis=1), color="C1", alpha=0.2, label="95%")
    for step, text in ((found.last, "now"), (2 * found.last, "the next doubling")):
        if step <= found.to:
            axis.axvline(step, color="0.5", linestyle="--")
            axis.annotate(text, (step, 0.02), (3, 0), ("data", "axes fraction"), "offset points", fontsize=8)
    head = f"by the law: {name} {Value.of(found.law.loss(found.last))} now, {found.gain(1)} less after a doubling"
    low, high = min(draws[:, 0].min(), found.losses.min()), found.losses.max()
    axis.set(
        xscale="log",
        xlabel="step",
        ylabel=name,
        title="\n".join([head, found.verdict(), *warnings]),
        ylim=(0.9 * low, 1.1 * high),
    )
    axis.set_xlim(left=found.steps[0] / 2)
    axis.title.set_fontsize(9)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
