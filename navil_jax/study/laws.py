"""Laws fitted to losses, each with bootstrap draws.

Every fit returns arrays of length 1 + DRAWS: entry 0 is the estimate, the others are estimates from data in which the
noise is drawn anew around the fitted law. The noise is that of the points (reading error, spread over seeds) where the
law misses them by no more, else the misfit itself, with the heavier tails that few points deserve.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

DRAWS = 1000
EXPONENTS = np.geomspace(0.02, 4.0, 64)  # searched
Estimates = tuple[np.ndarray, ...]


class Value(NamedTuple):
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: np.ndarray) -> "Value":
        """From an estimate and its draws. [1 + DRAWS]; draws that are not finite count as they are (infinite)."""
        low, high = np.quantile(draws[1:], [0.025, 0.975], method="closest_observation")
        return cls(float(draws[0]), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


class TooFew(Exception):
    """There are too few data for a law; the message says what is there and what is needed."""


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """loss = floor + scale * (x / unit)^-exponent; arrays [1 + DRAWS]."""

    floor: np.ndarray
    scale: np.ndarray
    exponent: np.ndarray
    unit: float
    misfit: float  # root of the mean squared miss of the points

    def loss(self, x: float) -> np.ndarray:
        """[1 + DRAWS]"""
        return self.floor + self.scale * (x / self.unit) ** -self.exponent


def draw_noise(residuals: np.ndarray, errors: np.ndarray, parameters: int, rng: np.random.Generator) -> np.ndarray:
    """Noise for DRAWS repetitions of the data, [DRAWS, n]; see the module's docstring.

    Args:
      residuals, errors: [n], misses of the fitted law, and known standard deviations of the points.
      parameters: of the law.
    """
    freedom = len(residuals) - parameters
    normal = rng.standard_normal((DRAWS, len(residuals)))
    misfit = np.sqrt(np.sum(residuals**2) / freedom) if freedom > 0 else 0.0
    if misfit**2 <= np.mean(errors**2):
        return normal * errors
    return normal * misfit * np.sqrt(freedom / rng.chisquare(freedom, (DRAWS, 1)))


def _bootstrap(
    estimate: Callable[[np.ndarray], Estimates],
    predict: Callable[[Estimates], np.ndarray],
    y: np.ndarray,
    errors: np.ndarray,
    parameters: int,
) -> tuple[Estimates, float]:
    """Estimates [1 + DRAWS], and the misfit.

    Args:
      estimate: data [b, n] -> estimates, arrays [b, ...].
      predict: estimates -> data [b, n].
    """
    rng = np.random.default_rng(0)
    first = estimate(y[None])
    fitted = predict(first)[0]
    drawn = estimate(fitted + draw_noise(y - fitted, errors, parameters, rng))
    joined = tuple(np.concatenate(pair) for pair in zip(first, drawn, strict=True))
    return joined, float(np.sqrt(np.mean((y - fitted) ** 2)))


def _arrays(*values: object) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(value, np.float64) for value in values)


def fit_power_law(x: object, losses: object, errors: object) -> PowerLaw:
    """Fits loss = floor + scale * x^-exponent with floor >= 0 and scale >= 0 by least squares.

    For each exponent floor and scale are linear, so that the exponent alone is searched: there is no start to choose
    and no local minimum to fall into, and a floor that the data do not show ends at 0.

    Args:
      x, losses, errors: [n]; x in any order, such as samples seen or parameters.

    Raises:
      TooFew: fewer than 4 different x.

    Example: x 1 2 4 8, losses 3 2 1.5 1.25 -> floor 1, scale * unit^exponent 2, exponent 1
    """
    x, losses, errors = _arrays(x, losses, errors)
    if (different := len(np.unique(x))) < 4:
        raise TooFew(f"{different} different sizes, at least 4 are needed for floor, scale and exponent")
    unit = float(np.exp(np.mean(np.log(x))))
    scaled = x / unit

    def estimate(y: np.ndarray) -> Estimates:
        coarse = np.broadcast_to(EXPONENTS, (len(y), len(EXPONENTS)))
        best = _best_exponent(scaled, y, coarse)[2]
        step = EXPONENTS[1] / EXPONENTS[0]
        fine = best[:, None] * np.geomspace(1 / step, step, 41)
        return _best_exponent(scaled, y, fine)

    def predict(found: Estimates) -> np.ndarray:
        floor, scale, exponent = (part[:, None] for part in found)
        return floor + scale * scaled**-exponent

    (floor, scale, exponent), misfit = _bootstrap(estimate, predict, losses, errors, parameters=3)
    return PowerLaw(floor, scale, exponent, unit, misfit)


def _best_exponent(x: np.ndarray, y: np.ndarray, exponents: np.ndarray) -> Estimates:
    """The best of the given exponents, with its floor and scale.

    Args:
      x: [n]; y: [b, n]; exponents: [b, g].

    Returns:
      floor, scale, exponent [b]
    """
    powers = x ** -exponents[..., None]  # [b, g, n]
    centre, mean = powers.mean(axis=-1), y.mean(axis=-1)[:, None]
    spread = np.maximum(np.sum((powers - centre[..., None]) ** 2, axis=-1), 1e-300)
    scale = np.maximum(np.einsum("bgn,bn->bg", powers - centre[..., None], y) / spread, 0)
    floor = mean - scale * centre
    through_zero = np.einsum("bgn,bn->bg", powers, y) / np.sum(powers**2, axis=-1)
    scale, floor = np.where(floor < 0, through_zero, scale), np.maximum(floor, 0)
    miss = np.sum((y[:, None] - floor[..., None] - scale[..., None] * powers) ** 2, axis=-1)
    chosen = np.argmin(miss, axis=1)[:, None]
    return tuple(np.take_along_axis(part, chosen, axis=1)[:, 0] for part in (floor, scale, exponents))


@dataclasses.dataclass(frozen=True)
class Line:
    """y = intercept + slope * x; arrays [1 + DRAWS], intercepts [1 + DRAWS, groups]."""

    slope: np.ndarray
    intercepts: np.ndarray
    misfit: float

    def at(self, x: float) -> np.ndarray:
        """[1 + DRAWS], with the intercept of the last group."""
        return self.intercepts[:, -1] + self.slope * x


def fit_line(x: object, y: object, errors: object, groups: object = None) -> Line:
    """Fits a line by least squares; points of several groups share the slope and have intercepts of their own.

    Args:
      x, y, errors: [n].
      groups: [n] numbers from 0; None: all are one group.

    Raises:
      TooFew: fewer than 3 different x, or no group with two.
    """
    x, y, errors = _arrays(x, y, errors)
    groups = np.zeros(len(x), int) if groups is None else np.asarray(groups)
    if (different := len(np.unique(x))) < 3:
        raise TooFew(f"{different} different sizes, at least 3 are needed for a line that could be missed")
    member = np.eye(groups.max() + 1)[groups]  # [n, groups]
    design = np.concatenate([x[:, None], member], axis=1)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise TooFew("no two sizes were measured alike")
    solve = np.linalg.pinv(design)  # [1 + groups, n]

    def estimate(y: np.ndarray) -> Estimates:
        found = y @ solve.T
        return found[:, 0], found[:, 1:]

    def predict(found: Estimates) -> np.ndarray:
        slope, intercepts = found
        return slope[:, None] * x + intercepts @ member.T

    (slope, intercepts), misfit = _bootstrap(estimate, predict, y, errors, design.shape[1])
    return Line(slope, intercepts, misfit)


@dataclasses.dataclass(frozen=True)
class EncoderLine:
    """Optimal encoder = scale * (LLM / unit)^exponent; arrays [1 + DRAWS]."""

    scale: np.ndarray
    exponent: np.ndarray
    unit: float

    def encoder(self, llm: float) -> np.ndarray:
        """[1 + DRAWS]"""
        return self.scale * (llm / self.unit) ** self.exponent


@dataclasses.dataclass(frozen=True)
class Surface:
    """loss = floor + slope * ln(L / llm_unit) + scale * (V / unit)^-encoder_exponent * (L / llm_unit)^llm_exponent.

    The floor falls log-linearly with the LLM, the encoder's benefit saturates, and a larger LLM makes use of a larger
    encoder (paper, section 3.4). Arrays [1 + DRAWS].
    """

    floor: np.ndarray
    slope: np.ndarray
    scale: np.ndarray
    encoder_exponent: np.ndarray
    llm_exponent: np.ndarray
    llm_unit: float
    unit: float
    misfit: float

    def loss(self, llm: float, encoder: float) -> np.ndarray:
        """[1 + DRAWS]"""
        return (
            self.floor
            + self.slope * np.log(llm / self.llm_unit)
            + self._benefit(llm) * ((encoder / self.unit) ** -self.encoder_exponent)
        )

    def _benefit(self, llm: float) -> np.ndarray:
        return self.scale * (llm / self.llm_unit) ** self.llm_exponent

    def optimal_encoder(self, llm: float, smallest: float, share: float) -> np.ndarray:
        """Where twice the encoder gains `share` of the loss with the smallest encoder. [1 + DRAWS]

        0 where the fit sees no benefit of a larger encoder.
        """
        gain = self._benefit(llm) * (1 - 2**-self.encoder_exponent) / (share * self.loss(llm, smallest))
        return self.unit * np.maximum(gain, 0.0) ** (1 / self.encoder_exponent)


def fit_surface(llm: object, encoder: object, losses: object, errors: object) -> Surface:
    """Fits `Surface` by least squares: a grid over the two exponents, the rest is linear.

    Args:
      llm, encoder, losses, errors: [n].

    Raises:
      TooFew: fewer than 2 LLM sizes, 3 encoder sizes or 7 points.
    """
    llm, encoder, losses, errors = _arrays(llm, encoder, losses, errors)
    sizes = len(np.unique(llm)), len(np.unique(encoder)), len(losses)
    if any(have < need for have, need in zip(sizes, (2, 3, 7), strict=True)):
        raise TooFew(f"{sizes[0]} LLM sizes, {sizes[1]} encoder sizes, {sizes[2]} points; needed are 2, 3 and 7")
    units = float(np.exp(np.mean(np.log(llm)))), float(np.exp(np.mean(np.log(encoder))))
    x, v = np.log(llm / units[0]), np.log(encoder / units[1])

    def estimate(y: np.ndarray) -> Estimates:
        return tuple(np.stack([_surface_of(x, v, row) for row in y]).T)

    def predict(found: Estimates) -> np.ndarray:
        floor, slope, scale, encoder_exponent, llm_exponent = (part[:, None] for part in found)
        return floor + slope * x + scale * np.exp(-encoder_exponent * v + llm_exponent * x)

    found, misfit = _bootstrap(estimate, predict, losses, errors, parameters=5)
    floor, slope, scale, encoder_exponent, llm_exponent = found
    return Surface(floor, slope, scale, encoder_exponent, llm_exponent, *units, misfit)


def _surface_of(x: np.ndarray, v: np.ndarray, y: np.ndarray) -> np.ndarray:
    """floor, slope, scale, encoder_exponent, llm_exponent: a grid over the exponents that closes in on the best."""
    centre, reach = np.array([np.log(0.4), 0.25]), np.array([2.0, 1.25])  # of ln(encoder_exponent) and llm_exponent
    steps = np.linspace(-1, 1, 11)
    grid = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    ridge = 1e-10 * np.eye(3)  # where an exponent of 0 makes two columns alike
    for _ in range(5):
        places = centre + grid * reach
        benefit = np.exp(-np.exp(places[:, :1]) * v + places[:, 1:] * x)  # [g, n]
        flat = np.broadcast_to([np.ones_like(x), x], (len(places), 2, len(x)))
        designs = np.concatenate([flat, benefit[:, None]], axis=1)  # [g, 3, n]
        squares = designs @ designs.swapaxes(1, 2) + ridge
        coefficients = np.linalg.solve(squares, (designs @ y)[..., None])[..., 0]
        miss = np.sum((y - np.einsum("gi,gin->gn", coefficients, designs)) ** 2, axis=1)
        miss[coefficients[:, 2] < 0] = np.inf
        best = int(np.argmin(miss))
        centre, reach = places[best], reach / 4
    return np.array([*coefficients[best], np.exp(centre[0]), centre[1]])


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times more samples one curve needs than another for the same loss."""

    loss: float
    ratio: np.ndarray  # [1 + DRAWS]
    bound: bool  # the better curve is below this loss from its first point on: the ratio is at least this


