"""The autoencoder against torch diffusers."""

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
from diffusers import AutoencoderKL as TorchAutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from network_configs import PUBLISHED, SD21, TINY_MEMORY, VAES
from PIL import Image

from compdiff_jax.cli import InputError
from compdiff_jax.models import AutoencoderKL, Functional, VAEConfig
from compdiff_jax.models.vae import denormalize_pixels, normalize_pixels

# Image height and width of each toy, one size each: tests share the compiled programs.
SIZES = {"SD style": (19, 13), "one level": (6, 5), "options": (9, 10)}

# Fields of the torch class that ours has with one value only, and another value.
REFUSED = {
  "latents_mean": [0.0],
  "latents_std": [1.0],
  "shift_factor": 0.1,
  "use_post_quant_conv": False,
  "use_quant_conv": False,
}
# These say how a model is run, not what it computes in float32.
INERT = {"sample_size", "scaling_factor", "force_upcast"}

build = functools.cache(lambda name: torch_parity.build_jax("vae", VAES[name]))


def _torch_model(fields: dict) -> TorchAutoencoderKL:
  return torch_parity.randomize(torch_parity.build_torch("vae", fields))


def _assert_parity(name: str, model: TorchAutoencoderKL):
  """The moments, and the round trip through latents drawn with a given noise, agree within 1e-4."""
  images = torch_parity.vae_inputs(VAES[name], *SIZES[name])
  for ours, theirs in torch_parity.vae_outputs(model, build(name), images).values():
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VAES)
def test_round_trip_equals_diffusers(name):
  _assert_parity(name, _torch_model(VAES[name]))


def test_decode_alone_equals_diffusers():
  model, functional = _torch_model(VAES["one level"]), build("one level")
  latents = torch_parity.normal(1, 2, 5, 4, 4)
  ours = jax.jit(lambda *args: functional(*args, method="decode"))(torch_parity.params_of(model, functional), latents)
  with torch.no_grad():
    theirs = torch_parity.nhwc(model.decode(torch_parity.nchw(latents)).sample)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_norm_epsilons_equal_diffusers():
  # Variances around 1e-6, the epsilon of every norm here.
  faint = r"(?<!conv_out)(?<!quant_conv)$"
  _assert_parity("SD style", torch_parity.make_faint(_torch_model(VAES["SD style"]), faint, factor=1e-3))


def test_every_field_of_diffusers_is_honoured_or_refused():
  """The parity of "options" shows that a field is honoured, because torch's model there depends on the field."""
  fields, images = VAES["options"], torch_parity.nchw(torch_parity.vae_inputs(VAES["options"], *SIZES["options"]))
  defaults = {
    name: parameter.default
    for name, parameter in inspect.signature(TorchAutoencoderKL.__init__).parameters.items()
    if name != "self"
  }
  assert {*fields, *REFUSED} == set(defaults)
  assert VAEConfig.from_dict(fields).to_dict() == fields
  for name, value in fields.items():
    assert value != defaults[name]
    depends = torch_parity.depends_on("vae", fields, name, defaults[name], lambda model: model(images).sample)
    assert depends == (name not in INERT), name
  for name, value in REFUSED.items():
    with pytest.raises(InputError, match=rf"^vae/config\.json: field {name} "):
      VAEConfig.from_dict({**fields, name: value})
    assert VAEConfig.from_dict({**fields, name: defaults[name]}) == VAEConfig.from_dict(fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
  fields = PUBLISHED[name]["vae"]
  config = VAEConfig.from_dict(fields)
  written = json.loads(json.dumps(config.to_dict()))
  assert VAEConfig.from_dict(written) == config
  assert all(written[name] == value for name, value in fields.items() if name in written)
  # As a newer release writes the same model: every field it knows, lists for tuples.
  saved = json.loads(torch_parity.build_torch("vae", TINY_MEMORY["vae"]).to_json_string())
  assert VAEConfig.from_dict(saved | fields | {"sample_size": 32}) == VAEConfig.from_dict(fields | {"sample_size": 32})


def test_log_variance_is_clamped():
  model, functional = _torch_model(VAES["options"]), build("options")
  with torch.no_grad():
    model.quant_conv.bias[3:] += torch.tensor([-60.0, 0.0, 60.0])
  params, images = torch_parity.params_of(model, functional), torch_parity.vae_inputs(VAES["options"], 8, 8)
  moments = jax.jit(lambda *args: functional(*args, method="encode"))(params, images)
  np.testing.assert_array_equal(moments[..., 3], -30)
  np.testing.assert_array_equal(moments[..., 5], 20)
  with torch.no_grad():
    logvar = torch_parity.nhwc(model.encode(torch_parity.nchw(images)).latent_dist.logvar)
  np.testing.assert_allclose(moments[..., 3:], logvar, rtol=0, atol=1e-4)


def test_bfloat16_compute_gives_float32_moments():
  half = torch_parity.build_jax("vae", VAES["options"], jnp.bfloat16)
  assert {spec.dtype for spec in half.shapes.values()} == {jnp.dtype(jnp.float32)}
  images, noise = jnp.zeros((1, 8, 8, 1)), jnp.zeros((1, 4, 4, 3))
  decoded, moments = jax.eval_shape(half, half.shapes, images, noise)
  assert (decoded.dtype, moments.dtype) == (jnp.bfloat16, jnp.float32)


def test_pixels_equal_diffusers():
  processor = VaeImageProcessor(do_resize=False)
  levels = np.arange(3 * 256).astype(np.uint8).reshape(1, 16, 16, 3)  # each of the 256 three times
  theirs = torch_parity.nhwc(processor.preprocess(Image.fromarray(levels[0])))
  np.testing.assert_allclose(normalize_pixels(levels), theirs, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(denormalize_pixels(normalize_pixels(levels)), levels)
  decoded = torch_parity.normal(1, 1, 16, 16, 3)  # beyond [-1, 1], too
  (picture,) = processor.postprocess(torch_parity.nchw(decoded), "pil")
  np.testing.assert_array_equal(denormalize_pixels(jnp.asarray(decoded))[0], np.asarray(picture))


def test_full_size():
  config = VAEConfig.from_dict(SD21["vae"])
  functional = Functional(lambda rngs: AutoencoderKL(config, rngs=rngs))
  assert sum(math.prod(spec.shape) for spec in functional.shapes.values()) == 83_653_863
  images = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)
  moments = jax.eval_shape(lambda *args: functional(*args, method="encode"), functional.shapes, images)
  assert moments.shape == (1, 512 // config.downsampling, 512 // config.downsampling, 8)


@pytest.mark.parametrize(
  "fields",
  [
    {"act_fn": "tanh"},
    {"latent_channels": 0},
    {"down_block_types": ["AttnDownEncoderBlock2D"]},
    {"up_block_types": ["UpDecoderBlock2D"] * 2},
    {"scaling_factor": "0.18215"},
    {"tiling": True},
  ],
)
def test_unsupported_field_is_named(fields):
  with pytest.raises(InputError, match=f"vae/config.json: .*{next(iter(fields))}"):
    VAEConfig.from_dict(fields)
