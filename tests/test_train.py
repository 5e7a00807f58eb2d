"""`compdiff train`: resuming bit for bit, checkpoints, NaN, and what is refused."""

import errno
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from conftest import PATIENCE, config_arguments
from orbax.checkpoint import v1 as ocp

from compdiff_jax import cli, train
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.data.input_pipeline import training_batches
from compdiff_jax.data.records import RecordSet, decode_image
from compdiff_jax.metrics import read_metrics
from compdiff_jax.training import speed
from compdiff_jax.workdir import open_run

_STEPS = "--config.train.steps=24"


def _losses(workdir):
  return [{k: v for k, v in row.items() if k not in speed.FIELDS} for row in read_metrics(workdir)]


def _final_parts(workdir):
  _, params = open_run(workdir).load_params("raw")
  _, ema = open_run(workdir).load_params("ema")
  return {f"{kind}/{part}/{name}": np.asarray(value)
          for kind, tree in (("raw", params), ("ema", ema))
          for part, leaves in tree.items() for name, value in leaves.items()}  # fmt: skip


def _finish(process):
  out, err = process.communicate(timeout=PATIENCE)
  assert process.returncode == 0, err
  return out


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(workspace, command, tmp_path):
  arguments = ["train", *config_arguments(workspace), _STEPS]
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  _finish(command("compdiff_jax", *arguments, f"--workdir={whole}"))

  process = command("compdiff_jax", *arguments, f"--workdir={killed}")
  deadline = time.monotonic() + PATIENCE
  # Killed past a checkpoint, between two checkpoints, with rows in metrics.jsonl that the resumed run must repeat.
  while not any(row["step"] >= 10 for row in read_metrics(killed)):
    assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  process.stderr.close()
  with Checkpoints(killed / "checkpoints") as checkpoints:
    assert checkpoints.steps and checkpoints.steps[-1] < 24

  _finish(command("compdiff_jax", *arguments, f"--workdir={killed}"))
  assert _losses(killed) == _losses(whole)
  assert [row["step"] for row in _losses(whole)] == list(range(2, 25, 2))
  ours, theirs = _final_parts(killed), _final_parts(whole)
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_run_writes_what_it_promises(trained):
  rows = read_metrics(trained)
  assert [row["step"] for row in rows] == [2, 4, 6, 8]
  expected = {"loss", "diffusion", "kl", "composition", "aux_age", "acc_sex", "grad_norm", "learning_rate"}
  assert expected <= rows[-1].keys()
  assert rows[-1]["images"] == 8 * 8
  assert list((trained / "tensorboard").glob("events.*")), "TensorFlow is a test requirement, so CLU must have written"
  with Checkpoints(trained / "checkpoints") as checkpoints:
    assert checkpoints.steps == [4, 8]
  assert json.loads((trained / "config.json").read_text())["train"]["steps"] == 8


def test_sample_grids_appear_in_the_workdir(workspace, tmp_path):
  extra = ["--config.train.steps=4", "--config.logging.sample_every=2", f"--workdir={tmp_path / 'run'}"]
  train.main([*config_arguments(workspace), *extra])
  assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
    "step_000002.png",
    "step_000004.png",
  ]


def test_devices_hold_the_state_once(workspace, trained, tmp_path, monkeypatch):
  """Parameters, average and two moments: what the state was made from is gone when the steps begin."""
  held = []

  class Watched(train.StepClock):
    def next(self, batches):
      held.append(sum(array.nbytes for array in jax.live_arrays()))
      return super().next(batches)

  monkeypatch.setattr(train, "StepClock", Watched)
  before = sum(array.nbytes for array in jax.live_arrays())
  extra = [f"--config.init={trained}", "--config.weights.vae=", "--config.weights.tokenizer="]
  workdir = tmp_path / "run"
  train.main([*config_arguments(workspace), *extra, "--config.train.steps=4", f"--workdir={workdir}"])
  run = open_run(workdir)
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
  frozen = size(run.model.load_frozen(run.config.weights))
  trained_size = size(run.load_params("raw")[1]) - frozen
  assert 4 <= (held[0] - before - frozen) / trained_size < 4.5


