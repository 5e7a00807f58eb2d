"""The demo: age x sex x group phantoms at 64x64 on two CPU cores, from random weights.

make demo                                                          the whole chain, about eight minutes
compdiff train --config=configs/demo.py --workdir=build/demo/run   trains on the data that make demo prepared
"""

from compdiff_jax import default_config


def get_config():
  config = default_config.tiny(default_config.base("hcn"), image_size=64)
  config.data.path = "build/demo/data"
  config.weights.vae = "build/demo/vae"
  config.weights.tokenizer = "build/demo/tokenizer"
  config.text_encoder.max_position_embeddings = 40  # enough for every text
  config.unet.block_out_channels = (48, 96)
  config.conditioner.attributes = ("age", "sex", "group")
  config.loss.kl = 1e-4
  config.loss.kl_anneal_steps = 500
  config.vae_training.steps = 300
  config.vae_training.batch_size = 8
  config.train.steps = 600
  config.train.batch_size = 16
  config.train.learning_rate = 4e-3
  config.train.warmup_steps = 100
  config.train.ema_decay = 0.995
  config.sample.sampler = "ddim"
  config.sample.num_steps = 20
  config.sample.guidance = 2.0
  config.sample.batch_size = 40
  config.logging.log_every = 50
  config.logging.checkpoint_every = 300
  config.logging.sample_every = 1000
  return config
