"""Groups from the attribute schema, and the fidelity of each with its n, an interval and a real-versus-real reference.

A group is a marginal (one level), a pair, a full cell, everything, or the pooled held-out cells. Groups with too few
images are listed as not evaluable and carry no number.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from compdiff_jax.conditioning.schema import Cell, Schema
from compdiff_jax.evaluation import kid
from compdiff_jax.evaluation.frechet import frechet_distance

DRAWS = 200
KINDS = ("overall", "held-out", "attribute", "pair", "cell")
STATUSES = ("pair-seen", "pair-unseen")
Attributes = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Group:
  """One group of images.

  Attributes:
    name: "overall", "held-out (pair-seen)" or a cell name such as "age=60-80,sex=female".
    kind: one of `KINDS`.
    cell: its levels; empty for "overall" and "held-out".
    held_out: "pair-seen" or "pair-unseen" when training had no image of the combination, else "".
    real, synthetic: row numbers in the two sets; n_train: images in the training split.
    refusal: why it is not evaluable, else "".
  """

  name: str
  kind: str
  cell: Cell
  held_out: str
  real: np.ndarray
  synthetic: np.ndarray
  n_train: int
  n_patients: int
  refusal: str


def held_out_status(schema: Schema, cell: Cell, train: Attributes) -> str:
  """ "pair-seen" when every pair of the cell's levels occurs in training, "pair-unseen" when one does not.

  The empty string when training holds the cell itself, which is then no held-out cell at all.
  """
  if schema.in_cell(train, cell).any():
    return ""
  pairs = [dict(pair) for pair in itertools.combinations(cell.items(), 2)]
  return STATUSES[0] if all(schema.in_cell(train, pair).any() for pair in pairs) else STATUSES[1]


def make_groups(
  schema: Schema,
  held_out: Sequence[Cell],
  real: Attributes,
  synthetic: Attributes,
  train: Attributes,
  patients: np.ndarray,
  min_n: int,
) -> list[Group]:
  """Every group with at least one image on either side, in the order of `KINDS` and of the schema.

  Args:
    schema: the attributes to group by.
    held_out: cells said to be absent from training; partial cells cover every cell inside them.
    real, synthetic, train: encoded attributes; unknown values belong to no group but "overall".
    patients: patient of each real image.
    min_n: a group with fewer real or synthetic images, or fewer than min_n / 2 real patients, is not evaluable. Nor is
      one of which two fifths are a single image (`matched_sizes`).
  """
  sets = {"real": real, "synthetic": synthetic, "train": train}
  status = {tuple(cell.items()): held_out_status(schema, cell, train) for cell in held_out}

  def group(name: str, kind: str, cell: Cell, held: str, masks: Mapping[str, np.ndarray]) -> Group:
    rows = {key: np.flatnonzero(mask) for key, mask in masks.items()}
    n_patients = len(np.unique(patients[rows["real"]]))
    n_real, n_synthetic = len(rows["real"]), len(rows["synthetic"])
    refusal = ""
    if min(n_real, n_synthetic) < min_n:
      refusal = f"not evaluable (n={n_real} real, {n_synthetic} synthetic; needs {min_n})"
    elif n_patients < min_n // 2:
      refusal = f"not evaluable ({n_patients} real patients; needs {min_n // 2})"
    elif _matched_size(n_patients, n_synthetic) < 2:
      refusal = (
        f"not evaluable ({n_patients} real patients, {n_synthetic} synthetic images; KID at two fifths needs 5 of each)"
      )
    return Group(name, kind, cell, held, rows["real"], rows["synthetic"], len(rows["train"]), n_patients, refusal)

  def of_cell(kind: str, cell: Cell) -> Group | None:
    masks = {key: schema.in_cell(columns, cell) for key, columns in sets.items()}
    if not (masks["real"].any() or masks["synthetic"].any()):
      return None
    held = [s for key, s in status.items() if s and dict(key).items() <= cell.items()]
    return group(schema.cell_name(cell), kind, cell, max(held, default="", key=STATUSES.index), masks)

  everything = {key: np.ones(len(columns[schema.names[0]]), bool) for key, columns in sets.items()}
  groups = [group("overall", "overall", {}, "", everything)]
  # Results are never pooled over the two statuses: with an unseen pair the task is another one.
  for wanted in STATUSES:
    cells = [dict(key) for key, s in status.items() if s == wanted]
    if cells:
      masks = {k: np.logical_or.reduce([schema.in_cell(columns, c) for c in cells]) for k, columns in sets.items()}
      groups.append(group(f"held-out ({wanted})", "held-out", {}, wanted, masks))
  for kind, cells in _cells_by_kind(schema):
    groups += [g for g in (of_cell(kind, cell) for cell in cells) if g is not None]
  return groups


def _cells_by_kind(schema: Schema) -> list[tuple[str, list[Cell]]]:
  """Marginals, pairs and full cells; with two attributes the pairs are the cells, with one there are only marginals."""
  names = schema.names
  kinds = [("attribute", [(name,) for name in names])]
  if len(names) > 2:
    kinds.append(("pair", list(itertools.combinations(names, 2))))
  if len(names) > 1:
    kinds.append(("cell", [names]))
  return [(kind, [c for combination in choice for c in schema.subset(combination).cells()]) for kind, choice in kinds]


def composition_gap(schema: Schema, real: Attributes, synthetic: Attributes) -> float:
  """Total variation distance between the two sets' shares of the full cells, in [0, 1]; unknowns are a level."""
  shares = []
  for columns in (real, synthetic):
    levels = np.stack([a.levels(columns[a.name]) for a in schema], axis=1)
    cells, counts = np.unique(levels, axis=0, return_counts=True)
    shares.append({tuple(cell): count / len(levels) for cell, count in zip(cells.tolist(), counts)})
  return sum(abs(shares[0].get(c, 0) - shares[1].get(c, 0)) for c in {*shares[0], *shares[1]}) / 2