def test_ema_is_the_closed_form_average(workspace, tmp_path):
  """The first update copies; the second gives ema = p1 + (1 - d)(p2 - p1) with d = min(decay, 2/11)."""
  workdir = tmp_path / "run"
  every = ["--config.logging.log_every=1", "--config.logging.checkpoint_every=1"]
  steps = ["--config.train.steps=2", "--config.train.warmup_steps=0"]
  train.main([*config_arguments(workspace), *steps, *every, f"--workdir={workdir}"])
  run = open_run(workdir)
  (_, first), (_, second) = (run.load_params("raw", step) for step in (1, 2))
  (_, copied), (_, ema) = (run.load_params("ema", step) for step in (1, 2))
  moved = False
  for part in run.model.trained:
    for name, value in first[part].items():
      np.testing.assert_array_equal(copied[part][name], value, err_msg=name)
      wanted = value + (1 - 2 / 11) * (second[part][name] - value)
      np.testing.assert_allclose(ema[part][name], wanted, rtol=1e-5, atol=1e-7, err_msg=name)
      moved |= bool(np.any(np.asarray(second[part][name]) != np.asarray(value)))
  assert moved


def test_nan_stops_the_run_and_names_the_step(workspace, tmp_path, capsys):
  # One warm-up step at an absurd rate: step 1 has rate 0, step 2 destroys the weights, step 3 sees it.
  arguments = [*config_arguments(workspace), "--config.train.steps=8", "--config.train.learning_rate=1e30"]
  workdir = tmp_path / "run"
  assert (
    cli.run(train.main, "compdiff train", [*arguments, "--config.train.warmup_steps=1", f"--workdir={workdir}"]) == 1
  )
  message = capsys.readouterr().err.strip().splitlines()[-1]
  assert message.startswith("compdiff train: failed:") and "at step 3" in message
  dumped = json.loads((workdir / "nonfinite.json").read_text())
  assert dumped["step"] == 3 and dumped["metrics"]["loss"] in ("nan", "inf")
  # The records of these keys are what the third batch showed.
  records = RecordSet(workspace / "data")
  batches = training_batches([(records, 1.0)], batch_size=8, image_size=32, seed=42, first_step=2, threads=0)
  source = records.split("train")
  images = {source[i]["key"]: decode_image(source[i]["image"], 32) for i in range(len(source))}
  np.testing.assert_array_equal([images[key] for key in dumped["batch"]], next(iter(batches))["images"])
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps == []


def test_config_typo_names_the_nearest_key(workspace, tmp_path, fails):
  message = fails(train.main, *config_arguments(workspace), "--config.train.learning_rat=1", f"--workdir={tmp_path}/r")
  assert "'train.learning_rat'" in message and "did you mean 'train.learning_rate'" in message
  assert "steps" in fails(
    train.main, *config_arguments(workspace), "--config.train.steps=many", f"--workdir={tmp_path}/r"
  )
  assert not (tmp_path / "r").exists()


def test_another_config_is_refused_and_nothing_is_touched(workspace, trained, fails):
  before = (trained / "metrics.jsonl").read_bytes()
  arguments = [*config_arguments(workspace), "--config.train.steps=8", f"--workdir={trained}"]
  message = fails(train.main, *arguments, "--config.train.learning_rate=0.5")
  assert "config.train.learning_rate: 0.001 -> 0.5" in message
  assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_run_from_before_a_key_existed_goes_on(workspace, trained, tmp_path, fails):
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  today = json.loads((workdir / "config.json").read_text())
  old = json.loads((workdir / "config.json").read_text())
  del old["lora"], old["loss"]["coind"], old["sample"]["guidance_parts"], old["conditioner"]["ordinal_encoder"]
  (workdir / "config.json").write_text(json.dumps(old))
  run = open_run(workdir)
  assert run.model.lora is None and run.config.sample.guidance_parts == ""
  arguments = [*config_arguments(workspace), "--config.train.steps=8", f"--workdir={workdir}"]
  assert "(config.loss.coind: 0.0 -> 0.5)" in fails(train.main, *arguments, "--config.loss.coind=0.5")
  train.main(arguments)
  assert json.loads((workdir / "config.json").read_text()) == today
  (workdir / "config.json").write_text(json.dumps({**old, "lora": 4}))
  assert "config.json: lora is 4" in fails(train.main, *arguments)


