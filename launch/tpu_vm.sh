#!/usr/bin/env bash
# One TPU slice as TPU VMs, from creation to deletion:
#
#   export NAME=compdiff ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite BUCKET=my-bucket
#   launch/tpu_vm.sh create            # asks for the slice and waits until it is there (SPOT=1: cheaper, preemptible)
#   launch/tpu_vm.sh install           # this checkout and its environment, on all hosts
#   launch/tpu_vm.sh train --config=configs/chest/compdiff.py --workdir=bucket/run
#   launch/tpu_vm.sh logs              # follows host 0; the files are ~/compdiff-jax/train.log on every host
#   launch/tpu_vm.sh delete
#
# `train` starts the same command on all hosts and returns at once. After a preemption: delete, create, install, and the
# same `train` resumes. BUCKET is mounted at ~/compdiff-jax/bucket on all hosts; give it a hierarchical namespace, in
# which renaming a folder is one operation. Runtimes: v4 tpu-ubuntu2204-base, v5e v2-alpha-tpuv5-lite, v5p
# v2-alpha-tpuv5, v6e v2-alpha-tpuv6e.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}"

on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

case ${1:-} in
create)
  : "${TYPE:?}" "${RUNTIME:?}"
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" ${SPOT:+--spot}
  until
    state=$(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)')
    [[ $state == ACTIVE ]]
  do
    [[ $state != FAILED && $state != SUSPENDED ]] || { echo "$NAME is $state: delete it" >&2 && exit 1; }
    echo "waiting for $NAME ($state)" && sleep 30
  done
  ;;
install)
  : "${BUCKET:?}"
  archive=$(mktemp)
  git archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:compdiff-jax.tar.gz" --zone="$ZONE" --worker=all
  rm "$archive"
  on_all "mkdir -p compdiff-jax/bucket && tar -xzf compdiff-jax.tar.gz -C compdiff-jax && cd compdiff-jax
    python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
    python3 -m uv pip install --quiet --python .venv --editable . 'jax[tpu]'
    mountpoint -q bucket || gcsfuse --implicit-dirs $BUCKET bucket"
  ;;
train)
  shift
  # The last command alone goes to the background: a list would keep the connection open until training ends.
  on_all "cd compdiff-jax || exit
    export JAX_COMPILATION_CACHE_DIR=\$PWD/bucket/compile_cache PYTHONUNBUFFERED=1 \
      LIBTPU_INIT_ARGS='${LIBTPU_INIT_ARGS:-}'
    nohup .venv/bin/compdiff train $(printf '%q ' "$@") >> train.log 2>&1 < /dev/null &"
  ;;
stop) # a checkpoint, then the end
  on_all "pkill -TERM -f 'bin/compdiff train'"
  ;;
logs)
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 --command="tail -n 50 -F compdiff-jax/train.log"
  ;;
delete)
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
  ;;
*)
  echo "usage: launch/tpu_vm.sh create | install | train ARGUMENTS | stop | logs | delete" >&2
  exit 2
  ;;
esac
