"""CompDiff-1 on fundus photographs: sex and race composed into one token by HCN v1, age in the prompt.

compdiff train --config=configs/fundus/hcn.py --workdir=runs/fundus_hcn --config.data.path=DIR

Needs stable-diffusion-2-1-base as diffusers publishes it and a data set with age, sex and race. Meant for
accelerators of 80 GB: global batch 96 (the reference trained CompDiff-2 on four GPUs of 24), 30,000 steps.
Time and quality are unmeasured.

Hyper-parameters of the reference (configs/hcn/train_hcn_age_from_promt.yaml), except

- the text encoder is frozen; --config.train_text_encoder=True trains it as the reference does
- text dropout 0.1, where the reference has none
- attribute dropout 0.1 and full dropout 0.1
- learned nulls for unknown attributes, which the reference does not have
- no weight decay on biases, norms, embeddings and nulls
- the global batch is that of its CompDiff-2; this file has 8 a device
- the prompt begins "54 year old. …"; there "54 years old. …"
- the unconditional branch of guidance has the tokens of the nulls; there zero tokens
- the composition loss reads the pass that made the tokens, after attribute dropout; there a second pass without
- losses are float32 means over the global batch; there bfloat16, and means on each device
- the VAE computes in bfloat16; --config.upcast="('vae',)" has it in float32, as there
- a schedule in optimizer steps and an average with decay 0.9999; --config.train.reference_processes=N has the old one
"""

from compdiff_jax import methods


def get_config():
  return methods.fundus("hcn")
