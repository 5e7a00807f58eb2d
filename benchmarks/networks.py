"""Networks of the speed benchmarks, random weights: ours as a run's config has them, and the same in PyTorch."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import ml_collections

from tests.network_configs import SD21_BASE


@dataclasses.dataclass(frozen=True)
class Size:
  """config.json contents of the networks, and what they are fed.

  Attributes:
    image_size: side of the images in pixels.
    latent_side: side of their latents.
  """

  unet: dict[str, Any]
  vae: dict[str, Any]
  text_encoder: dict[str, Any]
  image_size: int
  latent_side: int


def _small(channels: tuple[int, ...], attends: tuple[bool, ...], width: int, latent_side: int) -> Size:
  """A UNet with a toy autoencoder, which halves twice, and a text encoder of one layer."""
  down = ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends]
  up = [block.replace("Down", "Up") for block in reversed(down)]
  unet = {
    **SD21_BASE["unet"],
    "sample_size": latent_side,
    "block_out_channels": list(channels),
    "down_block_types": down,
    "up_block_types": up,
    "cross_attention_dim": width,
    "attention_head_dim": 4,
  }
  vae = {
    **SD21_BASE["vae"],
    "block_out_channels": [32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "sample_size": 4 * latent_side,
  }
  text = {
    **SD21_BASE["text_encoder"],
    "hidden_size": width,
    "intermediate_size": width,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "projection_dim": width,
    "vocab_size": 1000,
  }
  return Size(unet, vae, text, 4 * latent_side, latent_side)


SIZES = {
  "toy": _small((32,), (True,), 32, 8),
  "small": _small((64, 128, 256), (True, True, False), 256, 32),  # the UNet has 18,150,852 parameters
  "sd21": Size(**SD21_BASE, image_size=512, latent_side=64),
}
TOKENS = 77


def run_config(size: Size, batch: int, dtype: str) -> ml_collections.ConfigDict:
  """The config of a run with these networks: no conditioner, frozen text encoder, EMA, clipping, AdamW."""
  from compdiff_jax import default_config

  config = default_config.base("none")
  config.compute_dtype = dtype
  config.data.image_size = size.image_size
  config.conditioner.d_ctx = size.unet["cross_attention_dim"]
  config.train.batch_size = batch
  config.unet = ml_collections.ConfigDict({k: v for k, v in size.unet.items() if not k.startswith("_")})
  return config


def our_model(config: ml_collections.ConfigDict, size: Size) -> Any:
  """The `LatentDiffusion` of a config. Of the pretrained networks there is a config.json, and no weights."""
  from compdiff_jax.conditioning.schema import Schema
  from compdiff_jax.latent_diffusion import LatentDiffusion

  with tempfile.TemporaryDirectory() as directory:
    for name in ("vae", "text_encoder"):
      (Path(directory) / name).mkdir()
      (Path(directory) / name / "config.json").write_text(json.dumps(getattr(size, name)))
      config.weights[name] = str(Path(directory) / name)
    return LatentDiffusion.from_config(config, Schema(()))


def torch_device() -> Any:
  """The GPU, else the CPU with as many threads as there are cores for this process, which is what XLA takes."""
  import torch

  if torch.cuda.is_available():
    return torch.device("cuda")
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  return torch.device("cpu")


def torch_networks(size: Size, channels_last: bool) -> dict[str, Any]:
  """{"unet", "vae", "text_encoder"} of diffusers and transformers in float32; the last two are frozen."""
  import torch
  from diffusers import AutoencoderKL, UNet2DConditionModel
  from transformers import CLIPTextConfig, CLIPTextModel

  classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
  layout = torch.channels_last if channels_last else torch.contiguous_format
  device = torch_device()
  models = {name: build.from_config(getattr(size, name)) for name, build in classes.items()}
  models["text_encoder"] = CLIPTextModel(CLIPTextConfig(**size.text_encoder))
  models = {name: model.to(device).to(memory_format=layout) for name, model in models.items()}
  for name in ("vae", "text_encoder"):
    models[name].requires_grad_(False).eval()
  return models
