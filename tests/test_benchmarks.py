"""The speed benchmarks at toy size: both sides do the same work, and what they print is what was timed."""

import argparse
import functools
import json
import shlex

import pytest
from conftest import REPOSITORY
from sleeper import sleeper

from benchmarks import full_size, networks, one_gpu, restart, sampling, train_step, turns
from compdiff_jax import train
from compdiff_jax.cli import RunError
from compdiff_jax.metrics import read_metrics

_TRAIN = {"size": "toy", "dtype": "float32", "batch": 2, "compiled": False}


def test_training_steps_of_both_sides():
  options = argparse.Namespace(**_TRAIN, inputs="moments")
  sides = [train_step.ours(options), train_step.theirs(options, channels_last=True)]
  for calls in sides:
    assert set(calls) == set(train_step.NAMES)
    # Fresh noise each time, from networks that predict next to nothing: the loss is about the noise's variance.
    assert calls["train step"]() == pytest.approx(1.2, abs=0.5)
  ours, theirs = (calls["forward"]() for calls in sides)
  assert ours.shape == (2, 8, 8, 4) and theirs.shape == (2, 4, 8, 8)


def test_the_peer_trains_on_images_too():
  options = argparse.Namespace(**_TRAIN, inputs="images")
  assert train_step.theirs(options, channels_last=True)["train step"]() == pytest.approx(1.2, abs=0.5)


def test_samplers_of_both_sides():
  options = argparse.Namespace(size="toy", dtype="float32", batch=2, steps=2, compiled=False)
  ours, theirs = (side(options)["sample"]() for side in (sampling.ours, sampling.theirs))
  assert ours.shape == theirs.shape == (2, 32, 32, 3)


def test_sizes_are_those_that_the_figures_name():
  counts = {"small": 18_150_852, "sd21": 865_910_724}
  for name, wanted in counts.items():
    size = networks.SIZES[name]
    model = networks.our_model(networks.run_config(size, 8, "bfloat16"), size)
    assert sum(leaf.size for leaf in model.unet.shapes.values()) == wanted
    assert model.latent_shape == (size.latent_side, size.latent_side, 4)
    assert model.trained == ("unet",) and model.frozen == ("vae", "text_encoder")


@pytest.mark.parametrize("rounds", [1, 2])
def test_turns_time_what_each_side_does(rounds):
  options = argparse.Namespace(seconds=0.02, batch=3)
  sides = {"jax": functools.partial(sleeper, factor=1), "torch": functools.partial(sleeper, factor=4)}
  times, peaks = turns.take_turns(sides, options, ["sleep"], rounds, repeats=2)
  assert [len(times["sleep"][side]) for side in sides] == [rounds] * 2
  assert all(one.wall >= 0.02 * factor for side, factor in (("jax", 1), ("torch", 4)) for one in times["sleep"][side])
  assert all(peak > 0 for peak in peaks.values())


def test_summary_compares_with_the_fastest_peer_round_by_round():
  wall = {"jax": [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "fast": [2.0, 3.0, 2.0]}
  times = {side: [turns.Times(seconds, 2 * seconds) for seconds in own] for side, own in wall.items()}
  row = turns.summary("it", argparse.Namespace(batch=10), times, dict.fromkeys(wall, 1.5))
  assert row["by_clock"] == {"ratio": 1.5, "lowest": 0.5, "highest": 2.0} and "slow" not in row
  assert row["jax"]["images_per_second"] == 5 and row["fast"]["processor_seconds"] == 4


def test_restart_measures_three_starts_of_one_run(tmp_path, capsys):
  restart.main([f"--dir={tmp_path}", "--first=2", "--steps=4", "--", str(REPOSITORY / "tests" / "stepper.py")])
  row = json.loads(capsys.readouterr().out)
  assert min(row["warm_seconds_to_first_step"], row["cold_seconds_to_first_step"]) >= 0.5  # the stand-in's start
  # Of the last of the three runs.
  assert row["images_per_second"] == 40 and row["data_wait_share"] == 0.01
  steps = [entry["step"] for entry in read_metrics(tmp_path / "run")]
  assert steps == sorted(steps) and steps[:4] == [1, 2, 3, 4] and all(step % 4 == 0 for step in steps[-2:])
  assert (tmp_path / "compiled").is_dir()


def test_restart_says_which_command_failed(tmp_path):
  with pytest.raises(SystemExit, match="status 2 after 0 reports"):
    restart.main([f"--dir={tmp_path}", "--", str(REPOSITORY / "tests" / "no_such_file.py")])


def test_a_run_of_any_size_without_downloads(tmp_path, capsys):
  """What it prints is a command that would train; a second call makes nothing again."""
  arguments = [f"--out={tmp_path}", "--size=toy", "--num=80"]
  full_size.main(arguments)
  made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
  full_size.main(arguments)
  assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
  program, verb, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
  assert (program, verb) == ("compdiff", "train")
  train.main([*words, f"--workdir={tmp_path / 'run'}", "--config.train.batch_size=8", "--dry_run"])


def test_measurements_of_a_gpu_go_on_where_the_time_was_over(tmp_path, monkeypatch, fails):
  """One that fails, one that succeeds, one that is too long, with what it started; then the rest."""
  monkeypatch.setattr(
    one_gpu,
    "MEASUREMENTS",
    {
      "inputs": "-c \"print('many words'); print('compdiff train --config=a')\"",
      "broken": "-c 'import nowhere'",
      "restart": '-c \'import os, time; os.mkdir("OUT/restart"); os.path.exists("OUT/go") or time.sleep(3600)\'',
      "last": "-c 'import sys; print(sys.argv)' TRAIN",
    },
  )
  command = [f"--out={tmp_path}", "--minutes=0.1"]
  with pytest.raises(RunError, match="goes on with 'restart'"):
    one_gpu.main(command)
  rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
  assert [(row["name"], row["status"]) for row in rows] == [("inputs", 0), ("broken", 1), ("restart", -9)]
  assert "nowhere" in rows[1]["output"][-1] and "nowhere" in (tmp_path / "broken.log").read_text()
  (tmp_path / "go").touch()
  one_gpu.main([f"--out={tmp_path}", "--minutes=60"])
  assert list(one_gpu.finished(tmp_path)) == ["inputs", "restart", "last"]
  assert one_gpu.finished(tmp_path)["last"] == ["['-c', 'compdiff', 'train', '--config=a']"]
  assert "there is no 'lost'" in fails(one_gpu.main, *command, "--only=lost")
