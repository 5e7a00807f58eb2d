#!/usr/bin/env bash
# A job on a GKE cluster of the Cluster Toolkit (gcluster), or of XPK, its predecessor:
#
#   export IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/compdiff-jax CLUSTER=... LOCATION=... PROJECT=... BUCKET=...
#   launch/gcluster.sh v6e-16 --config=configs/chest/compdiff.py --workdir=/bucket/run
#   SLICES=2 TOOL=xpk launch/gcluster.sh v6e-16 ...
#
# Build the image from launch/Dockerfile. Logs: gcluster job logs compdiff (xpk: the Cloud Logging page it prints). The
# job restarts after a failure or a preemption and resumes; submitting the same command again does so too.
set -euo pipefail
: "${IMAGE:?}" "${CLUSTER:?}" "${LOCATION:?}" "${PROJECT:?}" "${BUCKET:?}"
if (($# < 2)); then
  echo "usage: launch/gcluster.sh COMPUTE_TYPE --config=FILE --workdir=DIR [--config.key=value ...]" >&2
  exit 2
fi
type=$1
shift
# A run that was stopped before its last step ends with 75, so that the job is not taken for done.
command="compdiff train --stopped_status=75 $(printf '%q ' "$@")"
# Your XLA flags for the TPU.
command="${LIBTPU_INIT_ARGS:+env $(printf '%q ' "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS")}$command"

if [[ ${TOOL:-gcluster} == xpk ]]; then
  # The bucket is a storage of the cluster that `xpk storage attach` mounts at /bucket.
  exec xpk workload create --workload=compdiff --cluster="$CLUSTER" --zone="$LOCATION" --project="$PROJECT" \
    --tpu-type="$type" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" --max-restarts=50 \
    --restart-on-user-code-failure --env=JAX_COMPILATION_CACHE_DIR=/bucket/compile_cache --command="$command"
fi
exec gcluster job submit --name=compdiff --cluster="$CLUSTER" --location="$LOCATION" --project="$PROJECT" \
  --compute-type="$type" --num-slices="${SLICES:-1}" --image="$IMAGE" --mount="gs://$BUCKET:/bucket:rw" \
  --env=JAX_COMPILATION_CACHE_DIR=/bucket/compile_cache --command="$command"
