"""One plan: a config on a slice, compiled, timed and counted."""

import dataclasses
import math
from typing import Any

from navil_jax.config import Config, MeshConfig
from navil_jax.errors import UserError
from navil_jax.model import params as model_params
from navil_jax.model.flops import Counts, Flops, total, useful_flops
from navil_jax.plan.compile import Compiled, Effort, Task, compile_for
from navil_jax.plan.statistics import BatchStatistics
from navil_jax.plan.timing import Timing, model_time
from navil_jax.plan.topology import Slice
from navil_jax.sharding import MESH_AXES, mesh_axes, use_rules
from navil_jax.train.optimizer import split_trainable

MOST_ROWS = 64  # per group of devices that share a row's weights; the search for the largest batch goes no further


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a training step on a slice."""

    config: Config
    place: Slice
    rows: int  # of the global batch
    compiled: Compiled
    statistics: BatchStatistics
    timing: Timing | None  # None: it does not fit, or was compiled with too little effort to tell
    useful: dict[str, Flops]  # of a step
    largest_rows: int | None  # global rows that fit; 0: not even one per device; None: not searched

    @property
    def fits(self) -> bool:
        """By the bytes; the compiler lets some programs pass that need more than there is."""
        return self.compiled.total <= self.place.generation.hbm

    @property
    def shards(self) -> int:
        """Groups of devices that each take rows of their own."""
        return _groups(self.compiled)

    @property
    def step_seconds(self) -> float:
        """Modelled; of a plan that fits."""
        assert self.timing is not None
        return self.timing.step

    @property
    def mfu(self) -> float:
        """Useful FLOPs against the peak of all devices over the modelled step."""
        return total(self.useful) / (self.step_seconds * self.place.devices * self.place.generation.peak)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, visual and text."""
        counts = self.statistics.counts
        return self.rows * (counts.visual_tokens + counts.text_tokens) / self.step_seconds

    @property
    def samples_per_second(self) -> float:
        return self.rows * self.statistics.samples / self.step_seconds

    @property
    def samples(self) -> float:
        """Of the whole run."""
        return self.config.steps * (self.config.batch_samples or self.rows * self.statistics.samples)

    @property
    def days(self) -> float:
        return self.samples / self.samples_per_second / 86_400

    @property
    def chip_hours(self) -> float:
        return self.days * 24 * self.place.chips


def _groups(compiled: Compiled) -> int:
    return math.prod(compiled.mesh[axis] for axis in mesh_axes("batch"))


def make_plan(
    config: Config,
    place: Slice,
    statistics: BatchStatistics,
    rows: int | None = None,
    effort: Effort = "full",
    search: bool = True,
    hlo: str = "",
) -> Plan:
    """Compiles the config's training step for a slice and models it.

    Args:
      rows: of the global batch; None: config.data.rows; 0: the most that fit.
      effort: fast: memory only.
      search: whether to look for the largest batch that fits.

    Raises:
      UserError: the rows or the mesh do not fit the slice, or as `compile_for`.
    """
    shards = batch_shards(config.mesh, place) * config.optimizer.microbatches
    largest = None
    if rows == 0:
        largest = largest_rows(config, place, shards)
        rows = largest or shards
    rows = rows or config.data.rows
    if rows % shards:
        below = rows // shards * shards
        axes = " x ".join(mesh_axes("batch"))
        raise UserError(
            f"--batch: {rows} rows do not divide by the {shards} groups of devices that share them (mesh axes {axes}, "
            f"and microbatches); take {f'{below} or ' if below else ''}{below + shards}"
        )
    compiled = compile_for(config, place, rows, effort=effort, hlo=hlo)
    if search and largest is None:
        largest = largest_rows(config, place, shards)
    timing = None
    if compiled.program and effort == "full" and compiled.total <= place.generation.hbm:
        timing = model_time(compiled.program, place, compiled.devices, _groups(compiled), statistics)
    trainable, _ = split_trainable(config.optimizer, model_params.shapes(config.model))
    trained = set(model_params.flatten(trainable))
    useful = useful_flops(config.model, statistics.counts.scaled(rows), trained)
    return Plan(config, place, rows, compiled, statistics, timing, useful, largest)


@dataclasses.dataclass(frozen=True)
class Inference:
    """Prefill or decoding of one prompt for each group of devices, each as long as a packed row."""

    task: Task
    rows: int
    compiled: Compiled
    timing: Timing | None


def plan_inference(config: Config, place: Slice, statistics: BatchStatistics) -> list[Inference]:
    """Compiles the two programs of `inference.engine` for a slice.

    Raises:
      UserError: as `make_plan`.
    """
    rows, found = batch_shards(config.mesh, place), []
    statistics = dataclasses.replace(statistics, token_lengths=((statistics.token_slots,),))  # one sample fills a row
    for task in ("prefill", "decode"):
        compiled = compile_for(config, place, rows, task)
        timing = None
        if compiled.program and compiled.total <= place.generation.hbm:
            timing = model_time(compiled.program, place, compiled.devices, _groups(compiled), statistics)
        found.append(Inference(task, rows, compiled, timing))
    return found


