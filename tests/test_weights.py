"""Component directories: ours read by torch, torch's read by us, and every broken one refused in one line."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_parity
from diffusers import AutoencoderKL as TorchAutoencoderKL
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel as TorchCLIPTextModel

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.conditioning.typed import TypedConfig
from compdiff_jax.interop import keys, weights
from compdiff_jax.models import (
  AutoencoderKL,
  CLIPTextConfig,
  CLIPTextModel,
  Functional,
  UNet2DCondition,
  UNetConfig,
  VAEConfig,
)
from tests import torch_states

UNET = UNetConfig(
  block_out_channels=(8, 16),
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
  layers_per_block=1,
  norm_num_groups=4,
  cross_attention_dim=12,
  attention_head_dim=(2, 4),
  use_linear_projection=True,
)
VAE = VAEConfig(block_out_channels=(8,), norm_num_groups=4)
TEXT = CLIPTextConfig(vocab_size=20, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)

# class name -> (config, our model, torch's model, file name)
COMPONENTS = {
  "UNet2DConditionModel": (
    UNET,
    Functional(lambda rngs: UNet2DCondition(UNET, rngs=rngs)),
    UNet2DConditionModel,
    "diffusion_pytorch_model.safetensors",
  ),
  "AutoencoderKL": (
    VAE,
    Functional(lambda rngs: AutoencoderKL(VAE, rngs=rngs)),
    TorchAutoencoderKL,
    "diffusion_pytorch_model.safetensors",
  ),
  "CLIPTextModel": (
    TEXT,
    Functional(lambda rngs: CLIPTextModel(TEXT, rngs=rngs)),
    TorchCLIPTextModel,
    "model.safetensors",
  ),
}


def _random_params(functional: Functional) -> dict[str, np.ndarray]:
  return {key: torch_parity.normal(i, *spec.shape) for i, (key, spec) in enumerate(functional.shapes.items())}


def _assert_equal(ours: dict, theirs: dict):
  assert list(ours) == list(theirs)
  for key, value in ours.items():
    np.testing.assert_array_equal(np.asarray(value), np.asarray(theirs[key]), err_msg=key)


def _saved(tmp_path, class_name: str, **kwargs):
  """(directory, functional, params, weights file) of a freshly saved component."""
  config, functional, _, file_name = COMPONENTS[class_name]
  params = _random_params(functional)
  weights.save_component(tmp_path / "component", config.to_dict(), params, class_name, **kwargs)
  return tmp_path / "component", functional, params, tmp_path / "component" / file_name


@pytest.mark.parametrize("class_name", COMPONENTS)
def test_round_trip_is_bit_identical_and_torch_loads_it(tmp_path, class_name):
  config, functional, torch_class, file_name = COMPONENTS[class_name]
  directory, _, params, _ = _saved(tmp_path, class_name)
  assert sorted(path.name for path in directory.iterdir()) == ["config.json", file_name]
  assert list(tmp_path.iterdir()) == [directory]

  loaded = weights.load_component(directory, functional)
  assert all(isinstance(value, jax.Array) and value.dtype == jnp.float32 for value in loaded.values())
  _assert_equal(loaded, params)
  assert type(config).from_dict(weights.read_config(directory, class_name)) == config

  model, info = torch_class.from_pretrained(directory, output_loading_info=True)
  assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  _assert_equal(torch_parity.params_of(model, functional), params)


@pytest.mark.parametrize("class_name", COMPONENTS)
def test_what_torch_saves_is_read(tmp_path, class_name):
  config, functional, torch_class, _ = COMPONENTS[class_name]
  _, _, params, _ = _saved(tmp_path, class_name)
  model = torch_class.from_pretrained(tmp_path / "component")
  model.save_pretrained(tmp_path / "torch")
  _assert_equal(weights.load_component(tmp_path / "torch", functional), params)
  assert type(config).from_dict(weights.read_config(tmp_path / "torch", class_name)) == config


def test_shards_are_read(tmp_path):
  directory, functional, params, _ = _saved(tmp_path, "UNet2DConditionModel")
  model = UNet2DConditionModel.from_pretrained(directory)
  model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
  assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
  _assert_equal(weights.load_component(tmp_path / "sharded", functional), params)
  shard = min((tmp_path / "sharded").glob("*.safetensors"))
  shard.unlink()
  with pytest.raises(InputError, match=f"{shard.name} is missing"):
    weights.load_component(tmp_path / "sharded", functional)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path, dtype):
  """Stored in half precision, torch sees that type and we read float32: exactly torch's rounding."""
  directory, functional, params, file = _saved(tmp_path, "CLIPTextModel", dtype=dtype)
  stored = load_file(file)
  assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}
  rounded = {key: torch.from_numpy(value).to(getattr(torch, dtype)).float().numpy() for key, value in params.items()}
  loaded = weights.load_component(directory, functional)
  assert {value.dtype for value in loaded.values()} == {jnp.dtype(jnp.float32)}
  _assert_equal(loaded, rounded)


def test_fp16_variant_is_read_when_it_is_alone(tmp_path):
  directory, functional, _, file = _saved(tmp_path, "AutoencoderKL", dtype="float16")
  expected = weights.load_component(directory, functional)
  file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
  _assert_equal(weights.load_component(directory, functional), expected)


