"""What processes do together, in programs of a few lines; whole runs: test_processes.py."""

import argparse
import errno
import os
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, config_arguments
from local_processes import LOSS_SECONDS, end, places

from compdiff_jax import cli, distributed, sharding, train
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.training import bandit
from compdiff_jax.training.fairness import FairDiffusion
from data_prep.phantom.population import SCHEMA

_SEARCH = """
import argparse
import jax
from test_distributed import fairness_after_a_search
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


def test_all_processes_take_the_sigma_of_the_first(start):
  """Their searches end at different places, as they may where mathematical libraries differ."""
  command = [sys.executable, "-c", _SEARCH]
  path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
  processes = [start([*command, *place], PYTHONPATH=path) for place in places(2)]
  outputs = []
  for process in processes:
    status, out = end(process)
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


def test_all_processes_start_from_the_checkpoint_that_the_first_sees(start, trained, tmp_path):
  """The second is shown an older list, as by a network disk."""
  for process in range(2):
    shutil.copytree(trained / "checkpoints", tmp_path / str(process))
  shutil.rmtree(tmp_path / "1" / "8")
  processes = [start([sys.executable, "-c", _LATEST, tmp_path, *place]) for place in places(2)]
  for index, process in enumerate(processes):
    status, out = end(process)
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


def test_the_process_that_holds_the_others_together_is_killed(start):
  first, second = [start([sys.executable, "-c", _ADD, *place]) for place in places(2)]
  for process in (first, second):
    while process.stdout.readline() != "added\n":
      assert process.poll() is None
  first.send_signal(signal.SIGKILL)
  status, out = end(second, LOSS_SECONDS)
  assert status == cli.LostError.status, out[-3000:]
  assert "add: failed: process 1 of 2 lost another one" in out
  end(first)


_SAVE = """
import os, signal, sys
import jax, numpy as np
from compdiff_jax import cli, distributed, sharding
from compdiff_jax.checkpoint import Checkpoints

distributed._HEARTBEAT_SECONDS = 5

def main(argv):
  parser = cli.parser("save", "")
  distributed.add_arguments(parser)
  with distributed.session(parser.parse_args(argv[1:])), Checkpoints(argv[0], trains=True) as checkpoints:
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    rows = sharding.place(np.ones((mesh.size, 2**22), np.float32), sharding.batch_sharding(mesh))
    checkpoints.save(1, {"params": {"rows": rows}})
    checkpoints.wait()
    checkpoints.save(2, {"params": {"rows": rows}})
    if jax.process_index() == 1:
      os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.wait()

status = cli.run(main, "save")
distributed.leave(status)
sys.exit(status)
"""


def test_a_checkpoint_whose_writing_lost_a_process_is_not_picked_up(start, tmp_path):
  """Whoever waits for the write is ended by the runtime, which does not ask us, or by a collective's error."""
  first, second = [start([sys.executable, "-c", _SAVE, tmp_path, *place]) for place in places(2)]
  status, out = end(first, LOSS_SECONDS)
  assert status in (cli.LostError.status, -signal.SIGABRT), out[-3000:]
  assert "of 2 lost another one" in out or "another task died" in out
  assert end(second)[0] == -signal.SIGKILL
  assert any("2." in path.name for path in tmp_path.iterdir()), "the second checkpoint was not begun"
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 1
  with Checkpoints(tmp_path, trains=True) as checkpoints:  # the run, which goes on from there
    checkpoints.save(2, {"params": {"rows": np.zeros(2)}})
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


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


def test_every_process_says_the_error_that_all_have(start):
  """The first does not end the second, which comes to it later; the message is as long as it is."""
  processes = [start([sys.executable, "-c", _REFUSE, *place]) for place in places(2)]
  for process in processes:
    status, out = end(process)
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


def test_a_barrier_to_which_not_all_come_ends(start):
  first, second = [start([sys.executable, "-c", _LATE, *place]) for place in places(2)]
  status, out = end(second)
  assert status == cli.LostError.status and "late: failed: process 1 of 2 lost another one" in out, out[-3000:]
  first.kill()
  end(first)


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


def test_processes_that_get_sigterm_before_their_first_step_stop(start):
  processes = [start([sys.executable, "-c", _SIGTERM, *place]) for place in places(2)]
  outputs = [end(process) for process in processes]
  assert [status for status, _ in outputs] == [0, 0], outputs
  (first,), (second,) = [[line for line in out.splitlines() if line.startswith("steps")] for _, out in outputs]
  assert first == second


@pytest.mark.parametrize(
  "error",
  [
    PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/bucket/run/heartbeat"),
    cli.InputError("Barrier.png is not an image"),
    cli.RunError("UNAVAILABLE"),
    TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), "/bucket/run/heartbeat"),
  ],
)
def test_only_errors_of_the_runtime_and_of_orbax_can_mean_a_lost_process(monkeypatch, error):
  parser = argparse.ArgumentParser()
  distributed.add_arguments(parser)
  alone = parser.parse_args(["--num_processes=1"])
  monkeypatch.setattr(distributed, "_several", lambda: True)
  with pytest.raises(type(error)) as raised, distributed.session(alone):
    raise error
  assert raised.value is error
  for loss in (
    ValueError("Gloo: connection closed by peer"),
    TimeoutError("Timed out while waiting for async_write_complete barrier."),  # Orbax's
  ):
    with pytest.raises(cli.LostError), distributed.session(alone):
      raise loss


def test_coordinator_that_never_answers_and_processes_that_never_come(start, workspace, tmp_path):
  command = [
    sys.executable,
    "-m",
    "compdiff_jax",
    "train",
    *config_arguments(workspace),
    f"--workdir={tmp_path / 'run'}",
  ]
  starts = [start([*command, *places(2)[index], "--process_timeout=2"]) for index in range(2)]
  for process, words in zip(starts, ("not all processes came within 2 s", "does not answer within 2 s")):
    status, out = end(process)
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
