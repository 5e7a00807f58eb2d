"""The autoencoder against torch diffusers."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_parity
from diffusers import AutoencoderKL as TorchAutoencoderKL

from compdiff_jax.cli import InputError
from compdiff_jax.models import AutoencoderKL, Functional, VAEConfig


def _fields(*channels: int, **fields) -> dict:
  return {
    "block_out_channels": list(channels),
    "down_block_types": ["DownEncoderBlock2D"] * len(channels),
    "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    **fields,
  }


CONFIGS = {
  "sd": _fields(8, 16, 16, layers_per_block=2, norm_num_groups=4),
  "plain": _fields(8, 12, norm_num_groups=2, latent_channels=3, mid_block_add_attention=False),
  "one level": _fields(16, norm_num_groups=8, in_channels=1, out_channels=1),
}
SD21 = _fields(128, 256, 512, 512, layers_per_block=2, act_fn="silu", sample_size=768, scaling_factor=0.18215)


def _pair(name: str) -> tuple[TorchAutoencoderKL, Functional]:
  """The torch model of a configuration with wide random weights, and ours."""
  torch_model = torch_parity.randomize(TorchAutoencoderKL(**CONFIGS[name]))
  config = VAEConfig.from_dict(CONFIGS[name])
  return torch_model, Functional(lambda rngs: AutoencoderKL(config, rngs=rngs))


def _images(name: str, height: int, width: int) -> np.ndarray:
  return np.tanh(torch_parity.normal(1, 2, height, width, CONFIGS[name].get("in_channels", 3)))


def _assert_parity(name: str, model: TorchAutoencoderKL, functional: Functional, height: int, width: int):
  """The moments, and the round trip through latents drawn with a given noise, agree within 1e-4."""
  params, images = torch_parity.params_of(model, functional), _images(name, height, width)
  with torch.no_grad():
    posterior = model.encode(torch_parity.nchw(images)).latent_dist
    moments = torch_parity.nhwc(torch.cat([posterior.mean, posterior.logvar], dim=1))
    noise = torch_parity.normal(2, *posterior.mean.permute(0, 2, 3, 1).shape)
    latents = posterior.mean + posterior.std * torch_parity.nchw(noise)
    decoded = torch_parity.nhwc(model.decode(latents).sample)

  ours, our_moments = jax.jit(functional)(params, images, noise)
  np.testing.assert_allclose(our_moments, moments, rtol=0, atol=1e-4)
  np.testing.assert_allclose(ours, decoded, rtol=0, atol=1e-4)
  return moments, decoded


@pytest.mark.parametrize(("name", "height", "width"), [("sd", 19, 13), ("plain", 9, 10), ("one level", 6, 5)])
def test_round_trip_equals_diffusers(name, height, width):
  moments, decoded = _assert_parity(name, *_pair(name), height, width)
  assert moments.std() > 0.1
  assert decoded.std() > 0.1


def test_decode_alone_equals_diffusers():
  model, functional = _pair("one level")
  latents = torch_parity.normal(1, 2, 5, 4, 4)
  ours = jax.jit(lambda *args: functional(*args, method="decode"))(torch_parity.params_of(model, functional), latents)
  with torch.no_grad():
    theirs = torch_parity.nhwc(model.decode(torch_parity.nchw(latents)).sample)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_norm_epsilons_equal_diffusers():
  model, functional = _pair("sd")
  # Variances around 1e-6, the epsilon of every norm here.
  torch_parity.make_faint(model, r"(?<!conv_out)(?<!quant_conv)$", factor=1e-3)
  moments, decoded = _assert_parity("sd", model, functional, 8, 12)
  assert moments.std() > 0.1
  assert decoded.std() > 0.1


def test_log_variance_is_clamped():
  model, functional = _pair("plain")
  with torch.no_grad():
    model.quant_conv.bias[3:] += torch.tensor([-60.0, 0.0, 60.0])
  params, images = torch_parity.params_of(model, functional), _images("plain", 8, 8)
  moments = jax.jit(lambda *args: functional(*args, method="encode"))(params, images)
  np.testing.assert_array_equal(moments[..., 3], -30)
  np.testing.assert_array_equal(moments[..., 5], 20)
  with torch.no_grad():
    logvar = torch_parity.nhwc(model.encode(torch_parity.nchw(images)).latent_dist.logvar)
  np.testing.assert_allclose(moments[..., 3:], logvar, rtol=0, atol=1e-4)


def test_bfloat16_compute_gives_float32_moments():
  config = VAEConfig.from_dict(CONFIGS["plain"])
  half = Functional(lambda rngs: AutoencoderKL(config, jnp.bfloat16, rngs=rngs))
  assert {spec.dtype for spec in half.shapes.values()} == {jnp.dtype(jnp.float32)}
  images, noise = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 4, 4, 3))
  decoded, moments = jax.eval_shape(half, half.shapes, images, noise)
  assert (decoded.dtype, moments.dtype) == (jnp.bfloat16, jnp.float32)


def test_full_size():
  config = VAEConfig.from_dict(SD21)
  functional = Functional(lambda rngs: AutoencoderKL(config, rngs=rngs))
  assert sum(math.prod(spec.shape) for spec in functional.shapes.values()) == 83_653_863
  images = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)
  moments = jax.eval_shape(lambda *args: functional(*args, method="encode"), functional.shapes, images)
  assert moments.shape == (1, 512 // config.downsampling, 512 // config.downsampling, 8)


def test_config_round_trip():
  for fields in (*CONFIGS.values(), SD21):
    config = VAEConfig.from_dict(fields)
    written = json.loads(json.dumps(config.to_dict()))
    assert VAEConfig.from_dict(written) == config
    assert all(written[name] == value for name, value in fields.items() if name in written)
  full = dict(TorchAutoencoderKL(**CONFIGS["sd"]).config)
  assert VAEConfig.from_dict(full) == VAEConfig.from_dict(CONFIGS["sd"])


@pytest.mark.parametrize(
  "fields",
  [
    {"use_quant_conv": False},
    {"use_post_quant_conv": False},
    {"shift_factor": 0.1},
    {"latents_mean": [0.0]},
    {"act_fn": "gelu"},
    {"down_block_types": ["AttnDownEncoderBlock2D"]},
    {"up_block_types": ["UpDecoderBlock2D"] * 2},
    {"scaling_factor": "0.18215"},
    {"tiling": True},
  ],
)
def test_unsupported_field_is_named(fields):
  with pytest.raises(InputError, match=f"vae/config.json: .*{next(iter(fields))}"):
    VAEConfig.from_dict(fields)
