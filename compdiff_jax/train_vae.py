"""`compdiff train-vae`: trains the AutoencoderKL on a data set and saves it in diffusers format.

Loss: mean absolute error of the reconstruction plus `vae_training.kl` times the KL of the posterior to N(0, I), in
float32 (Rombach et al. 2022, section 3.1, without the perceptual and adversarial terms). It starts from
`config.vae_training.init` (fine-tuning) or from random weights. The scaling factor is measured on the training images,
so that latents have unit standard deviation, as in that paper's appendix G.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from compdiff_jax import cli, sharding
from compdiff_jax.config import load_config
from compdiff_jax.data.input_pipeline import device_batches, open_training_sets, training_batches
from compdiff_jax.data.records import RecordSet
from compdiff_jax.interop.weights import load_component, read_config, write_component
from compdiff_jax.metrics import Progress
from compdiff_jax.models.functional import Functional
from compdiff_jax.models.vae import AutoencoderKL, VAEConfig, denormalize_pixels, normalize_pixels

_SHOWN = 8  # images in the reconstruction picture
_MEASURED = 256  # images that the scaling factor and the validation error are measured on


def main(argv: list[str]) -> None:
  parser = cli.parser("compdiff train-vae", __doc__)
  parser.add_argument("--config", required=True, help="config file; override keys with --config.key=value")
  parser.add_argument("--out", type=Path, required=True, help="new directory for the diffusers VAE")
  args, overrides = parser.parse_known_args(argv)
  config = load_config(args.config, overrides)
  settings = config.vae_training
  if not settings.init and "vae" not in config:
    raise cli.InputError(
      f"{args.config} has no section vae, the shape of an autoencoder from random weights; set"
      " config.vae_training.init to a diffusers VAE directory to fine-tune, or add the section"
    )

  # ---- Data and network
  sets = open_training_sets(config.data)
  if sets[0][0].latents is not None:
    raise cli.InputError(f"{sets[0][0].path} holds moments; train-vae needs the data set of images they were made from")
  fields = read_config(settings.init, "AutoencoderKL") if settings.init else config.vae.to_dict()
  vae_config = VAEConfig.from_dict(fields)
  side = vae_config.latent_side(config.data.image_size)
  vae = Functional(lambda rngs: AutoencoderKL(vae_config, dtype=jnp.float32, rngs=rngs))
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(settings.batch_size, 1, mesh)
  out = cli.new_directory(args.out)
  batches = training_batches(
    sets,
    batch_size=settings.batch_size,
    image_size=config.data.image_size,
    seed=config.seed,
    balance=config.data.balance,
    balance_tau=config.data.balance_tau,
    threads=config.data.threads,
    workers=config.data.workers,
  )
  batches = device_batches(batches, sharding.batch_sharding(mesh), settings.batch_size)
  init_key, noise_key = jax.random.split(jax.random.key(config.seed))
  params = load_component(settings.init, vae) if settings.init else vae.init(init_key)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, settings.steps // 20, settings.steps)),
  )
  state = jax.device_put((params, optimizer.init(params)), sharding.replicated(mesh))

  # ---- Training
  def loss_fn(params, images, key):
    noise = jax.random.normal(key, [images.shape[0], side, side, vae_config.latent_channels])
    reconstruction, moments = vae(params, images, noise)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    error = jnp.mean(jnp.abs(reconstruction - images))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
    return error + settings.kl * kl, {"mean_absolute_error": error, "kl": kl}

  def step_fn(state, images, step):
    params, opt_state = state
    images, key = normalize_pixels(images), jax.random.fold_in(noise_key, step)
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params, images, key)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), metrics

  step_fn = jax.jit(step_fn, donate_argnums=0)
  progress = Progress(settings.steps, 0, "step")
  with contextlib.closing(progress), contextlib.closing(batches):
    for step in range(1, settings.steps + 1):
      state, metrics = step_fn(state, next(batches)["images"], step)
      if step % 100 == 0 or step == settings.steps:
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, values.values())):
          raise cli.RunError(f"the VAE loss became {values} by step {step}; lower vae_training.learning_rate")
        progress.update(step, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
  params = state[0]

  # ---- Scaling factor, weights, pictures
  _, _, spread = reconstruct(vae, params, sets, "train", config.data.image_size)
  shown = "val" if all(records.splits.get("val") for records, _ in sets) else "train"  # small ones may have none
  originals, reconstructions, _ = reconstruct(vae, params, sets, shown, config.data.image_size)
  vae_config = dataclasses.replace(vae_config, scaling_factor=round(1.0 / spread, 5))
  error = float(np.abs(originals.astype(np.float32) - reconstructions).mean())
  report = {
    **values,
    "steps": settings.steps,
    "scaling_factor": vae_config.scaling_factor,
    f"{shown}_error_grey_levels": error,
  }
  with cli.whole_directory(out) as directory, cli.writing(out):
    write_component(directory, vae_config.to_dict(), params, "AutoencoderKL")
    picture = np.concatenate([np.concatenate(list(images[:_SHOWN]), 1) for images in (originals, reconstructions)])
    Image.fromarray(picture).save(directory / "reconstructions.png")
    (directory / "training.json").write_text(json.dumps(report, indent=2) + "\n")
  print(f"VAE in {out}: {json.dumps(report)}; originals above reconstructions in {out / 'reconstructions.png'}")


def reconstruct(
  vae: Functional, params: Any, sets: Sequence[tuple[RecordSet, float]], split: str, image_size: int
) -> tuple[np.ndarray, np.ndarray, float]:
  """Up to 256 images of a split, of each set in proportion to its weight, their reconstructions (both uint8
  [N, S, S, 3]) and the posterior samples' sd.
  """
  sources = [(records.split(split), weight / sum(weight for _, weight in sets)) for records, weight in sets]
  chosen = [(source, i) for source, share in sources for i in range(min(round(share * _MEASURED), len(source)))]
  images = np.stack([source.decode(i, source[i], image_size) for source, i in chosen])
  # One image at a time: memory stays small at 512 px, and one program serves every split.
  results = [jax.device_get(_pass_through(vae, params, image[None])) for image in images]
  moments, reconstructions = (np.concatenate(part) for part in zip(*results))
  mean, log_variance = np.split(moments, 2, axis=-1)
  return images, reconstructions, float(np.sqrt(mean.var() + np.exp(log_variance).mean()))


@functools.partial(jax.jit, static_argnums=0)
def _pass_through(vae: Functional, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Images uint8 [B, S, S, 3] to the moments and to what their means decode to, uint8 as well."""
  moments = vae(params, normalize_pixels(images), method="encode")
  return moments, denormalize_pixels(vae(params, jnp.split(moments, 2, axis=-1)[0], method="decode"))
