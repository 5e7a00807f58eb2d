"""Training and sampling by several processes; what they do together in small programs: test_distributed.py.

One run of one process with four devices is what everything is compared with.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys

import jax
import pytest
from conftest import PATIENCE, REPOSITORY, config_arguments
from local_processes import LOSS_SECONDS, end, environment, heartbeat, places, wait

from compdiff_jax import cli, sample, sharding, train
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.metrics import read_metrics

_STEPS = 12
_CHECKPOINT = 6
_RUN = (
  "--config.mesh.fsdp=2",
  f"--config.train.steps={_STEPS}",
  f"--config.logging.checkpoint_every={_CHECKPOINT}",
  "--config.fairness.variant=compdiff",
  # No search: the place of a maximum may jump where gaps differ by a rounding. What processes do about it: below.
  "--config.fairness.window=100",
)
# Sums over devices in another order, followed through the steps of Adam.
_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def arguments(workspace):
  return [*config_arguments(workspace), *_RUN]


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory):
  """Rows of the run of one process with four devices."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  command = [sys.executable, "-m", "compdiff_jax", "train", *arguments, f"--workdir={workdir}"]
  done = subprocess.run(command, cwd=REPOSITORY, env=environment(4), capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return read_metrics(workdir)


def _assert_same(rows, reference):
  assert [row["step"] for row in rows] == [row["step"] for row in reference] == list(range(2, _STEPS + 1, 2))
  for ours, theirs in zip(rows, reference):
    for name in ("loss", "diffusion", "grad_norm", "fair_loss_gap"):
      assert ours[name] == pytest.approx(theirs[name], rel=_TOLERANCE), (ours["step"], name)
    assert ours["images"] == theirs["images"]
    assert ours["fair_sigma_mean"] == pytest.approx(theirs["fair_sigma_mean"], rel=1e-6)


def test_four_processes_lose_one_and_other_numbers_of_devices_finish(
  start, arguments, reference, workspace, tmp_path, monkeypatch, capsys
):
  """Four hosts read one shard, and two of them the same rows of it: they share a tensor axis."""
  assert len(list((workspace / "data").glob("*train.array_record*"))) == 1
  workdir = tmp_path / "run"
  command = [sys.executable, "-m", "compdiff_jax", "train", *arguments, f"--workdir={workdir}"]
  command += ["--config.mesh.tensor=2", "--config.sharding_rules=(('unet.*to_[qkv].kernel',(None,'tensor')),)"]
  processes = [start([*command, *place]) for place in places(4)]
  # Killed past a checkpoint, with rows in metrics.jsonl that the resumed run repeats.
  wait(lambda: (workdir / "checkpoints" / str(_CHECKPOINT)).exists(), processes)
  wait(lambda: any(row["step"] > _CHECKPOINT for row in read_metrics(workdir)), processes)
  processes[3].send_signal(signal.SIGKILL)
  for process in processes[:3]:
    status, out = end(process, LOSS_SECONDS)
    assert status == cli.LostError.status, out
    assert "of 4 lost another one" in out and "the same command on every host resumes" in out
  assert processes[3].wait() == -signal.SIGKILL
  processes[3].stdout.close()
  assert [heartbeat(workdir, i)["state"] for i in range(3)] == ["failed"] * 3
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps == [_CHECKPOINT]

  # This process, with one, two and eight of its devices, on other meshes.
  make_mesh, training_batches = sharding.make_mesh, train.training_batches
  positions = []

  def note_position(*sets, first_step, **options):
    positions.append(first_step)
    return training_batches(*sets, first_step=first_step, **options)

  monkeypatch.setattr(train, "training_batches", note_position)
  for count, fsdp in ((1, 1), (2, 2), (8, 4)):
    devices = jax.devices()[:count]
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes, _=None, devices=devices: make_mesh(sizes, devices))
    resumed = tmp_path / f"on_{count}"
    shutil.copytree(workdir, resumed)
    train.main([*arguments, f"--workdir={resumed}", f"--config.mesh.fsdp={fsdp}"])
    assert f"on {count} cpu device(s) of 1 process(es)" in capsys.readouterr().err
    _assert_same(read_metrics(resumed), reference)
  assert positions == [_CHECKPOINT] * 3


