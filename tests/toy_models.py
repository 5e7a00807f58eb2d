"""Toy models on disk, as PyTorch writes them: Stable Diffusion by diffusers, the reference's conditioner beside it."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch_parity
import transformers
from safetensors.torch import save_file

from compdiff_jax.conditioning.config import ConditionerConfig
from compdiff_jax.conditioning.flat import FlatConfig
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.conditioning.typed import TypedConfig
from compdiff_jax.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from compdiff_jax.interop import keys
from compdiff_jax.models.functional import Functional
from tests import torch_states

WIDTH = 16
UNET = {
  "sample_size": 8,
  "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
  "block_out_channels": [8, 16],
  "layers_per_block": 1,
  "norm_num_groups": 4,
  "cross_attention_dim": WIDTH,
  "attention_head_dim": [2, 4],
  "use_linear_projection": True,
}
VAE = {
  "down_block_types": ["DownEncoderBlock2D"] * 3,
  "up_block_types": ["UpDecoderBlock2D"] * 3,
  "block_out_channels": [8, 8, 8],
  "norm_num_groups": 4,
  "sample_size": 32,
}
TEXT = {
  "vocab_size": SMALLEST_VOCABULARY,
  "hidden_size": WIDTH,
  "intermediate_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "hidden_act": "gelu",
  "bos_token_id": SMALLEST_VOCABULARY - 2,
  "eos_token_id": SMALLEST_VOCABULARY - 1,
  "pad_token_id": SMALLEST_VOCABULARY - 1,
}
SCHEDULER = {
  "_class_name": "PNDMScheduler",
  "_diffusers_version": "0.8.0",
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": False,
  "num_train_timesteps": 1000,
  "prediction_type": "v_prediction",
  "set_alpha_to_one": False,
  "skip_prk_steps": True,
  "steps_offset": 1,
  "trained_betas": None,
}
REFERENCE_SCHEMA = Schema(
  (
    Attribute("age", "continuous", low=0, high=100, bins=(18, 40, 60, 80), unit="year"),
    Attribute("sex", "categorical", values=("male", "female")),
    Attribute("race", "categorical", values=("White", "Black", "Asian", "Hispanic")),
  )
)
# Conditioners of the reference: without nulls, as its classes have them.
TYPED = TypedConfig(("age", "sex", "race"), d_node=8, d_ctx=WIDTH, aux_hidden_dim=8, freq_dim=6, unconditional="zeros")
HCN = HCNConfig(("sex", "race"), d_node=8, d_ctx=WIDTH, aux_hidden_dim=8, learned_nulls=False)
FLAT = FlatConfig(("age", "sex", "race"), d_node=8, d_ctx=WIDTH, unconditional="zeros")


def tokenizer(directory: Path) -> Path:
  """A vocabulary of single bytes in CLIP's format."""
  train_tokenizer(["Effusion left.", "No finding."], directory, SMALLEST_VOCABULARY)
  return directory


def networks() -> dict[str, torch.nn.Module]:
  fields = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
  built = {name: torch_parity.build_torch(name, config) for name, config in fields.items()}
  return {name: torch_parity.randomize(model, seed) for seed, (name, model) in enumerate(built.items())}


def stable_diffusion(directory: Path, tokenizer_dir: Path, models: dict[str, torch.nn.Module], **options: Any) -> Path:
  """Saves Stable Diffusion with diffusers' own `save_pretrained`, which takes the options."""
  pipe = diffusers.StableDiffusionPipeline(
    **models,
    tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer_dir),
    scheduler=diffusers.PNDMScheduler.from_config(SCHEDULER),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )
  pipe.save_pretrained(directory, **options)
  return directory


def conditioner_state(config: ConditionerConfig, schema: Schema = REFERENCE_SCHEMA) -> dict[str, torch.Tensor]:
  """A state dict with random values."""
  shapes = keys.torch_shapes(Functional(lambda rngs: config.build(schema, rngs)).shapes)
  return {name: torch.from_numpy(torch_parity.normal(i, *shape)) for i, (name, shape) in enumerate(shapes.items())}


def save_state(path: Path, state: dict[str, torch.Tensor]) -> None:
  """A safetensors file or a pickle, by the name."""
  path.parent.mkdir(exist_ok=True)
  if path.suffix == ".bin":
    torch.save(state, path)
  else:
    save_file(state, path)


def assert_params(params: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
  """Every value of a state dict, in float32, is in our parameters, under the name of this or another release."""
  prefix = "text_model."
  theirs = {name.removeprefix(prefix): value.float().numpy() for name, value in state.items()}
  ours = torch_states.to_torch({name.removeprefix(prefix): np.asarray(value) for name, value in params.items()})
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def contents(directory: Path) -> dict[str, bytes]:
  """{relative path: bytes} of every file."""
  files = (path for path in directory.rglob("*") if path.is_file())
  return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(files)}


def edit_json(path: Path, **changes: Any) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
