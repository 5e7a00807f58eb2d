"""data_prep.encode_latents: moments and ids of every record, resuming, and training on them."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import config_arguments

from compdiff_jax import evaluate, train, train_vae
from compdiff_jax.data.prompts import format_prompt
from compdiff_jax.data.records import RecordSet, decode_image
from compdiff_jax.data.tokenizer import load_tokenizer
from compdiff_jax.interop.weights import load_component, read_config
from compdiff_jax.metrics import read_metrics
from compdiff_jax.models.functional import Functional
from compdiff_jax.models.vae import AutoencoderKL, VAEConfig
from data_prep import encode_latents, holdout, verify
from data_prep.dataset import write_dataset
from data_prep.phantom import population as phantom


def _encode(workspace, out, *options):
  encode_latents.main(["--data", f"{workspace / 'data'}", "--weights", f"{workspace}", "--out", f"{out}", *options])
  return out


@pytest.fixture(scope="module")
def latents(workspace, tmp_path_factory):
  return _encode(workspace, tmp_path_factory.mktemp("latents") / "set", "--prompt_attributes", "age,sex")


def test_moments_and_ids_are_those_of_each_record_alone(workspace, latents):
  images, encoded = RecordSet(workspace / "data"), RecordSet(latents)
  assert encoded.splits == images.splits and encoded.schema == images.schema
  config = VAEConfig.from_dict(read_config(workspace / "vae", "AutoencoderKL"))
  vae = Functional(lambda rngs: AutoencoderKL(config, dtype=jnp.float32, rngs=rngs))
  params = load_component(workspace / "vae", vae)
  moments = jax.jit(lambda image: vae(params, image / 127.5 - 1.0, method="encode"))
  tokenizer = load_tokenizer(workspace / "tokenizer")
  for split, count in images.splits.items():
    for i in {0, count // 2, count - 1}:
      record, ours = images.split(split)[i], encoded.split(split)[i]
      for field in ("key", "patient", "text", "findings", "factors", "attributes"):
        np.testing.assert_equal(ours[field], record[field])
      stored = np.frombuffer(ours["moments"], ml_dtypes.bfloat16).reshape(encoded.latents["shape"]).astype(np.float32)
      expected = np.asarray(moments(decode_image(record["image"])[None].astype(np.float32)))[0]
      np.testing.assert_allclose(stored, expected, rtol=2**-8, atol=1e-4)
      prompt = format_prompt(record["text"], record["attributes"], images.schema, ("age", "sex"))
      np.testing.assert_array_equal(ours["input_ids"], tokenizer([prompt])[0])
    for name, values in images.attributes(split).items():
      np.testing.assert_array_equal(encoded.attributes(split)[name], values)


def test_licence_of_the_images_holds_for_their_moments(workspace, tmp_path):
  licence = "Use for research only."
  what = {"name": "phantom", "schema": phantom.SCHEMA, "description": "", "size": 32, "command": "", "licence": licence}
  images = phantom.PhantomImages(0, 32)
  write_dataset(tmp_path / "data", examples=phantom.rows(0, 8), encode=images, fractions=(1, 0, 0), **what)
  out = tmp_path / "latents"
  encode_latents.main(["--data", f"{tmp_path / 'data'}", "--weights", f"{workspace}", "--out", f"{out}"])
  assert tfds.builder_from_directory(out).info.redistribution_info.license == licence
  assert (out / "LICENSE").read_text() == licence


def test_moments_carry_the_proof_of_the_holdout(workspace, tmp_path):
  what = {"name": "phantom", "schema": phantom.SCHEMA, "description": "", "size": 32, "command": ""}
  images = phantom.PhantomImages(0, 32)
  write_dataset(tmp_path / "all", examples=phantom.rows(0, 60), encode=images, fractions=(1, 0, 0), **what)
  data, out = tmp_path / "data", tmp_path / "latents"
  holdout.main(["--data", f"{tmp_path / 'all'}", "--out", f"{data}", "--cells", "sex=female,group=B"])
  encode_latents.main(["--data", f"{data}", "--weights", f"{workspace}", "--out", f"{out}"])
  for name in ("holdout.json", "holdout_images.csv", "holdout_leaks.csv"):
    assert (out / name).read_text() == (data / name).read_text()
  assert len((data / "holdout_images.csv").read_text().splitlines()) > 1
  _, problems = verify.verify(out)
  assert not problems.counts


def test_interrupted_run_goes_on_at_the_first_missing_shard(workspace, latents, tmp_path, monkeypatch):
  write_shard, written = encode_latents.write_shard, []

  def interrupted(path, *rest):
    if len(written) == 1:
      path.with_name(f".{path.name}.1").write_bytes(b"half a shard")
      raise KeyboardInterrupt
    written.append(path.name)
    return write_shard(path, *rest)

  out = tmp_path / "set"
  monkeypatch.setattr(encode_latents, "write_shard", interrupted)
  with pytest.raises(KeyboardInterrupt):
    _encode(workspace, out, "--prompt_attributes", "age,sex")
  assert not out.exists()
  monkeypatch.setattr(
    encode_latents, "write_shard", lambda path, *rest: written.append(path.name) or write_shard(path, *rest)
  )
  _encode(workspace, out, "--prompt_attributes", "age,sex")
  assert len(written) == len(set(written)) == 3  # train, val, test; none twice
  assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in latents.iterdir()}
  assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_training_on_moments_gives_the_losses_of_training_on_images(workspace, trained, latents, tmp_path):
  """Same seed, same draws: the only difference is that the moments were rounded to bfloat16."""
  arguments = [*config_arguments(workspace), f"--config.data.path={latents}", "--config.train.steps=8"]
  train.main([*arguments, f"--workdir={tmp_path / 'run'}"])
  ours, theirs = read_metrics(tmp_path / "run"), read_metrics(trained)
  for row, expected in zip(ours, theirs, strict=True):
    for name in ("loss", "diffusion", "aux_age"):
      assert row[name] == pytest.approx(expected[name], rel=2**-8), (row["step"], name)
  assert any(row["diffusion"] != expected["diffusion"] for row, expected in zip(ours, theirs))


def test_moments_of_another_vae_or_size_are_refused(workspace, latents, tmp_path, fails):
  (tmp_path / "set").mkdir()
  shutil.copytree(latents, tmp_path / "set", dirs_exist_ok=True)
  info = json.loads((latents / "latents.json").read_text())
  (tmp_path / "set" / "latents.json").write_text(json.dumps({**info, "vae": "0" * 64}))
  arguments = [*config_arguments(workspace), f"--workdir={tmp_path / 'run'}"]
  message = fails(train.main, *arguments, f"--config.data.path={tmp_path / 'set'}")
  assert "another VAE" in message and not (tmp_path / "run").exists()
  arguments += [f"--config.data.path={latents}"]
  assert "set it to 32" in fails(train.main, *arguments, "--config.data.image_size=64")
  mixed = f"--config.data.mix=(({str(workspace / 'data')!r}, 1.0),)"
  assert "must both hold images" in fails(train.main, *arguments, mixed)


def test_commands_that_need_images_say_so(workspace, latents, tmp_path, fails):
  path = f"--config.data.path={latents}"
  assert "needs the data set of images" in fails(
    train_vae.main, *config_arguments(workspace), path, "--out", tmp_path / "v"
  )
  again = ("--data", latents, "--weights", workspace, "--out", tmp_path / "again")
  assert "already holds moments" in fails(encode_latents.main, *again)
  assert "holds moments, not images" in fails(
    evaluate.main, "--real", latents, "--synthetic", latents, "--out", tmp_path / "report"
  )


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (["--image_size", "64"], "prepare larger"),
    (["--image_size", "30"], "multiple of the VAE's downsampling 4"),
    (["--batch_size", "9"], "not divisible"),
    (["--batch_size", "0"], "--batch_size 0: give a positive number"),
    (["--prompt_attributes", "agee"], "did you mean 'age'"),
    (["--weights", "nowhere"], "nowhere"),
  ],
)
def test_bad_arguments_leave_nothing(workspace, tmp_path, fails, options, words):
  out = tmp_path / "set"
  message = fails(encode_latents.main, "--data", workspace / "data", "--weights", workspace, "--out", out, *options)
  assert words in message and not list(tmp_path.iterdir())
