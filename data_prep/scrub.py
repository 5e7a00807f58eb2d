"""Removes identifiers and demographic words from free text by rules: (regular expression, replacement) pairs.

Rules ignore case. `IDENTIFIERS` are for all free text; `DEMOGRAPHICS` keep age, sex and race out of the text, because
the attributes carry them and a hold-out of a combination would leak through the text. `--scrub FILE` adds rules.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from compdiff_jax.cli import InputError

Rules = Sequence[tuple[str, str]]

# Words that name a level of sex; data_prep/leaks.py looks for the same.
PERSONS = {"male": r"males?|m[ae]n|gentlem[ae]n|boys?", "female": r"females?|wom[ae]n|lad(?:y|ies)|girls?"}
SEXES = "|".join(PERSONS.values())
PRONOUNS = {"male": r"he|him|his|himself", "female": r"she|hers?|herself"}
RELATIVES = {
  "male": r"husbands?|fathers?|brothers?|sons?",
  "female": r"wife|wives|mothers?|sisters?(?! mary joseph)|daughters?",  # Sister Mary Joseph: a nodule
}
TITLES = {"male": r"(?-i:Mr)", "female": r"(?-i:[Mm]rs|Ms|Miss(?=\s[A-Z]))"}  # MS is a disease, MR an examination
ORGANS = {
  "male": r"prostat(?:e|ic|ectomy)",
  "female": r"uter(?:us|ine)|hysterectomy|ovar(?:y|ies|ian)|pregnan(?:t|cy|cies)",
}
DIGITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SPELLED = rf"(?:(?:{'|'.join(TENS)})(?:[-\s]+(?:{'|'.join(DIGITS)}))?|{'|'.join((*TEENS, *DIGITS))})"

# "may" is a verb unless a year follows or it is written as a name.
_MONTH = (
  r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|(?-i:May|MAY)|may(?=[-/.,\s]+\d{4})|june?|july?|aug(?:ust)?"
  r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
# What may stand behind "Dr." or "name:" and is no name.
_NO_NAME = r"(?!(?:no|not|none|the|there|this|is|was|has|and|or|at|on|to|by|for|with|in)\b)"
_NAME = rf"{_NO_NAME}(?-i:[A-Z][\w'’-]*)"
_INITIALS = r"(?:(?-i:[A-Z])\.\s*)*"
_FULL_NAME = rf"{_INITIALS}{_NAME}(?:\s+{_INITIALS}{_NAME}){{0,2}}"
_SMALL_NAME = rf"{_NO_NAME}(?-i:[a-z][\w'’-]+)"
_WHOSE = r"(?:(?:patient|physician|doctor|radiologist)(?:['’]s)?|first|last|middle|full|family|given)"
# Things whose name is no person's. Every other "name:" is taken for one: a lost word is better than a name that stays.
_THINGS = ("exam", "examination", "procedure", "study", "series", "protocol", "test", "file", "drug", "device")
_NO_THING = "".join(rf"(?<!\b{thing}\s)" for thing in _THINGS)
_NUMBER = rf"(?:\d{{1,3}}|{SPELLED}|__+)"
_VALUE = r"(?:n/a|not?[ \t]+\w+|\w+)"  # behind "sex:"; "not stated" and "no information" too
_YEARS = r"[-\s]*(?:years?|yrs?|y)"
_OLD = rf"(?:{_YEARS}[-\s]*(?:old|of age)\b|[-\s]*(?:y[-\s/]?o|y\.o\.?)(?!\w))"  # year-old, years of age, yo, y-o
_INFANT = r"[-\s]*(?:month|week|day)[-\s]old\b"  # "3 weeks old" may be a fracture
_MONTHS = r"[-\s]*(?:months?|mos?|weeks?|wks?|days?)(?:[-\s]*(?:old|of age))?\b"
LETTER_END = r"\b(?!['’]|/\s?(?:[a-z]|ups?)\b)"  # of a letter that stands for a sex: "F/U" is a follow-up
_SEX = rf"(?:[-\s,/]*[mf]{LETTER_END})?"  # the letter behind an age
AGE_BEHIND = r",?\s+(?:1\d|[1-9])\d(?=\s*(?:[.,;:)](?!\d)|$))"  # "Female, 72." but not "female, 72 mm"
# Behind "___", what is left of an age or a name: "___F" is a woman, "___ F" too, but "___ F. Smith" has an initial.
BLANKED = r"\b_{2,}(?!\s(?-i:[MF]\.\s*[A-Z]))\s?"

_PERSON = rf"(?:patients?|{SEXES})"
# White and black alone are colours of findings ("white-out", "black blood"): a person or an age must stand behind them.
_OF_PERSON = (
  rf"(?=(?:,?\s+|\s?/\s?)(?:(?:{SEXES})\b|{_NUMBER}{_OLD})|\s+patients?\b|(?:\s+|\s?/\s?)(?-i:[MF]){LETTER_END})"
)
# Words that name a level of race; data_prep/leaks.py looks for the same.
RACES = {
  "white": rf"caucasians?|whites(?!\s+of\s+the\s+eyes?\b)|white{_OF_PERSON}",
  "black": rf"african[-\s]americans?|blacks(?!\s+out\b)|black{_OF_PERSON}",
  "asian": r"asians?",
  "hispanic": r"hispanics?|latin[oa]s?",
}
# "SMITH, JOHN" at the start of a line or behind "patient", in a text that is not all capitals; no heading ("HEART,
# LUNGS: clear") and no abbreviations. Elsewhere capitals stress a finding.
_CAPITALS_NAME = (
  r"(?m:(^|\b(?:patient|pt|re|by)\b[.:]?)[ \t]*(?-i:[A-Z][A-Z'’-]{2,},\s+"
  r"(?!(?:COPD|ARDS|PICC|CABG|LVAD|AICD)\b)[A-Z]{4,}(?:\s+[A-Z]\b\.?)?(?!\s*[:,]|\w|\s+[A-Z]{2})(?=[\s\S]*[a-z])))"
)
_HALF_DAY = r"(?:[ap]\.m\.|[ap]m\b)"
_AND_DAYS = r"(?:,?\s+(?:and|or|to)\s+\d{1,2}/\d{1,2}\b(?!/))*"  # 3/14/2150 and 4/1
# "8 F catheter tip", "chest tube, 28 F": F is the French size there, not a sex. "28F chest tube" is taken for a person.
_DEVICE = (
  r"(?:catheter|sheath|tube|drain|pigtail|picc|line|stent|cannula|introducer|dilator|needle|port|foley|dobhoff)s?\b"
)
_KIND_OF_DEVICE = (
  r"(?:(?:right|left)(?:[-\s]sided)?|(?:single|double|dual|triple)[-\s]lumen|chest|pleural|biliary|central|venous"
  r"|arterial|vascular|dialysis|feeding|drainage|nephrostomy|gastrostomy|thoracostomy|percutaneous|surgical|straight"
  r"|curved|pigtail|ng|et)"
)
FRENCH = (
  rf"(?:\b{_DEVICE}[\s,(]*(?:of |size )?[1-3]?\d\s?(?-i:F)\b"
  rf"|(?<!\w)(?<!\d[.,])(?:[1-3]?\d[-\s]|1?\d)(?-i:F)(?=(?:[-\s]+{_KIND_OF_DEVICE}){{0,3}}[-\s]+{_DEVICE}))"
)
# Case counts here: "MS" is a disease, "MR" an examination.
_NAMED_PERSONS = (
  rf"\b(?:(?-i:Drs?|DR|Prof|Doctor|Mr|Mrs|Ms|Miss)\b\.?\s+(?:_{{2,}}|{_FULL_NAME})"
  rf"|(?-i:drs?|prof|mrs?|ms)\.\s+(?:_{{2,}}|{_FULL_NAME}|{_SMALL_NAME}))",
  "",
)
IDENTIFIERS = (
  _NAMED_PERSONS,
  (
    r"\b(?:electronically |digitally )?(?:signed|dictated|transcribed|approved|verified|interpreted|reviewed|read)"
    rf" by\b:?\s+{_FULL_NAME}(?:,\s*(?-i:MD|DO|PA|RN)\b)?",
    "",
  ),
  (
    rf"\b(?:{_WHOSE}\s+){{0,2}}{_NO_THING}name\s*[:=]\s*"
    rf"(?:{_NAME},\s*{_NAME}(?:\s+(?-i:[A-Z])\b)?|{_FULL_NAME}|{_SMALL_NAME}(?:\s+{_SMALL_NAME})?)",
    "",
  ),
  (_CAPITALS_NAME, r"\1"),
  # Bounded, and without blanks that two parts may share: long texts would take for ever.
  (r"[^\s@]{1,64}@[^\s@]{1,255}\.\w+", ""),
  (
    r"\b(?:accession|mrn|medical record|clip|record|exam|study|account)(?:\s*(?:numbers?|no\.?|id|#))?(?:\s*[:#])?\s*"
    r"[a-z]{0,3}-?\d{4,}\b",
    "",
  ),
  (r"(?:\b\+?1[-. ])?\(?\b\d{3}\)?[-. ]\d{3}[-. ]\d{4}\b", ""),
  (r"(?<![\w.-])\d{3}-\d{4}(?![\w-]|\s(?:ml|cc|mg|mm|hu)\b)", ""),
  (
    r"\b\d{1,4}([/.-])\d{1,2}\1\d{2,4}"
    rf"(?:\b|T\d{{1,2}}(?::?\d{{2}}){{1,2}}(?:[.,]\d+)?(?:Z|[-+]\d{{2}}:?\d{{2}})?(?!\w)){_AND_DAYS}",
    "",
  ),
  (rf"\b(?:on|dated|from|since|of|compared (?:to|with))\s+\d{{1,2}}/\d{{1,2}}\b(?!/){_AND_DAYS}", ""),
  (r"\b(?:0?[1-9]|1[0-2])/(?:19|2[01])\d{2}\b", ""),
  (
    rf"\b(?:\d{{1,2}}(?:st|nd|rd|th)?[-/\s]+(?:of\s+)?{_MONTH}|{_MONTH}[-/\s]+\d{{1,2}}(?:st|nd|rd|th)?)"
    r"(?:(?:,?\s+|[-/,])\d{4}|[-/]\d{2})?(?!\w)",
    "",
  ),
  (rf"\b{_MONTH}[-/,\s]+\d{{4}}\b", ""),
  (rf"\b\d{{1,2}}(?::\d{{2}}(?::\d{{2}})?(?:\s*{_HALF_DAY})?|\s*{_HALF_DAY})", ""),
  (r"\b[a-z]{0,3}\d{6,}(?:t\d{4,6})?\b", ""),
  (r"_{2,}", ""),
)
DEMOGRAPHICS = (
  (rf"\b(?:sex|gender)(?:\s*[:=]\s*{_VALUE}|[-\s]+(?:[mf]|(?:fe)?males?)\b)", ""),
  (
    rf"\b(?:race|ethnicity)\s*[:=]\s*{_VALUE}(?:(?:\s+or\s+|\s*/\s*|[-\s])(?:african[-\s]american|american|latin[oa]"
    r"|caucasian))?",
    "",
  ),
  (rf"\b(?:an? )?(?:{'|'.join(RACES.values())})(?!\w)", ""),  # before the sexes and ages that colours are told by
  (rf"\baged?[\s:=]*(?:of )?{_NUMBER}(?:{_OLD}|{_YEARS}\b|{_MONTHS})?(?!\w){_SEX}", ""),
  (r"\bage\s*[:=]\s*(?:n/a|not?[ \t]+\w+|un\w+)", ""),
  (rf"\b(?:an? |the )?{_NUMBER}(?:{_OLD}{_SEX}|{_INFANT}|{_YEARS}[-\s]*(?-i:[MF]){LETTER_END})", "patient"),
  (rf"\b({_PERSON}){AGE_BEHIND}", r"\1"),
  (rf"\bin (?:his|her|their) (?:(?:early|mid|late)[-\s])?(?:{_NUMBER}s|\w+ties)\b", ""),
  # What the first group holds stays.
  (rf"({FRENCH})|(?:(?<!\w)(?<!\d[.,])\d{{1,3}}\s?/?\s?|{BLANKED})(?-i:[MF]){LETTER_END}", r"\1"),
  (r"\b(?-i:[MF])\s?/\s?\d{1,3}\b", ""),
  (rf"\b(?:patient|pt)\.?[\s,]+(?-i:[MF]){LETTER_END}", "patient"),
  (r"\b(?:an? )?(?:middle[-\s]aged?|retirement[-\s]aged|elderly|young|adult|aged|infant|child|teenager?)\b", ""),
  # "old" alone is a finding: an old fracture.
  (rf"\b(?:an? )?old(?=\s+{_PERSON}\b)", ""),
  (rf"\b(?:an? )?(?:{SEXES})\b", "patient"),
  (
    rf"\b(?:{'|'.join(RELATIVES.values())}|spouse|(?:{'|'.join(TITLES.values())})\.?|(?-i:mr|MRS|ms)\.)(?!\w)",
    "relative",
  ),
  (r"\b(?:s?he|himself|herself)\b", "the patient"),
  (r"\b(?:his|hers?|him)\b", "the"),
  (rf"\b(?:right |left )?(?:breasts?|mammary|{'|'.join(ORGANS.values())})\b", ""),
  (r"\b(patient)(?:[\s,]+(?:the )?patient)+\b", r"\1"),
)
# Names before "Mr." becomes a relative; ages before "___ year old" loses its blank.
ALL = (_NAMED_PERSONS, *DEMOGRAPHICS, *IDENTIFIERS)


def scrub(text: str, rules: Rules) -> str:
  """`text` with every rule applied in order, then tidied."""
  return tidy(substitute(text, rules))


def substitute(text: str, rules: Rules) -> str:
  for expression, replacement in rules:
    text = pattern(expression).sub(replacement, text)
  return text


def tidy(text: str) -> str:
  """Mends what replacements leave: blanks before a full stop, lone punctuation, lower case after a full stop."""
  text = re.sub(r"\(\s*\)|\[\s*\]", "", text)
  text = re.sub(r"\s+([.,;:])", r"\1", " ".join(text.split()))
  text = re.sub(r"(?:^|(?<=[.,;:]))\s*[.,;:]+", "", text).strip()
  return re.sub(r"(^|\. )([a-z])", lambda start: start[1] + start[2].upper(), text)


def cut(text: str, max_words: int) -> str:
  """The first `max_words` words, without a hanging comma."""
  return " ".join(text.split()[:max_words]).rstrip(",;:")


@functools.cache
def pattern(text: str) -> re.Pattern:
  try:
    return re.compile(text, re.IGNORECASE)
  except re.error as error:
    raise InputError(f"{text!r} is not a regular expression ({error})") from None


def read_rules(path: str | Path) -> Rules:
  """Rules of a text file: one regular expression a line, `=>` before a replacement; lines with # in front are notes."""
  try:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"cannot read the rules {path}: {getattr(error, 'strerror', None) or error}") from None
  rules = []
  for number, line in enumerate(lines, start=1):
    if not line.strip() or line.startswith("#"):
      continue
    expression, _, replacement = line.partition("=>")
    try:
      pattern(expression.strip()).sub(replacement.strip(), "")
    except (InputError, re.error) as error:
      raise InputError(f"{path}, line {number}: {error}") from None
    rules.append((expression.strip(), replacement.strip()))
  return tuple(rules)