def mesh_sizes(mesh: MeshConfig, place: Slice) -> dict[str, int]:
    """Devices along each mesh axis.

    Raises:
      UserError: the axes do not multiply to the devices, or data does not divide by the slices.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    rest = place.devices // known
    if place.devices % known or (-1 not in sizes.values() and known != place.devices):
        axes = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(f"--mesh: {axes} does not make the {place.devices} devices of {place.name}; set one axis to -1")
    sizes = {axis: rest if size == -1 else size for axis, size in sizes.items()}
    if sizes["data"] % place.slices:
        raise UserError(
            f"--mesh: data={sizes['data']} does not divide by {place.slices} slices; take data={place.slices}"
        )
    return sizes


def batch_shards(mesh: MeshConfig, place: Slice) -> int:
    """Groups of devices that each take rows of their own. Errors as in `mesh_sizes` and `sharding.use_rules`."""
    sizes = mesh_sizes(mesh, place)
    use_rules(mesh.rules)
    return math.prod(sizes[axis] for axis in mesh_axes("batch"))


def largest_rows(config: Config, place: Slice, shards: int) -> int:
    """The most rows that fit, a multiple of `shards`; 0: none. Compiles with little effort, as memory is what counts.

    Memory is about linear in the rows, so that the first guess from two sizes is mostly right to one row.
    """
    limit = place.generation.hbm
    needs: dict[int, float] = {}

    def need(count: int) -> float:
        if count not in needs:
            needs[count] = min(compile_for(config, place, count * shards, effort="fast").total, 100 * limit)
        return needs[count]

    first, second = 1, 2
    if need(first) > limit:
        return 0
    slope = max(need(second) - need(first), 1.0)
    fits, too_many = (second, MOST_ROWS + 1) if need(second) <= limit else (first, second)
    while too_many - fits > 1:
        guess = first + int((limit - need(first)) / slope)
        guess = min(max(guess, fits + 1), too_many - 1)
        if need(guess) <= limit:
            fits = guess
        else:
            too_many = guess
        slope = max((need(guess) - need(first)) / (guess - first), 1.0)
    return fits * shards


def executed_over_useful(plan: Plan) -> dict[str, float]:
    """What the forward pass computes over what it needs, by part: padding, and masked pairs of attention."""
    data, counts = plan.config.data, plan.statistics.counts
    full = Counts(
        patches=data.patch_slots,
        patch_pairs=0,
        window_pairs=0,
        visual_tokens=data.visual_slots,
        text_tokens=data.text_slots,
        token_pairs=0,
        targets=data.text_slots,
    )
    executed = useful_flops(plan.config.model, full, ())
    needed = useful_flops(plan.config.model, counts, ())
    linear = ("vision linear", "connector", "decoder linear", "head")
    ratios = {part: executed[part].forward / needed[part].forward for part in linear if needed[part].forward}
    for tower, pairs in plan.timing.kernel_pairs.items() if plan.timing else ():
        if f"{tower} attention" in needed and pairs:
            ratios[f"{tower} attention"] = pairs
    return ratios


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's figures, for programs."""
    compiled, timing, statistics = plan.compiled, plan.timing, plan.statistics
    figures: dict[str, Any] = {
        "topology": plan.place.name,
        "chips": plan.place.chips,
        "devices": plan.place.devices,
        "mesh": compiled.mesh,
        "rows": plan.rows,
        "rows_per_device_group": plan.rows / plan.shards,
        "largest_rows": plan.largest_rows,
        "fits": plan.fits,
        "hbm_limit_bytes": plan.place.generation.hbm,
        "hbm_bytes": None if math.isinf(compiled.total) else compiled.total,
        "refusal": compiled.refusal,
        "hbm_arguments": compiled.state,
        "hbm_compiler": compiled.memory,
        "compile_seconds": compiled.seconds,
        "compile_host_bytes": compiled.host_bytes,
        "effort": compiled.effort,
        "peak_flops_of_a_device": plan.place.generation.peak,
        "useful_flops": {part: flops._asdict() for part, flops in plan.useful.items()},
        "row": dataclasses.asdict(statistics.counts) | {"samples": statistics.samples, "fill": statistics.fill},
        "statistics": statistics.origin,
        "samples": plan.samples,
    }
    if timing:
        figures |= {
            "step_seconds": timing.step,
            "step_seconds_if_nothing_overlaps": timing.slowest,
            "timing": dataclasses.asdict(timing),
            "mfu": plan.mfu,
            "tokens_per_second": plan.tokens_per_second,
            "samples_per_second": plan.samples_per_second,
            "days": plan.days,
            "chip_hours": plan.chip_hours,
            "executed_over_useful": executed_over_useful(plan),
        }
    return figures
