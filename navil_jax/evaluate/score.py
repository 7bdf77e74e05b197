"""Scores a file of predictions: `python -m navil_jax.evaluate score FILE.jsonl --benchmark docvqa`."""

import json
from collections.abc import Sequence
from pathlib import Path

from navil_jax.errors import Parser
from navil_jax.evaluate.benchmarks.catalogue import BENCHMARKS, benchmark_named, protocol_of
from navil_jax.evaluate.benchmarks.lines import read_lines, report, scores_of
from navil_jax.paths import given_path

ABOUT = f"""Scores predictions as the reference code of a benchmark does; needs no model.

  python -m navil_jax.evaluate score answers.jsonl --benchmark docvqa
  python -m navil_jax.evaluate score answers.jsonl --benchmark chartqa --protocol lmms_eval

A line is a JSON object with `id`, `prediction` and what the benchmark's scorer needs (docs/benchmarks.md). Prints
{{"id": .., "score": ..}} for each, and the totals in the last line. Without --protocol, scores are those that reports
of the InternVL family use, and the last line has the totals by all reference codes.

Benchmarks: {", ".join(BENCHMARKS)}."""


def score(argv: Sequence[str]) -> int:
    """Runs the command."""
    parser = Parser(prog="python -m navil_jax.evaluate score", description=ABOUT)
    parser.add_argument("file", type=given_path, metavar="FILE.jsonl")
    parser.add_argument("--benchmark", required=True, metavar="NAME")
    parser.add_argument("--protocol", metavar="P", help="reference code, such as internvl, vlmevalkit or lmms_eval")
    options = parser.parse_args(list(argv))
    benchmark = benchmark_named(options.benchmark)
    protocol = protocol_of(benchmark, options.protocol) if options.protocol else None
    lines = read_lines(Path(options.file), benchmark)
    for line, value in zip(lines, scores_of(benchmark, lines, protocol), strict=True):
        print(json.dumps({"id": line["id"], "score": value}))
    print(json.dumps(report(benchmark, lines, protocol)))
    return 0
