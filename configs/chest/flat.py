"""FLAT on chest X-rays: age, sex and race concatenated into one token (single token, shallow heads).

compdiff train --config=configs/chest/flat.py --workdir=runs/chest_flat --config.data.path=DIR

Needs stable-diffusion-2-1-base as diffusers publishes it and a data set with age, sex and race. Meant for
accelerators of 80 GB: global batch 48 (the reference trained CompDiff-2 on six GPUs of 8), 30,000 steps.
Time and quality are unmeasured.

Hyper-parameters of the reference (configs/FLAT/train_demographic_encoder.yaml), except

- the text encoder is frozen; --config.train_text_encoder=True trains it as the reference does
- text dropout 0.1, where the reference has none
- attribute dropout 0.1 and full dropout 0.1
- learned nulls for unknown attributes, which the reference does not have
- no weight decay on biases, norms, embeddings and nulls
- the global batch is that of its CompDiff-2; this file has 16 a device
- the unconditional branch of guidance has the tokens of the nulls; there zero tokens
- losses are float32 means over the global batch; there bfloat16, and means on each device
- the VAE computes in bfloat16; --config.upcast="('vae',)" has it in float32, as there
- a schedule in optimizer steps and an average with decay 0.9999; --config.train.reference_processes=N has the old one
"""

from compdiff_jax import methods


def get_config():
  return methods.chest("flat")
