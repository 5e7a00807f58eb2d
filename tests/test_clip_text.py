"""The text encoder against torch transformers."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_parity
from transformers import CLIPTextConfig as TorchCLIPTextConfig
from transformers import CLIPTextModel as TorchCLIPTextModel

from compdiff_jax.cli import InputError
from compdiff_jax.models import CLIPTextConfig, CLIPTextModel, Functional

TINY = {
  "vocab_size": 99,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "max_position_embeddings": 77,
  "bos_token_id": 97,
  "eos_token_id": 98,
}
SD21 = {
  "architectures": ["CLIPTextModel"],
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "dropout": 0.0,
  "eos_token_id": 2,
  "hidden_act": "gelu",
  "hidden_size": 1024,
  "initializer_factor": 1.0,
  "initializer_range": 0.02,
  "intermediate_size": 4096,
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 77,
  "model_type": "clip_text_model",
  "num_attention_heads": 16,
  "num_hidden_layers": 23,
  "pad_token_id": 1,
  "projection_dim": 512,
  "torch_dtype": "float32",
  "transformers_version": "4.25.0.dev0",
  "vocab_size": 49408,
}


def _functional(fields: dict, dtype=jnp.float32) -> Functional:
  config = CLIPTextConfig.from_dict(fields)
  return Functional(lambda rngs: CLIPTextModel(config, dtype, rngs=rngs))


def _torch_model(fields: dict) -> TorchCLIPTextModel:
  return torch_parity.randomize(TorchCLIPTextModel(TorchCLIPTextConfig(**fields)))


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("length", [77, 5])
def test_last_hidden_state_equals_transformers(hidden_act, length):
  fields = {**TINY, "hidden_act": hidden_act}
  model, functional = _torch_model(fields), _functional(fields)
  ids = np.random.default_rng(0).integers(0, 99, (2, length))
  ours = jax.jit(functional)(torch_parity.params_of(model, functional), ids)
  with torch.no_grad():
    theirs = model(torch.from_numpy(ids)).last_hidden_state.numpy()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_layer_norm_epsilon_equals_transformers(eps):
  """Embeddings so faint that the variance under the first norms is about the epsilon."""
  fields = {**TINY, "layer_norm_eps": eps}
  model, functional = _torch_model(fields), _functional(fields)
  torch_parity.make_faint(model, "")
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "embedding" in name:
        parameter.mul_(1e-3)
  ids = np.arange(14).reshape(2, 7)
  ours = jax.jit(functional)(torch_parity.params_of(model, functional), ids)
  with torch.no_grad():
    theirs = model(torch.from_numpy(ids)).last_hidden_state.numpy()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_tokens_see_no_later_tokens():
  functional = _functional(TINY)
  params = torch_parity.params_of(_torch_model(TINY), functional)
  ids = np.arange(10)[None]
  changed = ids.copy()
  changed[0, 6] = 50
  before, after = functional(params, ids), functional(params, changed)
  np.testing.assert_array_equal(before[:, :6], after[:, :6])
  assert np.abs(before[:, 6:] - after[:, 6:]).min(axis=(0, 2)).all()


def test_bfloat16_compute():
  functional = _functional(TINY, jnp.bfloat16)
  assert {spec.dtype for spec in functional.shapes.values()} == {jnp.dtype(jnp.float32)}
  out = jax.eval_shape(functional, functional.shapes, jax.ShapeDtypeStruct((2, 77), jnp.int32))
  assert (out.shape, out.dtype) == ((2, 77, 24), jnp.bfloat16)


def test_full_size():
  """SD 2.1's text encoder."""
  functional = _functional(SD21)
  assert sum(math.prod(spec.shape) for spec in functional.shapes.values()) == 340_387_840
  out = jax.eval_shape(functional, functional.shapes, jax.ShapeDtypeStruct((2, 77), jnp.int32))
  assert out.shape == (2, 77, 1024)


def test_config_round_trip():
  for fields in (TINY, SD21):
    config = CLIPTextConfig.from_dict(fields)
    written = json.loads(json.dumps(config.to_dict()))
    assert CLIPTextConfig.from_dict(written) == config
    assert all(written[name] == value for name, value in fields.items() if name in written)
  full = json.loads(TorchCLIPTextConfig(**TINY).to_json_string())
  assert CLIPTextConfig.from_dict(full) == CLIPTextConfig.from_dict(TINY)


@pytest.mark.parametrize(
  "fields",
  [
    {"hidden_act": "relu"},
    {"num_attention_heads": 7},
    {"attention_dropout": 0.1},
    {"model_type": "clip_vision_model"},
    {"vocab_size": 1.5},
    {"rope_theta": 1.0},
  ],
)
def test_unsupported_field_is_named(fields):
  with pytest.raises(InputError, match=f"text_encoder/config.json: .*{next(iter(fields))}"):
    CLIPTextConfig.from_dict(fields)
