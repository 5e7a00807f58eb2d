"""The demo: CompDiff-2 on age x sex x group phantoms at 64x64, on two CPU cores, from random weights.

make demo                                                          the whole chain, about seven minutes
compdiff train --config=configs/demo.py --workdir=build/demo/run   trains on the data that make demo prepared

Differences from configs/phantom_compdiff.py are what docs/study.md found for so short a run: the FiLM route beside the
tokens, no latent noise, no dropout of single attributes, other weights of the losses; and little guidance.
"""

from compdiff_jax import methods


def get_config():
  config = methods.phantom("compdiff")
  config.data.path = "build/demo/data"
  config.weights.vae = "build/demo/vae"
  config.weights.tokenizer = "build/demo/tokenizer"
  config.conditioner.film_channels = (48, 96, 96, 96, 96, 96, 48, 48)
  config.conditioner.film_hidden = 64
  config.conditioner.use_uncertainty = False
  config.conditioner.dropout = 0.0
  config.dropout.attribute = 0.0
  config.loss.auxiliary = 0.2
  config.loss.composition = 2.0
  config.sample.num_steps = 25
  config.sample.guidance = 1.5
  return config
