"""Training by several processes, each with one CPU device, joined by Gloo: as several hosts would.

One run of one process with four devices is what everything is compared with.
"""

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import _FAST_COMPILE, PATIENCE, REPOSITORY, config_arguments

from compdiff_jax import cli, distributed, sample, sharding, train
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.metrics import read_metrics
from compdiff_jax.training import bandit
from compdiff_jax.training.fairness import FairDiffusion
from data_prep.phantom.population import SCHEMA

_STEPS = 40
_RUN = (
  "--config.mesh.fsdp=2",
  f"--config.train.steps={_STEPS}",
  "--config.logging.checkpoint_every=20",
  "--config.fairness.variant=compdiff",
  # No search: the place of a maximum may jump where gaps differ by a rounding. What processes do about it: below.
  "--config.fairness.window=100",
)
# Sums over devices in another order, followed through 40 steps of Adam.
_TOLERANCE = 2e-3
# Processes that lost one end within a minute (launch/README.md); the rest is for a slow machine.
_LOSS_SECONDS = 60 + 120


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


def _end(process, seconds=PATIENCE):
  out, _ = process.communicate(timeout=seconds)
  return process.returncode, out


def _wait(condition, processes, seconds=PATIENCE):
  deadline = time.monotonic() + seconds
  while not condition():
    for process in processes:
      assert process.poll() is None, process.stdout.read()
    assert time.monotonic() < deadline
    time.sleep(0.01)


def _heartbeat(workdir, process):
  with contextlib.suppress(FileNotFoundError):
    return json.loads((workdir / "heartbeat" / f"{process}.json").read_text())


def _places(count):
  """The options of each of `count` processes that find each other."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  return [[f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"] for i in range(count)]


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
    for name in ("loss", "diffusion", "grad_norm", "fair_loss_gap"):
      assert ours[name] == pytest.approx(theirs[name], rel=_TOLERANCE), (ours["step"], name)
    assert ours["images"] == theirs["images"]
    assert ours["fair_sigma_mean"] == pytest.approx(theirs["fair_sigma_mean"], rel=1e-6)


def test_four_processes_lose_one_and_other_numbers_of_devices_finish(
  arguments, reference, workspace, tmp_path, monkeypatch, capsys
):
  """Four hosts read one shard, and two of them the same rows of it: they share a tensor axis."""
  assert len(list((workspace / "data").glob("*train.array_record*"))) == 1
  workdir = tmp_path / "run"
  command = [sys.executable, "-m", "compdiff_jax", "train", *arguments, f"--workdir={workdir}"]
  command += ["--config.mesh.tensor=2", "--config.sharding_rules=(('unet.*to_[qkv].kernel',(None,'tensor')),)"]
  processes = [_start([*command, *place]) for place in _places(4)]
  # Killed past a checkpoint, with rows in metrics.jsonl that the resumed run repeats.
  _wait(lambda: (workdir / "checkpoints" / "20").exists(), processes)
  _wait(lambda: any(row["step"] >= 22 for row in read_metrics(workdir)), processes)
  processes[3].send_signal(signal.SIGKILL)
  for process in processes[:3]:
    status, out = _end(process, _LOSS_SECONDS)
    assert status == cli.LostError.status, out
    assert "of 4 lost another one" in out and "the same command on every host resumes" in out
  assert processes[3].wait() == -signal.SIGKILL
  processes[3].stdout.close()
  assert [_heartbeat(workdir, i)["state"] for i in range(3)] == ["failed"] * 3
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps == [20]

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
  assert positions == [20] * 3


def test_two_processes_stop_on_sigterm_and_the_slurm_script_resumes_them(arguments, reference, tmp_path):
  """launch/local.py starts them; SIGTERM to one of them stops both. Then launch/slurm.sh, with a stand-in for srun."""
  workdir = tmp_path / "run"
  local = _start([sys.executable, "-m", "launch.local", "--num_processes=2", "--", "compdiff", "train", *arguments,
                  f"--workdir={workdir}", "--stopped_status=75", "--profile=1:2"])  # fmt: skip
  _wait(lambda: _heartbeat(workdir, 0) and _heartbeat(workdir, 1), [local])
  children = subprocess.run(["pgrep", "-P", str(local.pid)], capture_output=True, text=True, check=True)
  os.kill(int(children.stdout.split()[1]), signal.SIGTERM)
  status, out = _end(local)
  assert status == 75, out
  assert "SIGTERM: stopped, to be resumed" in out
  stopped = [_heartbeat(workdir, i) for i in range(2)]
  assert [beat["state"] for beat in stopped] == ["stopped"] * 2
  for index in range(2):  # on one host, whose name is that of the file
    assert len(list((workdir / "profile" / str(index)).rglob("*.xplane.pb"))) == 1
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps[-1] == stopped[0]["step"] == stopped[1]["step"] < _STEPS

  status, out = _end(_slurm(tmp_path, [*arguments, f"--workdir={workdir}"], tasks=2))
  assert status == 0, out
  assert not (tmp_path / "requeued").exists()
  _assert_same(read_metrics(workdir), reference)
  assert [_heartbeat(workdir, i)["state"] for i in range(2)] == ["finished"] * 2


def _slurm(directory, arguments, tasks, python=sys.executable):
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
  return _start(["bash", REPOSITORY / "launch" / "slurm.sh", *arguments], **environment)


@pytest.mark.parametrize(
  ("end", "status", "requeued"),
  [("exit 2", 2, False), ("exit 1", 1, False), ("exit 75", 0, True), ("kill -KILL $$", 0, True)],
)
def test_the_first_task_that_fails_decides_whether_a_slurm_job_goes_on(tmp_path, end, status, requeued):
  python = tmp_path / "python"
  python.write_text(f"#!/bin/sh\n[ $SLURM_PROCID = 1 ] || exec sleep {PATIENCE}\n{end}\n")
  python.chmod(stat.S_IRWXU)
  assert _end(_slurm(tmp_path, ["--workdir=run"], tasks=3, python=python))[0] == status
  assert (tmp_path / "requeued").exists() == requeued


def test_two_processes_sample_what_one_does(trained, tmp_path):
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
  processes = [_start([*command, *place]) for place in _places(2)]
  for process in processes:
    status, out = _end(process)
    assert status == 0, out
  content = lambda directory: {path.name: path.read_bytes() for path in directory.iterdir()}  # noqa: E731
  assert len(content(one)) == 5 + len(("manifest.csv", "job.json", "schema.json"))
  assert content(two) == content(one)


_SEARCH = """
import argparse
import jax
from test_processes import fairness_after_a_search
from compdiff_jax import distributed

parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
with distributed.session(parser.parse_args()):
  sigma, filled = fairness_after_a_search(best=0.2 + 0.5 * jax.process_index())
  print("sigma", *sigma, filled)
"""


def fairness_after_a_search(best):
  """(sigma, rows of its history) where this process's search ends at `best`."""
  fairness = FairDiffusion(SCHEMA, "compdiff", 1.0, 4, 0.9, 0.1, 0.1)
  maximise = bandit.maximise
  bandit.maximise = lambda *_, **__: np.full(fairness.num_groups, best)
  try:
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    rng = np.random.default_rng(0)
    history = jax.tree.map(lambda x: rng.uniform(size=x.shape).astype(x.dtype), jax.device_get(fairness.create()))
    state = sharding.place(history._replace(count=np.int32(4)), sharding.replicated(mesh))
    found = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), fairness.search(state, 7, 4))
  finally:
    bandit.maximise = maximise
  return found.sigma.tolist(), int(found.count)


def test_all_processes_take_the_sigma_of_the_first():
  """Their searches end at different places, as they may where mathematical libraries differ."""
  command = [sys.executable, "-c", _SEARCH]
  path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
  processes = [_start([*command, *place], PYTHONPATH=path) for place in _places(2)]
  outputs = []
  for process in processes:
    status, out = _end(process)
    assert status == 0, out
    outputs += [line.split()[1:] for line in out.splitlines() if line.startswith("sigma")]
  sigma, filled = fairness_after_a_search(best=0.2)
  assert filled == 0 and not np.allclose(sigma, fairness_after_a_search(best=0.7)[0])
  assert outputs == [[*map(str, sigma), "0"]] * 2


_LATEST = """
import argparse, sys
import jax
from compdiff_jax import cli, distributed
from compdiff_jax.checkpoint import Checkpoints

parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
with distributed.session(parser.parse_args(sys.argv[2:])):
  with Checkpoints(f"{sys.argv[1]}/{jax.process_index()}") as checkpoints:
    step = checkpoints.latest()
    print("latest", step)
    if not distributed.is_writer():
      try:
        checkpoints.restore({}, step)
      except cli.InputError as error:
        print("error", error)
"""


def test_all_processes_start_from_the_checkpoint_that_the_first_sees(trained, tmp_path):
  """The second is shown an older list, as by a network disk."""
  for process in range(2):
    shutil.copytree(trained / "checkpoints", tmp_path / str(process))
  shutil.rmtree(tmp_path / "1" / "8")
  processes = [_start([sys.executable, "-c", _LATEST, tmp_path, *place]) for place in _places(2)]
  for index, process in enumerate(processes):
    status, out = _end(process)
    assert status == 0 and "latest 8\n" in out, out
    assert ("has no checkpoint of step 8; this host sees 4" in out) == (index == 1)


_ADD = """
import sys
import jax, numpy as np
from compdiff_jax import cli, distributed, sharding

def main(argv):
  parser = cli.parser("add", "")
  distributed.add_arguments(parser)
  with distributed.session(parser.parse_args(argv)):
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    rows = sharding.place(np.ones(mesh.size), sharding.batch_sharding(mesh))
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    distributed.compile_together(add, rows)
    while sharding.fetch(add(rows.copy())).sum() == 2 * mesh.size:
      print("added", flush=True)

status = cli.run(main, "add")
distributed.leave(status)
sys.exit(status)
"""


