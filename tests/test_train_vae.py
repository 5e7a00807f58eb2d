"""The autoencoder's training command where the data set is unusual; tests/conftest.py runs it on the usual one."""

import json
import subprocess
import sys

from conftest import PATIENCE, config_arguments

from compdiff_jax import train_vae
from data_prep.dataset import write_dataset
from data_prep.phantom.population import SCHEMA, PhantomImages, row


def test_data_without_a_validation_split(workspace, tmp_path):
  """The error that is reported is then that of training images, by name; the test split is never looked at."""
  write_dataset(
    tmp_path / "data",
    name="phantom",
    schema=SCHEMA,
    examples=[row(5, index) for index in range(40)],
    encode=PhantomImages(5, 32),
    description="No validation images.",
    size=32,
    command="a test",
    fractions=(0.7, 0, 0.3),
  )
  arguments = [*config_arguments(workspace), f"--config.data.path={tmp_path / 'data'}", f"--out={tmp_path / 'vae'}"]
  train_vae.main(arguments)
  report = json.loads((tmp_path / "vae" / "training.json").read_text())
  assert report["train_error_grey_levels"] > 0 and "val_error_grey_levels" not in report


def test_a_loss_that_diverges_ends_the_run_in_one_line(workspace, tmp_path):
  """Exit status 1 and nothing written; threads that still read ahead when the interpreter ends could abort it."""
  arguments = [*config_arguments(workspace), f"--out={tmp_path / 'vae'}", "--config.vae_training.learning_rate=1e30"]
  run = subprocess.run(
    [sys.executable, "-m", "compdiff_jax", "train-vae", *arguments], capture_output=True, text=True, timeout=PATIENCE
  )
  assert run.returncode == 1, run.stderr
  assert "the VAE loss became" in run.stderr and "Traceback" not in run.stderr
  assert not list((tmp_path / "vae").iterdir())
