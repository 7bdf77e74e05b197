"""Trains NaViL: `python -m navil_jax.train --config configs/x.py --config.workdir=runs/x`.

The same command goes on where a run was interrupted, and ends with the same parameters, optimizer state and losses, bit
for bit, as a run without interruption. What the workdir then holds is listed in `navil_jax/train/trainer.py`.

`python -m navil_jax.train watch DIR` shows a run in the terminal, `python -m navil_jax.train report DIR` as a page.
"""

import sys
from collections.abc import Sequence

from navil_jax.config import Config
from navil_jax.config.flags import parse
from navil_jax.errors import report_user_errors
from navil_jax.paths import path_of


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["watch"]:
        from navil_jax.train.watch import watch

        return watch(argv[1:])
    if argv[:1] == ["report"]:
        from navil_jax.train.report import report

        return report(argv[1:])
    config, _ = parse(argv, __doc__)
    from navil_jax.sharding import start_hosts  # --help needs no JAX
    from navil_jax.train.host_memory import keep_freed_memory

    keep_freed_memory()
    start_hosts()
    return train(config)


def train(config: Config) -> int:
    """Makes a run: goes on with the one in its workdir, or starts it; arguments and errors as `trainer.run`.

    A damaged checkpoint is set aside for an older one that is whole, unless `config.checkpoint_damage` says otherwise.
    Several processes end with status 1 then, for not all of them need have seen it: the same command goes on.
    """
    import jax

    from navil_jax.convert.opened import open_start
    from navil_jax.train.checksums import DamagedCheckpoint, set_aside
    from navil_jax.train.trainer import run

    while True:
        try:
            with open_start(config) as start:
                return run(config, start)
        except DamagedCheckpoint as damaged:
            if config.checkpoint_damage == "stop" or not config.workdir:
                raise
            print(set_aside(damaged, path_of(config.workdir) / "checkpoints"), flush=True)
            if jax.process_count() > 1:
                print("error: a checkpoint was set aside; the same command goes on", file=sys.stderr, flush=True)
                return 1


if __name__ == "__main__":
    sys.exit(main())
