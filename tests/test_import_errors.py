"""`compdiff import` says in one line what it cannot read, and what is cut short leaves nothing that looks complete."""

import contextlib
import json
import logging
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
import toy_models
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file
from toy_models import HCN, TYPED

from compdiff_jax import import_weights, sample
from compdiff_jax.cli import InputError
from compdiff_jax.workdir import open_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models")
  return toy_models.stable_diffusion(
    directory / "sd", toy_models.tokenizer(directory / "tokenizer"), toy_models.networks()
  )


@pytest.fixture
def source(base, tmp_path):
  return shutil.copytree(base, tmp_path / "source")


@pytest.fixture
def refused(source, tmp_path, fails):
  """Imports `source`, which must fail and leave nothing; returns the line."""

  def call(*options):
    before = sorted(tmp_path.iterdir())
    message = fails(import_weights.main, f"--source={source}", f"--workdir={tmp_path / 'run'}", *options)
    assert sorted(tmp_path.iterdir()) == before
    return message

  return call


_SDXL = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "X"]}


@pytest.mark.parametrize(
  ("file", "changes", "message"),
  [
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline", **_SDXL}, "a component text_encoder_2"),
    ("model_index.json", {"transformer": ["diffusers", "SD3Transformer2DModel"]}, "a component transformer"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "field addition_embed_type is 'text_time'"),
    ("unet/config.json", {"_class_name": "SD3Transformer2DModel"}, "describes a SD3Transformer2DModel"),
    ("unet/config.json", {"in_channels": 9}, "unet.in_channels 9 must equal vae.latent_channels 4"),
    ("unet/config.json", {"cross_attention_dim": 32}, "unet.cross_attention_dim 32, text_encoder.hidden_size 16"),
    ("unet/config.json", {"block_out_channels": [8, 24]}, "of another shape: "),
    ("unet/config.json", {"layers_per_block": 2}, "missing: "),
    ("unet/config.json", {"sample_size": None}, "field sample_size of the UNet's config.json is None"),
    ("vae/config.json", {"latent_channels": 16}, "must equal vae.latent_channels 16"),
    ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "describes a T5EncoderModel"),
    ("text_encoder/config.json", {"vocab_size": 100}, "514 tokens and the text encoder 100"),
    ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is 'FlowM"),
  ],
)
def test_a_model_of_another_architecture(source, refused, file, changes, message):
  toy_models.edit_json(source / file, **changes)
  assert message in refused()


def test_every_unmatched_key_is_listed(source, refused):
  path = source / "unet" / "diffusion_pytorch_model.safetensors"
  state = load_file(path)
  state["lora.weight"] = state.pop("conv_in.weight")
  state["conv_out.bias"] = torch.zeros(7)
  save_file(state, path)
  message = refused()
  for part in ("1 missing: conv_in.weight", "1 unexpected: lora.weight", "conv_out.bias (file [7], model [4])"):
    assert part in message


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_truncated_weights(source, refused, component):
  path = next((source / component).glob("*.safetensors"))
  path.write_bytes(path.read_bytes()[:-4])
  assert f"{path} is not a whole safetensors file" in refused()


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "a JSON list instead of an object")])
def test_broken_config(source, refused, text, message):
  (source / "vae" / "config.json").write_text(text)
  assert f"{source / 'vae' / 'config.json'}" in (line := refused()) and message in line


def test_quantised_weights(source, refused):
  path = source / "vae" / "diffusion_pytorch_model.safetensors"
  save_file({name: value.to(torch.int8) for name, value in load_file(path).items()}, path)
  assert "as I8; weights must be F32, F16" in refused()


