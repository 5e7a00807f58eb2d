"""What can be imported: which files of a directory are which network, and what they were configured as.

Four layouts are known: a diffusers directory of Stable Diffusion, the same with a conditioner of the reference beside
it (its releases and final saves), a training checkpoint of the reference, and our own export.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.config import ConditionerConfig
from compdiff_jax.conditioning.family import config_from_dict
from compdiff_jax.conditioning.none import NoConditionerConfig
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.interop import keys, reference
from compdiff_jax.interop.export_directory import CONDITIONER_CLASSES
from compdiff_jax.interop.recognition import infer_conditioner
from compdiff_jax.interop.weights import WeightFiles, find_weights, read_config, read_json, stored_shapes
from compdiff_jax.models.clip_text import CLIPTextConfig
from compdiff_jax.models.functional import Functional
from compdiff_jax.models.unet import UNetConfig
from compdiff_jax.models.vae import VAEConfig

_REFERENCE_DIRECTORIES = ("hcn", "conditioner", "demographic_encoder")
# Parts of a Stable Diffusion directory, and those of them that are of no use here.
_LEFT_OUT = {"safety_checker", "feature_extractor", "image_encoder"}
_COMPONENTS = {"unet", "vae", "text_encoder", "tokenizer", "scheduler", *_REFERENCE_DIRECTORIES, *_LEFT_OUT}

# The reference's final save keeps the text encoder it started from in text_encoder, and the trained one here.
_TRAINED_TEXT_ENCODER = "text_encoder_and_tokenizer"
# The networks of a training checkpoint are numbered in the order in which the reference hands them to its library.
_CHECKPOINT_FILES = {"unet": "model", "text_encoder": "model_1", "conditioner": "model_2"}
_FOURTH_NETWORK = "model_3"


@dataclasses.dataclass(frozen=True)
class Source:
  """A model on disk, recognised but not yet read.

  Attributes:
    kind: what it is, in words.
    step: the training step, 0 where it is not known.
    unet_config, vae_config, text_config, conditioner_config: the networks.
    weights: the files of "unet", "vae", "text_encoder" and, unless its kind is "none", "conditioner".
    tokenizer: directory of the tokenizer.
    scheduler: its scheduler_config.json; scheduler_file: where that is, for messages.
    schema: the attributes.
    prompt_attributes: names that stood in front of the text in training.
    left_out: components of the directory that are not imported.
  """

  kind: str
  step: int
  unet_config: UNetConfig
  vae_config: VAEConfig
  text_config: CLIPTextConfig
  conditioner_config: ConditionerConfig
  weights: Mapping[str, WeightFiles]
  tokenizer: Path
  scheduler: Mapping[str, Any]
  scheduler_file: Path
  schema: Schema
  prompt_attributes: tuple[str, ...]
  left_out: tuple[str, ...] = ()


def open_source(
  directory: Path, *, base: Path | None = None, schema: Schema | None = None, allow_pickle: bool = False
) -> Source:
  """Recognises `directory`.

  Args:
    directory: what to import.
    base: the diffusers directory that a training checkpoint was trained from: its configs, VAE, tokenizer, scheduler.
    schema: the attributes, where the source does not hold its own. Without one a model of the reference gets the
      reference's, and plain Stable Diffusion an empty one.
    allow_pickle: also read `.bin` files.
  """
  if not directory.is_dir():
    raise InputError(
      f"--source {directory} is not a directory; a checkpoint in a single file becomes one with diffusers'"
      " StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR)"
    )
  if (directory / "model_index.json").is_file():
    if base is not None:
      raise InputError(f"{directory} is a whole model; leave out --base, which belongs to training checkpoints")
    return _pipeline(directory, schema, allow_pickle)
  if any(path.name.removeprefix("pytorch_").startswith("model.") for path in directory.iterdir()):
    if base is None:
      raise InputError(
        f"{directory} is a training checkpoint, which holds no configs, VAE, tokenizer and scheduler; give as --base"
        " the diffusers directory that it was trained from"
      )
    return _checkpoint(directory, _pipeline(base, None, allow_pickle), schema, allow_pickle)
  raise InputError(
    f"{directory} has neither model_index.json nor model.safetensors; give a diffusers directory or a training"
    " checkpoint of the reference"
  )


def _pipeline(directory: Path, schema: Schema | None, allow_pickle: bool) -> Source:
  """A directory in diffusers' layout, with or without a conditioner."""
  index = read_json(directory / "model_index.json")
  components = {
    name for name, value in index.items() if isinstance(value, list) and not name.startswith("_") and any(value)
  }
  for name in sorted(components):
    if name not in _COMPONENTS:
      raise InputError(
        f"{directory / 'model_index.json'} names a component {name}, which Stable Diffusion 1.x and 2.x do not have;"
        " models of another architecture cannot be imported"
      )
  text_encoder = directory / "text_encoder"
  if (directory / _TRAINED_TEXT_ENCODER).is_dir():
    text_encoder = directory / _TRAINED_TEXT_ENCODER
  configs, weights = {}, {}
  for name, (path, config_class, torch_class) in {
    "unet": (directory / "unet", UNetConfig, "UNet2DConditionModel"),
    "vae": (directory / "vae", VAEConfig, "AutoencoderKL"),
    "text_encoder": (text_encoder, CLIPTextConfig, "CLIPTextModel"),
  }.items():
    configs[name] = config_class.from_dict(read_config(path, torch_class), source=str(path / "config.json"))
    weights[name] = find_weights(path, allow_pickle)
  scheduler_file = directory / "scheduler" / "scheduler_config.json"
  source = Source(
    kind="Stable Diffusion",
    step=0,
    unet_config=configs["unet"],
    vae_config=configs["vae"],
    text_config=configs["text_encoder"],
    conditioner_config=NoConditionerConfig(d_ctx=configs["unet"].cross_attention_dim),
    weights=weights,
    tokenizer=directory / "tokenizer",
    scheduler=read_json(scheduler_file),
    scheduler_file=scheduler_file,
    schema=schema or Schema(()),
    prompt_attributes=(),
    left_out=tuple(sorted(components & _LEFT_OUT)),
  )
  present = [name for name in _REFERENCE_DIRECTORIES if (directory / name).is_dir()]
  if len(present) > 1:
    raise InputError(f"{directory} has the conditioners {' and '.join(present)}; a model with one can be imported")
  if not present:
    return source
  folder = directory / present[0]
  config = read_json(folder / "config.json") if (folder / "config.json").exists() else None
  files = _conditioner_files(folder, allow_pickle)
  if config is not None and "schema" in config:
    return _own_export(source, folder / "config.json", config, files, schema)
  return _with_reference_conditioner(source, "CompDiff release", files, config, schema)


