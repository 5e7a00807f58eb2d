"""FairDiffusion on chest X-rays: the text baseline, its samples weighted by what the groups lose.

compdiff train --config=configs/chest/fairdiffusion.py --workdir=runs/chest_fairdiffusion --config.data.path=DIR

Needs stable-diffusion-2-1-base as diffusers publishes it and a data set with age, sex and race. Meant for
accelerators of 80 GB: global batch 48 (the reference trained CompDiff-2 on six GPUs of 8), 30,000 steps.
Time and quality are unmeasured.

Hyper-parameters of the reference (configs/fairdiffusion/train_baseline_fairdiffusion.yaml), except

- the text encoder is frozen; --config.train_text_encoder=True trains it as the reference does
- text dropout 0.1, where the reference has none
- weights use the global batch, and their state is in the checkpoint; input perturbation 0.1 as in the reference
  (with --config.fairness.variant=published give --config.loss.input_perturbation=0, too)
- no weight decay on biases, norms, embeddings and nulls
- the global batch is that of its CompDiff-2; this file has 16 a device
- the prompt begins "54 year old male White. …"; there "54 year old White male. …"
- losses are float32 means over the global batch; there bfloat16, and means on each device
- the VAE computes in bfloat16; --config.upcast="('vae',)" has it in float32, as there
- a schedule in optimizer steps and an average with decay 0.9999; --config.train.reference_processes=N has the old one
"""

from compdiff_jax import methods


def get_config():
  return methods.chest("fairdiffusion")
