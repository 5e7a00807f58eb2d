"""The UNet against torch diffusers; attention and resizing against closed forms."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
import torch_parity
from diffusers import UNet2DConditionModel

from compdiff_jax.cli import InputError
from compdiff_jax.models import Functional, UNet2DCondition, UNetConfig
from compdiff_jax.models.attention import attention
from compdiff_jax.models.layers import GroupNorm, LayerNorm
from compdiff_jax.models.unet_blocks import resize_nearest

CONFIGS = {
  # One attention level, 1x1 convolutions around the transformers: the style of SD 1.
  "sd1": {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
  },
  # Heads per level, linear projections, upcast attention: the style of SD 2.1-768.
  "sd2": {
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 20,
    "attention_head_dim": [1, 2, 3],
    "use_linear_projection": True,
    "upcast_attention": True,
    "sample_size": 96,
  },
  # Everything else that may differ from the defaults, attention at the lowest level included.
  "options": {
    "in_channels": 3,
    "out_channels": 5,
    "block_out_channels": [18, 24],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 3,
    "norm_eps": 1e-4,
    "cross_attention_dim": 8,
    "attention_head_dim": [2, 3],
    "transformer_layers_per_block": 2,
    "downsample_padding": 0,
    "mid_block_scale_factor": 1.5,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
  },
}

SD21 = {
  "sample_size": 64,
  "attention_head_dim": [5, 10, 20, 20],
  "cross_attention_dim": 1024,
  "use_linear_projection": True,
  "_class_name": "UNet2DConditionModel",
  "dual_cross_attention": False,
  "num_class_embeds": None,
}


def _pair(name: str, **changes) -> tuple[UNet2DConditionModel, Functional]:
  """The torch model of a configuration with wide random weights, and ours."""
  fields = {**CONFIGS[name], **changes}
  torch_model = torch_parity.randomize(UNet2DConditionModel(**fields))
  config = UNetConfig.from_dict(fields)
  return torch_model, Functional(lambda rngs: UNet2DCondition(config, rngs=rngs))


def _inputs(name: str, height: int, width: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  config = CONFIGS[name]
  sample = torch_parity.normal(1, 2, height, width, config.get("in_channels", 4))
  return sample, np.array([7, 981]), torch_parity.normal(2, 2, tokens, config["cross_attention_dim"])


def _torch_call(model, sample, timesteps, context) -> torch.Tensor:
  return model(torch_parity.nchw(sample), torch.from_numpy(timesteps), torch.from_numpy(context)).sample


@pytest.mark.parametrize(
  ("name", "height", "width", "tokens"),
  [("sd1", 9, 7, 77), ("sd2", 11, 6, 81), ("options", 9, 5, 1)],
)
def test_prediction_equals_diffusers(name, height, width, tokens):
  model, functional = _pair(name)
  inputs = _inputs(name, height, width, tokens)
  ours = jax.jit(functional)(torch_parity.params_of(model, functional), *inputs)
  with torch.no_grad():
    theirs = torch_parity.nhwc(_torch_call(model, *inputs))
  assert theirs.std() > 0.1
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  ("name", "faint"),
  # All maps but the last for the group norms; those before the transformer blocks for the layer norms.
  [("sd1", "(?<!conv_out)$"), ("options", "(?<!conv_out)$"), ("sd1", "proj_in$")],
)
def test_norm_epsilons_equal_diffusers(name, faint):
  model, functional = _pair(name)
  torch_parity.make_faint(model, faint)
  inputs = _inputs(name, 8, 8, 7)
  ours = jax.jit(functional)(torch_parity.params_of(model, functional), *inputs)
  with torch.no_grad():
    theirs = torch_parity.nhwc(_torch_call(model, *inputs))
  assert theirs.std() > 0.01
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_gradients_equal_diffusers():
  model, functional = _pair("sd1", layers_per_block=1)
  sample, timesteps, context = _inputs("sd1", 8, 7, 6)
  noise = torch_parity.normal(3, *sample.shape)

  def loss(params):
    return jnp.mean((functional(params, sample, timesteps, context) - noise) ** 2)

  ours = jax.jit(jax.grad(loss))(torch_parity.params_of(model, functional))
  torch.nn.functional.mse_loss(_torch_call(model, sample, timesteps, context), torch_parity.nchw(noise)).backward()
  for parameter in model.parameters():
    parameter.data = parameter.grad
  theirs = torch_parity.params_of(model, functional)
  errors = {key: jnp.linalg.norm(ours[key] - theirs[key]) / jnp.linalg.norm(theirs[key]) for key in theirs}
  assert max(errors.values()) < 1e-3, max(errors, key=errors.get)


def test_time_vector_is_added_to_the_time_embedding():
  model, functional = _pair("sd1")
  inputs = _inputs("sd1", 8, 8, 5)
  vector = torch_parity.normal(4, 2, 64)
  model.time_embedding.register_forward_hook(lambda module, args, output: output + torch.from_numpy(vector))
  ours = jax.jit(functional)(torch_parity.params_of(model, functional), *inputs, time_vector=vector)
  with torch.no_grad():
    theirs = torch_parity.nhwc(_torch_call(model, *inputs))
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_bfloat16_compute_keeps_float32_parameters():
  model, functional = _pair("sd1")
  config = UNetConfig.from_dict(CONFIGS["sd1"])
  half = Functional(lambda rngs: UNet2DCondition(config, jnp.bfloat16, rngs=rngs))
  assert half.shapes == functional.shapes
  assert {spec.dtype for spec in half.shapes.values()} == {jnp.dtype(jnp.float32)}
  inputs = _inputs("sd1", 8, 8, 5)
  ours = jax.jit(half)(torch_parity.params_of(model, functional), *inputs)
  with torch.no_grad():
    theirs = torch_parity.nhwc(_torch_call(model, *inputs))
  assert ours.dtype == jnp.bfloat16
  assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
  ("fields", "count"), [(SD21, 865_910_724), ({"sample_size": 64, "cross_attention_dim": 768}, 859_520_964)]
)
def test_full_size(fields, count):
  """SD 2.1 and SD 1.5, by shape only."""
  config = UNetConfig.from_dict(fields)
  functional = Functional(lambda rngs: UNet2DCondition(config, jnp.bfloat16, rngs=rngs))
  assert sum(math.prod(spec.shape) for spec in functional.shapes.values()) == count
  sample = jax.ShapeDtypeStruct((2, 64, 64, 4), jnp.float32)
  context = jax.ShapeDtypeStruct((2, 81, config.cross_attention_dim), jnp.float32)
  out = jax.eval_shape(functional, functional.shapes, sample, jax.ShapeDtypeStruct((2,), jnp.int32), context)
  assert out.shape == sample.shape


def test_initialization_is_torch_default():
  fields = {**CONFIGS["sd1"], "layers_per_block": 1}
  config = UNetConfig.from_dict(fields)
  functional = Functional(lambda rngs: UNet2DCondition(config, rngs=rngs))
  params = functional.init(jax.random.key(0))
  reference = torch_parity.params_of(UNet2DConditionModel(**fields), functional)
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


def test_config_round_trip():
  for fields in (*CONFIGS.values(), SD21):
    config = UNetConfig.from_dict(fields)
    written = json.loads(json.dumps(config.to_dict()))
    assert UNetConfig.from_dict(written) == config
    assert all(written[name] == value for name, value in fields.items() if name in written)


def test_config_of_diffusers_is_accepted_whole():
  """Every field that diffusers writes is known here: a default-constructed model's full config parses."""
  full = dict(UNet2DConditionModel(**CONFIGS["sd1"]).config)
  assert UNetConfig.from_dict(full) == UNetConfig.from_dict(CONFIGS["sd1"])


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"num_class_embeds": 10}, "num_class_embeds"),
    ({"only_cross_attention": True}, "only_cross_attention"),
    ({"center_input_sample": True}, "center_input_sample"),
    ({"act_fn": "gelu"}, "act_fn"),
    ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
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
  config = UNetConfig.from_dict({**CONFIGS["sd1"], "norm_num_groups": 5})
  with pytest.raises(InputError, match="norm_num_groups"):
    Functional(lambda rngs: UNet2DCondition(config, rngs=rngs))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_closed_form(causal):
  query, key, value = (torch_parity.normal(seed, 2, 6, 3, 4) for seed in range(3))
  scores = np.einsum("bthd,bshd->bhts", query.astype(np.float64), key) / 2
  if causal:
    scores = np.where(np.tri(6, dtype=bool), scores, -np.inf)
  expected = np.einsum("bhts,bshd->bthd", scipy.special.softmax(scores, axis=-1), value)
  np.testing.assert_allclose(attention(query, key, value, causal=causal), expected, rtol=0, atol=1e-6)


def test_attention_scores_are_float32():
  """Scores near 1,000 whose differences float16 and bfloat16 would round away or overflow."""
  query = jnp.full((1, 1, 1, 64), 16, jnp.bfloat16)
  key = jnp.full((1, 2, 1, 64), 8, jnp.bfloat16).at[0, 1, 0, 0].set(8.25)
  value = jnp.stack([jnp.zeros(64), jnp.ones(64)]).astype(jnp.bfloat16)[None, :, None]
  expected = scipy.special.expit(16 * 0.25 / 8)
  np.testing.assert_allclose(attention(query, key, value), expected, rtol=0, atol=4e-3)


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
