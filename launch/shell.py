"""Commands of other programs: shown so that a shell can read them back, then run, or in a dry run only shown."""

import dataclasses
import shlex
import subprocess

from navil_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shell:
    """Runs commands.

    Args:
      dry: only shows them.
    """

    dry: bool

    def run(self, *command: str) -> None:
        """Raises a `UserError` if the program is not there or fails."""
        print(shlex.join(command), flush=True)
        if not self.dry and (status := self._done(command).returncode):
            raise UserError(f"{' '.join(command[:4])}: failed with status {status}; what it said stands above")

    def remove(self, *command: str) -> None:
        """As `run`, of a command that deletes something; what is not there is passed over."""
        print(shlex.join(command), flush=True)
        if not self.dry:
            try:
                self.ask(*command)
            except Failed as error:
                if not error.absent:
                    raise
                print(error, flush=True)

    def ask(self, *command: str) -> str:
        """What a command prints; nothing in a dry run. Raises a `Failed` if it fails."""
        if self.dry:
            print(shlex.join(command), flush=True)
            return ""
        done = self._done(command, capture_output=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise Failed(f"{' '.join(command[:4])}: {lines[-1]}", done.stderr)
        return done.stdout.strip()

    def _done(self, command: tuple[str, ...], capture_output: bool = False) -> "subprocess.CompletedProcess[str]":
        try:
            return subprocess.run(command, text=True, capture_output=capture_output, check=False)
        except FileNotFoundError as error:
            raise UserError(f"{command[0]}: is not installed; docs/pods.md says what a road needs") from error


class Failed(UserError):
    """A question to another program that failed.

    Args:
      said: all that it printed on stderr.

    Attributes:
      absent: whether it says that what it was asked about is not there.
    """

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.absent = any(words in said for words in ("NOT_FOUND", "was not found"))
