"""launch/slurm.sh on a real Slurm of one node, which these tests start and end.

Slurm is found on the PATH, or below the directory SLURM_ROOT, into which `make test-slurm` unpacks Debian's packages.
"""

import getpass
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FAST_COMPILE, PATIENCE, REPOSITORY, config_arguments

from compdiff_jax.metrics import read_metrics

_ROOT = Path(os.environ.get("SLURM_ROOT", "/"))
_LIBRARIES = _ROOT / "usr" / "lib" / f"{os.uname().machine}-linux-gnu"
_PATH = f"{_ROOT}/usr/bin:{_ROOT}/usr/sbin:{os.environ['PATH']}"


def _program(name):
  return shutil.which(name, path=_PATH) or shutil.which(f"{name}-wlm", path=_PATH)  # Debian's name of the file


pytestmark = pytest.mark.skipif(not _program("slurmctld"), reason="no slurmctld; `make test-slurm` fetches it")


def _free_port():
  with socket.socket() as probe:
    probe.bind(("", 0))
    return probe.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  """Environment of a cluster of one node."""
  directory = tmp_path_factory.mktemp("slurm")
  configuration = f"""
ClusterName=test
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
PluginDir={_LIBRARIES}/slurm-wlm
StateSaveLocation={directory}
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
NodeName={socket.gethostname()} NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
"""
  (directory / "slurm.conf").write_text(configuration)
  (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
  environment = {
    **os.environ,
    "PATH": _PATH,
    "LD_LIBRARY_PATH": f"{_LIBRARIES}/slurm-wlm:{_LIBRARIES}",
    "SLURM_CONF": str(directory / "slurm.conf"),
  }
  commands = [_program("slurmctld"), "-D"], [_program("slurmd"), "-D", "-d", _program("slurmstepd")]
  with (directory / "log").open("w") as log:
    daemons = [subprocess.Popen(command, env=environment, stdout=log, stderr=log) for command in commands]
  deadline = time.monotonic() + PATIENCE
  try:
    while "idle" not in subprocess.run(["sinfo", "-h"], env=environment, capture_output=True, text=True).stdout:
      ready = all(daemon.poll() is None for daemon in daemons) and time.monotonic() < deadline
      assert ready, (directory / "log").read_text()
      time.sleep(0.1)
    yield environment
  finally:
    for daemon in daemons:
      daemon.terminate()
      daemon.wait()


def _job(slurm, directory, *arguments, **environment):
  """Submits launch/slurm.sh for two tasks and waits for its end; returns (what scontrol shows, its log)."""
  size = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]
  command = ["sbatch", "--parsable", *size, REPOSITORY / "launch" / "slurm.sh", *arguments]
  environment = {**slurm, "PYTHONPATH": str(REPOSITORY), "PYTHON": sys.executable, **environment}
  options = {"cwd": directory, "env": environment, "capture_output": True, "text": True, "check": True}
  number = subprocess.run(command, **options).stdout.strip()
  deadline = time.monotonic() + PATIENCE
  while time.monotonic() < deadline:
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", number], **options).stdout
    job = dict(re.findall(r"(\w+)=(\S+)", shown))
    if job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"):
      break
    time.sleep(0.2)
  return job, (directory / f"compdiff-{number}.log").read_text()


@pytest.mark.parametrize(("status", "state", "restarts"), [(2, "FAILED", 0), (75, "COMPLETED", 1)])
def test_bad_input_ends_a_job_and_a_lost_process_restarts_it(slurm, tmp_path, status, state, restarts):
  """One task ends, upon which Slurm ends the other; that of the second start succeeds."""
  python = tmp_path / "python"
  python.write_text(
    f"#!/bin/sh\n[ $SLURM_RESTART_COUNT ] && exit 0\n[ $SLURM_PROCID = 0 ] && exit {status}\nexec sleep {PATIENCE}\n"
  )
  python.chmod(stat.S_IRWXU)
  job, log = _job(slurm, tmp_path, "--workdir=run", PYTHON=str(python))
  assert (job["JobState"], int(job["Restarts"])) == (state, restarts), log
  assert "Terminated" in log and job["ExitCode"] == f"{status if state == 'FAILED' else 0}:0"


def test_two_tasks_train(slurm, workspace, tmp_path):
  arguments = [*config_arguments(workspace), "--config.train.steps=4", f"--workdir={tmp_path / 'run'}"]
  job, log = _job(slurm, tmp_path, *arguments, XLA_FLAGS=FAST_COMPILE)
  assert job["JobState"] == "COMPLETED" and "of 2 process(es)" in log, log
  assert [row["step"] for row in read_metrics(tmp_path / "run")] == [2, 4]
