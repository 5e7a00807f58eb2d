"""CompDiff-2 on chest X-rays: typed encoders, all pairs and the whole, four tokens (stage 2b).

compdiff train --config=configs/chest/compdiff.py --workdir=runs/chest_compdiff --config.data.path=DIR

Needs stable-diffusion-2-1-base as diffusers publishes it and a data set with age, sex and race. Meant for
accelerators of 80 GB: global batch 48 (the reference trained CompDiff-2 on six GPUs of 8), 30,000 steps.
Time and quality are unmeasured.

Hyper-parameters of the reference (configs/compdiff/train_compdiff_chest.yaml), except

- the text encoder is frozen; --config.train_text_encoder=True trains it as the reference does
- text dropout 0.1, where the reference has none
- attribute dropout 0.1 and full dropout 0.1, where the reference has none and so never trains its nulls
- no weight decay on biases, norms, embeddings and nulls
- the unconditional branch of guidance has the tokens of the nulls; there zero tokens
- embedding tables start with a standard deviation of 0.5; there 0.02
- the composition loss reads the pass that made the tokens, after attribute dropout; there a second pass without
- losses are float32 means over the global batch; there bfloat16, and means on each device
- the VAE computes in bfloat16; --config.upcast="('vae',)" has it in float32, as there
- a schedule in optimizer steps and an average with decay 0.9999; --config.train.reference_processes=N has the old one
"""

from compdiff_jax import methods


def get_config():
  return methods.chest("compdiff")
