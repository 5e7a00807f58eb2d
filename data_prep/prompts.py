"""Takes the finished prompts of the reference apart: two fixed templates and nothing else.

Chest:  "54 year old White male. <impression>"
Fundus: "SLO fundus image of a Black, Female, 61 years old patient with the following conditions: <conditions>"

Records store the findings alone; `compdiff_jax.data.prompts.format_prompt` puts demographics in front again where a
method asks for that.
"""

import re

_CHEST = re.compile(
  r"(?P<age>\d{1,3}) years? old (?P<race>[A-Za-z][A-Za-z/ -]*?) (?P<sex>male|female)\. *(?P<text>\S.*)",
  re.IGNORECASE | re.DOTALL,
)
_FUNDUS = re.compile(
  r"SLO fundus image of an? (?P<race>[A-Za-z][A-Za-z/ -]*), (?P<sex>\w+),"
  r" (?:(?P<age>\d{1,3}) years? old|unknown age) patient with the following conditions: *(?P<text>\S.*)",
  re.IGNORECASE | re.DOTALL,
)


def split_prompt(prompt: str) -> dict[str, str]:
  """The parts `text`, `age`, `sex` and `race` as written; an unknown age is "".

  `ValueError` for any other prompt. It does not quote the prompt: the text of a patient would get into rejected.csv.
  """
  for template in (_CHEST, _FUNDUS):
    if match := template.fullmatch(prompt.strip()):
      return {name: value or "" for name, value in match.groupdict().items()}
  raise ValueError("the prompt follows neither template")
