"""TPU VMs from the queue of the Cloud TPU API: v4, v5e, v5p and v6e, one or several slices."""

from pathlib import Path

from launch.hosts import ABSENT, ACTIVE, GOING, HOST, LOST, WAITING, Hosts
from launch.settings import RESERVED, Settings
from launch.shell import Failed
from navil_jax.plan.cloud import is_named, shape_text

_MEANINGS = {"ACTIVE": ACTIVE, "SUSPENDED": LOST, "FAILED": LOST, "SUSPENDING": GOING, "DELETING": GOING}
_STATE = "--format=value(state.state)"


class Queued(Hosts):
    """Queued resources. All nodes and workers of a request are reached by one command."""

    @classmethod
    def check(cls, settings: Settings, action: str) -> None:
        if not settings.cloud.runtime:
            name = settings.place.generation.name
            raise settings.error("topology", f"the Cloud TPU API has no {name}; take the road instances or jobset")

    def create(self) -> None:
        settings = self.settings
        gcloud, capacity = _capacity(settings)
        options = [f"--runtime-version={settings.system_image or settings.cloud.runtime}", *_slice(settings)]
        if settings.slices == 1:
            options.append(f"--node-id={settings.name}")
        else:
            options += [f"--node-count={settings.slices}", f"--node-prefix={settings.name}"]
        options += ["--internal-ips"] if settings.private else []
        for flag in ("network", "subnetwork", "service_account"):
            if value := getattr(settings, flag):
                options.append(f"--{flag.replace('_', '-')}={value}")
        self.shell.run(*gcloud, "create", settings.name, *self.place, *options, *capacity)

    def delete(self) -> None:
        self.shell.remove(*_TPU, "delete", self.settings.name, *self.place, "--force", "--quiet")

    def state(self) -> tuple[str, str]:
        try:
            name = self.shell.ask(*_TPU, "describe", self.settings.name, *self.place, _STATE)
        except Failed as error:
            if error.absent:
                return "no such request", ABSENT
            raise
        return name, _MEANINGS.get(name, WAITING)

    def on_hosts(self, command: str, first: bool = False) -> str:
        to = ("--node=0", "--worker=0") if first else ("--node=all", "--worker=all")
        words = (*_TPU, "ssh", self.settings.name, *self.place, *to, *self.tunnel, f"--command={command}")
        if first:
            return self.shell.ask(*words)
        self.shell.run(*words)
        return ""

    def copy(self, file: Path, name: str) -> None:
        to = (f"{self.settings.name}:{name}", *self.place, "--node=all", "--worker=all", *self.tunnel)
        self.shell.run(*_TPU, "scp", str(file), *to)

    def logs(self) -> None:
        to = (*self.place, "--node=0", "--worker=0", *self.tunnel)
        self.shell.run(*_TPU, "ssh", self.settings.name, *to, f"--command={HOST} log")


_TPU = ("gcloud", "compute", "tpus", "queued-resources")
_ALPHA = ("gcloud", "alpha", "compute", "tpus", "queued-resources")


def _slice(settings: Settings) -> list[str]:
    place, cloud = settings.place, settings.cloud
    if is_named(place):
        return [f"--accelerator-type={cloud.sized_name(place)}"]
    return [f"--type={cloud.accelerator}", f"--topology={shape_text(place)}"]


def _capacity(settings: Settings) -> tuple[tuple[str, ...], list[str]]:
    """Which gcloud knows the flags of a capacity, and these flags."""
    if settings.capacity == "flex-start":
        return _ALPHA, ["--provisioning-model=flex-start", f"--max-run-duration={settings.hours}h"]
    if settings.capacity in RESERVED:
        where = settings.reservation_in(f"/locations/{settings.zone}")
        bound = ["--provisioning-model=reservation-bound"] if settings.capacity == "calendar" else []
        return _ALPHA, [f"--reservation={where}", *bound]
    return _TPU, ["--spot"] if settings.capacity == "spot" else []
