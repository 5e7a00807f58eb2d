"""One compiled program from prompts, attributes and seeds to images: guidance, DDIM and VAE decoding together."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from compdiff_jax.diffusion.guidance import classifier_free_guidance
from compdiff_jax.diffusion.samplers import ddim_sample, initial_noise
from compdiff_jax.latent_diffusion import LatentDiffusion, Params


def make_sampler(model: LatentDiffusion, empty_ids: jax.Array, num_steps: int) -> Callable[..., jax.Array]:
  """Returns the jitted function (params, input_ids, attributes, seeds, guidance) -> images.

  Args of the function:
    params: all components' parameters.
    input_ids: int32 [B, 77]; attributes: {name: [B]}; seeds: uint32 [B]; guidance: scale of classifier-free guidance.

  Its result is uint8 [B, S, S, 3]. Image i is a function of row i alone. One program is compiled per batch shape.
  """

  def sample(params: Params, input_ids: jax.Array, attributes: Mapping[str, jax.Array], seeds, guidance) -> jax.Array:
    conditional, _ = model.context(params, input_ids, attributes)
    unconditional = model.unconditional_context(params, jnp.broadcast_to(empty_ids, input_ids.shape))

    def unet(sample, timesteps, context):
      return model.unet(params["unet"], sample, timesteps, *context)

    predict = classifier_free_guidance(unet, conditional, unconditional, guidance)
    latents = ddim_sample(predict, initial_noise(seeds, model.latent_shape), model.schedule, num_steps)
    return model.decode(params, latents)

  return jax.jit(sample)