Points = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]  # samples, losses, errors


def data_ratio(slow: Points, fast: Points, loss: float | None = None) -> Ratio:
    """Samples that `slow` needs over those that `fast` needs for the same loss, linear in ln(samples) between points.

    Args:
      slow, fast: samples (rising), losses, standard deviations.
      loss: where they are compared; None: the lowest loss that both reach.

    Raises:
      TooFew: no loss is reached by both.
    """
    if min(len(slow[0]), len(fast[0])) < 2:
        raise TooFew("a curve of one point")
    target = max(min(slow[1]), min(fast[1])) if loss is None else loss
    if min(slow[1]) > target or min(fast[1]) > target or target > max(slow[1]):
        raise TooFew(f"not both curves pass the loss {target:.3g}")
    rng = np.random.default_rng(0)
    needed = [_needed(points, target, rng) for points in (slow, fast)]
    return Ratio(target, np.exp(needed[0] - needed[1]), target >= fast[1][0])


def _needed(points: Points, target: float, rng: np.random.Generator) -> np.ndarray:
    """ln(samples) at which the curve first reaches the loss. [1 + DRAWS]"""
    samples, losses, errors = _arrays(*points)
    noise = rng.standard_normal((1 + DRAWS, len(losses))) * errors
    noise[0] = 0
    falling = np.minimum.accumulate(losses + noise, axis=1)
    falling -= 1e-9 * np.arange(len(losses))  # strictly
    return np.array([np.interp(-target, -row, np.log(samples)) for row in falling])