def test_a_key_in_two_shards(source, refused):
  directory = source / "vae"
  whole = directory / "diffusion_pytorch_model.safetensors"
  for name in ("a.safetensors", "b.safetensors"):
    shutil.copyfile(whole, directory / name)
  whole.unlink()
  index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
  (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
  assert "which another file of" in refused()


def test_parts_that_are_missing_or_double(source, refused, base, tmp_path):
  assert "is a whole model; leave out --base" in refused(f"--base={base}")
  for folder, config in (("hcn", TYPED), ("demographic_encoder", HCN)):
    toy_models.save_state(source / folder / "model.safetensors", toy_models.conditioner_state(config))
  assert "has the conditioners hcn and demographic_encoder" in refused()
  shutil.rmtree(source / "demographic_encoder")
  toy_models.save_state(source / "hcn" / "model.safetensors", {"some.weight": torch.zeros(2)})
  assert "holds no conditioner of the reference" in refused()
  shutil.rmtree(source / "hcn")
  shutil.rmtree(source / "tokenizer")
  assert "is not a CLIP tokenizer" in refused()
  (source / "model_index.json").unlink()
  assert "has neither model_index.json nor model.safetensors" in refused()


class _Trap:
  def __reduce__(self):
    return print, ("a pickle ran code",)


def test_a_pickle_that_runs_code(source, refused, capsys):
  path = source / "vae" / "diffusion_pytorch_model.bin"
  (source / "vae" / "diffusion_pytorch_model.safetensors").unlink()
  torch.save({"conv_in.weight": _Trap()}, path)
  assert "compdiff import --allow_pickle" in refused()
  assert f"{path} is not a whole file of tensors" in refused("--allow_pickle")
  assert "a pickle ran code" not in capsys.readouterr().out


@contextlib.contextmanager
def largest_file(num_bytes):
  """No file may grow beyond this: the operating system's own error, in Python and in the checkpoint library."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(refused, source, tmp_path, monkeypatch, capsys):
  """Found before, found by Python, and found by the library that writes the checkpoint."""
  usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "and its disk has 0.0 GB free" in refused()
  with largest_file(60_000):
    assert "cannot write" in (line := refused()) and "File too large" in line

  def save(*arguments):
    with largest_file(10_000):
      write(*arguments)

  write = import_weights._save
  monkeypatch.setattr(import_weights, "_save", save)
  # What stays silent after the failure is restored after the test.
  loggers = [(logging.getLogger(name), "disabled") for name in ("asyncio", "absl")]
  for owner, name in ((threading, "excepthook"), (sys, "unraisablehook"), *loggers):
    monkeypatch.setattr(owner, name, getattr(owner, name))
  before = sorted(tmp_path.iterdir())
  with pytest.raises(InputError, match="cannot write the checkpoint of"):
    import_weights.main([f"--source={source}", f"--workdir={tmp_path / 'run'}"])
  assert sorted(tmp_path.iterdir()) == before
  assert "Traceback" not in capsys.readouterr().err


def test_a_killed_import_can_be_repeated(source, tmp_path):
  """Killed when everything but the JSON files is there."""
  arguments = [f"--source={source}", f"--workdir={tmp_path / 'run'}"]
  program = (
    "import os, signal, sys; from compdiff_jax import import_weights;"
    "import_weights.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL); import_weights.main(sys.argv[1:])"
  )
  killed = subprocess.run([sys.executable, "-c", program, *arguments], cwd=REPOSITORY, capture_output=True)
  assert killed.returncode == -signal.SIGKILL
  assert list(tmp_path.glob(".run.partial-*"))
  with pytest.raises(InputError, match=r"config\.json is missing"):
    open_run(tmp_path / "run")
  import_weights.main(arguments)
  assert not list(tmp_path.glob(".run.partial-*"))
  assert open_run(tmp_path / "run").load_params("ema")[0] == 0


def test_an_imported_workdir_that_was_damaged(source, tmp_path, fails):
  run = tmp_path / "run"
  import_weights.main([f"--source={source}", f"--workdir={run}"])
  (tmp_path / "plan.csv").write_text("text\nEffusion.\n")
  arguments = (f"--workdir={run}", f"--plan={tmp_path / 'plan.csv'}", f"--out={tmp_path / 'out'}")
  path = run / "vae" / "diffusion_pytorch_model.safetensors"
  state = load_file(path)
  save_file({name: value + 1 for name, value in state.items()}, path)
  assert f"{run / 'vae'} is not the vae that {run} was trained with" in fails(sample.main, *arguments)
  path.unlink()
  assert "has no diffusion_pytorch_model.safetensors" in fails(sample.main, *arguments)
  (run / "config.json").write_text("{}")
  assert "config.json has no section" in fails(sample.main, *arguments)
