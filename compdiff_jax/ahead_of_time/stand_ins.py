"""What stands in for data and weights that are not there: a program is compiled from their shapes alone."""

import json
import os
from pathlib import Path

import ml_collections

from compdiff_jax.conditioning import demographics
from compdiff_jax.conditioning.schema import Attribute, Schema

# config.json of the networks of Stable Diffusion 2.1-base.
SD21_BASE = {
  "unet": {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.10.0.dev0",
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "use_linear_projection": True,
  },
  "vae": {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 768,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
  },
  "text_encoder": {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "pad_token_id": 1,
    "projection_dim": 512,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
  },
}


# Levels of a stand-in for an attribute that the reference does not have.
_LEVELS = ("a", "b", "c", "d")


def schema_of(config: ml_collections.ConfigDict) -> tuple[Schema, list[str]]:
  """The attributes of the config's data set; where there is none stand-ins, and a sentence that says so.

  They are the reference's, and four levels for each other attribute that the config names.
  """
  path = config.data.path
  if os.path.exists(path):
    return Schema.load(Path(path) / "schema.json"), []
  named = (*config.conditioner.get("attributes", ()), *config.prompt_attributes, *config.fairness.attributes)
  others = [name for name in dict.fromkeys(named) if name not in demographics.SCHEMA.names]
  schema = Schema((*demographics.SCHEMA, *(Attribute(name, "categorical", _LEVELS) for name in others)))
  names = ", ".join(demographics.SCHEMA.names) + "".join(f", {name} (of {len(_LEVELS)} levels)" for name in others)
  return schema, [f"data.path {path!r} does not exist: {names} stand in; --schema gives others"]


def with_networks(config: ml_collections.ConfigDict, directory: Path) -> tuple[ml_collections.ConfigDict, list[str]]:
  """The config with sizes for networks whose `config.weights` do not exist, and a sentence for each.

  They are those of Stable Diffusion 2.1-base; for an autoencoder those that `compdiff train-vae` would give it, where
  the config says. Their config.json is written below `directory`.
  """
  config, sentences = config.copy_and_resolve_references(), []
  for name, fields in SD21_BASE.items():
    path, sizes = config.weights[name], "Stable Diffusion 2.1-base"
    if not path or os.path.exists(path):
      continue
    if name == "vae" and "vae" in config:
      fields, sizes = config.vae.to_dict(), "config.vae"
    (directory / name).mkdir()
    (directory / name / "config.json").write_text(json.dumps(fields))
    config.weights[name] = str(directory / name)
    sentences.append(f"weights.{name} {path!r} does not exist: the sizes of {sizes} stand in")
  return config, sentences