def test_the_process_that_holds_the_others_together_is_killed():
  first, second = [_start([sys.executable, "-c", _ADD, *place]) for place in _places(2)]
  for process in (first, second):
    while process.stdout.readline() != "added\n":
      assert process.poll() is None
  first.send_signal(signal.SIGKILL)
  status, out = _end(second, _LOSS_SECONDS)
  assert status == cli.LostError.status, out[-3000:]
  assert "add: failed: process 1 of 2 lost another one" in out
  _end(first)


_REFUSE = """
import sys, time
import jax
from compdiff_jax import cli, distributed

def refuse():
  raise cli.InputError("no such data" + 9000 * "!")

def main(argv):
  parser = cli.parser("refuse", "")
  distributed.add_arguments(parser)
  with distributed.session(parser.parse_args(argv)):
    try:
      distributed.from_writer(refuse)
    finally:
      time.sleep(3 * jax.process_index())

status = cli.run(main, "refuse")
distributed.leave(status)
"""


def test_every_process_says_the_error_that_all_have():
  """The first does not end the second, which comes to it later; the message is as long as it is."""
  processes = [_start([sys.executable, "-c", _REFUSE, *place]) for place in _places(2)]
  for process in processes:
    status, out = _end(process)
    assert status == 2 and f"refuse: error: no such data{9000 * '!'}\n" in out, out[-3000:]


_LATE = """
import sys, time
import jax
from compdiff_jax import cli, distributed

def main(argv):
  parser = cli.parser("late", "")
  distributed.add_arguments(parser)
  with distributed.session(parser.parse_args(argv)):
    if jax.process_index() == 0:
      time.sleep(3600)
    distributed.barrier("together", 2)

status = cli.run(main, "late")
distributed.leave(status)
"""


def test_a_barrier_to_which_not_all_come_ends():
  first, second = [_start([sys.executable, "-c", _LATE, *place]) for place in _places(2)]
  status, out = _end(second)
  assert status == cli.LostError.status and "late: failed: process 1 of 2 lost another one" in out, out[-3000:]
  first.kill()
  _end(first)


_SIGTERM = """
import argparse, itertools, os, signal, sys, time
import jax
from compdiff_jax import distributed
from compdiff_jax.training.health import Preemption

parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
with distributed.session(parser.parse_args()), Preemption() as preemption:
  if jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(3)
  print("steps", next(step for step in itertools.count() if preemption.reached() or time.sleep(0.1)))
"""


def test_processes_that_get_sigterm_before_their_first_step_stop():
  processes = [_start([sys.executable, "-c", _SIGTERM, *place]) for place in _places(2)]
  outputs = [_end(process) for process in processes]
  assert [status for status, _ in outputs] == [0, 0], outputs
  (first,), (second,) = [[line for line in out.splitlines() if line.startswith("steps")] for _, out in outputs]
  assert first == second


@pytest.mark.parametrize(
  "error",
  [
    PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/bucket/run/heartbeat"),
    cli.InputError("Barrier.png is not an image"),
    cli.RunError("UNAVAILABLE"),
  ],
)
def test_only_errors_of_the_runtime_can_mean_a_lost_process(monkeypatch, error):
  parser = argparse.ArgumentParser()
  distributed.add_arguments(parser)
  alone = parser.parse_args(["--num_processes=1"])
  monkeypatch.setattr(distributed, "_several", lambda: True)
  with pytest.raises(type(error)) as raised, distributed.session(alone):
    raise error
  assert raised.value is error
  with pytest.raises(cli.LostError), distributed.session(alone):
    raise ValueError("Gloo: connection closed by peer")


def test_coordinator_that_never_answers_and_processes_that_never_come(arguments, tmp_path):
  command = [sys.executable, "-m", "compdiff_jax", "train", *arguments, f"--workdir={tmp_path / 'run'}"]
  starts = [_start([*command, *_places(2)[index], "--process_timeout=2"]) for index in range(2)]
  for process, words in zip(starts, ("not all processes came within 2 s", "does not answer within 2 s")):
    status, out = _end(process)
    assert status == cli.LostError.status, out
    (line,) = [line for line in out.splitlines() if line.startswith("compdiff train: ")]
    assert words in line and "the same command runs on every host" in line
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (["--num_processes=2"], "--coordinator is missing"),
    (["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"], "must be from 0 to 1"),
    (["--coordinator=localhost", "--num_processes=2", "--process_id=0"], "must be HOST:PORT"),
    (["--process_timeout=nan"], "must be above 0 and finite"),
    (["--process_timeout=inf"], "must be above 0 and finite"),
  ],
)
def test_incomplete_options_are_refused(workspace, tmp_path, fails, options, words):
  assert words in fails(train.main, *config_arguments(workspace), f"--workdir={tmp_path / 'run'}", *options)
