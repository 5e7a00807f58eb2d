"""The prompt: clinical text, with demographics in front of it only where a method asks for that."""

from collections.abc import Mapping, Sequence

from compdiff_jax.conditioning.schema import Schema


def format_prompt(text: str, attributes: Mapping[str, int | float], schema: Schema, names: Sequence[str] = ()) -> str:
  """`text`, preceded by the named attributes: "54 year old male. No acute abnormality."

  Unknown attributes are left out. With no names this is `text` itself, the prompt of methods that hand demographics
  to a conditioner; HCN v1 without age names ("age",); the text baseline names all attributes.
  """
  phrases = []
  for name in names:
    attribute, value = schema[name], attributes[name]
    if not attribute.is_known(value):
      continue
    if attribute.kind == "categorical":
      phrases.append(attribute.values[int(value)])
    else:
      phrases.append(f"{value:.0f} {attribute.unit} old" if attribute.unit == "year" else f"{value:g} {attribute.unit}")
  return f"{' '.join(phrases)}. {text}" if phrases else text
