"""CoInD on fundus photographs: a token for each attribute, trained to be conditionally independent.

compdiff train --config=configs/fundus/coind.py --workdir=runs/fundus_coind --config.data.path=DIR

Needs stable-diffusion-2-1-base as diffusers publishes it and a data set with age, sex and race. Meant for
accelerators of 80 GB: global batch 96 (the reference trained CompDiff-2 on four GPUs of 24), 30,000 steps.
Time and quality are unmeasured.

The reference has no such method. Its conditioner is FLAT with separate tokens; the loss has weight 1 on a quarter of
the batch, which doubles the cost of a step. Optimizer, schedule and dropout are those of the other methods.
"""

from compdiff_jax import methods


def get_config():
  return methods.fundus("coind")
