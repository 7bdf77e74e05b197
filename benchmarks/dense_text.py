"""Text steps of well-known dense shapes beside MaxText's, and what a second weight set adds.

    python -m benchmarks.dense_text                      # what is missing is compiled, minutes each
    python -m benchmarks.dense_text --only qwen3 --write # cases whose name holds this; puts the tables into docs/tpu.md
    python -m benchmarks.dense_text --read runs/maxtext  # takes in what benchmarks/maxtext_step.py wrote there

Two questions, asked of the TPU compiler by the planner's functions (docs/tpu.md), for 16 v5p chips and one row of 8,192
tokens on each. Is a step of text alone, in the shapes of Llama2-7B and Qwen3-8B, as good as MaxText's? And what does a
decoder with two weight sets cost beside one with a single set, where 30, 50 or 80% of its slots are visual?

Every weight is trained by AdamW, all state is float32, products are bfloat16, and one sample fills a row. There is no
encoder: visual slots hold embedded tokens as text slots do, so that decoders are compared. The head runs on text slots
alone, so that its share is left out where decoders are compared. Figures are kept in benchmarks/dense_text.json; a case
whose entry is deleted there is compiled anew.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tpu_table import PAGE, write
from navil_jax.config import Config, DataConfig, DecoderConfig, MeshConfig, ModelConfig
from navil_jax.console import markdown_table
from navil_jax.data.packing import SlotAdvice
from navil_jax.errors import UserError, report_user_errors
from navil_jax.model.flops import Counts
from navil_jax.plan.compile import compile_for
from navil_jax.plan.hlo import Program, summarise
from navil_jax.plan.statistics import BatchStatistics
from navil_jax.plan.timing import model_time
from navil_jax.plan.topology import GIB, parse_topology

FILE = Path(__file__).parent / "dense_text.json"
MARKS = {
    "text": ("<!-- table: python -m benchmarks.dense_text --write -->", "<!-- end of the text steps -->"),
    "experts": ("<!-- table of two sets: python -m benchmarks.dense_text --write -->", "<!-- end of two sets -->"),
}
PLACE = parse_topology("v5p-32")
SLOTS = 8192
LANES = 128  # visual slots are a multiple of it
SHARES = (0.3, 0.5, 0.8)

SHAPES = {
    "llama2-7b": DecoderConfig(
        depth=32, width=4096, mlp_dim=11008, num_heads=32, num_kv_heads=32, vocab_size=32_000, rope_theta=1e4
    ),
    "qwen3-8b": DecoderConfig(
        depth=36,
        width=4096,
        mlp_dim=12288,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=151_936,
        norm_eps=1e-6,
        qk_norm=True,
    ),
}
# What the backward pass recomputes, in our words and in MaxText's: a whole layer, or what is no matrix product.
REMAT = {"full": "full", "dots": "minimal_with_context"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One program of ours."""

    shape: str
    remat: str = "full"
    share: float = 0.0  # of the slots that are visual
    sets: int = 1  # of weights

    @property
    def name(self) -> str:
        return f"navil_jax {self.shape} {self.remat} {self.share:.0%} {self.sets}"

    @property
    def config(self) -> Config:
        """Its recipe; where no slot is visual, one that no training run has (config.validate)."""
        experts = self.sets == 2
        decoder = dataclasses.replace(
            SHAPES[self.shape], attention_experts=experts, ffn_experts=experts, serial_visual_output=False
        )
        visual = round(self.share * SLOTS / LANES) * LANES
        data = DataConfig(rows=PLACE.devices, visual_slots=visual, text_slots=SLOTS - visual, patch_slots=0)
        model = ModelConfig(vision=None, decoder=decoder, special_token_ids=(), remat=self.remat)
        return Config(model=model, data=data, mesh=MeshConfig(fsdp=-1))


def cases() -> list[Case]:
    """Steps of text alone, then two sets at every share of visual slots."""
    text = [Case(shape, remat) for shape in SHAPES for remat in REMAT]
    return text + [Case(shape, "full", share, 2) for shape in SHAPES for share in SHARES]


def full_row() -> BatchStatistics:
    """One sample that fills a row."""
    counts = Counts(0, 0, 0, 0, SLOTS, SLOTS * (SLOTS + 1) / 2, SLOTS)
    advice = SlotAdvice(0, SLOTS, 0)
    return BatchStatistics(counts, 1, 0, {}, advice, SLOTS, 0, ((SLOTS,),), ((),), (1,), 1, "one sample fills a row")


