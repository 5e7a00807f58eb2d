"""The text encoder against torch transformers."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_parity
from network_configs import PUBLISHED, SD15, SD21, TEXT_ENCODERS, TINY_MEMORY
from transformers import CLIPTextConfig as TorchCLIPTextConfig
from transformers import CLIPTextModel as TorchCLIPTextModel

from compdiff_jax.cli import InputError
from compdiff_jax.models import CLIPTextConfig

# Fields of the torch class that ours has with one value only, and another value.
REFUSED = {"attention_dropout": 0.1, "is_encoder_decoder": True, "model_type": "clip_vision_model"}
# Fields that say nothing about the hidden states, with another value than their default.
BOOKKEEPING = {
  "architectures": ["CLIPTextModelWithProjection"],
  "chunk_size_feed_forward": 1,
  "dtype": "float32",
  "id2label": {"0": "a", "1": "b"},
  "initializer_factor": 2.0,
  "initializer_range": 0.5,
  "label2id": {"a": 0, "b": 1},
  "output_attentions": True,
  "output_hidden_states": True,
  "problem_type": "regression",
  "return_dict": False,
  "transformers_version": "4.0",
}
# These belong to the pooled output.
INERT = {"projection_dim", "bos_token_id", "eos_token_id", "pad_token_id"}

build = functools.cache(lambda name: torch_parity.build_jax("text_encoder", TEXT_ENCODERS[name]))


def _torch_model(fields: dict) -> TorchCLIPTextModel:
  return torch_parity.randomize(torch_parity.build_torch("text_encoder", fields))


@pytest.mark.parametrize("name", TEXT_ENCODERS)
@pytest.mark.parametrize("length", [77, 5])
def test_last_hidden_state_equals_transformers(name, length):
  ids = torch_parity.text_inputs(TEXT_ENCODERS[name], length)
  ours, theirs = torch_parity.text_outputs(_torch_model(TEXT_ENCODERS[name]), build(name), ids)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_layer_norm_epsilon_equals_transformers(name):
  """Embeddings so faint that the variance under the first norms is about the epsilon."""
  model = torch_parity.make_faint(_torch_model(TEXT_ENCODERS[name]), "")
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      if "embedding" in key:
        parameter.mul_(1e-3)
  ids = torch_parity.text_inputs(TEXT_ENCODERS[name], 77)
  ours, theirs = torch_parity.text_outputs(model, build(name), ids)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_every_field_of_transformers_is_honoured_or_refused():
  """The parity of "options" shows that a field is honoured, because torch's model there depends on the field."""
  fields = TEXT_ENCODERS["options"]
  ids = torch.from_numpy(torch_parity.text_inputs(fields, 77))
  defaults = {name: value for name, value in TorchCLIPTextConfig().to_dict().items() if not name.startswith("_")}
  assert {*fields, *REFUSED, *BOOKKEEPING} == set(defaults)
  config = CLIPTextConfig.from_dict(fields)
  assert config.to_dict() == fields

  def depends(name: str, value) -> bool:
    assert value != fields.get(name, defaults[name])
    return torch_parity.depends_on(
      "text_encoder", fields, name, value, lambda model: model(ids, return_dict=True).last_hidden_state
    )

  for name in fields:
    assert depends(name, defaults[name]) == (name not in INERT), name
  for name, value in REFUSED.items():
    with pytest.raises(InputError, match=rf"^text_encoder/config\.json: field {name} "):
      CLIPTextConfig.from_dict({**fields, name: value})
  for name, value in BOOKKEEPING.items():
    assert not depends(name, value), name
  assert CLIPTextConfig.from_dict({**fields, **BOOKKEEPING}) == config
  assert CLIPTextConfig.from_dict({**defaults, **fields}) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
  fields = PUBLISHED[name]["text_encoder"]
  config = CLIPTextConfig.from_dict(fields)
  written = json.loads(json.dumps(config.to_dict()))
  assert CLIPTextConfig.from_dict(written) == config
  assert all(written[name] == value for name, value in fields.items() if name in written)
  # As transformers 5 writes the same model.
  saved = TorchCLIPTextConfig(**fields).to_json_string()
  assert CLIPTextConfig.from_dict(json.loads(saved)) == config


def test_tokens_see_no_later_tokens():
  functional = build("options")
  params = torch_parity.params_of(_torch_model(TEXT_ENCODERS["options"]), functional)
  ids = np.arange(10)[None]
  changed = ids.copy()
  changed[0, 6] = 50
  before, after = functional(params, ids), functional(params, changed)
  np.testing.assert_array_equal(before[:, :6], after[:, :6])
  assert np.abs(before[:, 6:] - after[:, 6:]).min(axis=(0, 2)).all()


def test_bfloat16_compute():
  functional = torch_parity.build_jax("text_encoder", TINY_MEMORY["text_encoder"], jnp.bfloat16)
  assert {spec.dtype for spec in functional.shapes.values()} == {jnp.dtype(jnp.float32)}
  out = jax.eval_shape(functional, functional.shapes, jax.ShapeDtypeStruct((2, 77), jnp.int32))
  assert (out.shape, out.dtype) == ((2, 77, 8), jnp.bfloat16)


@pytest.mark.parametrize(("published", "count"), [(SD21, 340_387_840), (SD15, 123_060_480)], ids=["SD 2.1", "SD 1.5"])
def test_full_size(published, count):
  functional = torch_parity.build_jax("text_encoder", published["text_encoder"])
  assert sum(math.prod(spec.shape) for spec in functional.shapes.values()) == count
  out = jax.eval_shape(functional, functional.shapes, jax.ShapeDtypeStruct((2, 77), jnp.int32))
  assert out.shape == (2, 77, published["text_encoder"]["hidden_size"])


@pytest.mark.parametrize(
  "fields",
  [
    {"hidden_act": "gelu_new"},
    {"num_attention_heads": 7},
    {"dropout": 0.1},
    {"num_hidden_layers": 0},
    {"vocab_size": 1.5},
    {"rope_theta": 1.0},
  ],
)
def test_unsupported_field_is_named(fields):
  with pytest.raises(InputError, match=f"text_encoder/config.json: .*{next(iter(fields))}"):
    CLIPTextConfig.from_dict(fields)
