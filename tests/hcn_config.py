"""The config of the tests' own runs: HCN on three attributes, from random weights; `conftest.TINY` makes it smaller."""

from compdiff_jax import default_config


def get_config():
  config = default_config.tiny(default_config.base("hcn"), image_size=32)
  config.text_encoder.max_position_embeddings = 40  # as the vocabulary of conftest.py
  config.conditioner.attributes = ("age", "sex", "group")
  config.loss.kl = 1e-4
  config.loss.kl_anneal_steps = 500
  config.train.update(steps=600, learning_rate=1e-3, ema_decay=0.995)
  config.sample.update(sampler="ddim", guidance=2.0)
  return config