def _checkpoint(directory: Path, base: Source, schema: Schema | None, allow_pickle: bool) -> Source:
  """A training checkpoint of the reference; what it lacks comes from `base`."""
  if base.conditioner_config.kind != "none":
    raise InputError("--base has a conditioner; give the diffusers directory of Stable Diffusion itself")
  fourth = sorted(path.name for path in directory.iterdir() if re.match(rf"(pytorch_)?{_FOURTH_NETWORK}\.", path.name))
  if fourth:
    raise InputError(
      f"{directory} has a fourth network, {fourth[0]}: two conditioners, or FiLM, neither of which is supported"
    )
  weights = dict(base.weights)
  for name, stem in _CHECKPOINT_FILES.items():
    if name != "conditioner" or any(directory.glob(f"*{stem}.*")):
      weights[name] = find_weights(directory, allow_pickle, (stem,))
  name = re.fullmatch(r"checkpoint-(\d+)", directory.absolute().name)
  kind = "training checkpoint"
  source = dataclasses.replace(base, kind=kind, step=int(name[1]) if name else 0, weights=weights)
  if "conditioner" not in weights:
    return dataclasses.replace(source, schema=schema or Schema(()))
  return _with_reference_conditioner(source, kind, weights["conditioner"], None, schema)


def _with_reference_conditioner(
  source: Source, kind: str, files: WeightFiles, config: Mapping[str, Any] | None, schema: Schema | None
) -> Source:
  conditioner_config, reference_schema = infer_conditioner(stored_shapes(files), config, str(files.source))
  return dataclasses.replace(
    source,
    kind=kind,
    conditioner_config=conditioner_config,
    weights={**source.weights, "conditioner": files},
    schema=schema or reference_schema,
    prompt_attributes=reference.prompt_attributes(conditioner_config),
  )


def _own_export(
  source: Source, path: Path, config: Mapping[str, Any], files: WeightFiles, schema: Schema | None
) -> Source:
  """A directory that `compdiff export` wrote: its config.json holds schema, fields and prompt attributes."""
  if schema is not None:
    raise InputError(f"{path} holds the model's own schema; leave out --schema")
  kinds = {class_name: kind for kind, class_name in CONDITIONER_CLASSES.items()}
  class_name = config.get("_class_name")
  if class_name not in kinds:
    raise InputError(f"{path} describes a {class_name}; known conditioners are {', '.join(kinds)}")
  if not isinstance(config["schema"], list):
    raise InputError(f"{path}: field schema must be a list of attributes; copy the file again")
  own = Schema.from_json(config["schema"])
  fields = {k: v for k, v in config.items() if k not in ("schema", "prompt_attributes") and not k.startswith("_")}
  conditioner_config = config_from_dict({"kind": kinds[class_name], **fields})
  return dataclasses.replace(
    source,
    kind="compdiff export",
    conditioner_config=_without_absent_heads(conditioner_config, own, files),
    weights={**source.weights, "conditioner": files},
    schema=own,
    prompt_attributes=tuple(config.get("prompt_attributes", ())),
  )


def _without_absent_heads(config: ConditionerConfig, schema: Schema, files: WeightFiles) -> ConditionerConfig:
  """Auxiliary heads are for training: files without any of them are whole, and the config follows."""

  def state_keys(some: ConditionerConfig) -> set[str]:
    return set(keys.torch_shapes(Functional(lambda rngs: some.build(schema, rngs)).shapes))

  headless = dataclasses.replace(config, **({"heads": "none"} if hasattr(config, "heads") else {"aux_hidden_dim": 0}))
  heads = state_keys(config) - state_keys(headless)
  return config if heads & stored_shapes(files).keys() else headless


def _conditioner_files(folder: Path, allow_pickle: bool) -> WeightFiles:
  """The weights of a conditioner directory: the usual names, or its only safetensors file."""
  files = sorted(folder.glob("*.safetensors"))
  return WeightFiles(files[0], (files[0],)) if len(files) == 1 else find_weights(folder, allow_pickle)
