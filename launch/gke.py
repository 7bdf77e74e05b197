"""A cluster of GKE: what the roads that hand jobs to Kubernetes have in common."""

import json
import shlex
from collections.abc import Mapping
from typing import ClassVar

from launch.settings import RESERVED, ROOT, Settings
from launch.shell import Shell
from navil_jax.errors import UserError

GRACE_SECONDS = (
    300  # to save after `stop`; a spot node itself is gone 30 s after its notice, 15 s after that of its pods
)
KEPT_SECONDS = 12 * 3600  # that a finished job is kept, for its logs


class Gke:
    """A road whose hosts are pods. How a job is handed over is the road's own."""

    actions: ClassVar[Mapping[str, str]] = {
        "cluster": "a cluster with the slices, JobSet and Kueue, made by xpk; then as connect",
        "connect": "lets kubectl speak to the cluster",
        "image": "builds the container and pushes it",
        "submit": "hands the command to the cluster",
        "logs": "follows the log of the first host",
        "status": "the job and its hosts",
        "stop": "training saves a checkpoint and stops; the job is deleted",
        "delete": "deletes the cluster; it costs money until then",
    }
    takes_command: tuple[str, ...] = ("submit",)
    needed = ("project", "zone", "bucket", "name", "topology", "capacity", "cluster", "image")

    def __init__(self, settings: Settings, shell: Shell, command: list[str]) -> None:
        self.settings, self.shell, self.command = settings, shell, command
        self.place = (f"--project={settings.project}", f"--zone={settings.zone}")
        self.location = settings.cluster_location or settings.region

    @classmethod
    def check(cls, settings: Settings, action: str) -> None:
        """Raises a `UserError` if this road does not lead there."""
        if action == "image" and "@" in settings.image:
            raise settings.error("image", "names a digest, which is known after the image is built; give it a tag")

    def cluster(self) -> None:
        settings = self.settings
        options = [f"--tpu-type={settings.cloud.type_name(settings.place)}", f"--num-slices={settings.slices}"]
        options.append(_capacity(settings))
        networks = [f"--{key}={getattr(settings, key)}" for key in ("network", "subnetwork") if getattr(settings, key)]
        options += [f"--custom-cluster-arguments={' '.join(networks)}"] if networks else []
        if settings.service_account:
            options.append(f"--custom-tpu-nodepool-arguments=--service-account={settings.service_account}")
        options += ["--private"] if settings.private else []
        self.shell.run("xpk", "cluster", "create", f"--cluster={settings.cluster}", *self.place, *options)
        self.connect()

    def connect(self) -> None:
        to = (f"--project={self.settings.project}", f"--location={self.location}")
        endpoint = ("--dns-endpoint",) if self.settings.private else ()
        self.shell.run("gcloud", "container", "clusters", "get-credentials", self.settings.cluster, *to, *endpoint)

    def image(self) -> None:
        file, tag = ROOT / "launch" / "Dockerfile", self.settings.image
        self.shell.run("docker", "build", "--platform=linux/amd64", f"--tag={tag}", f"--file={file}", str(ROOT))
        self.shell.run("docker", "push", tag)

    def submit(self) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        """Deletes a finished job of this name, which would keep a new one from starting.

        Raises:
          UserError: it is not finished.
        """
        name = self.settings.name
        found = self.shell.ask("kubectl", "get", "jobset", name, "--ignore-not-found", "--output=json")
        if not found:
            return
        if not json.loads(found).get("status", {}).get("terminalState"):
            raise UserError(
                f"{name}: a job of this name is not finished; stop it first, or change name in the settings"
            )
        self.shell.run("kubectl", "delete", "jobset", name)

    def logs(self) -> None:
        first = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
        self.shell.run("kubectl", "logs", "--follow", "--tail=100", f"--selector={self._pods()},{first}")

    def status(self) -> None:
        self.shell.run("kubectl", "get", "jobset", self.settings.name)
        self.shell.run("kubectl", "get", "pods", f"--selector={self._pods()}", "--output=wide")

    def stop(self) -> None:
        self.shell.run("kubectl", "delete", "jobset", self.settings.name, f"--timeout={GRACE_SECONDS + 60}s")

    def delete(self) -> None:
        self.shell.run("xpk", "cluster", "delete", f"--cluster={self.settings.cluster}", *self.place)

    def line(self) -> str:
        """The command for a shell, as programs want it that put it into a manifest of YAML themselves.

        Raises:
          UserError: a line break or another control character, which would not arrive as it is.
        """
        if broken := [word for word in self.command if not word.isprintable()]:
            raise UserError(f"{broken[0]!r}: control characters and line breaks are lost here; take the road jobset")
        return kept_by_kubernetes(shlex.join(self.command))

    def _pods(self) -> str:
        return f"jobset.sigs.k8s.io/jobset-name={self.settings.name}"


def kept_by_kubernetes(word: str) -> str:
    """A word of a command as it has to be given, so that Kubernetes hands it on as it is: it reads $(NAME) and $$."""
    return word.replace("$", "$$")


def _capacity(settings: Settings) -> str:
    if settings.capacity in RESERVED:
        return f"--reservation={settings.reservation}"
    return {"flex-start": "--flex"}.get(settings.capacity, f"--{settings.capacity}")
