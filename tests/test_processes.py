"""Training by several processes, each with one CPU device, joined by Gloo: as several hosts would.

One run of one process with four devices is what everything is compared with.
"""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from conftest import _FAST_COMPILE, REPOSITORY, config_arguments

from compdiff_jax import cli, train
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.metrics import read_metrics

_STEPS = 40
_RUN = ("--config.mesh.fsdp=2", f"--config.train.steps={_STEPS}", "--config.logging.checkpoint_every=20")
# Sums over devices in another order, followed through 40 steps of Adam.
_TOLERANCE = 2e-3


def _environment(devices=1):
  flags = f"--xla_force_host_platform_device_count={devices} {_FAST_COMPILE}"
  return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}


_STARTED = []


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
  yield
  for process in _STARTED:
    if process.poll() is None:
      process.kill()
    process.wait()
  _STARTED.clear()


def _start(command, **environment):
  process = subprocess.Popen(
    [*map(str, command)],
    cwd=REPOSITORY,
    env={**_environment(), **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  _STARTED.append(process)
  return process


def _end(process, timeout=400):
  out, _ = process.communicate(timeout=timeout)
  return process.returncode, out


def _wait(condition, processes, seconds=400):
  deadline = time.monotonic() + seconds
  while not condition():
    for process in processes:
      assert process.poll() is None, process.stdout.read()
    assert time.monotonic() < deadline
    time.sleep(0.01)


def _heartbeat(workdir, process):
  with contextlib.suppress(FileNotFoundError):
    return json.loads((workdir / "heartbeat" / f"{process}.json").read_text())


def _free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@pytest.fixture(scope="module")
def arguments(workspace):
  return [*config_arguments(workspace), *_RUN]


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory):
  """Rows of the run of one process with four devices."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  command = [sys.executable, "-m", "compdiff_jax", "train", *arguments, f"--workdir={workdir}"]
  done = subprocess.run(command, cwd=REPOSITORY, env=_environment(4), capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return read_metrics(workdir)


def _assert_same(rows, reference):
  assert [row["step"] for row in rows] == [row["step"] for row in reference] == list(range(2, _STEPS + 1, 2))
  for ours, theirs in zip(rows, reference):
    for name in ("loss", "diffusion", "grad_norm"):
      assert ours[name] == pytest.approx(theirs[name], rel=_TOLERANCE), (ours["step"], name)
    assert ours["images"] == theirs["images"]


def test_four_processes_lose_one_and_eight_devices_of_one_process_finish(arguments, reference, tmp_path, capsys):
  workdir = tmp_path / "run"
  port = _free_port()
  command = [sys.executable, "-m", "compdiff_jax", "train", *arguments, f"--workdir={workdir}"]
  places = [[f"--coordinator=127.0.0.1:{port}", "--num_processes=4", f"--process_id={i}"] for i in range(4)]
  processes = [_start([*command, *place]) for place in places]
  # Killed past a checkpoint, with rows in metrics.jsonl that the resumed run repeats.
  _wait(lambda: (workdir / "checkpoints" / "20").exists(), processes)
  _wait(lambda: any(row["step"] >= 22 for row in read_metrics(workdir)), processes)
  processes[3].send_signal(signal.SIGKILL)
  for process in processes[:3]:
    status, out = _end(process, timeout=200)
    assert status == cli.LostError.status, out
    assert "of 4 lost another one" in out and "the same command on every host resumes" in out
  assert processes[3].wait() == -signal.SIGKILL
  processes[3].stdout.close()
  assert [_heartbeat(workdir, i)["state"] for i in range(3)] == ["failed"] * 3
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps == [20]

  # This process, with its eight devices, on another mesh.
  train.main([*arguments, f"--workdir={workdir}", "--config.mesh.fsdp=4"])
  assert "on 8 cpu device(s) of 1 process(es)" in capsys.readouterr().err
  _assert_same(read_metrics(workdir), reference)


def test_two_processes_stop_on_sigterm_and_the_slurm_script_resumes_them(arguments, reference, tmp_path):
  """launch/local.py starts them; SIGTERM to one of them stops both. Then launch/slurm.sh, with a stand-in for srun."""
  workdir = tmp_path / "run"
  local = _start([sys.executable, "-m", "launch.local", "--num_processes=2", "--", "compdiff", "train", *arguments,
                  f"--workdir={workdir}", "--stopped_status=75"])  # fmt: skip
  _wait(lambda: _heartbeat(workdir, 0) and _heartbeat(workdir, 1), [local])
  children = subprocess.run(["pgrep", "-P", str(local.pid)], capture_output=True, text=True, check=True)
  os.kill(int(children.stdout.split()[1]), signal.SIGTERM)
  status, out = _end(local)
  assert status == 75, out
  assert "SIGTERM: stopped, to be resumed" in out
  stopped = [_heartbeat(workdir, i) for i in range(2)]
  assert [beat["state"] for beat in stopped] == ["stopped"] * 2
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps[-1] == stopped[0]["step"] == stopped[1]["step"] < _STEPS

  status, out = _end(_slurm(tmp_path, [*arguments, f"--workdir={workdir}"], tasks=2))
  assert status == 0, out
  assert not (tmp_path / "requeued").exists()
  _assert_same(read_metrics(workdir), reference)
  assert [_heartbeat(workdir, i)["state"] for i in range(2)] == ["finished"] * 2


def _slurm(directory, arguments, tasks):
  """launch/slurm.sh with stand-ins: srun starts the tasks as Slurm would describe them, scontrol leaves a note."""
  srun = f"""#!{sys.executable}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
  command.pop(0)
slurm = dict(SLURM_STEP_NODELIST="127.0.0.1", SLURM_NTASKS="{tasks}", SLURM_STEP_NUM_NODES="1")
tasks = [
  subprocess.Popen(command, env={{**os.environ, **slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
  for i in range({tasks})
]
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
  tools = directory / "tools"
  tools.mkdir(exist_ok=True)
  for name, text in (("srun", srun), ("scontrol", f'#!/bin/sh\necho "$@" > {directory}/requeued\n')):
    (tools / name).write_text(text)
    (tools / name).chmod(stat.S_IRWXU)
  environment = {
    "PATH": f"{tools}:{os.environ['PATH']}",
    "PYTHON": sys.executable,
    "SLURM_JOB_ID": str(os.getpid()),
    "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
  }
  return _start(["bash", REPOSITORY / "launch" / "slurm.sh", *arguments], **environment)


_JOIN = """
import argparse, sys
from compdiff_jax import cli, distributed

def main(argv):
  parser = cli.parser("join", "")
  distributed.add_arguments(parser)
  with distributed.session(parser.parse_args(argv)):
    pass

status = cli.run(main, "join")
distributed.leave(status)
sys.exit(status)
"""


def test_coordinator_that_never_answers_and_processes_that_never_come():
  starts = []
  for index in range(2):
    place = [f"--coordinator=127.0.0.1:{_free_port()}", "--num_processes=2", f"--process_id={index}"]
    starts.append(_start([sys.executable, "-c", _JOIN, *place, "--process_timeout=2"]))
  for process, words in zip(starts, ("not all processes came within 2 s", "does not answer within 2 s")):
    status, out = _end(process, timeout=200)
    assert status == cli.LostError.status and words in out, out


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (["--num_processes=2"], "--coordinator is missing"),
    (["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"], "must be from 0 to 1"),
    (["--coordinator=localhost", "--num_processes=2", "--process_id=0"], "must be HOST:PORT"),
  ],
)
def test_incomplete_options_are_refused(workspace, tmp_path, fails, options, words):
  assert words in fails(train.main, *config_arguments(workspace), f"--workdir={tmp_path / 'run'}", *options)
