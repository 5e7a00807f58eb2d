"""The UNet against torch diffusers; activations, norms and resizing against closed forms."""

import functools
import inspect
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_parity
from diffusers import UNet2DConditionModel
from diffusers.models.activations import get_activation
from network_configs import PUBLISHED, SD15, SD21_BASE, TINY_MEMORY, UNETS

from compdiff_jax.cli import InputError
from compdiff_jax.models import UNetConfig
from compdiff_jax.models.layers import ACTIVATIONS, GroupNorm, LayerNorm
from compdiff_jax.models.unet_blocks import resize_nearest

# Of each toy: latent height and width, context tokens. One size each, so that tests share the compiled programs.
SIZES = {"SD 1 style": (11, 6, 77), "SD 2 style": (9, 7, 83), "options": (9, 5, 78)}

# Fields of the torch class that ours has with one value only, and another value.
REFUSED = {
  "addition_embed_type": "text",
  "addition_embed_type_num_heads": 32,
  "addition_time_embed_dim": 8,
  "attention_type": "gated",
  "center_input_sample": True,
  "class_embed_type": "timestep",
  "class_embeddings_concat": True,
  "conv_in_kernel": 1,
  "conv_out_kernel": 1,
  "cross_attention_norm": "layer_norm",
  "dropout": 0.1,
  "dual_cross_attention": True,
  "encoder_hid_dim": 8,
  "encoder_hid_dim_type": "text_proj",
  "mid_block_only_cross_attention": True,
  "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
  "num_attention_heads": 2,
  "num_class_embeds": 10,
  "only_cross_attention": True,
  "projection_class_embeddings_input_dim": 8,
  "resnet_out_scale_factor": 2.0,
  "resnet_skip_time_act": True,
  "resnet_time_scale_shift": "scale_shift",
  "reverse_transformer_layers_per_block": [1, 2],
  "time_cond_proj_dim": 8,
  "time_embedding_act_fn": "silu",
  "time_embedding_dim": 32,
  "time_embedding_type": "fourier",
  "timestep_post_act": "silu",
}
# These say how a model is run, not what it computes in float32.
INERT = {"sample_size", "upcast_attention"}

ONE_LEVEL = TINY_MEMORY["unet"] | {
  "block_out_channels": [16],
  "down_block_types": ["CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D"],
}

build = functools.cache(lambda name: torch_parity.build_jax("unet", UNETS[name]))


def _torch_model(fields: dict) -> UNet2DConditionModel:
  return torch_parity.randomize(torch_parity.build_torch("unet", fields))


@pytest.mark.parametrize("name", UNETS)
def test_prediction_equals_diffusers(name):
  inputs = torch_parity.unet_inputs(UNETS[name], *SIZES[name])
  ours, theirs = torch_parity.unet_outputs(_torch_model(UNETS[name]), build(name), inputs)
  assert theirs.std() > 0.1
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  ("name", "faint"),
  # All maps but the last for the group norms; those before the transformer blocks for the layer norms.
  [("SD 1 style", "(?<!conv_out)$"), ("SD 2 style", "(?<!conv_out)$"), ("SD 1 style", "proj_in$")],
)
def test_norm_epsilons_equal_diffusers(name, faint):
  model = torch_parity.make_faint(_torch_model(UNETS[name]), faint)
  inputs = torch_parity.unet_inputs(UNETS[name], *SIZES[name])
  ours, theirs = torch_parity.unet_outputs(model, build(name), inputs)
  assert theirs.std() > 0.01
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fields", [TINY_MEMORY["unet"], UNETS["options"]], ids=["SD 1 style", "options"])
def test_gradients_equal_diffusers(fields):
  """Also those in the context, through which the conditioner trains, and in the vector added to the time embedding."""
  inputs = torch_parity.unet_inputs(fields, 8, 7, 78)
  ours, theirs = torch_parity.unet_gradients(_torch_model(fields), torch_parity.build_jax("unet", fields), inputs)
  errors = torch_parity.relative_errors(ours, theirs)
  assert set(errors) > {"context", "time vector", "conv_in.kernel"}
  assert max(errors.values()) < 1e-3, max(errors, key=errors.get)


