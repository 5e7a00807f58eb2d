"""Do the images show the attributes they were asked for? Predictions on synthetic images beside those on real ones.

The reader of attributes is fitted on real training images only. Its figure on real test images is the practical
ceiling, and where that is not clearly above chance, by a margin and by its interval, its figure on synthetic images is
void.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.evaluation.groups import Group
from compdiff_jax.evaluation.phantom_factors import FactorReader

MARGIN = 0.10
ABSENT = (
  "attribute fidelity needs a reader of the attributes that is right by construction; there is one for the phantom"
  " data set only"
)


class Reader(Protocol):
  """Measures attributes in images; `phantom_factors.FactorReader` is one."""

  def fit(self, images: np.ndarray, attributes: Mapping[str, np.ndarray], schema: Schema): ...

  def predict(self, images: np.ndarray) -> dict[str, np.ndarray]: ...


def reader_for(name: str) -> Reader | None:
  """The reader of the data set `name`; None where no reader is right by construction."""
  return FactorReader() if name == "phantom" else None


def fidelity(
  schema: Schema,
  groups: Sequence[Group],
  requested: Mapping[str, np.ndarray],
  predicted: Mapping[str, np.ndarray],
  recorded: Mapping[str, np.ndarray],
  predicted_real: Mapping[str, np.ndarray],
  min_n: int,
) -> dict:
  """Accuracy, or mean absolute error and bin accuracy, overall and per group, synthetic beside real.

  Args:
    schema: attributes to compare.
    groups: from `make_groups`; the synthetic side needs min_n synthetic images, the real side min_n real ones.
    requested, predicted: encoded attributes of the synthetic images: asked for, and read from the picture.
    recorded, predicted_real: the same for the real test images.

  Returns:
    `attributes` {name: {kind, unit, chance, status}}; `groups` [{group, held_out, measures}] with, per measure,
    {synthetic: {value, lo, hi, n} or {refusal}, real: the same}. Measures are "<attribute> accuracy",
    "<attribute> bin accuracy", "<attribute> mean absolute error" and "all attributes" (conformity: every attribute's
    level right at once, over images in which all are known). Intervals: Wilson's for shares, normal for errors.
  """
  sides = {"synthetic": (requested, predicted), "real": (recorded, predicted_real)}
  attributes, void = {}, []
  for a in schema:
    levels = a.levels(recorded[a.name])
    known = levels >= 0
    chance = np.bincount(levels[known]).max() / known.sum() if known.any() else 1.0
    right = (levels == a.levels(predicted_real[a.name]))[known]
    accuracy = right.mean() if known.any() else 0.0
    low, high = wilson(accuracy, len(right)) if known.any() else (0.0, 1.0)
    status = "ok"
    if accuracy < chance + MARGIN or low <= chance:
      read = f"{accuracy:.3f} ({low:.3f} to {high:.3f}) of {len(right)} real test images read right"
      status = f"void: {read}, chance {chance:.3f}"
      void.append(a.name)
    attributes[a.name] = {"kind": a.kind, "unit": a.unit, "chance": float(chance), "status": status}
  rows = []
  for group in groups:
    measures: dict[str, dict] = {}
    for side, (target, found) in sides.items():
      index = getattr(group, side)
      known = np.logical_and.reduce([a.is_known(target[a.name][index]) for a in schema])
      all_right = np.ones(len(index), bool)
      for a in schema:
        for name, values, share in _measures(a, target[a.name][index], found[a.name][index]):
          result = {"refusal": "void"} if a.name in void else _summary(values, share, min_n)
          measures.setdefault(name, {})[side] = result
        all_right &= a.levels(target[a.name][index]) == a.levels(found[a.name][index])
      result = {"refusal": "void"} if void else _summary(all_right[known], True, min_n)
      measures.setdefault("all attributes", {})[side] = result
    rows.append({"group": group.name, "kind": group.kind, "held_out": group.held_out, "measures": measures})
  return {"attributes": attributes, "groups": rows}


def _measures(a: Attribute, target: np.ndarray, found: np.ndarray) -> list[tuple[str, np.ndarray, bool]]:
  """(measure, per-image values over known targets, whether they are right/wrong)."""
  known = a.is_known(target)
  right = a.levels(target[known]) == a.levels(found[known])
  if a.kind == "categorical":
    return [(f"{a.name} accuracy", right, True)]
  error = np.abs(target[known].astype(np.float64) - found[known])
  return [(f"{a.name} bin accuracy", right, True), (f"{a.name} mean absolute error", error, False)]


def _summary(values: np.ndarray, share: bool, min_n: int) -> dict:
  n = len(values)
  if n < min_n:
    return {"refusal": f"not evaluable (n={n}; needs {min_n})"}
  mean = float(values.mean())
  if share:
    low, high = wilson(mean, n)
  else:
    half = 1.96 * float(values.std(ddof=1)) / np.sqrt(n)
    low, high = mean - half, mean + half
  return {"value": mean, "lo": float(low), "hi": float(high), "n": n}


def wilson(share: float, n: int) -> tuple[float, float]:
  """Wilson's 95 % score interval of a share (Wilson 1927); stays in [0, 1] and is not empty at 0 or 1."""
  z = 1.96
  centre = (share + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
  return max(0.0, centre - half), min(1.0, centre + half)
