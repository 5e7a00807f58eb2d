"""The methods that are compared, each as a config: they differ in how demographics reach the model, in nothing else.

  baseline        demographics as words of the prompt
  fairdiffusion   the same, with sample weights that follow the groups' losses
  flat            one token from the concatenated embeddings
  hcn             CompDiff-1: sex and race composed into one token, age in the prompt
  compdiff        CompDiff-2, stage 2b: typed encoders, all pairs, a token for each attribute and one for the whole
  coind           a token for each attribute, and the loss that makes them conditionally independent
  additive        one token that is a sum of effects with shrunk interactions

`method` gives the hyper-parameters of the reference with this project's corrections; `chest` and `fundus` are its data
sets on Stable Diffusion 2.1-base, `phantom` a toy scale that needs no weights.
"""

import ml_collections

from compdiff_jax import default_config
from compdiff_jax.cli import InputError, nearest

CONDITIONERS = {
  "baseline": "none",
  "fairdiffusion": "none",
  "flat": "flat",
  "hcn": "hcn",
  "compdiff": "typed",
  "coind": "flat",
  "additive": "additive",
}

_SD21 = "stable-diffusion-2-1-base"  # a download of the diffusers repository of this name


def method(name: str, attributes: tuple[str, ...] = ("age", "sex", "race")) -> ml_collections.ConfigDict:
  """The config of a method for these attributes, age first: where one goes into the prompt alone, it is the first."""
  if name not in CONDITIONERS:
    raise InputError(f"method {name!r}{nearest(name, CONDITIONERS)}")
  config = default_config.base(CONDITIONERS[name])
  if config.conditioner.kind != "none":
    config.conditioner.attributes = attributes
  if name in ("baseline", "fairdiffusion"):
    config.prompt_attributes = attributes
  elif name == "hcn":
    config.conditioner.attributes = attributes[1:]
    config.prompt_attributes = attributes[:1]
  elif name == "coind":
    config.conditioner.mode = "separate"
    config.loss.coind = 1.0
  if name == "fairdiffusion":
    config.fairness.variant = "compdiff"
    config.loss.input_perturbation = 0.1
  return config


def _stable_diffusion(name: str, batch_size: int) -> ml_collections.ConfigDict:
  config = method(name)
  config.weights.update({part: f"{_SD21}/{part}" for part in ("unet", "vae", "text_encoder", "tokenizer")})
  config.compute_dtype = "bfloat16"
  config.train.batch_size = batch_size
  return config


def chest(name: str) -> ml_collections.ConfigDict:
  """Chest X-rays with age, sex and race; a global batch of 48 as the reference's six GPUs of eight."""
  config = _stable_diffusion(name, 48)
  config.data.path = "data/chest"
  return config


def fundus(name: str) -> ml_collections.ConfigDict:
  """Fundus photographs with age, sex and race; a global batch of 96 as the reference's four GPUs of 24."""
  config = _stable_diffusion(name, 96)
  config.data.path = "data/fundus"
  config.sample.text = "Fundus photograph without glaucoma."
  return config


def phantom(name: str) -> ml_collections.ConfigDict:
  """64 pixel phantoms with age, sex and group, from random weights; every method has the same budget and data order."""
  config = default_config.tiny(method(name, ("age", "sex", "group")), image_size=64)
  config.data.path = "build/phantom/data"
  config.weights.vae = "build/phantom/vae"
  config.weights.tokenizer = "build/phantom/tokenizer"
  config.text_encoder.max_position_embeddings = 40  # enough for every text; a vocabulary of this --length
  config.unet.block_out_channels = (48, 96)
  # The reference's weight of the KL term, for a thirtieth of its steps, would keep the token from saying anything.
  config.loss.kl = 1e-4
  config.loss.kl_anneal_steps = 500
  config.vae_training.update(steps=300, batch_size=8)
  config.train.update(steps=600, batch_size=16, learning_rate=4e-3, warmup_steps=100, ema_decay=0.995)
  config.sample.update(num_steps=20, guidance=2.0, batch_size=40)
  config.logging.update(log_every=50, checkpoint_every=300, sample_every=1000)
  return config
