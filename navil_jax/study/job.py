"""One run in a process of its own: `python -m navil_jax.study.job JOB.json`.

The job file holds {"config": ..., "language": folder of a language model to start from, or ""}.
"""

import json
import sys
from pathlib import Path

from navil_jax.config.plain import from_json
from navil_jax.convert.opened import open_start
from navil_jax.convert.upcycling import initialise_from
from navil_jax.errors import report_user_errors
from navil_jax.sharding import start_hosts
from navil_jax.train.host_memory import keep_freed_memory
from navil_jax.train.trainer import run


@report_user_errors
def main(path: str) -> int:
    keep_freed_memory()
    start_hosts()
    job = json.loads(Path(path).read_text())
    config = from_json(job["config"])
    if job["language"] and not Path(config.init_from).exists():
        initialise_from(Path(job["language"]), config, Path(config.init_from))
    with open_start(config) as start:
        return run(config, start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
