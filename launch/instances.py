"""Compute Engine's instance groups, which take over from the Cloud TPU API: one slice of v5p, v6e or tpu7x."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from launch.hosts import ABSENT, ACTIVE, HOST, LOST, WAITING, Hosts
from launch.settings import RESERVED, Settings
from launch.shell import Failed
from navil_jax.errors import UserError
from navil_jax.plan.cloud import hosts_per_slice, shape_text

_T = TypeVar("_T")
_GROUPS = ("gcloud", "compute", "instance-groups", "managed")
_TEMPLATES = ("gcloud", "compute", "instance-templates")
_POLICIES = ("gcloud", "compute", "resource-policies")
_IMAGES = "ubuntu-os-accelerator-images"  # project of the system images
_GONE = {"STOPPING", "STOPPED", "TERMINATED", "SUSPENDING", "SUSPENDED"}
_UNKNOWN = "INSTANCE"  # stands for every host in a dry run, as Compute Engine names them
_AT_ONCE = 32  # connections


class Instances(Hosts):
    """A managed group of instances whose workload policy makes one slice of them."""

    @classmethod
    def check(cls, settings: Settings, action: str) -> None:
        if not settings.cloud.image:
            name = settings.place.generation.name
            raise settings.error("topology", f"instance groups have no {name}; take the road queued or jobset")
        if settings.slices > 1:
            raise settings.error("slices", "an instance group is one slice; several are on the roads queued and jobset")

    @property
    def _several(self) -> bool:
        return hosts_per_slice(self.settings.place) > 1

    def create(self) -> None:
        settings, name = self.settings, self.settings.name
        place = settings.place
        options = [f"--template={name}", f"--size={hosts_per_slice(place)}"]
        options.append("--default-action-on-vm-failure=do-nothing")  # one host that is made anew is in no slice
        if self._several:
            shape = ("--type=HIGH_THROUGHPUT", f"--accelerator-topology={shape_text(place)}")
            self.shell.run(*_POLICIES, "create", "workload-policy", name, *self._in_region(), *shape)
            policy = f"projects/{settings.project}/regions/{settings.region}/resourcePolicies/{name}"
            options.append(f"--workload-policy={policy}")
        self.shell.run(*_TEMPLATES, "create", name, self.place[0], *_template(settings))
        self.shell.run(*_GROUPS, "create", name, *self.place, *options)

    def delete(self) -> None:
        name = self.settings.name
        self.shell.remove(*_GROUPS, "delete", name, *self.place, "--quiet")
        self.shell.remove(*_TEMPLATES, "delete", name, self.place[0], "--quiet")
        if self._several:
            self.shell.remove(*_POLICIES, "delete", name, *self._in_region(), "--quiet")

    def state(self) -> tuple[str, str]:
        try:
            found = self._list("value(instanceStatus)")
        except Failed as error:
            if error.absent:
                return "no such group", ABSENT
            raise
        wanted = hosts_per_slice(self.settings.place)
        name = f"{found.count('RUNNING')} of {wanted} hosts run"
        if lost := sorted(_GONE.intersection(found)):
            return f"{name}, others are {', '.join(lost)}", LOST
        return name, ACTIVE if found.count("RUNNING") == wanted else WAITING

    def on_hosts(self, command: str, first: bool = False) -> str:
        if first:
            return self.shell.ask(*self._ssh(self._first(), command))
        self._on_each(lambda name: self.shell.run(*self._ssh(name, command)))
        return ""

    def copy(self, file: Path, name: str) -> None:
        def copy(host: str) -> None:
            self.shell.run("gcloud", "compute", "scp", str(file), f"{host}:{name}", *self.place, *self.tunnel)

        self._on_each(copy)

    def logs(self) -> None:
        self.shell.run(*self._ssh(self._first(), f"{HOST} log"))

    def _in_region(self) -> tuple[str, str]:
        return self.place[0], f"--region={self.settings.region}"

    def _list(self, form: str) -> list[str]:
        return self.shell.ask(*_GROUPS, "list-instances", self.settings.name, *self.place, f"--format={form}").split()

    def _names(self) -> list[str]:
        names = sorted(self._list("value(NAME)")) or ([_UNKNOWN] if self.shell.dry else [])
        if not names:
            raise UserError(f"{self.settings.name}: the group has no hosts yet; `wait` until it has")
        return names

    def _ssh(self, name: str, command: str) -> tuple[str, ...]:
        return ("gcloud", "compute", "ssh", name, *self.place, *self.tunnel, f"--command={command}")

    def _first(self) -> str:
        """The host whose process is number 0, the one that says how training goes."""
        numbers = self._on_each(lambda name: (self.shell.ask(*self._ssh(name, f"{HOST} number")), name))
        return min(numbers)[1]

    def _on_each(self, work: Callable[[str], _T]) -> list[_T]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(work, self._names()))


def _template(settings: Settings) -> list[str]:
    """Options of the template that the group makes its instances from."""
    cloud = settings.cloud
    options = [
        f"--machine-type={cloud.machine_type(settings.place)}",
        f"--image-family={settings.system_image or cloud.image}",
        f"--image-project={_IMAGES}",
        "--maintenance-policy=TERMINATE",
        "--boot-disk-size=200GB",
        "--scopes=cloud-platform",
    ]
    options += [f"--boot-disk-type={cloud.disk}"] if cloud.disk else []
    options += [f"--network={settings.network}"] if settings.network else []
    if "/" in settings.subnetwork:
        options.append(f"--subnet={settings.subnetwork}")
    elif settings.subnetwork:
        options.append(
            f"--subnet=projects/{settings.project}/regions/{settings.region}/subnetworks/{settings.subnetwork}"
        )
    options += ["--no-address"] if settings.private else []
    options += [f"--service-account={settings.service_account}"] if settings.service_account else []
    if settings.capacity == "spot":
        options += ["--provisioning-model=SPOT", "--instance-termination-action=STOP"]
    elif settings.capacity == "flex-start":
        options += ["--provisioning-model=FLEX_START", f"--max-run-duration={settings.hours}h"]
        options.append("--instance-termination-action=DELETE")
    elif settings.capacity in RESERVED:
        where = settings.reservation_in()
        options += ["--provisioning-model=RESERVATION_BOUND", "--instance-termination-action=DELETE"]
        options += ["--reservation-affinity=specific", f"--reservation={where}"]
    return options
