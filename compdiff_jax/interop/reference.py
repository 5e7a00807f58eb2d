"""The reference's own layout of a model: plain Stable Diffusion, and a folder with the conditioner beside it.

Its classes know one schema (age, sex, race) and give the unconditional branch zero tokens. What they cannot hold is
refused: `infer_conditioner` must read the same conditioner back from the keys and the config.json written here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.config import ConditionerConfig
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.interop.recognition import infer_conditioner

# The folder of each kind of conditioner, and the name of its weights there.
FOLDERS = {"hcn": "hcn", "typed": "hcn", "flat": "demographic_encoder"}
WEIGHTS_STEM = "model"

# Time embedding of Stable Diffusion 2.1, the default of a field that only says something where a time vector exists.
_D_TIME_EMB = 1280


def prompt_attributes(config: ConditionerConfig) -> tuple[str, ...]:
  """What the reference's pipeline puts in front of the text: the age, where its HCN does not encode it."""
  return ("age",) if config.kind == "hcn" and "age" not in config.attributes else ()


def conditioner_config(
  config: ConditionerConfig, schema: Schema, prompts: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
  """The config.json of the reference's class.

  Args:
    config: the conditioner.
    schema: the attributes of the data.
    prompts: the prompt attributes that the model was trained with.
    shapes: {key of the torch state dict: shape}.

  Raises:
    InputError: the reference has no class for it; says what differs.
  """
  if config.kind not in FOLDERS:
    raise _refusal(f"it has no conditioner of kind {config.kind!r}")
  own = config.select(schema)
  wanted = ("sex", "race") if config.kind == "hcn" and "age" not in own.names else ("age", "sex", "race")
  if own.names != wanted:
    raise _refusal(f"its attributes are age, sex and race, this model's are {', '.join(own.names)}")
  nulls = config.learned_nulls if config.kind == "hcn" else config.unconditional == "nulls"
  if nulls and config.kind != "typed":
    raise _refusal("it has no learned nulls for unknown attributes, this model has")
  if config.kind == "flat" and config.heads == "none":
    raise _refusal("its encoder always has auxiliary heads, this model has none")
  composer = getattr(config, "composer", "transformer")
  if getattr(config, "num_registers", 0) and composer != "transformer":
    raise _refusal(f"its {composer} composer has no registers, this model has {config.num_registers}")

  fields = {"hcn": _hcn_fields, "typed": _typed_fields, "flat": _flat_fields}[config.kind](config, own)
  read, read_schema = infer_conditioner(shapes, fields, "this model")
  ours = dataclasses.replace(config, attributes=read.attributes)
  if config.kind == "typed":
    ours = dataclasses.replace(ours, unconditional=read.unconditional)  # the README says what the reference does
  values, there = ours.to_dict(), read.to_dict()
  differences = [f"{name}={values[name]!r}" for name in _decisive(ours) if values[name] != there[name]]
  if differences:
    raise _refusal(f"it cannot hold {', '.join(differences)}")
  for attribute in own:
    if _spelled(attribute) != _spelled(read_schema[attribute.name]):
      described = ", ".join(map(str, read_schema[attribute.name].values or read_schema[attribute.name].bins))
      raise _refusal(f"its {attribute.name} is {described}, this model's {attribute.name} is another")
  if tuple(prompts) != prompt_attributes(ours):
    there = ", ".join(prompt_attributes(ours)) or "nothing"
    raise _refusal(
      f"it puts {there} in front of the text, this model was trained with {', '.join(prompts) or 'nothing'}"
    )
  return fields


def readme(kind: str) -> str:
  """What a user of the reference's pipeline must know, as Markdown; empty without a conditioner."""
  if kind not in FOLDERS:
    return ""
  folder = FOLDERS[kind]
  return (
    f"## In the reference's layout\n\n`model_index.json` describes plain Stable Diffusion; the conditioner lies in"
    f" `{folder}/` with the reference's configuration and keys. **A pipeline that does not load `{folder}/` draws"
    " without demographics and says nothing.** The reference reads its weights as a pickle, which this line makes:\n\n"
    '```\npython -c "import torch, safetensors.torch as s; '
    f"torch.save(s.load_file('{folder}/{WEIGHTS_STEM}.safetensors'), '{folder}/pytorch_model.bin')\"\n```\n\n"
    "The reference's pipeline takes zero tokens for the unconditional branch of guidance, whatever the model was"
    " trained with, and has no value for a single unknown attribute."
  )


def _refusal(reason: str) -> InputError:
  return InputError(f"--layout reference: the reference cannot hold this model: {reason}; export it without --layout")


def _spelled(attribute: Any) -> tuple:
  """What must agree: the meaning of every row of an embedding. Categories may differ in case."""
  return attribute.kind, tuple(value.lower() for value in attribute.values), attribute.bins


def _decisive(config: ConditionerConfig) -> list[str]:
  """The fields that change what the network computes; sizes of parts that are not there do not."""
  idle = {"dropout", "ordinal_loss", "soft_sigma", "film_hidden"}
  if config.kind == "typed" and config.composer != "flat":
    idle |= {"flat_hidden"}
  if config.kind == "typed" and config.composer != "transformer":
    idle |= {"transformer_layers", "transformer_heads"}
  if config.kind == "flat" and config.heads != "deep":
    idle |= {"aux_hidden_dim"}
  return [field.name for field in dataclasses.fields(config) if field.name not in idle]


def _sizes(own: Schema) -> dict[str, int]:
  levels = {attribute.name: attribute.num_levels for attribute in own}
  return {"num_age_bins": levels.get("age", 5), "num_sex": levels["sex"], "num_race": levels["race"]}


def _hcn_fields(config: Any, own: Schema) -> dict[str, Any]:
  return {
    **_sizes(own),
    "d_node": config.d_node,
    "d_ctx": config.d_ctx,
    "dropout": config.dropout,
    "use_uncertainty": config.use_uncertainty,
    "use_aux_loss": config.aux_hidden_dim > 0,
    "aux_hidden_dim": config.aux_hidden_dim or 512,
    "encode_age": "age" in own.names,
  }


def _typed_fields(config: Any, own: Schema) -> dict[str, Any]:
  return {
    **_sizes(own),
    "d_node": config.d_node,
    "d_ctx": config.d_ctx,
    "d_time_emb": config.d_time_emb or _D_TIME_EMB,
    "max_age": own["age"].high,
    "age_freq_dim": config.freq_dim,
    "composer": config.composer,
    "multi_token": config.multi_token,
    "route_b": config.d_time_emb > 0,
    "num_registers": config.num_registers,
    "attr_dropout_prob": 0.0,
    "full_dropout_prob": 0.0,
    "use_uncertainty": config.use_uncertainty,
    "use_aux_loss": config.aux_hidden_dim > 0,
    "aux_hidden_dim": config.aux_hidden_dim or 512,
    "dropout": config.dropout,
    "transformer_layers": config.transformer_layers,
    "transformer_heads": config.transformer_heads,
    "flat_hidden": config.flat_hidden,
  }


def _flat_fields(config: Any, own: Schema) -> dict[str, Any]:
  return {
    **_sizes(own),
    "d_hidden": config.d_node,
    "d_output": config.d_ctx,
    "mode": config.mode,
    "classifier_depth": "deep" if config.heads == "deep" else "shallow",
    "aux_hidden_dim": config.aux_hidden_dim,
    "dropout": config.dropout,
  }
