#!/usr/bin/env bash
# Trains on a GKE cluster, on one or several slices, as a JobSet.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: launch/gke.sh [--dry-run] [--settings FILE] ACTION [-- COMMAND...]

  cluster               a cluster with the slices, JobSet and Kueue, made by xpk; then as connect
  connect               lets kubectl speak to the cluster
  image                 builds the container and pushes it
  manifest -- COMMAND   prints the JobSet that runs the command; it gets --config.workdir=$BUCKET/$NAME
  submit -- COMMAND     hands this JobSet to the cluster
  xpk -- COMMAND        the same through xpk, in the place of submit
  logs                  follows the log of the first host
  status                the JobSet and its hosts
  stop                  training saves a checkpoint and stops; the JobSet is deleted
  delete                deletes the cluster; it costs money until then

  --dry-run             prints the commands and runs none
  --settings FILE       in the place of launch/settings.sh (see launch/settings.example.sh)

Example:
  launch/gke.sh submit -- python -m navil_jax.train --config configs/my_recipe.py
  launch/gke.sh logs
TEXT
}

restarts=50 # after slices were taken away, or failed

quoted() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

# Names as xpk gives them, so that logs, status and stop do for both. GKE itself tells the hosts of one another, and
# those of several slices too (TPU_WORKER_*, MEGASCALE_*). Exit status 2 is a mistake that no restart mends.
manifest() {
  local words='' word
  for word in "${command[@]}"; do
    words+=$(printf '\n                    - %s' "$(quoted "$word")")
  done
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  labels:
    kueue.x-k8s.io/queue-name: multislice-queue
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice-job
      replicas: $SLICES
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $label
                cloud.google.com/gke-tpu-topology: $shape
              tolerations:
                - key: google.com/tpu
                  operator: Exists
              containers:
                - name: train
                  image: $IMAGE
                  command:$words
                  securityContext:
                    privileged: true
                  resources:
                    limits:
                      google.com/tpu: 4
                  volumeMounts:
                    - name: shared-memory
                      mountPath: /dev/shm
              volumes:
                - name: shared-memory
                  emptyDir:
                    medium: Memory
YAML
}

connect() {
  run gcloud container clusters get-credentials "$CLUSTER" "--project=$PROJECT" "--location=${ZONE%-*}"
}

cluster() {
  local capacity=--$CAPACITY
  if [[ $CAPACITY == reserved ]]; then
    [[ -n $RESERVATION ]] || fail "$settings: not set: RESERVATION"
    capacity=--reservation=$RESERVATION
  fi
  run xpk cluster create "--cluster=$CLUSTER" "${place[@]}" "--tpu-type=$accelerator" "--num-slices=$SLICES" "$capacity"
  connect
}

submit() {
  local file=${TMPDIR:-/tmp}/$NAME-jobset.yaml
  if "$dry_run"; then
    manifest
  else
    manifest >"$file"
  fi
  run kubectl apply -f "$file"
}

parse_arguments "$@"
case $action in
  '') fail "no action given" ;;
  manifest | submit | xpk) read_settings PROJECT ZONE BUCKET NAME TOPOLOGY SLICES CAPACITY CLUSTER IMAGE && add_workdir ;;
  image) read_settings IMAGE NAME TOPOLOGY SLICES CAPACITY ;;
  cluster | connect | logs | status | stop | delete) read_settings PROJECT ZONE NAME TOPOLOGY SLICES CAPACITY CLUSTER ;;
  *) fail "unknown action $action" ;;
esac
place=("--project=${PROJECT:-}" "--zone=${ZONE:-}")
pods="jobset.sigs.k8s.io/jobset-name=$NAME"
case $action in
  cluster) cluster ;;
  connect) connect ;;
  image)
    run docker build --platform=linux/amd64 "--tag=$IMAGE" "--file=$root/launch/Dockerfile" "$root"
    run docker push "$IMAGE"
    ;;
  manifest) manifest ;;
  submit) submit ;;
  xpk)
    run xpk workload create "--cluster=$CLUSTER" "${place[@]}" "--workload=$NAME" "--tpu-type=$accelerator" \
      "--num-slices=$SLICES" "--docker-image=$IMAGE" "--max-restarts=$restarts" "--command=$(show "${command[@]}")"
    ;;
  logs)
    first="jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    run kubectl logs --follow --tail=100 --selector="$pods,$first"
    ;;
  status)
    run kubectl get jobset "$NAME"
    run kubectl get pods "--selector=$pods" --output=wide
    ;;
  stop) run kubectl delete jobset "$NAME" ;;
  delete) run xpk cluster delete "--cluster=$CLUSTER" "${place[@]}" ;;
esac