def matched_sizes(groups: Sequence[Group]) -> dict[str, int]:
  """Per kind n* = two fifths of the smallest evaluable side, the size at which the groups of a kind are compared.

  A side is its synthetic images or its real patients, since a draw takes one image a patient. A subset as large as its
  set is the set, and the smallest group would show an interval of width zero; two fifths also leave room for two real
  draws without a common patient.
  """
  sizes: dict[str, int] = {}
  for group in groups:
    if not group.refusal:
      size = _matched_size(group.n_patients, len(group.synthetic))
      sizes[group.kind] = min(sizes.get(group.kind, size), size)
  return sizes


def _matched_size(n_patients: int, n_synthetic: int) -> int:
  return min(min(n_patients, n_synthetic) * 2 // 5, kid.LARGEST_SUBSET)


def fidelity(
  group: Group,
  groups: Sequence[Group],
  schema: Schema,
  real: np.ndarray,
  synthetic: np.ndarray,
  patients: np.ndarray,
  size: int,
  seed: int,
) -> dict[str, dict]:
  """KID and Fréchet distance of an evaluable group.

  Args:
    group, groups: the group, and all of them (for the parent of its null band).
    real, synthetic: standardised features of the whole sets, [N, d] and [M, d].
    patients: patient of each real image, [N]. Patients are the unit of every real draw.
    size: n* of `matched_sizes`.
    seed: every group uses the same stream, so neither names nor order of groups matter.

  Returns:
    `kid`: `value` (full-sample U-statistic) with `lo`, `hi`, the 2.5 % and 97.5 % quantiles over half-samples of both
    sides, centred on it (the delete-half jackknife: a half-sample varies about the full value as that varies about
    the truth; real halves are drawn patient by patient);
    `matched` {n, mean, lo, hi} at n*; `null` {n, group, mean, lo, hi} or {reason}: two draws of n* real images
    without a common patient; `excess` = matched mean - null mean; `share_inside_null`, of the draws of `matched` in the
    interval of `null`: about 0.95 where the two sets are alike.
    `fd`: value, n, m, d, rank_deficient, null_bias.
  """
  rng = np.random.default_rng(seed)
  x, y, units = real[group.real], synthetic[group.synthetic], patients[group.real]
  values = half_sample_kid(x, y, units, seed)
  matched = kid.kid_of_subsets(x, y, *patient_draws(rng, units, size, DRAWS), kid.draw(rng, len(y), size, DRAWS))
  scores = {
    "value": float(values[0]),
    **_interval(values[0] + values[1:] - values[1:].mean()),
    "matched": {"n": size, "mean": float(matched.mean()), **_interval(matched)},
    "null": _null_band(group, groups, schema, real, patients, size, rng),
  }
  if "mean" in scores["null"]:
    scores["excess"] = scores["matched"]["mean"] - scores["null"]["mean"]
    # Draw by draw: their mean varies less than the single draws that the interval is of.
    inside = (scores["null"]["lo"] <= matched) & (matched <= scores["null"]["hi"])
    scores["share_inside_null"] = float(inside.mean())
  return {"kid": scores, "fd": dataclasses.asdict(frechet_distance(x, y))}


def half_sample_kid(real: np.ndarray, synthetic: np.ndarray, patients: np.ndarray, seed: int) -> np.ndarray:
  """KID of features [N, d] and [M, d], then of `DRAWS` pairs of half-samples: [1 + DRAWS].

  Draws depend on `patients`, M and `seed` alone. Two synthetic sets whose rows correspond are drawn alike, so that the
  spread of their difference leaves out what both share: the real images, and the noise that rows start from.
  """
  rng = np.random.default_rng(seed)
  in_x = np.concatenate([np.ones([1, len(real)], bool), half_draws(rng, patients, DRAWS)])
  halves = kid.draw(rng, len(synthetic), len(synthetic) // 2, DRAWS)
  in_y = np.concatenate([np.ones([1, len(synthetic)], bool), halves])
  return kid.kid_of_subsets(real, synthetic, in_x, in_y)


def _interval(values: np.ndarray) -> dict[str, float]:
  low, high = np.quantile(values, [0.025, 0.975])
  return {"lo": float(low), "hi": float(high)}


def _null_band(
  group: Group,
  groups: Sequence[Group],
  schema: Schema,
  real: np.ndarray,
  patients: np.ndarray,
  size: int,
  rng: np.random.Generator,
) -> dict:
  """Real against real at n*, in the group or, where it is too small, in the nearest parent that is large enough."""
  for parent in _lineage(group, groups, schema):
    pair = patient_draws(rng, patients[parent.real], size, DRAWS, parts=2)
    if pair is not None:
      values = kid.kid_of_subsets(real[parent.real], real[parent.real], *pair)
      return {"n": size, "group": parent.name, "mean": float(values.mean()), **_interval(values)}
  return {"reason": f"fewer than 2 x {size} real patients"}


def _lineage(group: Group, groups: Sequence[Group], schema: Schema) -> list[Group]:
  """The group, then its parents: each time without the attribute that has most levels, at last "overall"."""
  by_name = {g.name: g for g in groups}
  line, cell = [group], dict(group.cell)
  while len(cell) > 1:
    del cell[max(cell, key=lambda name: schema[name].num_levels)]
    parent = by_name.get(schema.cell_name(cell))
    if parent is not None:
      line.append(parent)
  return line if group.kind == "overall" else [*line, by_name["overall"]]


def half_draws(rng: np.random.Generator, units: np.ndarray, count: int) -> np.ndarray:
  """Membership [count, N] of draws of exactly half the images, patient by patient (the last one may be cut)."""
  _, patient = np.unique(units, return_inverse=True)
  rank = rng.permuted(np.tile(np.arange(patient.max() + 1), (count, 1)), axis=1)[:, patient]
  order = np.argsort(rank + rng.random(rank.shape), axis=1)
  picks = np.zeros(order.shape, bool)
  np.put_along_axis(picks, order[:, : len(units) // 2], True, axis=1)
  return picks


def patient_draws(
  rng: np.random.Generator, units: np.ndarray, size: int, count: int, parts: int = 1
) -> list[np.ndarray] | None:
  """`parts` memberships [count, N] of `size` images each, no two images of one patient in all parts together.

  Images of one patient resemble each other. Were whole patients drawn, small draws would hold a larger share of such
  pairs than large ones, and the estimator would no longer be free of n. None when there are too few patients.
  """
  _, patient, members = np.unique(units, return_inverse=True, return_counts=True)
  if len(members) < size * parts:
    return None
  by_patient = np.argsort(patient, kind="stable")
  first = np.cumsum(members) - members
  chosen = by_patient[first + (rng.random((count, len(members))) * members).astype(np.int64)]
  chosen = rng.permuted(chosen, axis=1)
  picks = [np.zeros([count, len(units)], bool) for _ in range(parts)]
  for part, pick in enumerate(picks):
    np.put_along_axis(pick, chosen[:, part * size : (part + 1) * size], True, axis=1)
  return picks
