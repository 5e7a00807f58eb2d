"""Writes a complete diffusers directory.

model_index.json    list-style class names: without `trust_remote_code=True` diffusers refuses to load the directory,
                    and so the conditioner can never be left out silently
pipeline.py         CompDiffPipeline
conditioner/        conditioner.py, config.json with class and schema, weights
unet/ vae/ text_encoder/ tokenizer/ scheduler/ as in Stable Diffusion
README.md           model card

A model without a conditioner is plain Stable Diffusion and has the last two lines only. In the layout of the reference
(`interop.reference`) it has the reference's conditioner folder beside them.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from compdiff_jax.cli import InputError, check_space, whole_directory, writing
from compdiff_jax.conditioning.config import ConditionerConfig
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.interop import keys, reference
from compdiff_jax.interop.model_card import model_card
from compdiff_jax.interop.weights import save_weights, write_component

# The classes of torch_files/conditioner.py.
CONDITIONER_CLASSES = {
  "hcn": "HierarchicalConditioner",
  "typed": "TypedConditioner",
  "flat": "FlatConditioner",
  "additive": "AdditiveConditioner",
}

_TORCH_FILES = Path(__file__).parent / "torch_files"
_DIFFUSERS_VERSION = "0.42.1"  # the version whose file formats these are
LAYOUTS = ("compdiff", "reference")

_PIPELINE_KEYWORDS = (
  "prompt",
  "negative_prompt",
  "guidance_scale",
  "num_inference_steps",
  "generator",
  "latents",
  "output_type",
  "null",
)


def _write_json(path: Path, data: Any) -> None:
  path.write_text(json.dumps(data, indent=2) + "\n")


def _model_index(conditioner_class: str | None, scheduler_class: str, null: str) -> dict[str, Any]:
  """The index of our pipeline, or of plain Stable Diffusion where there is no class of a conditioner."""
  own = {"_class_name": "StableDiffusionPipeline"}
  if conditioner_class:
    own = {"_class_name": ["pipeline", "CompDiffPipeline"], "conditioner": ["conditioner", conditioner_class]}
    own["null"] = null
  return {
    **own,
    "_diffusers_version": _DIFFUSERS_VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", scheduler_class],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }


def _check(schema: Schema, prompt_attributes: Sequence[str], tokenizer_dir: Path) -> None:
  for name in prompt_attributes:
    schema[name]
  for attribute in schema:
    if attribute.name in _PIPELINE_KEYWORDS:
      raise InputError(
        f"attribute {attribute.name!r} is also an argument of the torch pipeline; rename it in the schema"
      )
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
  conditioner: tuple[ConditionerConfig, Mapping[str, Any], Schema],
  prompt_attributes: Sequence[str] = (),
  null: str = "learned",
  card: Mapping[str, Any],
  dtype: str = "float32",
  max_bytes: int | None = None,
  layout: str = "compdiff",
) -> Path:
  """Writes the directory under a temporary name beside `out` and renames it when it is complete.

  Args:
    out: new or empty directory.
    unet_config, vae_config, text_config: model configs with `to_dict()`, the diffusers or transformers JSON.
    unet_params, vae_params, text_params: flat parameters {"a.b.kernel": array}.
    tokenizer_dir: directory of a CLIP tokenizer, copied.
    scheduler_config: the scheduler_config.json with its `_class_name`, `interop.schedulers.to_diffusers`.
    conditioner: config, flat parameters and the schema of the data set (every attribute the pipeline accepts).
    prompt_attributes: names put in front of the text, as in `data.prompts.format_prompt`.
    null: what our pipeline takes where its caller does not say, one of `sampling.guidance.NULLS`.
    card: see `model_card.model_card`.
    dtype: stored type of all weights: "float32", "float16" or "bfloat16".
    max_bytes: the most data in one file of weights; None for single files.
    layout: "compdiff", or "reference" for the pipeline of the reference.

  Returns:
    `out`.
  """
  config, conditioner_params, schema = conditioner
  tokenizer_dir = Path(tokenizer_dir)
  _check(schema, prompt_attributes, tokenizer_dir)
  plain = config.kind == "none"
  for_reference = layout == "reference" and not plain
  shapes = keys.torch_shapes(conditioner_params)
  fields = reference.conditioner_config(config, schema, prompt_attributes, shapes) if for_reference else {}
  conditioner_class = None if plain or for_reference else CONDITIONER_CLASSES[config.kind]
  networks = (unet_params, vae_params, text_params, conditioner_params)
  count = sum(math.prod(value.shape) for params in networks for value in params.values())
  check_space(out, count * jnp.dtype(dtype).itemsize)
  with whole_directory(out) as directory, writing(out):
    components = {
      "unet": (unet_config.to_dict(), unet_params, "UNet2DConditionModel"),
      "vae": (vae_config.to_dict(), vae_params, "AutoencoderKL"),
      "text_encoder": (text_config.to_dict(), text_params, "CLIPTextModel"),
    }
    used = config.select(schema).names
    if conditioner_class:
      fields = {name: value for name, value in config.to_dict().items() if name != "kind"}  # the class says it
      fields |= {"schema": schema.to_json(), "attributes": list(used), "prompt_attributes": list(prompt_attributes)}
      components["conditioner"] = fields, conditioner_params, conditioner_class
    for name, (component_config, params, class_name) in components.items():
      (directory / name).mkdir()
      write_component(directory / name, component_config, params, class_name, dtype, max_bytes)
    if for_reference:
      folder = directory / reference.FOLDERS[config.kind]
      folder.mkdir()
      save_weights(folder, reference.WEIGHTS_STEM, conditioner_params, dtype)
      _write_json(folder / "config.json", fields)
    shutil.copytree(tokenizer_dir, directory / "tokenizer")
    (directory / "scheduler").mkdir()
    scheduler = {"_diffusers_version": _DIFFUSERS_VERSION, **scheduler_config}
    _write_json(directory / "scheduler" / "scheduler_config.json", scheduler)
    if conditioner_class:
      shutil.copyfile(_TORCH_FILES / "conditioner.py", directory / "conditioner" / "conditioner.py")
      shutil.copyfile(_TORCH_FILES / "pipeline.py", directory / "pipeline.py")
    note = reference.readme(config.kind) if for_reference else ""
    facts = (config.hierarchical, config.represents_unknown, bool(conditioner_class))
    text = model_card(card, schema, used, prompt_attributes, *facts, note)
    (directory / "README.md").write_text(text)
    _write_json(directory / "model_index.json", _model_index(conditioner_class, scheduler["_class_name"], null))
  return Path(out)
