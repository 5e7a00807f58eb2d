"""CoInD on phantoms: a token for each attribute, trained to be conditionally independent.

python -m data_prep.phantom --out build/phantom/data --num 1600
python -m data_prep.vocabulary --data build/phantom/data --out build/phantom/tokenizer --length 40
compdiff train-vae --config=configs/phantom_coind.py --out=build/phantom/vae
compdiff train --config=configs/phantom_coind.py --workdir=build/phantom/coind

The first three serve all phantom configs. All methods train for 600 steps of 16 images in the same order; that takes
minutes on two CPU cores. Differences from configs/chest/coind.py: small networks and pictures, all from random weights,
so the text encoder is trained, too; budget (steps, batch, rate, warm-up, average); float32; samples of 20 steps with
guidance 2.
"""

from compdiff_jax import methods


def get_config():
  return methods.phantom("coind")
