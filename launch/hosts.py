"""Hosts that are reached by ssh: what the roads without Kubernetes have in common.

A road says how slices are asked for, in what state they are, and how a command reaches the hosts; the rest is here.
`launch/host.sh` is what runs over there.
"""

import shlex
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from launch.settings import ROOT, Settings
from launch.shell import Failed, Shell
from navil_jax.errors import UserError

POLL_SECONDS = 30.0
MOST_ERRORS = 20  # questions one after the other that fail before waiting ends
MOST_STARTS = 5  # that fail one after the other before `keep` ends
ABSENT, ACTIVE, LOST, GOING, WAITING = "absent", "active", "lost", "going", "waiting"  # what a state means
HOST = "navil_jax/launch/host.sh"
_RUNS = "error: a command is still running, stop it first"
# Code is not changed under a command that runs.
_IDLE = f"{{ ! systemctl is-active --quiet navil || {{ echo '{_RUNS}' >&2; exit 2; }}; }}"
LEFT_OUT = ("./.git", "./.venv", "./runs", "./site", "./launch/settings.toml", "__pycache__")


class Hosts:
    """A road whose hosts are reached by ssh."""

    actions: ClassVar[Mapping[str, str]] = {
        "create": "asks for the slices; a request waits until there are some",
        "wait": "until the slices are there",
        "setup": "copies this repository to all hosts and installs it there, with the versions of launch/lock.txt",
        "run": "starts the command on all hosts as a service, which outlives crashes, reboots and this terminal",
        "up": "all of these, from wherever it stands; also after slices were taken away",
        "keep": "as up, and again whenever slices are taken away, until the command has ended",
        "logs": "follows the log of the first host",
        "status": "the state of the slices, and what every host does",
        "stop": "training saves a checkpoint and stops, on all hosts; within five minutes",
        "delete": "gives the slices back; they cost money until then",
    }
    takes_command = ("run", "up", "keep")
    needed = ("project", "zone", "bucket", "name", "topology", "capacity")

    def __init__(self, settings: Settings, shell: Shell, command: list[str]) -> None:
        self.settings, self.shell, self.command = settings, shell, command
        self.place = (f"--project={settings.project}", f"--zone={settings.zone}")
        self.tunnel = ("--tunnel-through-iap",) if settings.private else ()

    @classmethod
    def check(cls, settings: Settings, action: str) -> None:
        """Raises a `UserError` if this road does not lead there."""

    def create(self) -> None:
        raise NotImplementedError

    def delete(self) -> None:
        raise NotImplementedError

    def state(self) -> tuple[str, str]:
        """What the state is called, and what it means; raises a `Failed` where it cannot be known."""
        raise NotImplementedError

    def on_hosts(self, command: str, first: bool = False) -> str:
        """Runs a shell command on all hosts, or on the first one alone and returns what that prints."""
        raise NotImplementedError

    def copy(self, file: Path, name: str) -> None:
        """Copies a file to the home folder of all hosts."""
        raise NotImplementedError

    def wait(self) -> None:
        if (found := self._settled((WAITING,))) != ACTIVE:
            raise UserError(f"{self.settings.name}: will not become active ({found}); `up` deletes it and asks anew")

    def setup(self) -> None:
        packed = Path(tempfile.gettempdir()) / f"{self.settings.name}-code.tar.gz"
        excluded = [f"--exclude={name}" for name in LEFT_OUT]
        self.shell.run("tar", "-czf", str(packed), "-C", str(ROOT), *excluded, ".")
        self.copy(packed, "code.tar.gz")
        self.on_hosts(f"{_IDLE} && mkdir -p navil_jax && tar -xzf code.tar.gz -C navil_jax && {HOST} install")

    def run(self) -> None:
        self.on_hosts(f"{HOST} start {shlex.join([f'{self.settings.workdir}/logs', *self.command])}")

    def up(self) -> None:
        state = ABSENT if self.shell.dry else self._settled((GOING,))
        if state == LOST:
            self.delete()
        if state in (ABSENT, LOST):
            self.create()
        self.wait()
        self.setup()
        self.run()

    def keep(self) -> None:
        if self.shell.dry or self._settled((GOING,)) != ACTIVE or self._service()[0] != "active":
            self._up_at_last()
        while not self.shell.dry and not self._has_ended():
            time.sleep(POLL_SECONDS)
            if self._settled((WAITING, GOING)) != ACTIVE:
                self._up_at_last()

    def _up_at_last(self) -> None:
        """As `up`, some times if it fails: slices may be taken away while they are set up."""
        for left in reversed(range(MOST_STARTS)):
            try:
                return self.up()
            except UserError as error:
                if not left:
                    raise
                print(f"{time.strftime('%T')} {error}", flush=True)
                time.sleep(POLL_SECONDS)
        return None

    def _service(self) -> tuple[str, str]:
        """Whether the first host's service is active, inactive or failed, and the last line of its log."""
        try:
            state, _, last = self.on_hosts(f"{HOST} status", first=True).partition("\n")
        except Failed as error:
            print(f"{time.strftime('%T')} {error}", flush=True)
            return "unknown", ""
        return state, last

    def _has_ended(self) -> bool:
        """Whether the command has ended well; raises a `UserError` if it failed for good."""
        state, last = self._service()
        if state == "failed":
            name = self.settings.name
            raise UserError(f"{name}: the command failed: {last}; its log says why, and the slices still cost money")
        if state == "inactive":
            print(f"the command has ended: {last}; the slices cost money until `delete`")
        return state == "inactive"

    def logs(self) -> None:
        raise NotImplementedError

    def status(self) -> None:
        if not self.shell.dry:
            print(self.state()[0])
        self.on_hosts(f"{HOST} status")

    def stop(self) -> None:
        self.on_hosts(f"{HOST} stop")

    def _settled(self, passing: tuple[str, ...]) -> str:
        """What the state means once it is none of those that pass; prints every change.

        Raises:
          UserError: the state could not be asked for, many times one after the other.
        """
        before, errors = "", 0
        while True:
            try:
                name, meaning = self.state()
                errors = 0
            except Failed as error:
                errors += 1
                if errors >= MOST_ERRORS:
                    raise UserError(f"{error}; this was asked {errors} times") from error
                name, meaning = str(error), ""
            if self.shell.dry:
                return ACTIVE
            if name != before:
                print(f"{time.strftime('%T')} {name}", flush=True)
            if meaning and meaning not in passing:
                return meaning
            before = name
            time.sleep(POLL_SECONDS)