def test_foreign_directory_is_refused(workspace, tmp_path, fails):
  (tmp_path / "thesis.txt").write_text("mine")
  message = fails(train.main, *config_arguments(workspace), f"--workdir={tmp_path}")
  assert "not an empty directory" in message
  assert "not an empty directory" in fails(train.main, *config_arguments(workspace), f"--workdir={tmp_path}/thesis.txt")
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_checkpoint_cut_short_is_named(workspace, trained, tmp_path, fails):
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  for path in (workdir / "checkpoints" / "8").rglob("d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  arguments = [*config_arguments(workspace), "--config.train.steps=8", f"--workdir={workdir}"]
  message = fails(train.main, *arguments)
  assert str(workdir / "checkpoints" / "8") in message and "damaged" in message
  # Moved away, as the message says, the run goes on from the one before.
  shutil.rmtree(workdir / "checkpoints" / "8")
  train.main(arguments)
  assert _losses(workdir) == _losses(trained)


def _status_and_line(capsys, *arguments):
  status = cli.run(train.main, "compdiff train", [str(argument) for argument in arguments])
  return status, capsys.readouterr().err.strip().splitlines()[-1]


def test_a_whole_checkpoint_is_not_called_damaged(workspace, trained, tmp_path, monkeypatch, capsys):
  """Where the disk or the device fails while it is read."""
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  arguments = [*config_arguments(workspace), "--config.train.steps=8", f"--workdir={workdir}"]
  for error, words in (
    (OSError(errno.EIO, os.strerror(errno.EIO)), "checkpoints/8 cannot be read: Input/output error"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), "training state does not fit in device memory"),
  ):

    def fail(*_, error=error):
      raise error

    monkeypatch.setattr(ocp.training.Checkpointer, "load_checkpointables", fail)
    status, line = _status_and_line(capsys, *arguments)
    assert status == 1 and words in line and "move it away" not in line


def test_a_sampler_that_fails_takes_no_checkpoint_with_it(workspace, trained, tmp_path, monkeypatch, capsys):
  arguments = [*config_arguments(workspace), "--config.train.steps=8", f"--workdir={tmp_path / 'run'}"]

  def fail(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.00GiB.")

  with monkeypatch.context() as patch:
    patch.setattr(train, "sample_grid", fail)
    status, line = _status_and_line(capsys, *arguments, "--config.logging.sample_every=4")
  assert status == 1 and "sampling does not fit" in line and "a smaller sample.batch_size (now 8)" in line
  with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    assert checkpoints.steps == [4]
  free = ["--config.logging.sample_every=8", "--config.sample.batch_size=4", "--config.vae_training.steps=9"]
  train.main([*arguments, *free])
  assert _losses(tmp_path / "run") == _losses(trained)


def test_a_run_that_is_past_its_last_step_is_finished(workspace, trained, tmp_path, capsys):
  shutil.copytree(trained, tmp_path / "run")
  arguments = [*config_arguments(workspace), "--config.train.steps=6", f"--workdir={tmp_path / 'run'}"]
  train.main([*arguments, "--accept_changes", "--stopped_status=75"])
  assert "trained to step 8" in capsys.readouterr().out


def test_checkpoints_that_appear_later_are_found(tmp_path):
  state = {"state": {"x": np.arange(3.0)}}
  with Checkpoints(tmp_path) as early, Checkpoints(tmp_path) as writer:
    writer.save(5, state)
    writer.wait()
    assert early.latest() is None
    step, loaded = early.restore(state, 5)
    np.testing.assert_array_equal(loaded["state"]["x"], state["state"]["x"])
    assert step == early.latest() == 5


def test_unfinished_checkpoint_is_never_picked_up(workspace, trained, tmp_path):
  """Readers leave it to the run, which may be writing it; the run starts that step again."""
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  for marker in (workdir / "checkpoints" / "8").rglob("commit_success.txt"):
    marker.unlink()
  unfinished = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
  (workdir / "checkpoints" / "8").rename(unfinished)
  assert open_run(workdir).load_params("ema")[0] == 4
  assert any(unfinished.iterdir())
  with Checkpoints(workdir / "checkpoints", trains=True) as checkpoints:
    assert checkpoints.steps == [4]
    checkpoints.save(8, {"params": {"x": np.zeros(2)}})
  assert not unfinished.exists() and unfinished.with_suffix("").exists()


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("--config.train.batch_size=7", "not divisible"),
    ("--config.train.batch_size=4", "choose a multiple of 8"),  # fewer rows than devices, and so than hosts
    ("--config.mesh.data=3", "does not divide 8 devices"),
    ("--config.mesh.data=4", "needs 4 devices, 8 are present"),
    ("--config.data.path=nowhere", "nowhere is not a prepared data set"),
    ("--config.weights.vae=nowhere", "nowhere"),
    ("--config.weights.vae=", "compdiff train-vae"),
    ("--config.weights.tokenizer=nowhere", "vocab.json is missing"),
    ("--config.data.image_size=64", "prepare larger"),
    ("--config.data.image_size=30", "multiple of 4"),
    ("--config.text_encoder.vocab_size=520", "set it to at least"),
    ("--config.text_encoder.max_position_embeddings=39", "gives 40 tokens a text"),
    ("--config.train_text_encoder=False", "a frozen text encoder needs weights"),
    ("--config.conditioner.d_ctx=32", "must be equal"),
    ("--config.conditioner.attributes=('age','height')", "height"),
    ("--config.logging.checkpoint_every=5", "multiple of logging.log_every"),
    ("--config.logging.keep_every=6", "a multiple or divisor of logging.checkpoint_every 4"),
    ("--config.sharding_rules=(('.*kernel',('fsdp','fsdp')),)", "names a mesh axis twice"),
    ("--config.seed=2147483648", "config.seed is 2147483648; it must be from 0 to 2147483647"),
    ("--config.train.warmup_steps=9999", "must be smaller than train.steps"),
    ("--config.scheduler.prediction_type=eps", "prediction_type"),
    ("--config.sample.sampler=eular", "did you mean 'euler'"),
  ],
)
def test_bad_values_are_refused_before_anything_is_written(workspace, tmp_path, fails, override, words):
  message = fails(train.main, *config_arguments(workspace), override, f"--workdir={tmp_path / 'run'}")
  assert words in message
  assert not (tmp_path / "run").exists()


