"""Real chest radiographs at toy scale: 198 X-rays of 111 patients, 64x64, age x sex x view, on two CPU cores.

With CHEST naming the folder that holds the images and metadata.csv (public COVID-19 collection of Cohen et al. 2020):

  python -m data_prep.table --csv CHEST/metadata.csv --images CHEST/images --config configs/data/chest_xray.py \
      --fractions 0.7,0.1,0.2 --out build/chest/data
  python -m data_prep.vocabulary --data build/chest/data --out build/chest/tokenizer
  compdiff train-vae --config configs/real_chest_toy.py --out build/chest/vae
  compdiff train --config configs/real_chest_toy.py --workdir build/chest/run
  compdiff plan --data build/chest/data --balance age,sex,view --per_cell 4 --out build/chest/plan.csv
  compdiff sample --workdir build/chest/run --plan build/chest/plan.csv --out build/chest/samples --grid
  compdiff evaluate --real build/chest/data --synthetic build/chest/samples --out build/chest/report
  compdiff export --workdir build/chest/run --out build/chest/export

`python -m launch.real_chest_toy --source CHEST` runs exactly these. A model of this size on 198 images memorises: it
shows that the chain works on real pictures, and says nothing about patients.
"""

from compdiff_jax import default_config


def get_config():
  config = default_config.tiny(default_config.base("hcn"), image_size=64)
  config.data.path = "build/chest/data"
  config.weights.vae = "build/chest/vae"
  config.weights.tokenizer = "build/chest/tokenizer"
  config.text_encoder.vocab_size = 1000
  config.conditioner.attributes = ("age", "sex", "view")
  config.loss.kl = 1e-4
  config.loss.kl_anneal_steps = 500
  config.vae_training.steps = 1000
  config.train.steps = 3000
  config.train.batch_size = 16
  config.train.learning_rate = 1e-3
  config.train.warmup_steps = 200
  config.train.ema_decay = 0.999
  config.sample.sampler = "ddim"
  config.sample.num_steps = 50
  config.sample.guidance = 2.0
  config.sample.batch_size = 24
  config.sample.text = "Chest X-ray. COVID-19."
  config.logging.log_every = 50
  config.logging.checkpoint_every = 1000
  config.logging.sample_every = 1000
  return config
