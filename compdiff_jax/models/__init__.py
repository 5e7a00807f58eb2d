"""Flax NNX networks of Stable Diffusion, whose parameter paths are the diffusers and transformers state dict keys.

UNet2DCondition, AutoencoderKL and CLIPTextModel are parameter containers with a pure call; `Functional` turns any of
them into a pure function of one flat dict of parameters. Images and latents are NHWC, parameters are float32.
"""

from compdiff_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from compdiff_jax.models.functional import Functional
from compdiff_jax.models.unet import UNet2DCondition, UNetConfig
from compdiff_jax.models.vae import AutoencoderKL, VAEConfig

__all__ = [
  "AutoencoderKL",
  "CLIPTextConfig",
  "CLIPTextModel",
  "Functional",
  "UNet2DCondition",
  "UNetConfig",
  "VAEConfig",
]