def measure(case: Case) -> dict[str, Any]:
    """Compiles a case, or finds it in the planner's cache.

    Raises:
      UserError: it does not fit, or as `compile_for`.
    """
    compiled = compile_for(case.config, PLACE, case.config.data.rows)
    if compiled.program is None:
        raise UserError(f"{case.name}: does not fit: {compiled.refusal}")
    versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    return _figures(compiled.program, compiled.devices, compiled.memory, compiled.seconds, versions)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Figures of the programs that `benchmarks/maxtext_step.py` left in a folder, by name.

    Raises:
      UserError: there are none.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        said = json.loads(file.read_text())
        program = summarise(file.with_suffix(".hlo").read_text())
        remat = {theirs: ours for ours, theirs in REMAT.items()}[said["remat_policy"]]
        figures = _figures(program, said["devices"], said["memory"], said["seconds"], said["versions"])
        found[f"maxtext {said['model']} {remat} 0% 1"] = figures | {"settings": said["settings"]}
    if not found:
        raise UserError(f"--read: {folder} holds no NAME.json; benchmarks/maxtext_step.py writes them")
    return found


def _figures(
    program: Program,
    devices: Sequence[Sequence[int]],
    memory: dict[str, float],
    seconds: float,
    versions: dict[str, str],
) -> dict[str, Any]:
    timing = model_time(program, PLACE, devices, PLACE.devices, full_row())
    return {
        "compute_seconds": sum(timing.compute.values()),
        "kernel_seconds": sum(timing.kernels.values()),
        "exposed_seconds": timing.exposed,
        "step_seconds": timing.step,
        "hbm_bytes": memory["argument"] + memory["output"] - memory["alias"] + memory["temp"],
        "memory": memory,
        "compute": timing.compute,
        "collective_bytes": timing.collective_bytes,
        "compile_seconds": seconds,
        "versions": versions,
    }


def text_table(kept: dict[str, dict[str, Any]]) -> str:
    """Steps of text alone, MaxText's above ours."""
    lines = []
    for shape in SHAPES:
        for remat in REMAT:
            for program in ("maxtext", "navil_jax"):
                figures = kept.get(f"{program} {shape} {remat} 0% 1")
                if figures:
                    label = REMAT[remat] if program == "maxtext" else remat
                    lines.append({"shape": shape, "program": program, "remat": label} | _text_cells(figures))
    return markdown_table(lines) if lines else "Nothing is compiled yet."


def _text_cells(figures: dict[str, Any]) -> dict[str, str]:
    sizes = figures["collective_bytes"]
    gathered = sizes.get("all-gather", 0) + sizes.get("all-to-all", 0)
    return {
        "compute s": f"{figures['compute_seconds']:.3f}",
        "HBM GiB": f"{figures['hbm_bytes'] / GIB:.1f}",
        "gathered GiB": f"{gathered / GIB:.1f}",
        "reduced GiB": f"{(sum(sizes.values()) - gathered) / GIB:.1f}",
        "collectives s": f"{figures['exposed_seconds']:.3f}",
        "libtpu": figures["versions"]["libtpu"],
    }


def experts_table(kept: dict[str, dict[str, Any]]) -> str:
    """Two weight sets beside one, without the head."""
    lines = []
    for shape in SHAPES:
        one = kept.get(Case(shape).name)
        if one:
            lines.append({"shape": shape, "sets": "1", "visual": "-"} | _decoder_cells(one, one))
        for share in SHARES:
            two = kept.get(Case(shape, "full", share, 2).name)
            if one and two:
                lines.append({"shape": shape, "sets": "2", "visual": f"{share:.0%}"} | _decoder_cells(two, one))
    return markdown_table(lines) if lines else "Nothing is compiled yet."


def _decoder_cells(figures: dict[str, Any], base: dict[str, Any]) -> dict[str, str]:
    def without_head(key: str, figures: dict[str, Any]) -> float:
        head = sum(seconds for label, seconds in figures["compute"].items() if label.startswith("head"))
        return figures[key] - head

    def added(key: str) -> str:
        return "-" if figures is base else f"{without_head(key, figures) / without_head(key, base) - 1:+.1%}"

    return {
        "compute s": f"{without_head('compute_seconds', figures):.3f}",
        "added": added("compute_seconds"),
        "of it optimizer s": f"{figures['compute']['optimizer']:.3f}",
        "kernels s": f"{figures['kernel_seconds']:.3f}",
        "collectives s": f"{figures['exposed_seconds']:.3f}",
        "step s": f"{without_head('step_seconds', figures):.3f}",
        "added to it": added("step_seconds"),
        "HBM GiB": f"{figures['hbm_bytes'] / GIB:.1f}",
    }


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compiles cases whose name holds this; others are taken as kept")
    parser.add_argument("--kept", action="store_true", help="compiles nothing")
    parser.add_argument("--read", metavar="FOLDER", help="MaxText's programs, see benchmarks/maxtext_step.py")
    parser.add_argument("--write", action="store_true", help=f"puts the tables into {PAGE.name}")
    options = parser.parse_args(argv)
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {}

    def keep(new: dict[str, Any]) -> None:
        kept.update(new)
        FILE.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")

    if options.read:
        keep(read(Path(options.read)))
    for case in cases() if not (options.kept or options.read) else ():
        if options.only in case.name and case.name not in kept:
            keep({case.name: measure(case)})
    for name, text in (("text", text_table(kept)), ("experts", experts_table(kept))):
        print(text, end="\n\n")
        if options.write:
            write(text, *MARKS[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