def test_fsdp_on_shapes_that_it_does_not_divide(workspace, tmp_path, fails, capsys):
  """A rule is an order and refused; by default such parameters stay whole, which is said."""
  arguments = [*config_arguments(workspace), "--config.mesh.fsdp=8", f"--workdir={tmp_path / 'run'}"]
  message = fails(train.main, *arguments, "--config.sharding_rules=(('unet.conv_out.bias',('fsdp',)),)")
  assert "unet.conv_out.bias (4,) is not divisible by fsdp" in message
  train.main([*arguments, "--dry_run"])
  (line,) = [line for line in capsys.readouterr().err.splitlines() if "not split over fsdp" in line]
  assert "no axis is divisible" in line and line.endswith("MiB")
  assert not (tmp_path / "run").exists()


def test_frozen_network_must_stay_the_same(workspace, trained, tmp_path, fails):
  (trained_copy := tmp_path / "run").mkdir()
  shutil.copytree(trained, trained_copy, dirs_exist_ok=True)
  frozen = json.loads((trained_copy / "frozen.json").read_text())
  (trained_copy / "frozen.json").write_text(json.dumps({**frozen, "vae": "0" * 64}))
  arguments = [*config_arguments(workspace), "--config.train.steps=8", f"--workdir={trained_copy}"]
  assert "frozen.vae" in fails(train.main, *arguments)
  with pytest.raises(cli.InputError, match="content hash differs"):
    open_run(trained_copy).load_params("ema")


def test_another_schema_is_refused(workspace, trained, tmp_path, fails):
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  text = (workdir / "schema.json").read_text()
  assert '"year"' in text
  (workdir / "schema.json").write_text(text.replace('"year"', '"month"'))
  message = fails(train.main, *config_arguments(workspace), "--config.train.steps=8", f"--workdir={workdir}")
  assert "schema: [" in message and '"unit": "month"' in message and '"unit": "year"' in message


def test_dry_run_prints_and_writes_nothing(workspace, tmp_path, capsys):
  train.main([*config_arguments(workspace), f"--workdir={tmp_path / 'run'}", "--dry_run"])
  printed = capsys.readouterr()
  assert json.loads(printed.out)["train"]["batch_size"] == 8
  assert "MiB a device" in printed.err
  assert not (tmp_path / "run").exists()
