"""A latent diffusion model whose big networks are formulas, so that its loss and its training step compile at once."""

import jax
import jax.numpy as jnp
import numpy as np
from conditioner_parity import build

from compdiff_jax.conditioning.config import ConditionerConfig
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.latent_diffusion import LatentDiffusion
from compdiff_jax.training.step import sample_keys


class StandIn(LatentDiffusion):
  """The conditioner is real; text tokens are one half, latents the image itself, 2 x 2 pixels."""

  latent_shape = (2, 2, 3)

  def encode_text(self, params, input_ids):
    return jnp.full([len(input_ids), 2, self.conditioner_config.d_ctx], 0.5)

  def moments(self, params, images):
    return images.astype(jnp.float32) / 127.5 - 1.0

  def latents(self, moments, noise):
    return moments


def stand_in(unet, config: ConditionerConfig, schema: Schema, kind: type[StandIn] = StandIn) -> StandIn:
  """`unet` is (params, noisy, timesteps, context, time_vector, …) -> prediction."""
  fields = dict.fromkeys(("unet_config", "vae_config", "text_config", "vae", "text_encoder"))
  return kind(
    **fields,
    schema=schema,
    schedule=NoiseSchedule(),
    conditioner_config=config,
    unet=unet,
    conditioner=build(config, schema),
    trained=("unet", "conditioner"),
    image_size=2,
  )


def batch_of(schema: Schema, count: int) -> dict:
  """Random images and attributes, of which some are unknown."""
  rng = np.random.default_rng(1)
  attributes = {}
  for a in schema:
    values = rng.uniform(a.low, a.high, count) if a.kind == "continuous" else rng.integers(0, len(a.values), count)
    attributes[a.name] = np.where(rng.uniform(size=count) < 0.2, a.unknown, values).astype(a.dtype)
  images = rng.integers(0, 255, [count, 2, 2, 3], np.uint8)
  return {"images": images, "input_ids": np.zeros([count, 77], np.int32), "attributes": attributes}


def rows_of(batch: dict, seed: int, step: int) -> dict:
  """The rows that the loss gets from a batch without dropout."""
  keys = sample_keys(seed, jnp.int32(step), len(batch["images"]))
  return {**jax.tree.map(jnp.asarray, batch), "full_attributes": batch["attributes"], "keys": keys}
