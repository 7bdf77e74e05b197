"""Cycles of a Pallas kernel's grid step, read from the schedule that the TPU compiler writes down.

A TPU core issues one bundle of instructions a cycle, in order, so the schedule of a grid step is the time that it takes
while its copies from HBM keep up. Two of libtpu's dumps hold it (`plan/kernels.py` asks for them):

    *-packed-bundles-post-ra.txt                       a line a cycle, empty ones too; branches and loops
    *-pre-delay_hlo-static-per-bundle-utilization.txt  issue slots that each of these bundles uses

The outermost loop of a kernel with a grid is a step. Ranges that a branch may jump over become a tree; those with
matrix products are the work of a computed step, the others belong to the first and last visit of an output block. Left
out: waiting for HBM, the start of a kernel (some microseconds), and bank conflicts.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

DELAY_SLOTS = 4  # bundles after a branch that run in any case
BUNDLES, SLOTS = "packed-bundles-post-ra.txt", "pre-delay_hlo-static-per-bundle-utilization.txt"
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+(?:(LH|LB|LE|PB|PF|CT))?\s*:\s*(>*)\s*\{")
_BRANCH = re.compile(r"sbr\.rel\s*(?:\((!?)%\w+\))?\s*,?\s*target bundleno = (\d+)")


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Of one grid step of a kernel, on one core."""

    empty: int  # in any step
    work: int  # in one that computes, on top
    once: int  # for the first and the last visit of an output block, on top
    matrix: float  # share of the work in which the matrix units are busy

    @property
    def computed(self) -> int:
        """Of a step that computes."""
        return self.empty + self.work


@dataclasses.dataclass
class _Range:
    """Bundles [start, end) that run together or, if `conditional`, not at all."""

    start: int
    end: int
    conditional: bool
    inner: list["_Range"] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def own(self) -> list[int]:
        """Bundles that are in no inner range."""
        taken = {number for part in self.inner for number in range(part.start, part.end)}
        return [number for number in range(self.start, self.end) if number not in taken]

    def holds(self, other: "_Range") -> bool:
        return self is not other and self.start <= other.start and other.end <= self.end

    def walk(self) -> Iterator["_Range"]:
        yield self
        for part in self.inner:
            yield from part.walk()


def read_folder(folder: Path) -> dict[str, Cycles]:
    """Every kernel in a folder of dumps, by name without its number."""
    found = {}
    for file in sorted(folder.glob(f"*-{BUNDLES}")):
        stem = re.sub(rf"-\d+-{re.escape(BUNDLES)}$", "", file.name)
        slots = next((one for one in folder.glob(f"*{SLOTS}") if one.name.startswith(stem + "-")), None)
        if "schedule-analysis" in file.name or slots is None:
            continue
        cycles = grid_step(file.read_text(), slots.read_text())
        if cycles:
            found[re.sub(r"^\d+-|[.\d]+$", "", stem)] = cycles
    return found


def grid_step(bundles: str, slots: str) -> Cycles | None:
    """Reads the two dumps of a kernel; None where it has no loop."""
    text: list[str] = []
    for line in bundles.splitlines():
        if found := _BUNDLE.match(line):
            text.append(line[found.end() - 1 :])
        elif text:
            text[-1] += "\n" + line
    text = [re.sub(r"/\*.*?\*/", "", one, flags=re.S) for one in text]
    loops = [part for root in _tree(text) for part in root.walk() if not part.conditional]
    if not loops:
        return None
    loop = max(loops, key=lambda part: part.length)
    empty, work, once = _sorted_out(loop, ["vmatmul" in one for one in text])
    return Cycles(len(empty), len(work), len(once), _matrix_share(work, slots))


def _sorted_out(loop: _Range, products: Sequence[bool]) -> tuple[list[int], list[int], list[int]]:
    """Bundles of any step, of the work of a computed one (its longest branch), and of first and last visits.

    Conditional ranges with matrix products of their own (where a kernel has none, the longest) are branches of the
    work; ranges around them run in every step.
    """
    inner = [part for one in loop.inner for part in one.walk()]
    parts = [part for part in inner if part.conditional]
    multiplies = lambda part: any(products[number] for number in part.own)  # noqa: E731
    branches = [part for part in parts if multiplies(part)]
    if not branches and parts and not multiplies(loop):
        branches = [max(parts, key=lambda part: len(part.own))]
    branches = [part for part in branches if not any(one.holds(part) for one in branches)]
    around = [part for part in parts if any(part.holds(one) for one in branches)]
    empty, visits = list(loop.own), list[int]()
    work: dict[int, list[int]] = {number: [] for number in range(len(branches))}
    for part in inner:
        last = min((one for one in parts if one is part or one.holds(part)), key=lambda one: one.length, default=None)
        holder = next((n for n, one in enumerate(branches) if part is one or one.holds(part)), None)
        if holder is not None and (last is branches[holder] or multiplies(part)):
            work[holder] += part.own
        elif last is None or last in around:
            empty += part.own
        else:
            visits += part.own
    return empty, max(work.values(), key=len, default=[]), visits


def _tree(text: Sequence[str]) -> list[_Range]:
    """The outermost ranges, with loops and conditional ranges inside."""
    ranges = []
    for number, bundle in enumerate(text):
        for _, target in _BRANCH.findall(bundle):
            after = number + 1 + DELAY_SLOTS
            if int(target) <= number:
                ranges.append(_Range(int(target), after, conditional=False))
            elif int(target) > after:
                ranges.append(_Range(after, int(target), conditional=True))
    roots: list[_Range] = []
    stack: list[_Range] = []
    for part in sorted(ranges, key=lambda part: (part.start, -part.end)):
        while stack and part.start >= stack[-1].end:
            stack.pop()
        if stack:
            part.end = min(part.end, stack[-1].end)  # a jump out of a range ends with it
            if part.length <= 0:
                continue
        (stack[-1].inner if stack else roots).append(part)
        stack.append(part)
    return roots


def _matrix_share(work: Sequence[int], slots: str) -> float:
    rows = [line for line in slots.splitlines() if line and not line.startswith("==")]
    column = [name.strip() for name in rows[0].split(",")].index("MXU")
    capacity, *used = (int(row.split()[column]) for row in rows[1:])
    return sum(used[number] for number in work if number < len(used)) / (capacity * len(work)) if work else 0.0
