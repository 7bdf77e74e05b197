"""What the programs that `launch` calls understand, from their references: flags of every command, and which it needs.

gcloud: the synopses of its reference; xpk: the parser of version 1.16.0; gcluster: cmd/job/submit.go of the Cluster
Toolkit; kubectl and docker: their help. Only those flags are listed that one could take for this work.
"""

_GCLOUD = "project format quiet zone"
_SSH = "tunnel-through-iap internal-ip ssh-key-file ssh-flag strict-host-key-checking"
_QUEUED = (
    "accelerator-type type topology runtime-version node-id node-count node-prefix async boot-disk data-disk "
    "description guaranteed internal-ips labels metadata metadata-from-file network range reserved scopes "
    "service-account shielded-secure-boot spot subnetwork tags valid-after-duration valid-after-time "
    "valid-until-duration valid-until-time"
)
_REQUEST = "runtime-version accelerator-type|type node-id|node-count zone"
_XPK = "cluster project project-number zone namespace dry-run quiet skip-validation"
_KUBECTL = "output selector"

# The words of a command -> flags that it knows.
FLAGS = {
    "gcloud compute tpus queued-resources create": f"{_GCLOUD} {_QUEUED}",
    "gcloud alpha compute tpus queued-resources create": (
        f"{_GCLOUD} {_QUEUED} provisioning-model max-run-duration reservation workload-type best-effort"
    ),
    "gcloud compute tpus queued-resources describe": _GCLOUD,
    "gcloud compute tpus queued-resources delete": f"{_GCLOUD} force async",
    "gcloud compute tpus queued-resources ssh": f"{_GCLOUD} {_SSH} node worker command batch-size",
    "gcloud compute tpus queued-resources scp": f"{_GCLOUD} {_SSH} node worker batch-size compress recurse",
    "gcloud compute ssh": f"{_GCLOUD} {_SSH} command",
    "gcloud compute scp": f"{_GCLOUD} {_SSH} compress recurse",
    "gcloud compute resource-policies create workload-policy": (
        "project region type accelerator-topology accelerator-topology-mode max-topology-distance description"
    ),
    "gcloud compute resource-policies delete": "project quiet region",
    "gcloud compute instance-templates create": (
        "project machine-type image-family image-project image boot-disk-size boot-disk-type maintenance-policy scopes "
        "service-account network subnet no-address provisioning-model instance-termination-action max-run-duration "
        "reservation-affinity reservation instance-template-region metadata labels tags"
    ),
    "gcloud compute instance-templates delete": "project quiet",
    "gcloud compute instance-groups managed create": (
        f"{_GCLOUD} template size default-action-on-vm-failure workload-policy base-instance-name"
    ),
    "gcloud compute instance-groups managed delete": _GCLOUD,
    "gcloud compute instance-groups managed list-instances": _GCLOUD,
    "gcloud container clusters get-credentials": "project location dns-endpoint internal-ip",
    "kubectl get jobset": f"{_KUBECTL} ignore-not-found",
    "kubectl get pods": _KUBECTL,
    "kubectl create": "filename",
    "kubectl delete jobset": "timeout ignore-not-found wait",
    "kubectl logs": "follow tail selector",
    "xpk cluster create": (
        f"{_XPK} tpu-type num-slices on-demand reservation spot flex private authorized-networks "
        "custom-cluster-arguments custom-tpu-nodepool-arguments gke-version enable-mtc mtc-ramdisk-size mtc-gcs-bucket"
    ),
    "xpk cluster delete": f"{_XPK} force",
    "xpk workload create": (
        f"{_XPK} workload command tpu-type num-slices docker-image base-docker-image script-dir max-restarts priority "
        "restart-on-exit-codes termination-grace-period-seconds ttl-seconds-after-finished env env-file scheduler "
        "ramdisk-directory mtc-enabled output-manifest-file use-parallel-containers"
    ),
    "gcluster job submit": (
        "project cluster location name image command compute-type num-slices restarts restart-on-exit-codes queue "
        "grace-period gke-ttl-after-finished gke-disable-parallel-containers placement-policy node-constraint topology "
        "service-account priority await-job-completion timeout dry-run-out mount verbose"
    ),
    "docker build": "platform tag file",
    "docker push": "",
}

# The words of a command -> flags that it cannot do without; of several words with | one.
NEEDED = {
    "gcloud compute tpus queued-resources create": _REQUEST,
    "gcloud alpha compute tpus queued-resources create": _REQUEST,
    "gcloud compute resource-policies create workload-policy": "type",
    "gcloud compute instance-templates create": "machine-type image-family",
    "gcloud compute instance-groups managed create": "template size",
    "xpk cluster create": "cluster tpu-type|device-type",
    "xpk cluster delete": "cluster",
    "xpk workload create": "command workload cluster tpu-type|device-type",
    "gcluster job submit": "cluster location project command name compute-type image",
    "kubectl create": "filename",
}


def mistakes(command: list[str]) -> list[str]:
    """What is wrong with a command of these programs; nothing for others."""
    if command[0] not in {known.split()[0] for known in FLAGS}:
        return [] if command[0] == "tar" else [f"{command[0]}: no such program"]
    words = [word for word in command if not word.startswith("--")]
    known = next((name for name in FLAGS if words[: len(name.split())] == name.split()), "")
    if not known:
        return [f"no such command: {' '.join(words[:5])}"]
    flags = {word[2:].partition("=")[0] for word in command if word.startswith("--")}
    wrong = [f"{known}: no flag --{flag}" for flag in sorted(flags - set(FLAGS[known].split()))]
    for needed in NEEDED.get(known, "").split():
        if not flags.intersection(needed.split("|")):
            wrong.append(f"{known}: needs --{needed}")
    if len([flag for flag in flags if flag in ("spot", "reserved", "provisioning-model", "guaranteed")]) > 1:
        wrong.append(f"{known}: two kinds of capacity")
    return wrong
