"""`config.compute_dtype` and `config.upcast`: what computes in float32 beside networks that do not."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import config_arguments

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.config import load_config
from compdiff_jax.latent_diffusion import UPCASTS, LatentDiffusion

# Matrix products and convolutions, by the type of what they multiply.
_PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution).*: \(tensor<[^>]*x(\w+)>")


@pytest.fixture(scope="module")
def build(workspace):
  """Builds the toy model in bfloat16, with some keys changed."""
  path, *overrides = config_arguments(workspace)
  config = load_config(path.removeprefix("--config="), overrides)
  schema = Schema.load(workspace / "data" / "schema.json")

  def build(**changes):
    changed = config.copy_and_resolve_references()
    changed.update({"compute_dtype": "bfloat16", **changes})
    return LatentDiffusion.from_config(changed, schema)

  return build


def _programs(model):
  """{component: products by type}, and the type of the UNet's prediction."""
  side, _, channels = model.latent_shape
  array = jax.ShapeDtypeStruct
  latents = array((1, side, side, channels), jnp.float32)
  context = array((1, 77, model.unet_config.cross_attention_dim), jnp.bfloat16)
  calls = {
    "unet": lambda p: model.unet(p, jnp.zeros(latents.shape), jnp.zeros(1, jnp.int32), jnp.zeros(context.shape)),
    "vae": lambda p: model.vae(p, jnp.zeros(latents.shape), method="decode"),
    "text_encoder": lambda p: model.text_encoder(p, jnp.zeros((1, 77), jnp.int32)),
  }
  lowered = {name: jax.jit(call).lower(model.component(name).shapes) for name, call in calls.items()}
  products = {name: collections.Counter(_PRODUCT.findall(program.as_text())) for name, program in lowered.items()}
  return products, lowered["unet"].out_info.dtype


def test_each_part_computes_in_float32_alone(build):
  plain, prediction = _programs(build())
  assert prediction == jnp.bfloat16
  assert all(set(types) == {"bf16"} for types in plain.values())
  for part in UPCASTS:
    found, prediction = _programs(build(upcast=(part,)))
    component = part if part in plain else "unet"
    in_float32 = {"time_embedding": 2, "conv_out": 1}.get(part, plain[component].total())
    assert found.pop(component) == +collections.Counter(f32=in_float32, bf16=plain[component].total() - in_float32)
    assert found == {name: types for name, types in plain.items() if name != component}
    assert prediction == (jnp.float32 if part == "conv_out" else jnp.bfloat16)


@pytest.mark.parametrize("name", ["float16", "bf16", "float64", ""])
def test_other_types_are_refused(build, name):
  with pytest.raises(InputError, match=f"config.compute_dtype '{name}' must be float32 or bfloat16"):
    build(compute_dtype=name)


def test_unknown_parts_are_refused(build):
  with pytest.raises(InputError, match=r"config\.upcast names 'vea'; did you mean 'vae'"):
    build(upcast=("vea",))


def test_converted_parameters_predict_the_same_to_the_bit(build):
  """Kernels and biases are in the type that their layer computes in, the parameters of norms as they were."""
  model = build(upcast=("conv_out",))
  params = model.unet.init(jax.random.key(0))
  converted = model.unet.converted(params)
  norms = {key for key in params if key.endswith(".scale")}
  norms |= {key.replace(".scale", ".bias") for key in norms}
  precise = {key for key, value in converted.items() if value.dtype == jnp.float32}
  assert converted.keys() == params.keys() and precise == norms | {"conv_out.kernel", "conv_out.bias"}
  side, _, channels = model.latent_shape
  latents = jax.random.normal(jax.random.key(1), (2, side, side, channels))
  context = jax.random.normal(jax.random.key(2), (2, 77, model.unet_config.cross_attention_dim))
  predict = jax.jit(lambda params: model.unet(params, latents, jnp.array([3, 700]), context))
  assert jnp.array_equal(predict(params), predict(converted))
