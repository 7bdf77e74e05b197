"""How tests call `python -m launch`: settings files, dry runs, and stand-ins for the programs of Google Cloud."""

import contextlib
import io
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from launch.__main__ import main

TRAIN = ("--", "python", "-m", "navil_jax.train", "--config", "my recipe.py", '--config.data.system_message=it\'s "x"')
SETTINGS: dict[str, Any] = {
    "project": "my-project",
    "zone": "us-east5-a",
    "bucket": "gs://my-bucket",
    "name": "navil",
    "topology": "v5p-128",
    "capacity": "on-demand",
    "cluster": "my-cluster",
    "image": "us-docker.pkg.dev/my-project/images/navil:1",
}


class Done(NamedTuple):
    status: int
    out: str
    err: str


def settings_file(folder: Path, **changes: Any) -> str:
    path = folder / "settings.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in (SETTINGS | changes).items()))
    return str(path)


def launch(*arguments: str) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with mock.patch("launch.__main__.check_training"):  # the recipe of TRAIN is not there
                status = main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def dry_run(folder: Path, road: str, action: str, *command: str, **changes: Any) -> Done:
    return launch("--dry-run", "--settings", settings_file(folder, **changes), road, action, *command)


def commands(text: str) -> list[list[str]]:
    """The commands that a dry run shows, without the manifest."""
    lines = text.splitlines()
    if "{" in lines:
        lines = lines[: lines.index("{")] + lines[lines.index("}") + 1 :]
    return [shlex.split(line) for line in lines]


def manifest(text: str) -> dict[str, Any]:
    lines = text.splitlines()
    return dict(json.loads("\n".join(lines[lines.index("{") : lines.index("}") + 1])))
