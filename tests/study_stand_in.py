"""`python tests/study_stand_in.py run --config ...`: the study command, with a stand-in of a second for every training.

What is made is noted in `made.txt` of the study's folder. A training takes longer as long as there is `hold` beside it.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from navil_jax.study import __main__ as study
from navil_jax.study import run as running

TRAINER = """
import json, pathlib, sys, time
job = pathlib.Path(sys.argv[1])
with (job.parents[1] / "made.txt").open("a") as file:
    file.write(job.stem + "\\n")
time.sleep(1)
while (job.parents[1] / "hold").exists():
    time.sleep(0.05)
if job.stem.startswith("language"):
    lines = [{"step": 30, "eval/text/loss": 3.0}]
else:
    seen = [{"step": step, "samples_seen": step, "tokens_seen": 9 * step} for step in (4, 8)]
    lines = [line | {"eval/easy_vqa_captions/loss": 8 / line["step"]} for line in seen]
workdir = pathlib.Path(json.loads(json.loads(job.read_text())["config"])["workdir"])
workdir.mkdir(parents=True)
(workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""
popen = subprocess.Popen


def start(command: list[str], **settings: Any) -> subprocess.Popen:
    return popen([sys.executable, "-c", TRAINER, command[-1]], **settings)


class StandIn:
    """In the place of a tokenizer."""

    def save(self, folder: Path) -> None:
        with (folder.parent / "made.txt").open("a") as file:
            file.write("tokenizer\n")
        time.sleep(0.5)
        folder.mkdir()


if __name__ == "__main__":
    running.subprocess.Popen, running.make_tokenizer = start, lambda *_: StandIn()
    sys.exit(study.main())
