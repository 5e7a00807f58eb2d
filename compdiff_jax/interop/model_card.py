"""The README.md of an exported model: what it is, how to call it, what it was made from, what it is not for."""

from collections.abc import Mapping, Sequence
from typing import Any

from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.data.prompts import format_prompt

_SECTIONS = {"data": "Training data", "recipe": "Training recipe", "metrics": "Evaluation"}

_NOTICE = """\
For research only. Images from this model are synthetic: they show no real patient, and they are not evidence about one.
Do not use them, or anything computed from them, for diagnosis, triage or treatment. A synthetic image can be wrong in
ways that look right, and a generative model can repeat images it was trained on: check for memorised training images
before sharing a set, and respect the licence and the access rules of the training data. Attributes such as sex and race
are labels of the training data; what the model draws for them is an association in those data, not a fact about people.
"""


def _describe(attribute: Attribute) -> str:
  if attribute.kind == "categorical":
    return ", ".join(attribute.values)
  if attribute.kind == "multilabel":
    return f"{', '.join(attribute.values)}, each negative, uncertain or positive"
  return f"{attribute.low:g} to {attribute.high:g} {attribute.unit}".rstrip()


def _example(attribute: Attribute) -> str:
  if attribute.kind == "multilabel":
    first, *rest = attribute.values
    return repr("; ".join([first, *(f"{label}=negative" for label in rest[:1])]))
  value = attribute.representative(attribute.num_levels - 1)
  return repr(attribute.values[value]) if attribute.kind == "categorical" else f"{value:g}"


def _example_prompt(text: str, schema: Schema, names: Sequence[str]) -> str:
  values = {name: schema[name].representative(schema[name].num_levels - 1) for name in names}
  return format_prompt(text, values, schema, names).strip()


def _template(schema: Schema, names: Sequence[str]) -> str:
  """`format_prompt` with <name> for the values."""
  attributes = [schema[name] for name in names]
  units = {a.name: "year old" if a.unit == "year" else a.unit for a in attributes}
  return f"{' '.join(f'<{a.name}> {units[a.name]}'.strip() for a in attributes)}. <text>"


def _cell(value: Any) -> str:
  if isinstance(value, float):
    value = f"{value:.6g}"
  return str(value).replace("|", "\\|").replace("\n", " ")


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def model_card(
  card: Mapping[str, Any],
  schema: Schema,
  used: Sequence[str],
  prompt_attributes: Sequence[str],
  hierarchical: bool,
  represents_unknown: bool,
  pipeline: bool = True,
  note: str = "",
) -> str:
  """The model card as Markdown.

  Args:
    card: "name" (title), "text" (an example prompt), and the tables "data", "recipe" and "metrics", each a mapping of
      label to value. Every entry may be left out; without "metrics" the card says that nothing was measured.
    schema: attributes the pipeline accepts.
    used: names that the conditioner turns into tokens.
    prompt_attributes: names that are put in front of the text.
    hierarchical: whether the conditioner is CompDiff's.
    represents_unknown: whether a single attribute may be unknown.
    pipeline: whether the directory has our pipeline, which takes attributes; plain Stable Diffusion takes a text.
    note: a section of its own, Markdown.
  """
  name = card.get("name", "CompDiff model")
  keywords = ", ".join(f"{a.name}={_example(a)}" for a in schema)
  rows = []
  for attribute in schema:
    roles = [role for role, names in (("tokens", used), ("prompt", prompt_attributes)) if attribute.name in names]
    rows.append([attribute.name, _describe(attribute), " and ".join(roles) or "not used"])
  unknown = (
    "Leave an attribute out, or give `None`, where it is unknown."
    if represents_unknown
    else f"Give all of {', '.join(used)}, or none of them: this model has no representation of a single unknown one."
  )
  trust = ", trust_remote_code=True" if pipeline else ""
  in_words = prompt_attributes if not used else ()  # nothing but the caller puts these into the prompt
  prompt = _example_prompt(card.get("text", ""), schema, in_words)
  arguments = ", ".join(filter(None, [repr(prompt), keywords if pipeline else ""]))
  how = (
    f"`trust_remote_code=True` runs `pipeline.py` and `conditioner/conditioner.py` of this directory. {unknown} "
    "Values outside the table are refused. Lists give a batch; `negative_prompt`, `guidance_scale`, "
    "`num_inference_steps`, `generator` and `latents` mean what they mean in Stable Diffusion. "
    '`null="zeros"` guides away from zero demographic tokens, `null="learned"` from those of unknown attributes.'
  )
  words = (
    "Demographics are words of the prompt, and a prompt without them is drawn without. The model was trained with\n\n"
    f"    {_template(schema, in_words)}\n\n"
    "in these words and this order; what is unknown is left out."
  )
  kind = "hierarchical demographic conditioning (CompDiff)" if hierarchical else "demographic conditioning"
  conditioned = f" with {kind}" if used else ""
  parts = [
    f"---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\n\n# {name}",
    f"Text-to-image latent diffusion{conditioned}, exported by compdiff-jax.",
    "## Use",
    "```python\n"
    "from diffusers import DiffusionPipeline\n\n"
    f'pipe = DiffusionPipeline.from_pretrained("path/to/this/directory"{trust})\n'
    f"image = pipe({arguments}).images[0]\n"
    "```",
    *([how] if pipeline else []),
    *([words] if in_words else []),
    *([note] if note else []),
    *(["## Attributes", _table(["attribute", "values", "enters as"], rows)] if rows else []),
  ]
  for key, title in _SECTIONS.items():
    if card.get(key):
      parts += [f"## {title}", _table(["", ""], list(card[key].items()))]
    elif key == "metrics":
      parts += [f"## {title}", "No metrics were recorded with this export."]
  return "\n\n".join([*parts, "## Intended use", _NOTICE])
