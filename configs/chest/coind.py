"""CoInD on chest X-rays: a token for each attribute, trained to be conditionally independent.

compdiff train --config=configs/chest/coind.py --workdir=runs/chest_coind --config.data.path=DIR

Needs stable-diffusion-2-1-base as diffusers publishes it and a data set with age, sex and race. Meant for
accelerators of 80 GB: global batch 48 (the reference trained CompDiff-2 on six GPUs of 8), 30,000 steps.
Time and quality are unmeasured.

The reference has no such method. Its conditioner is FLAT with separate tokens; the loss has weight 1 on a quarter of
the batch, which doubles the cost of a step. Optimizer, schedule and dropout are those of the other methods.
"""

from compdiff_jax import methods


def get_config():
  return methods.chest("coind")