def test_old_autoencoder_attention_is_read(tmp_path):
  directory, functional, params, file = _saved(tmp_path, "AutoencoderKL")
  old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  state, renamed = {}, 0
  for name, tensor in load_file(file).items():
    for new, old in old_names.items():
      if f".{new}." in name:
        name, renamed = name.replace(new, old), renamed + 1
        tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
    state[name] = tensor
  assert renamed == 16
  save_file(state, file)
  _assert_equal(weights.load_component(directory, functional), params)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_both_text_encoder_spellings_are_read(tmp_path, prefix):
  directory, functional, params, file = _saved(tmp_path, "CLIPTextModel")
  state = load_file(file)
  assert all(name.startswith("text_model.") for name in state)
  state = {prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()}
  state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
  save_file(state, file)
  _assert_equal(weights.load_component(directory, functional), params)


def test_a_parameter_in_two_spellings_is_refused(tmp_path):
  directory, functional, _, file = _saved(tmp_path, "CLIPTextModel")
  state = load_file(file)
  state["final_layer_norm.bias"] = state["text_model.final_layer_norm.bias"] + 1
  save_file(state, file)
  with pytest.raises(InputError, match=r"1 unexpected: .*final_layer_norm\.bias"):
    weights.load_component(directory, functional)


def test_every_mismatch_is_listed_in_one_line(tmp_path):
  directory, functional, _, file = _saved(tmp_path, "UNet2DConditionModel")
  state = load_file(file)
  state["extra.weight"] = state.pop("conv_in.weight")
  state["conv_out.bias"] = torch.zeros(7)
  save_file(state, file)
  with pytest.raises(InputError) as error:
    weights.load_component(directory, functional)
  assert str(error.value).count("\n") == 0
  for part in (
    str(file),
    "1 missing: conv_in.weight",
    "1 unexpected: extra.weight",
    "conv_out.bias (file [7], model [4])",
  ):
    assert part in str(error.value)


def test_long_lists_are_cut(tmp_path):
  """Weights of another model: all differ, eight names of each kind are shown."""
  directory, _, _, _ = _saved(tmp_path, "AutoencoderKL")
  with pytest.raises(InputError) as error:
    weights.load_component(directory, COMPONENTS["CLIPTextModel"][1])
  assert len(str(error.value)) < 2_000
  missing = len(COMPONENTS["CLIPTextModel"][1].shapes)
  assert f"{missing} missing: " in str(error.value)
  assert f"and {missing - 8} more" in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights(tmp_path, keep):
  directory, functional, _, file = _saved(tmp_path, "AutoencoderKL")
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(InputError, match=re.escape(str(file))):
    weights.load_component(directory, functional)


def test_nothing_to_read(tmp_path):
  functional = COMPONENTS["AutoencoderKL"][1]
  with pytest.raises(InputError, match="is not a directory"):
    weights.load_component(tmp_path / "absent", functional)
  with pytest.raises(InputError, match=r"has no diffusion_pytorch_model\.safetensors"):
    weights.load_component(tmp_path, functional)
  (tmp_path / "diffusion_pytorch_model.bin").touch()
  with pytest.raises(InputError, match=r"convert diffusion_pytorch_model\.bin"):
    weights.load_component(tmp_path, functional)
  (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
  with pytest.raises(InputError, match="no weight_map"):
    weights.load_component(tmp_path, functional)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "is not JSON"),
    ("[]", "instead of an object"),
    (json.dumps({"_class_name": "UNet2DModel"}), "describes a UNet2DModel"),
    (json.dumps({"architectures": ["CLIPTextModel"]}), "describes a CLIPTextModel"),
    (None, "cannot read"),
  ],
)
def test_wrong_config(tmp_path, text, message):
  if text is not None:
    (tmp_path / "config.json").write_text(text)
  with pytest.raises(InputError, match=message) as error:
    weights.read_config(tmp_path, "UNet2DConditionModel")
  assert str(tmp_path / "config.json") in str(error.value)


def test_nothing_is_overwritten(tmp_path):
  directory, functional, _, file = _saved(tmp_path, "AutoencoderKL")
  before = file.read_bytes()
  with pytest.raises(InputError, match="not empty"):
    weights.save_component(directory, VAE.to_dict(), _random_params(functional), "AutoencoderKL")
  assert file.read_bytes() == before


def test_interrupted_save_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
  def fail(path, *_):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(weights.safetensors_file, "write", fail)
  with pytest.raises(InputError, match="No space left on device"):
    _saved(tmp_path, "AutoencoderKL")
  assert not list(tmp_path.rglob("*.*"))


def test_every_leaf_rule_is_used_and_inverts():
  used = set()
  conditioner = TypedConfig(d_node=4, d_ctx=4, composer="transformer")
  schema = Schema((Attribute("sex", "categorical", values=("male", "female")),))
  functionals = [functional for _, functional, _, _ in COMPONENTS.values()]
  for functional in (*functionals, Functional(lambda rngs: conditioner.build(schema, rngs))):
    params = _random_params(functional)
    state = torch_states.to_torch(params)
    assert all(tensor.flags.c_contiguous for tensor in state.values())
    _assert_equal(torch_states.from_torch(state, functional.shapes), params)
    used |= {(key.rpartition(".")[2], value.ndim) for key, value in params.items()}
  assert used >= set(keys._LEAVES)
