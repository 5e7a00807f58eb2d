#!/usr/bin/env bash
# GPUs under Slurm, one process a GPU, on any number of nodes:
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/chest/compdiff.py --workdir=/shared/run
#
# All arguments go to `compdiff train`. The workdir, the data and the environment lie where all nodes see them; activate
# the environment before sbatch. Log: compdiff-<job>.log. Two minutes before its time limit, or when it is preempted,
# the run writes a checkpoint, and this script puts itself back into the queue until the last step is reached.
#SBATCH --job-name=compdiff
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch launch/slurm.sh --config=FILE --workdir=DIR [--config.key=value ...]" >&2
  exit 2
fi

# Compiled programs, so that a restart does not compile again; only you should be able to write there.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/compdiff_jax}
# Overlaps communication with computing, and lets XLA choose its own matrix kernels.
gpu_flags="--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_triton_gemm_any=true"
export XLA_FLAGS="$gpu_flags ${XLA_FLAGS:-}"

# One task that fails ends the others, and srun's own status may be theirs; how each one ended stands on its stderr.
status=0
ends=$(srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-12}" \
  "${PYTHON:-python}" -u -m compdiff_jax train "$@" --stopped_status=75 2>&1 |
  tee -a /dev/stderr | sed -n 's/^srun: error: .*: tasks\{0,1\} [0-9,-]*: //p') || status=$?
first=${ends%%$'\n'*}

# 1, the run failed, or 2, bad input: another try would end the same way.
if [[ $first == "Exited with exit code "[12] ]]; then
  exit "${first##* }"
fi
# 75: stopped, or another process was lost; from 128 on: killed.
if (((status == 75 || status >= 128) && ${SLURM_RESTART_COUNT:-0} < 50)); then
  echo "not finished (status $status): back into the queue"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
