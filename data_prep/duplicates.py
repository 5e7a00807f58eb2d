"""Images that occur more than once: the same bytes after preparation under different keys."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("key", "split", "patient", "same_as", "other_split", "other_patient")


def find(splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
  """One line for each image whose bytes an earlier record has; `same_as` is the first of them.

  Rows have `key`, `patient` (hashes) and `sha256` of the encoded image. `other_split` and `other_patient` are "yes"
  when the first record is in another split, or belongs to another patient: the one leaks, the other asks who it is.
  """
  first: dict[str, tuple[str, Mapping[str, Any]]] = {}
  lines = []
  for split, rows in splits.items():
    for row in rows:
      own, original = first.setdefault(row["sha256"], (split, row))
      if original is not row:
        lines.append(
          {
            "key": row["key"],
            "split": split,
            "patient": row["patient"],
            "same_as": original["key"],
            "other_split": "yes" if own != split else "no",
            "other_patient": "yes" if original["patient"] != row["patient"] else "no",
          }
        )
  return lines


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
  """One sentence for the terminal and the card."""
  if not lines:
    return "No image occurs twice."
  splits = sum(line["other_split"] == "yes" for line in lines)
  patients = sum(line["other_patient"] == "yes" for line in lines)
  return (
    f"{len(lines)} images repeat an earlier one byte for byte, {splits} of them in another split, {patients} under"
    " another patient (duplicates.csv)."
  )
