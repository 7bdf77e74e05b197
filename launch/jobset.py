"""A JobSet of this repository's own, which `kubectl` hands to a cluster of GKE."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from launch.gke import GRACE_SECONDS, KEPT_SECONDS, Gke, kept_by_kubernetes
from launch.settings import Settings
from navil_jax.errors import BAD_INPUT
from navil_jax.plan.cloud import chips_per_host, hosts_per_slice, shape_text

MOST_RESTARTS = 20  # after failures; what Google Cloud takes away does not count
STOPPED = 143  # exit status of training that SIGTERM has stopped: it has saved
_CONTAINER = "train"


class JobSet(Gke):
    """Needs kubectl and, in the cluster, JobSet 0.10 or newer, which `cluster` brings; any generation and slices."""

    actions: ClassVar[Mapping[str, str]] = {"manifest": "prints the JobSet that runs the command", **Gke.actions}
    takes_command = ("manifest", "submit")

    def manifest(self) -> None:
        print(self._text())

    def submit(self) -> None:
        manifest = self._text()
        self.clear()
        file = Path(tempfile.gettempdir()) / f"{self.settings.name}-jobset.json"
        if self.shell.dry:
            print(manifest)
        else:
            file.write_text(manifest + "\n")
        self.shell.run("kubectl", "create", f"--filename={file}")

    def _text(self) -> str:
        return json.dumps(job_set(self.settings, self.command), indent=2)


def job_set(settings: Settings, command: list[str]) -> dict[str, Any]:
    """The JobSet of a command. Names are those that xpk gives, so that logs, status and stop do for both.

    GKE itself tells the hosts of one another, and those of several slices too (TPU_WORKER_*, MEGASCALE_*).
    """
    queue = {"kueue.x-k8s.io/queue-name": "multislice-queue"}
    alone = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    job = {"name": "slice-job", "replicas": settings.slices, "template": {"spec": _job(settings, command)}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": settings.name, "labels": queue, "annotations": alone},
        "spec": {
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "failurePolicy": {
                "maxRestarts": MOST_RESTARTS,
                "rules": [
                    _rule("mistake", "FailJobSet", "0"),
                    _rule("taken", "RestartJobSetAndIgnoreMaxRestarts", "[12]"),
                ],
            },
            "replicatedJobs": [job],
        },
    }


def _rule(name: str, action: str, index: str) -> dict[str, Any]:
    """What follows when a rule of `_job` has ended a job; JobSet knows which one by Kubernetes' message."""
    patterns = [f"matching FailJob rule at index {index}$"]
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": patterns,
    }


def _job(settings: Settings, command: list[str]) -> dict[str, Any]:
    hosts = hosts_per_slice(settings.place)
    taken = {"type": "DisruptionTarget", "status": "True"}
    return {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [_on_exit(BAD_INPUT), {"action": "FailJob", "onPodConditions": [taken]}, _on_exit(STOPPED)]
        },
        "template": {"spec": _pod(settings, command)},
    }


def _on_exit(status: int) -> dict[str, Any]:
    return {
        "action": "FailJob",
        "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": [status]},
    }


def _pod(settings: Settings, command: list[str]) -> dict[str, Any]:
    place, cloud = settings.place, settings.cloud
    shape = shape_text(place)
    nodes = {"cloud.google.com/gke-tpu-accelerator": cloud.label, "cloud.google.com/gke-tpu-topology": shape}
    if place.generation.name == "tpu7x" and hosts_per_slice(place) > 1:
        policy = f"{cloud.type_name(place)}-{shape}-placement-policy"
        nodes["cloud.google.com/placement-policy-name"] = policy
    container = {
        "name": _CONTAINER,
        "image": settings.image,
        "command": [kept_by_kubernetes(word) for word in command],
        "securityContext": {"privileged": True},
        "resources": {"limits": {"google.com/tpu": chips_per_host(place)}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    return {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": nodes,
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists"}],
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
