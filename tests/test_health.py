"""Signs of life: heartbeat, stall detector, SIGTERM, keep policy, and the checks of a run that goes on."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from conftest import PATIENCE, REPOSITORY, config_arguments
from PIL import Image

from compdiff_jax import cli, train
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.default_config import base
from compdiff_jax.metrics import read_metrics
from compdiff_jax.training import speed
from compdiff_jax.training.checks import out_of_memory_advice
from compdiff_jax.training.health import Heartbeat
from compdiff_jax.workdir import claim
from data_prep.phantom.population import SCHEMA

_STALL = """
import time
from pathlib import Path
from compdiff_jax.training.health import Heartbeat

def stuck_in_the_network():
  time.sleep(60)

with Heartbeat(Path({path!r}), 0, 100, stall_seconds=0.4) as heartbeat:
  heartbeat.beat(7)
  stuck_in_the_network()
"""


def test_stalled_run_says_where_it_hangs_and_ends(tmp_path):
  path = tmp_path / "heartbeat" / "0.json"
  script = [sys.executable, "-c", _STALL.format(path=str(path))]
  done = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE, check=False)
  assert done.returncode == cli.LostError.status
  assert "the last one was 7" in done.stderr and "in stuck_in_the_network" in done.stderr
  assert "giving up" in done.stderr
  assert json.loads(path.read_text())["state"] == "failed"


def test_heartbeat_waits_for_the_first_step_and_tells_how_it_ended(tmp_path):
  path = tmp_path / "0.json"
  with (tmp_path / "log").open("w+") as log:
    with Heartbeat(path, 3, 9, stall_seconds=0.04, log=log) as heartbeat:
      time.sleep(0.3)  # compiling: no stall, or this process would end
      assert json.loads(path.read_text()) | {"time": "", "seconds_since_step": 0} == {
        "state": "training", "step": 3, "steps": 9, "seconds_since_step": 0, "time": "",
      }  # fmt: skip
    assert json.loads(path.read_text())["state"] == "finished"
    with Heartbeat(path, 3, 9, stall_seconds=0, log=log) as heartbeat:
      heartbeat.beat(4)
      heartbeat.stopped()
    assert json.loads(path.read_text()) | {"state": "stopped", "step": 4} == json.loads(path.read_text())
    with pytest.raises(ZeroDivisionError), Heartbeat(path, 3, 9, stall_seconds=0, log=log):
      raise ZeroDivisionError
    assert json.loads(path.read_text())["state"] == "failed"
    log.seek(0)
    assert log.read() == ""


def _rows(workdir):
  return [{name: value for name, value in row.items() if name not in speed.FIELDS} for row in read_metrics(workdir)]


def test_sigterm_writes_a_checkpoint_at_the_next_step_and_the_run_goes_on_as_if_nothing_was(
  workspace, trained, tmp_path, monkeypatch, capsys
):
  """The signal comes in the middle of a report; rows and parameters are those of the run without it."""
  workdir = tmp_path / "run"
  arguments = [*config_arguments(workspace), "--config.train.steps=8", f"--workdir={workdir}"]
  beat = Heartbeat.beat

  def beat_and_signal(self, step):
    beat(self, step)
    if step == 2:
      signal.raise_signal(signal.SIGTERM)

  before = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    patch.setattr(Heartbeat, "beat", beat_and_signal)
    assert cli.run(train.main, "compdiff train", arguments) == 0
  assert "SIGTERM" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGTERM) == before
  assert json.loads((workdir / "heartbeat" / "0.json").read_text())["state"] == "stopped"
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps == [3]
  train.main(arguments)  # status 0 is no exception
  assert _rows(workdir) == _rows(trained)
  assert json.loads((workdir / "heartbeat" / "0.json").read_text())["state"] == "finished"


def test_sigterm_while_the_networks_are_loaded_stops_before_the_first_step(
  workspace, trained, tmp_path, monkeypatch, capsys
):
  workdir = tmp_path / "run"
  arguments = [*config_arguments(workspace), "--config.train.steps=8", f"--workdir={workdir}"]
  claimed = train.claim

  def claim_and_signal(*given, **options):
    claimed(*given, **options)
    signal.raise_signal(signal.SIGTERM)

  before = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    patch.setattr(train, "claim", claim_and_signal)
    with pytest.raises(SystemExit) as stop:
      train.main([*arguments, "--stopped_status=75"])
  assert stop.value.code == 75 and "SIGTERM: stopped, to be resumed, at step 0" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGTERM) == before
  assert json.loads((workdir / "heartbeat" / "0.json").read_text())["state"] == "stopped"
  train.main(arguments)
  assert _rows(workdir) == _rows(trained)


def test_sampling_which_may_compile_is_no_stall(workspace, tmp_path, monkeypatch):
  with (tmp_path / "log").open("w+") as log:
    with Heartbeat(tmp_path / "0.json", 0, 9, stall_seconds=0.5, log=log) as heartbeat:
      heartbeat.beat(1)
      heartbeat.disarm()
      time.sleep(1.5)
    log.seek(0)
    assert log.read() == ""

  calls = []
  monkeypatch.setattr(Heartbeat, "disarm", lambda self: calls.append("disarm"))
  monkeypatch.setattr(Heartbeat, "beat", lambda self, step: calls.append(step))
  monkeypatch.setattr(train, "sample_grid", lambda *_: calls.append("sample") or Image.new("L", (1, 1)))
  arguments = [*config_arguments(workspace), "--config.train.steps=3", "--config.logging.sample_every=2"]
  train.main([*arguments, f"--workdir={tmp_path / 'run'}"])
  assert calls == [1, "disarm", "sample", 2, 3]


def test_kept_checkpoints_are_the_latest_the_multiples_and_the_best(tmp_path):
  state = {"x": jax.numpy.zeros(2)}
  with Checkpoints(tmp_path, keep=2, keep_every=4, keep_best="loss") as checkpoints:
    for step, loss in enumerate([5.0, 3.0, 1.0, 9.0, 2.0, 8.0, 7.0, 6.0, 5.0, 4.0], start=1):
      metrics = {"loss": loss} if step < 10 else {}  # of which no sample of the report had one
      checkpoints.save(step, {"state": state}, metrics, {"report": [{"loss": loss, "acc_sex": math.nan}]})
  with Checkpoints(tmp_path, keep=2, keep_every=4, keep_best="loss") as checkpoints:
    assert checkpoints.steps == [3, 4, 8, 9, 10]
    (row,) = checkpoints.note(9)["report"]
    assert row["loss"] == 5.0 and math.isnan(row["acc_sex"])


def test_another_data_set_is_refused_unless_told_and_a_moved_one_is_not(workspace, trained, tmp_path, fails, capsys):
  from data_prep.phantom import __main__ as phantom

  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  arguments = [*config_arguments(workspace), "--config.train.steps=8", f"--workdir={workdir}"]
  phantom.main(["--out", str(tmp_path / "other"), "--num", "160", "--size", "32", "--seed", "1"])
  message = fails(train.main, *arguments, f"--config.data.path={tmp_path / 'other'}")
  assert "data.0.content" in message and "--accept_changes" in message

  shutil.copytree(workspace / "data", tmp_path / "moved")
  train.main([*arguments, f"--config.data.path={tmp_path / 'moved'}"])
  assert json.loads((workdir / "config.json").read_text())["data"]["path"] == str(tmp_path / "moved")

  capsys.readouterr()
  train.main([*arguments, f"--config.data.path={tmp_path / 'other'}", "--accept_changes"])
  assert "accepted changes" in capsys.readouterr().err
  assert "data.0.content" in fails(train.main, *arguments)


def test_moved_sets_of_a_mix_are_the_same_run(tmp_path):
  config = base()
  for path in ("old/b", "new/b"):
    config.data.mix = ((path, 0.5),)
    claim(tmp_path / "run", config, SCHEMA, {}, {"1": "content"})
  config.data.mix = (("new/b", 0.7),)
  with pytest.raises(cli.InputError, match=r"config\.data\.mix: \[0\.5\] -> \[0\.7\]"):
    claim(tmp_path / "run", config, SCHEMA, {}, {"1": "content"})


def test_out_of_memory_says_what_to_change(workspace):
  from compdiff_jax.config import load_config

  path, *overrides = config_arguments(workspace)
  config = load_config(path.removeprefix("--config="), overrides)
  text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.21G of 15.75G hbm. Exceeded by 1.46G."
  with pytest.raises(cli.RunError) as error, out_of_memory_advice(config):
    raise jax.errors.JaxRuntimeError(text)
  for words in ("Used 17.21G of 15.75G hbm", "mesh.fsdp (now 1)", "remat=matmuls", "batch_size (now 8)", "bfloat16"):
    assert words in str(error.value)
  with pytest.raises(jax.errors.JaxRuntimeError), out_of_memory_advice(config):
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_metric_to_keep_by_must_exist(workspace, tmp_path, fails):
  arguments = [*config_arguments(workspace), "--config.train.steps=4", f"--workdir={tmp_path / 'run'}"]
  for more in ([], ["--dry_run"]):
    assert "did you mean 'diffusion'" in fails(train.main, *arguments, *more, "--config.logging.keep_best=difusion")
  assert not (tmp_path / "run").exists()
