"""All benchmarks by name."""

from navil_jax.errors import UserError
from navil_jax.evaluate.benchmarks.anls import DOCVQA, INFOVQA
from navil_jax.evaluate.benchmarks.chartqa import CHARTQA
from navil_jax.evaluate.benchmarks.circular import CCBENCH, MMBENCH
from navil_jax.evaluate.benchmarks.gqa import GQA
from navil_jax.evaluate.benchmarks.mathvista import MATHVISTA
from navil_jax.evaluate.benchmarks.mme import MME
from navil_jax.evaluate.benchmarks.mmmu import MMMU
from navil_jax.evaluate.benchmarks.mmvet import MMVET
from navil_jax.evaluate.benchmarks.ocrbench import OCRBENCH
from navil_jax.evaluate.benchmarks.scoring import Benchmark
from navil_jax.evaluate.benchmarks.single_choice import AI2D, SCIENCEQA
from navil_jax.evaluate.benchmarks.textvqa import TEXTVQA

_FIRST = (MMVET, MMMU, MMBENCH, MME, MATHVISTA, OCRBENCH, CCBENCH)  # as the paper's table has them
_LAST = (TEXTVQA, SCIENCEQA, GQA, DOCVQA, AI2D, CHARTQA, INFOVQA)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (*_FIRST, *_LAST)}


def benchmark_named(name: str) -> Benchmark:
    """Raises UserError if there is no such benchmark."""
    if name.lower() not in BENCHMARKS:
        raise UserError(f"--benchmark {name}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name.lower()]


def protocol_of(benchmark: Benchmark, name: str) -> str:
    """Full name of a protocol of a benchmark. Raises UserError if it has none of that name."""
    try:
        return benchmark.protocol(name)
    except KeyError:
        known = ", ".join((*benchmark.protocols, *benchmark.aliases))
        raise UserError(f"--protocol {name}: {benchmark.name} has {known} (default: {benchmark.primary})") from None
