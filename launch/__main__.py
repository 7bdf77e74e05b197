"""Starts training on Google Cloud TPUs: `python -m launch queued up -- python -m navil_jax.train --config my.py`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.command import check_training, complete
from launch.gcluster import Gcluster
from launch.gke import Gke
from launch.hosts import Hosts
from launch.instances import Instances
from launch.jobset import JobSet
from launch.queued import Queued
from launch.settings import ROOT, read_settings
from launch.shell import Shell
from launch.xpk import Xpk
from navil_jax.errors import Parser, UserError, report_user_errors

ROADS: dict[str, type[Hosts] | type[Gke]] = {
    "queued": Queued,
    "instances": Instances,
    "jobset": JobSet,
    "xpk": Xpk,
    "gcluster": Gcluster,
}


def _about() -> str:
    lines = [__doc__ or "", "roads:"]
    lines += [f"  {name:<9} {(sys.modules[road.__module__].__doc__ or '').strip()}" for name, road in ROADS.items()]
    for title, road in (("queued and instances", Queued), ("jobset (xpk and gcluster lack manifest)", JobSet)):
        lines += ["", f"actions of {title}:"]
        lines += [f"  {action:<9} {text}" for action, text in road.actions.items()]
    return "\n".join(
        [
            *lines,
            "",
            "A COMMAND without --config.workdir gets --config.workdir=BUCKET/NAME. docs/pods.md leads from an empty",
            "project to a run.",
        ]
    )


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    given, command = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = Parser(
        prog="python -m launch",
        usage="%(prog)s [--dry-run] [--settings FILE]\n    ROAD ACTION [-- COMMAND...]",
        description=_about(),
    )
    parser.add_argument("--dry-run", action="store_true", help="prints the commands and runs none")
    parser.add_argument(
        "--settings",
        type=Path,
        default=ROOT / "launch" / "settings.toml",
        metavar="FILE",
        help="in the place of launch/settings.toml (see launch/settings.example.toml)",
    )
    parser.add_argument("road", choices=ROADS, metavar="ROAD", help=", ".join(ROADS))
    parser.add_argument("action", metavar="ACTION", help="see above")
    options = parser.parse_args(given)
    road = ROADS[options.road]
    if options.action not in road.actions:
        raise UserError(f"{options.action}: {options.road} has no such action; there are {', '.join(road.actions)}")
    if command and options.action not in road.takes_command:
        raise UserError(
            f"{options.action}: takes no command, which {command[0]} begins; {', '.join(road.takes_command)} do"
        )
    settings = read_settings(options.settings, _needed(road, options.action))
    road.check(settings, options.action)
    check_training(command)
    words = complete(command, settings) if options.action in road.takes_command else []
    getattr(road(settings, Shell(options.dry_run), words), options.action)()
    return 0


def _needed(road: type[Hosts] | type[Gke], action: str) -> tuple[str, ...]:
    """The settings that an action uses."""
    if action == "image":
        return ("image",)
    return tuple(name for name in road.needed if action in road.takes_command or name != "image")


if __name__ == "__main__":
    sys.exit(main())
