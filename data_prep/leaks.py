"""Finds attribute levels that a clinical text names: "72 year old", "woman", "group D".

A held-out cell is unseen only if neither the attributes nor the words of training name it. Words are found by regular
expressions, which know no context ("his wife" names a woman): they err on the side of finding too much. Values that are
ordinary words of any report ("no other finding", "white lung") count only where a person, an age or the name of the
attribute stands beside them.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.conditioning.schema import Attribute, Schema
from data_prep import scrub

# {attribute: {level: [regular expression, ...]}}; of a continuous attribute, "number" holds expressions whose first
# group is the value.
Patterns = Mapping[str, Mapping[str, Sequence[str]]]
NUMBER = "number"

_OF_SEX = (scrub.PERSONS, scrub.PRONOUNS, scrub.RELATIVES, scrub.TITLES, scrub.ORGANS)
_SYNONYMS = {**{sex: "|".join(words[sex] for words in _OF_SEX) for sex in scrub.PERSONS}, **scrub.RACES}
_SEX_LETTERS = {"f": "female", "m": "male"}
_ORDINARY = frozenset({"white", "black", "other", "mixed", "multiple"})
_ALSO_CALLED = dict.fromkeys(("race", "ethnicity"), "race|ethnicity")
_WORDS = {
  **{word: i for i, word in enumerate((*scrub.DIGITS, *scrub.TEENS), start=1)},
  **{word: 10 * i for i, word in enumerate(scrub.TENS, start=2)},
}
_DECADES = {word.removesuffix("y") + "ies": _WORDS[word] for word in scrub.TENS}
_NUMBER = r"(?<![\d.])(\d{1,3}(?:\.\d+)?)"
_SPELLED = rf"\b({scrub.SPELLED})"
_DECADE = re.compile(
  rf"\bin\s+(?:his|her|their|the)\s+(?:early\s+|mid[\s-]+|late\s+)?(\d0'?s|{'|'.join(_DECADES)})\b", re.IGNORECASE
)
_YEARS_OLD = r"(?:years?|yrs?|y)[\s./-]*(?:old|of age|o)\b"
_OLD = rf"[\s-]*{_YEARS_OLD}"  # 72 year old, 72-year-old, 72 years of age, 72 y/o, 72yo
_WHOLE = r"(?<!\w)(?<!\d[.,])(\d{1,3})"  # not the end of another number
_INFANT = r"[\s-]*(?P<unit>month|week|day)[\s-]old\b"  # not "3 weeks old": so may a fracture be
_YEARS_IN = {"month": 12, "week": 365.25 / 7, "day": 365.25}
_AGES = (
  _NUMBER + _OLD,
  _SPELLED + _OLD,
  _NUMBER + _INFANT,
  _SPELLED + _INFANT,
  r"\baged?[\s:=]+(?:of\s+)?(\d{1,3}(?:\.\d+)?)(?!\.?\d)(?:[\s-]*(?P<unit>month|week|day)s?\b)?",
  rf"\baged?[\s:=]+(?:of\s+)?{_SPELLED}\b",
  rf"\b(?:{scrub.SEXES})(?={scrub.AGE_BEHIND}),?\s+(\d{{2,3}})",
  rf"{_WHOLE}\s?/?\s?(?-i:[MF]){scrub.LETTER_END}",
  rf"{_WHOLE}\s?y(?:ea)?r?s?[\s-]*(?-i:[MF]){scrub.LETTER_END}",
  r"\b(?-i:[MF])\s?/\s?(\d{1,3})\b",
)


def _letter_forms(letter: str) -> list[str]:
  """Expressions of a letter that stands for a sex."""
  capital = rf"(?-i:{letter.upper()})"
  end = scrub.LETTER_END
  return [
    rf"{_WHOLE}\s?/?\s?{capital}{end}",  # 72F, 72/F
    rf"\b{capital}\s?/\s?\d{{1,3}}\b",
    rf"{scrub.BLANKED}{capital}{end}",
    rf"(?<![a-z]){_YEARS_OLD}[\s.,/-]*{letter}{end}",  # 72 yo F
    rf"{_WHOLE}\s?y(?:ea)?r?s?[\s-]*{capital}{end}",
    rf"\b(?:patient|pt)\.?[\s,]+{capital}{end}",
    rf"\b(?:sex|gender)[\s:=-]+{letter}\b",
  ]


def _ordinary_forms(word: str, names: str) -> list[str]:
  """Expressions of a value that is an ordinary word; `names` are those of its attribute, as a regular expression."""
  return [
    rf"(?<!\w){word}[\s-]+(?:{names})s?\b",
    rf"\b(?:{names})[\s:=-]+{word}(?!\w)",
    rf"(?<!\w){word},\s+(?:{scrub.SEXES})\b",
    # 54 year old other male; 60 M/white.
    rf"(?:(?<![a-z]){_YEARS_OLD},?\s+|\b(?-i:[MF])\s?/\s?){word}(?=,?\s+(?:{scrub.SEXES}|with)\b|\s*(?:[.,;)]|$))",
  ]


def _default_patterns(attribute: Attribute) -> dict[str, list[str]]:
  if attribute.kind == "continuous":
    if attribute.unit == "year":
      return {NUMBER: list(_AGES)}
    return {NUMBER: [rf"{_NUMBER}\s*{re.escape(attribute.unit)}\b"]} if attribute.unit else {}
  patterns = {}
  for value in attribute.values:
    word = re.escape(value.lower())
    meant = _SEX_LETTERS.get(word, value.lower())
    name = attribute.name.lower()
    if meant in _ORDINARY:
      forms = _ordinary_forms(word, _ALSO_CALLED.get(name, name))
    elif len(value) < 3:  # words of their own in any text ("A small effusion"): the attribute must be named too
      forms = [rf"\b{name}[\s:=-]+{word}(?!\w)"]
    else:
      forms = [rf"(?<!\w){word}s?(?!\w)"]
    forms += [rf"\b(?:{_SYNONYMS[meant]})\b"] if meant in _SYNONYMS else []
    forms += [form for letter, sex in _SEX_LETTERS.items() if sex == meant for form in _letter_forms(letter)]
    patterns[value] = forms
  return patterns


def read_patterns(path: str | Path, schema: Schema) -> Patterns:
  """Reads a JSON file of patterns; every attribute, level and expression in it must be usable."""
  try:
    patterns = json.loads(Path(path).read_text(encoding="utf-8"))
    entries = [(a, level, e) for a, levels in patterns.items() for level, own in levels.items() for e in own]
  except (OSError, ValueError, AttributeError, TypeError) as error:
    raise InputError(f"{path} is no JSON object of attribute, level and list of expressions ({error})") from None
  for name, level, expression in entries:
    attribute = schema[name]
    allowed = [*attribute.level_names, *([NUMBER] if attribute.kind == "continuous" else [])]
    if level not in allowed:
      raise InputError(f"{path}: {name} has no level {level!r}{nearest(level, allowed)}")
    try:
      groups = re.compile(expression).groups
    except (re.error, TypeError) as error:
      raise InputError(f"{path}: {expression!r} of {name} is no regular expression ({error})") from None
    if level == NUMBER and groups < 1:
      raise InputError(f"{path}: {expression!r} of {name} needs a group around the number")
  return patterns


class Scanner:
  """Finds the levels that texts name.

  Args:
    schema: the attributes.
    patterns: replace the built-in ones of the attributes they name; an empty object turns an attribute off.
  """

  def __init__(self, schema: Schema, patterns: Patterns | None = None):
    self._rules = []
    for attribute in schema.grouping:
      own = (patterns or {}).get(attribute.name, _default_patterns(attribute))
      compiled = {level: [re.compile(e, re.IGNORECASE) for e in expressions] for level, expressions in own.items()}
      self._rules.append((attribute, compiled))

  def __call__(self, text: str) -> dict[str, dict[int, str]]:
    """{attribute: {level: the words that name it}} for every attribute that the text names."""
    named = {}
    text = scrub.pattern(scrub.FRENCH).sub(" ", text)  # "8 F catheter" names no woman of eight
    for attribute, rules in self._rules:
      found: dict[int, str] = {}
      for level, phrase in _find(attribute, rules, text):
        found.setdefault(level, phrase)
      if found:
        named[attribute.name] = found
    return named


def _find(attribute: Attribute, rules: Mapping[str, Sequence[re.Pattern]], text: str) -> Iterator[tuple[int, str]]:
  for level, expressions in rules.items():
    for match in (match for expression in expressions for match in expression.finditer(text)):
      if level != NUMBER:
        yield attribute.level_names.index(level), match.group()
        continue
      value = _value(match)
      if value is not None and attribute.low <= value <= attribute.high:
        yield int(attribute.levels(np.array([value]))[0]), match.group()
  if attribute.kind == "continuous" and attribute.unit == "year" and NUMBER in rules:
    for match in _DECADE.finditer(text):
      start = _DECADES.get(match.group(1).lower()) or int(re.sub(r"\D", "", match.group(1)))
      for year in (start, start + 9):  # a decade may lie in two bins
        if attribute.low <= year <= attribute.high:
          yield int(attribute.levels(np.array([float(year)]))[0]), match.group()


def _value(match: re.Match) -> float | None:
  """The first group, in digits or English words below one hundred, over the `unit` that infants are counted in."""
  text = match.group(1)
  try:
    value = float(text)
  except ValueError:
    parts = [_WORDS.get(part) for part in re.split(r"[\s-]+", text.lower())]
    value = None if None in parts else float(sum(parts))
  unit = match.groupdict().get("unit")
  return value / _YEARS_IN[unit.lower()] if unit else value
