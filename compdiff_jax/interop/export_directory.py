"""Writes a complete diffusers directory, from which `DiffusionPipeline.from_pretrained` builds a torch pipeline.

model_index.json    list-style class names: without `trust_remote_code=True` diffusers refuses to load the directory,
                    and so the conditioner can never be left out silently
pipeline.py         CompDiffPipeline
conditioner/        conditioner.py (HierarchicalConditioner), config.json with the schema, weights
unet/ vae/ text_encoder/ tokenizer/ scheduler/ as in Stable Diffusion
README.md           model card
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compdiff_jax.cli import InputError, whole_directory, writing
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.interop.model_card import model_card
from compdiff_jax.interop.weights import save_component

_TORCH_FILES = Path(__file__).parent / "torch_files"
_DIFFUSERS_VERSION = "0.42.1"  # the version whose file formats these are
_PIPELINE_KEYWORDS = (
  "prompt",
  "negative_prompt",
  "guidance_scale",
  "num_inference_steps",
  "generator",
  "latents",
  "output_type",
)


def _write_json(path: Path, data: Any) -> None:
  path.write_text(json.dumps(data, indent=2) + "\n")


def _model_index() -> dict[str, Any]:
  return {
    "_class_name": ["pipeline", "CompDiffPipeline"],
    "_diffusers_version": _DIFFUSERS_VERSION,
    "conditioner": ["conditioner", "HierarchicalConditioner"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }


def _check(schema: Schema, prompt_attributes: Sequence[str], tokenizer_dir: Path) -> None:
  for name in prompt_attributes:
    schema[name]
  for name in schema.names:
    if name in _PIPELINE_KEYWORDS:
      raise InputError(f"attribute {name!r} is also an argument of the torch pipeline; rename it in the schema")
  if not (tokenizer_dir / "vocab.json").exists() and not (tokenizer_dir / "tokenizer.json").exists():
    raise InputError(
      f"{tokenizer_dir} has neither vocab.json nor tokenizer.json; give the directory of a CLIP tokenizer"
    )


def write_export(
  out: str | Path,
  *,
  unet_config: Any,
  unet_params: Mapping[str, Any],
  vae_config: Any,
  vae_params: Mapping[str, Any],
  text_config: Any,
  text_params: Mapping[str, Any],
  tokenizer_dir: str | Path,
  scheduler_config: Mapping[str, Any],
  conditioner: tuple[HCNConfig, Mapping[str, Any], Schema],
  prompt_attributes: Sequence[str] = (),
  card: Mapping[str, Any],
  dtype: str = "float32",
) -> Path:
  """Writes the directory under a temporary name beside `out` and renames it when it is complete.

  Args:
    out: new or empty directory.
    unet_config, vae_config, text_config: model configs with `to_dict()`, the diffusers or transformers JSON.
    unet_params, vae_params, text_params: flat parameters {"a.b.kernel": array}.
    tokenizer_dir: directory of a CLIP tokenizer, copied.
    scheduler_config: fields of `diffusion.schedule.NoiseSchedule.to_dict()`.
    conditioner: config, flat parameters and the schema of the data set (every attribute the pipeline accepts).
    prompt_attributes: names put in front of the text, as in `data.prompts.format_prompt`.
    card: see `model_card.model_card`.
    dtype: stored type of all weights: "float32", "float16" or "bfloat16".

  Returns:
    `out`.
  """
  config, conditioner_params, schema = conditioner
  tokenizer_dir = Path(tokenizer_dir)
  _check(schema, prompt_attributes, tokenizer_dir)
  with whole_directory(out) as directory, writing(out):
    used = schema.subset(config.attributes or schema.names).names
    conditioner_config = {
      "schema": schema.to_json(),
      **config.to_dict(),
      "attributes": list(used),
      "prompt_attributes": list(prompt_attributes),
    }
    components = {
      "unet": (unet_config.to_dict(), unet_params, "UNet2DConditionModel"),
      "vae": (vae_config.to_dict(), vae_params, "AutoencoderKL"),
      "text_encoder": ({"model_type": "clip_text_model", **text_config.to_dict()}, text_params, "CLIPTextModel"),
      "conditioner": (conditioner_config, conditioner_params, "HierarchicalConditioner"),
    }
    for name, (component_config, params, class_name) in components.items():
      save_component(directory / name, component_config, params, class_name, dtype)
    shutil.copytree(tokenizer_dir, directory / "tokenizer")
    (directory / "scheduler").mkdir()
    scheduler = {"_class_name": "DDIMScheduler", "_diffusers_version": _DIFFUSERS_VERSION}
    # The fields that a NoiseSchedule leaves to the sampler; DDIM's own default would clip latents to [-1, 1].
    scheduler |= {"clip_sample": False, "timestep_spacing": "leading", **scheduler_config}
    _write_json(directory / "scheduler" / "scheduler_config.json", scheduler)
    shutil.copyfile(_TORCH_FILES / "conditioner.py", directory / "conditioner" / "conditioner.py")
    shutil.copyfile(_TORCH_FILES / "pipeline.py", directory / "pipeline.py")
    text = model_card(card, schema, used, prompt_attributes, config.learned_nulls)
    (directory / "README.md").write_text(text)
    _write_json(directory / "model_index.json", _model_index())
  return Path(out)