def test_every_field_of_diffusers_is_honoured_or_refused():
  """The parity of "options" shows that a field is honoured, because torch's model there depends on the field."""
  fields, inputs = UNETS["options"], torch_parity.unet_inputs(UNETS["options"], *SIZES["options"])
  defaults = {
    name: parameter.default
    for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    if name != "self"
  }
  assert {*fields, *REFUSED} == set(defaults)
  assert UNetConfig.from_dict(fields).to_dict() == fields
  for name, value in fields.items():
    assert value != defaults[name]
    depends = torch_parity.depends_on(
      "unet", fields, name, defaults[name], lambda model: torch_parity.call_torch_unet(model, *inputs)
    )
    assert depends == (name not in INERT), name
  for name, value in REFUSED.items():
    assert value != defaults[name]
    with pytest.raises(InputError, match=rf"^unet/config\.json: field {name} "):
      UNetConfig.from_dict({**fields, name: value})
    assert UNetConfig.from_dict({**fields, name: defaults[name]}) == UNetConfig.from_dict(fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
  fields = PUBLISHED[name]["unet"]
  config = UNetConfig.from_dict(fields)
  written = json.loads(json.dumps(config.to_dict()))
  assert UNetConfig.from_dict(written) == config
  assert all(written[name] == value for name, value in fields.items() if name in written)
  # As a newer release writes the same model: every field it knows, lists for tuples.
  saved = json.loads(torch_parity.build_torch("unet", TINY_MEMORY["unet"]).to_json_string())
  assert UNetConfig.from_dict(saved | fields) == config
  assert UNetConfig.from_dict(fields | {"only_cross_attention": [False, False]}) == config


def test_full_size():
  """By shape only."""
  old, functional = (torch_parity.build_jax("unet", fields["unet"], jnp.bfloat16) for fields in (SD15, SD21_BASE))
  assert sum(math.prod(spec.shape) for spec in old.shapes.values()) == 859_520_964
  assert sum(math.prod(spec.shape) for spec in functional.shapes.values()) == 865_910_724
  sample = jax.ShapeDtypeStruct((2, 64, 64, 4), jnp.float32)
  context = jax.ShapeDtypeStruct((2, 81, 1024), jnp.float32)
  out = jax.eval_shape(functional, functional.shapes, sample, jax.ShapeDtypeStruct((2,), jnp.int32), context)
  assert out.shape == sample.shape


def test_bfloat16_compute_keeps_float32_parameters():
  half = torch_parity.build_jax("unet", ONE_LEVEL, jnp.bfloat16)
  assert {spec.dtype for spec in half.shapes.values()} == {jnp.dtype(jnp.float32)}
  ours, theirs = torch_parity.unet_outputs(_torch_model(ONE_LEVEL), half, torch_parity.unet_inputs(ONE_LEVEL, 8, 8, 5))
  assert ours.dtype == jnp.bfloat16
  assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


def test_initialization_is_torch_default():
  functional = torch_parity.build_jax("unet", ONE_LEVEL)
  params = functional.init(jax.random.key(0))
  reference = torch_parity.params_of(torch_parity.build_torch("unet", ONE_LEVEL), functional)
  assert list(params) == list(functional.shapes)
  for key, expected in reference.items():
    if expected.size > 500:
      # Uniform on the same interval: the largest draws of both lie near its end.
      np.testing.assert_allclose(jnp.abs(params[key]).max(), jnp.abs(expected).max(), rtol=0.03, err_msg=key)
      np.testing.assert_allclose(params[key].std(), expected.std(), rtol=0.1, err_msg=key)
    elif "norm" in key:
      np.testing.assert_array_equal(params[key], expected)
  repeated, other = functional.init(jax.random.key(0)), functional.init(jax.random.key(1))
  np.testing.assert_array_equal(params["conv_in.kernel"], repeated["conv_in.kernel"])
  assert not np.array_equal(params["conv_in.kernel"], other["conv_in.kernel"])


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"only_cross_attention": [False, True]}, "only_cross_attention"),
    ({"act_fn": "tanh"}, "act_fn"),
    ({"layers_per_block": 0}, "layers_per_block"),
    ({"block_out_channels": [32, 0, 64, 64]}, "block_out_channels"),
    ({"norm_num_groups": None}, "norm_num_groups"),
    ({"layers_per_block": [1, 2]}, "layers_per_block"),
    ({"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block"),
    ({"downsample_padding": 2}, "downsample_padding"),
    ({"block_out_channels": "320"}, "block_out_channels"),
    ({"attention_head_dim": [8, 8]}, "attention_head_dim"),
    ({"attention_head_dim": 7}, "attention_head_dim"),
    ({"use_linear_projection": 1}, "use_linear_projection"),
    ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types"),
    ({"up_block_types": ["UpBlock2D"]}, "up_block_types"),
    ({"cross_attention_dims": 1024}, "cross_attention_dim'?"),
  ],
)
def test_unsupported_field_is_named(fields, named):
  with pytest.raises(InputError, match=r"unet/config\.json: ") as error:
    UNetConfig.from_dict(fields)
  assert named in str(error.value)


def test_groups_must_divide_channels():
  with pytest.raises(InputError, match="norm_num_groups"):
    torch_parity.build_jax("unet", {**UNETS["options"], "norm_num_groups": 5})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_diffusers(name):
  x = np.linspace(-6, 6, 101, dtype=np.float32)
  expected = get_activation(name)(torch.from_numpy(x))
  np.testing.assert_allclose(ACTIVATIONS[name](x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_statistics_do_not_cancel(dtype):
  """Values around 1,000 with a spread of about 1: E[x^2] - E[x]^2 in float32 loses all of it."""
  x = jnp.asarray(1_000 + 4 * torch_parity.normal(0, 2, 6, 5, 8), dtype)
  exact = torch.from_numpy(np.asarray(x, np.float64))
  grouped = torch.nn.functional.group_norm(exact.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
  # Only the input is rounded to bfloat16: statistics and output are compared in float32.
  np.testing.assert_allclose(GroupNorm(4, 8, eps=1e-5)(x), grouped, rtol=0, atol=1e-3)
  np.testing.assert_allclose(LayerNorm(8)(x), torch.nn.functional.layer_norm(exact, [8]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (7, 10), (9, 11), (4, 5)])
def test_resize_equals_torch(size):
  x = torch_parity.normal(0, 2, 4, 5, 3)
  expected = torch.nn.functional.interpolate(torch_parity.nchw(x), size=size, mode="nearest")
  np.testing.assert_array_equal(resize_nearest(jnp.asarray(x), size), torch_parity.nhwc(expected))
