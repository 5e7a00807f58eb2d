"""The additive conditioner on fundus photographs: one token, a sum of effects whose interactions are shrunk.

compdiff train --config=configs/fundus/additive.py --workdir=runs/fundus_additive --config.data.path=DIR

Needs stable-diffusion-2-1-base as diffusers publishes it and a data set with age, sex and race. Meant for
accelerators of 80 GB: global batch 96 (the reference trained CompDiff-2 on four GPUs of 24), 30,000 steps.
Time and quality are unmeasured.

The reference has no such method. Optimizer, schedule and dropout are those of the other methods.
"""

from compdiff_jax import methods


def get_config():
  return methods.fundus("additive")
