"""The impression of a radiology report: the section under its heading, never a sentence picked from prose."""

import re

# A heading stands at the start of a line in capitals and ends with a colon: " IMPRESSION:", "WET READ:", "FINDINGS AND
# IMPRESSION:". Three letters or fewer ("CT:", "PA:") are text.
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ()/,&-]{2,60}[A-Z)])[ \t]*:", re.MULTILINE)
_IMPRESSION = re.compile(r"IMPRESSIONS?|CONCLUSIONS?|FINDINGS? ?(?:AND|/|&) ?IMPRESSIONS?")
_FINDINGS = re.compile(r"FINDINGS?")
# Closing lines that are no part of the reading.
_END = re.compile(
  r"^[ \t]*(?:_{10,}|DICTATED BY|ELECTRONICALLY SIGNED|FINAL REPORT|ADDENDUM)\b.*", re.MULTILINE | re.DOTALL
)


def sections(report: str) -> list[tuple[str, str]]:
  """(heading, text) of each headed section in order; text before the first heading has none and is left out."""
  marks = list(_HEADING.finditer(report))
  ends = [*(mark.start() for mark in marks[1:]), len(report)]
  return [
    (" ".join(mark[1].split()), " ".join(_END.sub("", report[mark.end() : end]).split()))
    for mark, end in zip(marks, ends)
  ]


def impression(report: str) -> str:
  """The last impression that has text (a final report follows a preliminary one), else the last findings, else ""."""
  found = [(heading, text) for heading, text in sections(report.replace("\r\n", "\n")) if text.strip(" _.")]
  for wanted in (_IMPRESSION, _FINDINGS):
    texts = [text for heading, text in found if wanted.fullmatch(heading)]
    if texts:
      return texts[-1]
  return ""
