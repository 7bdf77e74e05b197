# shellcheck shell=bash disable=SC2034 # read by the launchers
# What the launchers need to know. Copy it to launch/settings.sh, which git does not track, and fill it in.

PROJECT=         # of Google Cloud: my-project
ZONE=            # with such TPUs: us-east5-a
BUCKET=          # of the runs, in the same region: gs://my-bucket
NAME=navil       # of the run; its folder is $BUCKET/$NAME
TOPOLOGY=v5p-128 # Google Cloud's name of a slice: v4-N and v5p-N count cores, v5e-N and v6e-N chips
SLICES=1         # such slices, joined by the data centre's network
CAPACITY=spot    # spot (cheap, can be taken away), on-demand or reserved
RESERVATION=     # its name, for reserved capacity on GKE

RUNTIME_VERSION= # system image of TPU VMs; empty: the usual one of the topology

CLUSTER= # of GKE
IMAGE=   # of the container on GKE: us-docker.pkg.dev/my-project/my-repository/navil