def test_two_processes_stop_on_sigterm_and_the_slurm_script_resumes_them(start, arguments, reference, tmp_path):
  """launch/local.py starts them; SIGTERM to one of them stops both. Then launch/slurm.sh, with a stand-in for srun."""
  workdir = tmp_path / "run"
  local = start([sys.executable, "-m", "launch.local", "--num_processes=2", "--", "compdiff", "train", *arguments,
                  f"--workdir={workdir}", "--stopped_status=75", "--profile=1:2"])  # fmt: skip
  wait(lambda: heartbeat(workdir, 0) and heartbeat(workdir, 1), [local])
  children = subprocess.run(["pgrep", "-P", str(local.pid)], capture_output=True, text=True, check=True)
  os.kill(int(children.stdout.split()[1]), signal.SIGTERM)
  status, out = end(local)
  assert status == 75, out
  assert "SIGTERM: stopped, to be resumed" in out
  stopped = [heartbeat(workdir, i) for i in range(2)]
  assert [beat["state"] for beat in stopped] == ["stopped"] * 2
  for index in range(2):  # on one host, whose name is that of the file
    assert len(list((workdir / "profile" / str(index)).rglob("*.xplane.pb"))) == 1
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps[-1] == stopped[0]["step"] == stopped[1]["step"] < _STEPS

  status, out = end(_slurm(start, tmp_path, [*arguments, f"--workdir={workdir}"], tasks=2))
  assert status == 0, out
  assert not (tmp_path / "requeued").exists()
  _assert_same(read_metrics(workdir), reference)
  assert [heartbeat(workdir, i)["state"] for i in range(2)] == ["finished"] * 2


def _slurm(start, directory, arguments, tasks, python=sys.executable):
  """launch/slurm.sh with stand-ins: srun starts the tasks as Slurm would describe them, scontrol leaves a note.

  Like the true one with --kill-on-bad-exit, srun ends all tasks when one fails, and a signal outranks exit statuses.
  """
  srun = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
command = sys.argv[1:]
while command[0].startswith("-"):
  command.pop(0)
slurm = dict(SLURM_STEP_NODELIST="127.0.0.1", SLURM_NTASKS="{tasks}", SLURM_STEP_NUM_NODES="1")
tasks = {{
  subprocess.Popen(command, env={{**os.environ, **slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}): i
  for i in range({tasks})
}}
codes = {{}}
while len(codes) < len(tasks):
  time.sleep(0.05)
  for task, i in tasks.items():
    if task in codes or task.poll() is None:
      continue
    code = codes[task] = task.returncode
    if code:
      end = f"Exited with exit code {{code}}" if code > 0 else signal.strsignal(-code)
      print(f"srun: error: node: task {{i}}: {{end}}", file=sys.stderr, flush=True)
      for other in tasks:
        other.terminate()
lowest, highest = min(codes.values()), max(codes.values())
sys.exit(128 - lowest if lowest < 0 else highest)
"""
  tools = directory / "tools"
  tools.mkdir(exist_ok=True)
  for name, text in (("srun", srun), ("scontrol", f'#!/bin/sh\necho "$@" > {directory}/requeued\n')):
    (tools / name).write_text(text)
    (tools / name).chmod(stat.S_IRWXU)
  environment = {
    "PATH": f"{tools}:{os.environ['PATH']}",
    "PYTHON": str(python),
    "SLURM_JOB_ID": str(os.getpid()),
    "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
  }
  return start(["bash", REPOSITORY / "launch" / "slurm.sh", *arguments], **environment)


@pytest.mark.parametrize(
  ("command", "status", "requeued"),
  [("exit 2", 2, False), ("exit 1", 1, False), ("exit 75", 0, True), ("kill -KILL $$", 0, True)],
)
def test_the_first_task_that_fails_decides_whether_a_slurm_job_goes_on(start, tmp_path, command, status, requeued):
  python = tmp_path / "python"
  python.write_text(f"#!/bin/sh\n[ $SLURM_PROCID = 1 ] || exec sleep {PATIENCE}\n{command}\n")
  python.chmod(stat.S_IRWXU)
  assert end(_slurm(start, tmp_path, ["--workdir=run"], tasks=3, python=python))[0] == status
  assert (tmp_path / "requeued").exists() == requeued


def test_two_processes_sample_what_one_does(start, trained, tmp_path):
  """They go on where a kill left a job, and every file has the same bytes."""
  rows = [f"clear,{40 + i},{('male', 'female')[i % 2]},A,{i}" for i in range(5)]
  (tmp_path / "plan.csv").write_text("\n".join(["text,age,sex,group,seed", *rows]) + "\n")
  arguments = [f"--workdir={trained}", f"--plan={tmp_path / 'plan.csv'}"]
  one, two = tmp_path / "one", tmp_path / "two"
  sample.main([*arguments, f"--out={one}", "--batch_size=8"])  # one image a device, as below
  shutil.copytree(one, two)
  lines = (one / "manifest.csv").read_text().splitlines(keepends=True)
  (two / "manifest.csv").write_text("".join(lines[:2]) + lines[2][:20])
  (two / "000001.png").write_bytes(b"half")
  for index in range(2, 5):
    (two / f"{index:06d}.png").unlink()
  command = [sys.executable, "-m", "compdiff_jax", "sample", *arguments, f"--out={two}", "--batch_size=2"]
  processes = [start([*command, *place]) for place in places(2)]
  for process in processes:
    status, out = end(process)
    assert status == 0, out
  content = lambda directory: {path.name: path.read_bytes() for path in directory.iterdir()}  # noqa: E731
  assert len(content(one)) == 5 + len(("manifest.csv", "job.json", "schema.json"))
  assert content(two) == content(one)
