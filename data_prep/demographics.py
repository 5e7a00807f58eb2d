"""Age, sex and race as the public data sets write them. What is not recorded is unknown; nothing is guessed.

Each function returns the text that `Attribute.encode` takes: a number, a value of data_prep/schemas.py, or "" for
unknown. A value it does not know is a `ValueError`, so a new spelling is seen instead of becoming a wrong group.
"""

import contextlib
import re
from collections.abc import Iterable

from compdiff_jax.conditioning.schema import Attribute
from data_prep.rows import RowError
from data_prep.schemas import OTHER

UNKNOWN = frozenset({"", "unknown", "nan", "none", "na", "n/a", "u", "not specified", "not reported"})
# HIPAA: years above 89 are grouped; MIMIC-IV writes 91 for all of them.
TOP_CODED, _LAST_YEAR = 91, 89
_DICOM_UNITS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_SEXES = {"m": "male", "male": "male", "f": "female", "female": "female"}
# The first word of a recorded race decides: "WHITE - RUSSIAN", "BLACK/CAPE VERDEAN", "HISPANIC OR LATINO". These words
# cover MIMIC-IV, CheXpert and FairGenMed. Races outside the four groups are "other", as recorded.
_RACES = {
  **{"white": "white", "caucasian": "white", "black": "black", "african": "black", "asian": "asian"},
  **{"hispanic": "hispanic", "latino": "hispanic", "latina": "hispanic"},
  **dict.fromkeys(("other", "multiple", "american", "native", "pacific", "portuguese", "south", "middle"), OTHER),
  **dict.fromkeys(("unknown", "unable", "patient", "declined", "refused", "race"), ""),
}


def parse_age(text: str) -> str:
  """Years as a number: "58", "058Y" and "018M" (DICOM), "90+", ">89" (the next full year)."""
  text = text.strip()
  if text.lower() in UNKNOWN:
    return ""
  if match := re.fullmatch(r"(\d{1,3})([YMWD])", text):
    return f"{int(match[1]) * _DICOM_UNITS[match[2]]:g}"
  if match := re.fullmatch(r">\s*(\d+)", text):
    return str(int(match[1]) + 1)
  if match := re.fullmatch(r"(\d+)\s*\+", text):
    return match[1]
  return text


def age_at(anchor_age: str, anchor_year: str, year: int) -> str:
  """The age in `year` of a MIMIC-IV patient; above 89 it is 91, as MIMIC-IV writes it."""
  age = int(anchor_age) + year - int(anchor_year)
  if age < 0:
    raise ValueError(f"age {age} in the year of the study")
  return str(TOP_CODED if int(anchor_age) > _LAST_YEAR or age > _LAST_YEAR else age)


def parse_sex(text: str) -> str:
  text = text.strip().lower()
  if text in UNKNOWN:
    return ""
  if text not in _SEXES:
    raise ValueError(f"sex {text!r} is not male, female or unknown")
  return _SEXES[text]


def parse_race(text: str) -> str:
  text = text.strip().lower()
  if text in UNKNOWN:
    return ""
  word = re.match(r"[a-z]*", text)[0]
  if word not in _RACES:
    raise ValueError(f"race {text!r} is not in the table of recorded races")
  return _RACES[word]


def recorded_races(texts: Iterable[str]) -> set[str]:
  """The races that occur, "" among them; a value that will be rejected with its row is left out."""
  found = set()
  for text in set(texts):
    with contextlib.suppress(ValueError):
      found.add(parse_race(text))
  return found


def agreed_race(texts: set[str]) -> str:
  """The race of a patient with several records: the one that all known records give, else unknown."""
  races = {parse_race(text) for text in texts} - {""}
  return races.pop() if len(races) == 1 else ""


def encode(attribute: Attribute, text: str) -> int | float:
  """`attribute.encode`, with the error of a rejected row."""
  try:
    return attribute.encode(text)
  except ValueError as error:
    raise RowError(f"bad attribute value: {error}") from None
