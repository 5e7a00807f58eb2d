"""The autoencoder's training command in unusual cases; tests/conftest.py runs it on the usual one."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PATIENCE, REPOSITORY, config_arguments
from safetensors.numpy import load_file

from compdiff_jax import cli, train_vae
from compdiff_jax.data.records import RecordSet, decode_image
from compdiff_jax.interop.weights import read_config
from compdiff_jax.models.functional import Functional
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


def test_fine_tuning_with_a_config_of_real_data(workspace, tmp_path, fails):
  """Such a config describes no VAE: the shape comes from the one that is fine-tuned, or there is none."""
  arguments = [f"--config={REPOSITORY / 'configs/chest/compdiff.py'}", f"--out={tmp_path / 'vae'}"]
  message = fails(train_vae.main, *arguments)
  assert "no section vae" in message and "set config.vae_training.init" in message and not (tmp_path / "vae").exists()
  data = [f"--config.data.path={workspace / 'data'}", "--config.data.image_size=32"]
  settings = [f"--config.vae_training.{name}" for name in (f"init={workspace / 'vae'}", "steps=2", "batch_size=8")]
  train_vae.main([*arguments, *data, *settings])
  shapes, tuned = (read_config(path / "vae", "AutoencoderKL") for path in (workspace, tmp_path))
  assert tuned | {"scaling_factor": 0} == shapes | {"scaling_factor": 0}
  before, after = (load_file(path / "vae" / "diffusion_pytorch_model.safetensors") for path in (workspace, tmp_path))
  for name, value in before.items():
    np.testing.assert_allclose(after[name], value, rtol=0, atol=1e-4, err_msg=name)  # steps of at most 1e-5 each


def test_every_set_of_the_mix_is_trained_on(workspace, tmp_path, fails, monkeypatch):
  class Read(Exception):
    pass

  def read(sets, *, balance, balance_tau, **_):
    raise Read([(str(records.path), weight) for records, weight in sets], balance, balance_tau)

  shutil.copytree(workspace / "data", tmp_path / "more")
  arguments = [*config_arguments(workspace), f"--out={tmp_path / 'vae'}", "--config.data.balance=('sex',)"]
  mix = f"--config.data.mix=(({str(tmp_path / 'more')!r}, 3.0),)"
  with monkeypatch.context() as patch, pytest.raises(Read) as error:
    patch.setattr(train_vae, "training_batches", read)
    train_vae.main([*arguments, mix])
  sets = [(str(workspace / "data"), 1.0), (str(tmp_path / "more"), 3.0)]
  assert error.value.args == (sets, ("sex",), 0.5)
  assert "data.image_size 30 must be a multiple of 4" in fails(
    train_vae.main, *arguments, "--config.data.image_size=30"
  )

  # What is measured is a quarter of the one and three quarters of the other, as far as there are images.
  traced = []

  def stub(params, batch, method):
    traced.append((method, isinstance(params["weight"], jax.core.Tracer)))
    return jnp.concatenate([batch, jnp.full_like(batch, -30.0)], axis=-1) if method == "encode" else batch

  records = RecordSet(workspace / "data")
  params = {"weight": jnp.ones([])}
  originals, decoded, spread = train_vae.reconstruct(stub, params, [(records, 1.0), (records, 3.0)], "train", 32)
  count = records.splits["train"]
  wanted = np.stack(
    [decode_image(records.split("train")[i]["image"], 32) for i in [*range(64), *range(min(192, count))]]
  )
  np.testing.assert_array_equal(originals, wanted)
  np.testing.assert_array_equal(decoded, wanted)
  assert spread == pytest.approx((wanted / 127.5 - 1).std(), rel=1e-4)
  train_vae.reconstruct(stub, params, [(records, 1.0)], "val", 32)
  assert traced == [("encode", True), ("decode", True)]  # one program for all splits, with the weights as arguments


def test_noise_and_initial_weights_have_keys_of_their_own(workspace, tmp_path, monkeypatch):
  """Both are counted: with one key the noise of step k would be drawn as the k-th parameter was."""

  class Drawn(Exception):
    pass

  keys, init, fold_in = [], Functional.init, jax.random.fold_in

  def note_init(self, key):
    keys.append(key)
    return init(self, key)

  def note_noise(key, count):
    if isinstance(count, jax.core.Tracer):  # the number of the step
      raise Drawn(key)
    return fold_in(key, count)

  monkeypatch.setattr(Functional, "init", note_init)
  monkeypatch.setattr(jax.random, "fold_in", note_noise)
  with pytest.raises(Drawn) as noise:
    train_vae.main([*config_arguments(workspace), f"--out={tmp_path / 'vae'}"])
  (weights,) = keys
  assert not np.array_equal(*(jax.random.key_data(key) for key in (weights, noise.value.args[0])))


def test_a_second_run_leaves_the_files_of_the_first_alone(workspace, tmp_path, monkeypatch):
  """What nobody holds a lock on is removed as left over from a killed run."""

  class Looked(Exception):
    pass

  def second_run(_):
    with pytest.raises(Looked), cli.whole_directory(tmp_path / "vae"):
      raise Looked
    raise Looked(*tmp_path.glob(".vae.partial-*/config.json"))

  monkeypatch.setattr(train_vae.Image, "fromarray", second_run)
  with pytest.raises(Looked) as error:
    train_vae.main([*config_arguments(workspace), f"--out={tmp_path / 'vae'}"])
  assert len(error.value.args) == 1


def test_a_loss_that_diverges_ends_the_run_in_one_line(workspace, tmp_path):
  """Exit status 1 and nothing written; threads that still read ahead when the interpreter ends could abort it."""
  arguments = [*config_arguments(workspace), f"--out={tmp_path / 'vae'}", "--config.vae_training.learning_rate=1e30"]
  run = subprocess.run(
    [sys.executable, "-m", "compdiff_jax", "train-vae", *arguments], capture_output=True, text=True, timeout=PATIENCE
  )
  assert run.returncode == 1, run.stderr
  assert "the VAE loss became" in run.stderr and "Traceback" not in run.stderr
  assert not list((tmp_path / "vae").iterdir())
