"""How well a run denoises real images of other patients under their own text and attributes, cell by cell.

The denoising loss bounds the likelihood of an image under its condition. Noise and timesteps are the same for every
method, seed and image position, so two methods are compared on equal terms, and far more precisely than by distances
between sets of samples. It says how well a condition is understood, not what samples look like.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from compdiff_jax.data.prompts import format_prompt
from compdiff_jax.diffusion import objective
from compdiff_jax.evaluation import image_sets
from compdiff_jax.evaluation.features import in_batches
from compdiff_jax.sampling.plan import read_plan
from compdiff_jax.workdir import open_run

# From a quarter of the noising to almost all of it.
TIMESTEPS = (250, 450, 650, 850)


def losses(workdir: Path, plan: Path, reference: Path) -> np.ndarray:
  """The loss of each real image, float64 [N] in the plan's order: the mean over `TIMESTEPS` of the averaged weights'.

  `plan` copies texts and attributes of the test split of `reference`; its ids are that split's keys.
  """
  run = open_run(workdir)
  model, schema = run.model, run.model.schema
  _, params = run.load_params("ema")
  rows = read_plan(plan, schema)
  real = image_sets.load(reference, "test")
  images = dict(zip(real.keys, real.images))
  images = np.stack([images[row.id] for row in rows])
  prompts = [format_prompt(row.text, row.attributes, schema, tuple(run.config.prompt_attributes)) for row in rows]
  ids = run.tokenizer(prompts)
  attributes = {a.name: np.asarray([row.attributes[a.name] for row in rows], a.dtype) for a in schema}

  @jax.jit
  def batch_losses(params, images, ids, attributes, index):
    context, _ = model.context(params, ids, attributes)
    latents = model.latents(model.moments(params, images), jnp.zeros([len(images), *model.latent_shape]))

    def at(timestep):
      keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(timestep), i))(index)
      noise = jax.vmap(lambda key: jax.random.normal(key, model.latent_shape))(keys)
      timesteps = jnp.full(len(images), timestep)
      noisy = objective.add_noise(model.schedule, latents, noise, timesteps)
      wanted = objective.target(model.schedule, latents, noise, timesteps)
      return objective.denoising_loss(model.unet(params["unet"], noisy, timesteps, *context), wanted)

    return jnp.mean(jax.lax.map(at, jnp.asarray(TIMESTEPS)), axis=0)

  def of(index):
    own = {name: values[index] for name, values in attributes.items()}
    return batch_losses(params, images[index], ids[index], own, index)

  return in_batches(of, np.arange(len(rows)))
