"""One exported toy model, drawn by torch's pipeline and by our sampler from the same noise."""

import dataclasses
import functools
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from compdiff_jax.data.prompts import format_prompt
from compdiff_jax.data.tokenizer import load_tokenizer
from compdiff_jax.diffusion import trajectory
from compdiff_jax.diffusion.samplers import Sampler, make_table
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.interop.schedulers import to_diffusers
from compdiff_jax.latent_diffusion import LatentDiffusion
from compdiff_jax.sampling.guidance import Guidance, guided
from tests import toy_export
from tests.toy_diffusion import same_noise

SEEDS = np.array([3, 1, 4], np.uint32)
# All attributes set, one unknown, all unknown.
VALUES = {"age": [64.0, 20.0, None], "sex": ["female", "male", None], "race": ["asian", None, None]}
NEGATIVE = "blurred"
GUIDANCE = 4.0
STEPS = 10
_V = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
# (schedule, sampler, guidance rescale)
CASES = [
  (NoiseSchedule(), Sampler("ddpm"), 0.0),
  (NoiseSchedule(), Sampler("ddim"), 0.0),
  (NoiseSchedule(), Sampler("ddim", eta=1.0), 0.7),
  (NoiseSchedule(), Sampler("dpmpp_2m"), 0.0),
  (NoiseSchedule(), Sampler("dpmpp_2m", karras=True), 0.0),
  (NoiseSchedule(), Sampler("euler"), 0.0),
  (NoiseSchedule(), Sampler("euler_ancestral"), 0.0),
  (NoiseSchedule(), Sampler("unipc"), 0.0),
  (NoiseSchedule(), Sampler("pndm"), 0.0),
  (_V, Sampler("ddim", "trailing"), 0.7),
]


class Pictures:
  """The toy model in both; our programs are compiled once for all samplers."""

  def __init__(self, directory: Path):
    tokenizer_dir = toy_export.make_tokenizer(directory / "tokenizer")
    self.pipe = toy_export.load(toy_export.export(directory / "export", tokenizer_dir, "nulls"))
    config, _ = toy_export.VARIANTS["nulls"]
    conditioner, conditioner_params = toy_export.conditioner(config)
    model = LatentDiffusion(
      schema=toy_export.SCHEMA,
      schedule=toy_export.SCHEDULE,
      unet_config=toy_export.UNET,
      vae_config=toy_export.VAE,
      text_config=toy_export.TEXT,
      conditioner_config=config,
      unet=toy_export.unet,
      vae=toy_export.vae,
      text_encoder=toy_export.text_encoder,
      conditioner=conditioner,
      trained=("unet",),
      image_size=16,
    )
    params = {
      "unet": toy_export.UNET_PARAMS,
      "vae": toy_export.VAE_PARAMS,
      "text_encoder": toy_export.TEXT_PARAMS,
      "conditioner": conditioner_params,
    }
    tokenizer = load_tokenizer(tokenizer_dir)
    schema = toy_export.SCHEMA
    encoded = {
      name: np.asarray([schema[name].encode(value) for value in column], schema[name].dtype)
      for name, column in VALUES.items()
    }
    prompts = [format_prompt(text, {}, schema, ()) for text in toy_export.TEXTS]
    shape = model.latent_shape
    self.noise = np.asarray(jax.jit(lambda: trajectory.initial_noise(SEEDS, shape))())
    numbers = jnp.arange(STEPS + 1)
    self.fresh = np.asarray(jax.jit(jax.vmap(lambda step: trajectory.step_noise(SEEDS, step, shape)))(numbers))

    @functools.partial(jax.jit, static_argnames="rescale", compiler_options={"xla_llvm_disable_expensive_passes": True})
    def predict(rows, guidance, rescale, *inputs):
      return guided(model, *rows, guidance, rescale)(*inputs)

    self._rows = params, tokenizer(prompts), tokenizer([NEGATIVE] * len(SEEDS)), encoded
    self._predict = predict
    self._decode = jax.jit(model.decode)
    self._params = params

  def jax(
    self, schedule: NoiseSchedule, sampler: Sampler, rescale: float, null: str = "learned"
  ) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, h, w, c] and pixels [B, S, S, 3] in 0 … 255."""
    table = make_table(sampler, schedule, STEPS)

    def predict(*inputs):
      with jax.disable_jit(False):
        return self._predict(self._rows, Guidance(GUIDANCE, null=null), rescale, *inputs)

    with jax.disable_jit():  # the loop in Python around the compiled network, or every sampler would compile it anew
      latents = trajectory.sample(predict, self.noise, lambda step: self.fresh[int(step)], table)
    return np.asarray(latents), np.asarray(self._decode(self._params, latents)).astype(float)

  def torch(
    self, schedule: NoiseSchedule, sampler: Sampler, rescale: float, **options: str
  ) -> tuple[np.ndarray, np.ndarray]:
    """The same by the exported pipeline with the scheduler that an export of this sampler names."""
    config = to_diffusers(schedule, sampler)
    self.pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    fresh = iter(torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()) for noise in self.fresh)
    seen = []

    def remember(pipe, step, timestep, tensors):
      seen.append(tensors["latents"])
      return tensors

    with same_noise(self.pipe.scheduler, lambda: next(fresh)):
      images = self.pipe(
        toy_export.TEXTS,
        negative_prompt=NEGATIVE,
        guidance_scale=GUIDANCE,
        guidance_rescale=rescale,
        num_inference_steps=STEPS,
        eta=sampler.eta,
        latents=torch.from_numpy(self.noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
        callback_on_step_end=remember,
        **options,
        **VALUES,
      ).images
    return seen[-1].numpy().transpose(0, 2, 3, 1), images * 255


def describe(schedule: NoiseSchedule, sampler: Sampler, rescale: float) -> str:
  """A case in words: what differs from the defaults."""
  words = [sampler.name]
  default = Sampler(sampler.name)
  for field in dataclasses.fields(sampler)[1:]:
    value = getattr(sampler, field.name)
    if value != getattr(default, field.name):
      words.append(field.name if value is True else f"{field.name} {value}")
  if schedule != NoiseSchedule():
    words.append(f"{schedule.prediction_type}, zero SNR")
  if rescale:
    words.append(f"guidance rescale {rescale:g}")
  return ", ".join(words)
