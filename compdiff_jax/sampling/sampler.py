"""One compiled program from prompts, attributes and seeds to images: guidance, sampler and VAE decoding together."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from compdiff_jax.diffusion import trajectory
from compdiff_jax.diffusion.samplers import Sampler, Table
from compdiff_jax.latent_diffusion import LatentDiffusion, Params
from compdiff_jax.sampling.guidance import Guidance, guided


def sampler_from_config(options: ml_collections.ConfigDict) -> Sampler:
  """The sampler that `config.sample` describes."""
  return Sampler(options.sampler, options.timestep_spacing, options.eta, options.karras)


def sampler_to_config(sampler: Sampler) -> dict[str, Any]:
  """The inverse: entries of `config.sample`."""
  options = dataclasses.asdict(sampler)
  return {"sampler": options.pop("name"), **options}


def padded_batch(batch_size: int, devices: int) -> int:
  """The batch that is computed: as many rows on every device."""
  return -(-batch_size // devices) * devices


def make_sampler(model: LatentDiffusion, table: Table, guidance_rescale: float) -> Callable[..., jax.Array]:
  """Returns the jitted function (params, input_ids, negative_ids, attributes, seeds, guidance) -> images.

  Args of the function:
    params: all components' parameters.
    input_ids, negative_ids: prompts and negative prompts, int32 [B, 77]; attributes: {name: [B]}; seeds: uint32 [B];
    guidance: the weights.

  Its result is uint8 [B, S, S, 3]. Image i is a function of row i alone. One program is compiled per batch shape and
  per set of weights that are given.
  """

  def sample(
    params: Params,
    input_ids: jax.Array,
    negative_ids: jax.Array,
    attributes: Mapping[str, jax.Array],
    seeds: jax.Array,
    guidance: Guidance,
  ) -> jax.Array:
    params = {**params, "unet": model.unet.converted(params["unet"])}
    predict = guided(model, params, input_ids, negative_ids, attributes, guidance, guidance_rescale)
    noise = trajectory.initial_noise(seeds, model.latent_shape)
    draw = lambda step: trajectory.step_noise(seeds, step, model.latent_shape)  # noqa: E731
    return model.decode(params, trajectory.sample(predict, noise, draw, table))

  return jax.jit(sample)
