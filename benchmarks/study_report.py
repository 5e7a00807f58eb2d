"""The study's tables and pictures, from the measures of its runs.

Each figure is the mean over seeds, with the standard deviation between them. Intervals are 95 % and hold both kinds of
uncertainty: between seeds, and of the images of one run (the delete-half jackknife of each run). The real images are
the same for all runs, so the second kind does not shrink with more seeds. A few seeds tell their own variance badly, so
the quantile is Student's, with the degrees of freedom of Welch and Satterthwaite.
"""

import csv
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image
from scipy import stats

from benchmarks.tables import machine, table
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.evaluation.image_sets import ImageSet

matplotlib.use("Agg")
from matplotlib import pyplot

LABELS = {
  "baseline": "text baseline",
  "fairdiffusion": "FairDiffusion",
  "flat": "FLAT",
  "hcn": "HCN v1",
  "compdiff": "CompDiff",
  "coind": "CoInD",
  "additive": "additive",
}


class Figure(NamedTuple):
  """A figure of one method: mean and standard deviation over seeds, and a 95 % interval."""

  mean: float
  sd: float
  lo: float
  hi: float

  @classmethod
  def of(cls, values: Sequence[float], own_sds: Sequence[float] = ()) -> "Figure":
    """From one value a seed, and the standard error that each has from its images."""
    seeds = len(values)
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1)) if seeds > 1 else math.nan
    between = sd**2 / seeds if seeds > 1 else 0.0
    variance = between + (float(np.mean(np.square(own_sds))) if len(own_sds) else 0.0)
    freedom = (seeds - 1) * (variance / between) ** 2 if between else math.inf  # the images' part counts as known
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return cls(mean, sd, mean - half, mean + half)

  def __str__(self) -> str:
    return f"{_short(self.mean)} ± {_short(self.sd)}" if self.sd == self.sd else _short(self.mean)

  def interval(self) -> str:
    return f"{_short(self.mean)} ({_short(self.lo)} to {_short(self.hi)})"


def _short(value: float) -> str:
  return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


class Study:
  """The measures, as figures by method."""

  def __init__(self, results: Mapping[str, Any]):
    self.runs = results["runs"]
    self.shares = results["shares"]
    self.held_out = results["held_out"]
    self.schema: Schema = results["schema"]

  def figure(self, method: str, value: Callable[[Mapping], float], se: Callable[[Mapping], float] | None = None):
    runs = list(self.runs[method].values())
    return Figure.of([value(run) for run in runs], [se(run) for run in runs] if se else ())

  def distance(self, method: str, group: str) -> Figure:
    return self.figure(method, lambda run: _kid(run, group), lambda run: _kid_error(run, group))

  def mean_distance(self, method: str, cells: Sequence[str], weights: Sequence[float] | None = None) -> Figure:
    """(Weighted) mean over cells; errors of different cells are independent: they share no image."""
    w = np.ones(len(cells)) / len(cells) if weights is None else np.asarray(weights) / np.sum(weights)

    def mean(run):
      return float(w @ [_kid(run, cell) for cell in cells])

    def error(run):
      return float(np.sqrt(w**2 @ np.square([_kid_error(run, cell) for cell in cells])))

    return self.figure(method, mean, error)

  def difference(self, method: str, other: str, cells: Sequence[str]) -> Figure:
    """Mean over cells of the method's KID less the other's, seed by seed and on the same draws of images."""

    def one(ours, theirs):
      return float(np.mean([_kid(ours, cell) - _kid(theirs, cell) for cell in cells]))

    def error(ours, theirs):
      halves = [np.subtract(ours[cell]["kid"]["halves"], theirs[cell]["kid"]["halves"]) for cell in cells]
      return float(np.sqrt(np.sum(np.var(halves, axis=1, ddof=1)))) / len(cells)

    pairs = [(self.runs[method][seed], self.runs[other][seed]) for seed in self.runs[method]]
    return Figure.of([one(*pair) for pair in pairs], [error(*pair) for pair in pairs])

  def loss(self, method: str, cells: Sequence[str]) -> Figure:
    """Mean over cells of the denoising loss of their real images."""
    return self.figure(method, lambda run: _mean_loss(run, cells)[0], lambda run: _mean_loss(run, cells)[1])

  def loss_difference(self, method: str, other: str, cells: Sequence[str]) -> Figure:
    """How much higher the method's loss is than the other's, in per cent, seed by seed on the same images and noise."""
    values, errors = [], []
    for seed, ours in self.runs[method].items():
      theirs = self.runs[other][seed]
      scale = 100 / _mean_loss(theirs, cells)[0]
      gaps = {cell: {"losses": np.subtract(ours[cell]["losses"], theirs[cell]["losses"])} for cell in cells}
      value, error = _mean_loss(gaps, cells)
      values.append(scale * value)
      errors.append(scale * error)
    return Figure.of(values, errors)

  def equity_scaled(self, method: str, attribute: str) -> str:
    """D + sum over the attribute's levels of |D_level - D|; the KID is unbiased, whatever the size of a level.

    Without one of the levels it would flatter, so then it is not evaluable.
    """
    levels = [self.schema.cell_name({attribute: level}) for level in range(self.schema[attribute].num_levels)]
    missing = [level for level in levels if any(level not in run for run in self.runs[method].values())]
    if missing:
      return f"not evaluable ({', '.join(missing)})"

    def scaled(run):
      whole = _kid(run, "overall")
      return whole + sum(abs(_kid(run, level) - whole) for level in levels)

    return str(self.figure(method, scaled))

  def fidelity(self, method: str, group: str, measure: str, side: str = "synthetic") -> str:
    """Accuracy or error read off the images; "void" where the reader fails on real ones."""
    if any(group not in run for run in self.runs[method].values()):
      return "not evaluable"
    values = [run[group]["fidelity"][measure][side] for run in self.runs[method].values()]
    refusals = {value["refusal"] for value in values if "refusal" in value}
    return refusals.pop() if refusals else str(Figure.of([value["value"] for value in values]))

  @property
  def seen(self) -> list[str]:
    """Seen cells, the most common first."""
    run = next(iter(next(iter(self.runs.values())).values()))
    cells = [group for group in run if run[group]["kind"] == "cell" and group not in self.held_out]
    return sorted(cells, key=lambda cell: -self.shares[cell])


def _kid(run: Mapping, group: str) -> float:
  return run[group]["kid"]["value"]


def _kid_error(run: Mapping, group: str) -> float:
  return (run[group]["kid"]["hi"] - run[group]["kid"]["lo"]) / 3.92


def _mean_loss(run: Mapping, cells: Sequence[str]) -> tuple[float, float]:
  """Mean over cells, and its standard error from the images."""
  each = [run[cell]["losses"] for cell in cells]
  errors = [np.std(values, ddof=1) / math.sqrt(len(values)) for values in each]
  return float(np.mean([np.mean(values) for values in each])), float(np.linalg.norm(errors)) / len(cells)


# ---- Tables


def write(
  out: Path, results: Mapping[str, Any], methods: Sequence[str], budget: Any, title: str, seconds: float
) -> None:
  """Writes tables.md, table1.csv to table5.csv, distance_by_share.png, held_out.png and grid.png."""
  study = Study(results)
  held = [cell for cell in study.held_out if all(cell in run for runs in study.runs.values() for run in runs.values())]
  tables = {
    "table1": ("Overall, all seen cells alike", _overall(study, methods)),
    "table2": ("Seen cells by share of training: KID", _by_cell(study, methods)),
    "table3": ("Held-out cells: KID, 95 % interval", _held_out(study, methods, held)),
    "table4": ("Attributes read off the images, seen and held-out cells", _attributes(study, methods)),
    "table5": ("Denoising loss of the real images under their own text and attributes", _losses(study, methods, held)),
  }
  real = results["real"].images
  parts = [
    f"# {title}",
    f"{machine('jax', 'flax')} Budget {dataclasses.asdict(budget)}. The last call took {seconds / 60:.1f} min.",
    "KID on radiomics features, unbiased, so that cells of different size compare, to real images as the autoencoder"
    " that all methods share reproduces them; 95 % intervals in brackets (Student). Mean ± standard deviation over"
    f" {len(budget.seeds)} seeds. Toy scale: compared with {len(real)} real images of {real.shape[1]} pixels.",
  ]
  for name, (title, (header, rows)) in tables.items():
    parts.append(f"## {title}\n\n{table(header, rows)}")
    with open(out / f"{name}.csv", "w", newline="") as file:
      csv.writer(file, lineterminator="\n").writerows([header, *rows])
  parts += [f"## Margins\n\n{line}" for line in [_margins(study, methods, held)] if line]
  (out / "tables.md").write_text("\n\n".join(parts) + "\n")
  _plot_shares(out / "distance_by_share.png", study, methods)
  if held:
    _plot_held_out(out / "held_out.png", study, methods, held)
  _grid(out, results["real"], study, methods, budget.seeds[0])


Table = tuple[list[str], list[list[str]]]


def _overall(study: Study, methods: Sequence[str]) -> Table:
  names = study.schema.names
  equity = [f"pooled KID, equity-scaled by {name}" for name in names]
  header = ["method", "KID, mean over cells", "the same by share of training", "pooled KID", *equity, "pooled FD"]
  shares = [study.shares[cell] for cell in study.seen]
  rows = []
  for method in methods:
    scaled = [study.equity_scaled(method, name) for name in names]
    by_share = study.mean_distance(method, study.seen, shares)
    distance = study.figure(method, lambda run: run["overall"]["fd"]["value"])
    cells, pooled = study.mean_distance(method, study.seen), study.distance(method, "overall")
    rows.append([LABELS[method], cells.interval(), str(by_share), str(pooled), *scaled, str(distance)])
  null = next(iter(study.runs[methods[0]].values()))["overall"]["kid"]["null"]
  if "mean" in null:
    real = f"{_short(null['mean'])} ({_short(null['lo'])} to {_short(null['hi'])}, n={null['n']})"
    rows.append(["real against real", "", "", real, *[""] * (len(header) - 4)])
  return header, rows


def _by_cell(study: Study, methods: Sequence[str]) -> Table:
  header = ["cell", "share", *(LABELS[method] for method in methods)]
  rows = [
    [cell, f"{study.shares[cell]:.1%}", *(str(study.distance(method, cell)) for method in methods)]
    for cell in study.seen
  ]
  return header, rows


def _held_out(study: Study, methods: Sequence[str], held: Sequence[str]) -> Table:
  rows = [[cell, *(study.distance(method, cell).interval() for method in methods)] for cell in held]
  if held:
    rows.append(["mean over cells", *(study.mean_distance(method, held).interval() for method in methods)])
  return ["cell", *(LABELS[method] for method in methods)], rows


def _attributes(study: Study, methods: Sequence[str]) -> Table:
  groups = ("overall", "held-out (pair-seen)")
  of_kind = {"categorical": "accuracy", "continuous": "mean absolute error"}
  measures = [*(f"{a.name} {of_kind[a.kind]}" for a in study.schema), "all attributes"]
  header = ["images of", *(f"{name}, {part}" for part in ("seen", "held out") for name in measures)]

  def cells(method: str, side: str) -> list[str]:
    return [study.fidelity(method, group, measure, side) for group in groups for measure in measures]

  rows = [[LABELS[method], *cells(method, "synthetic")] for method in methods]
  real = [cell.split(" ± ")[0] for cell in cells(methods[0], "real")]  # the same for every seed
  return header, [*rows, ["real images, through the autoencoder", *real]]


def _losses(study: Study, methods: Sequence[str], held: Sequence[str]) -> Table:
  """Mean over cells, and beside the first method the difference in per cent; all with 95 % intervals."""
  parts = {"seen": study.seen, "held out": held} if held else {"seen": study.seen}
  other = methods[0]
  header = ["method", *(f"{part}, {what}" for part in parts for what in ("loss", f"% above {LABELS[other]}"))]
  rows = []
  for method in methods:
    own = [LABELS[method]]
    for cells in parts.values():
      difference = "" if method == other else study.loss_difference(method, other, cells).interval()
      own += [study.loss(method, cells).interval(), difference]
    rows.append(own)
  return header, rows


def _margins(study: Study, methods: Sequence[str], held: Sequence[str]) -> str:
  """CompDiff against the two baselines, as shares of their distance, and whether the intervals are disjoint."""
  lines = []
  for other in ("baseline", "fairdiffusion"):
    if not {"compdiff", other} <= set(methods):
      continue
    for where, cells in (("seen cells", study.seen), ("held-out cells", held)):
      if cells:
        ours, theirs = (study.mean_distance(method, cells) for method in ("compdiff", other))
        disjoint = "disjoint" if ours.hi < theirs.lo or theirs.hi < ours.lo else "overlapping"
        change = (theirs.mean - ours.mean) / theirs.mean
        lines.append(
          f"- CompDiff against {LABELS[other]}, {where}: {ours.interval()} against {theirs.interval()},"
          f" {abs(change):.0%} {'lower' if change > 0 else 'higher'}; intervals {disjoint}."
          f" Difference on the same images: {study.difference('compdiff', other, cells).interval()}."
        )
  return "\n".join(lines)


# ---- Pictures


def _colour(method: str) -> Any:
  return pyplot.get_cmap("tab10")(list(LABELS).index(method))


def _plot_shares(path: Path, study: Study, methods: Sequence[str]) -> None:
  figure, axes = pyplot.subplots(figsize=(7, 4.5))
  shares = [100 * study.shares[cell] for cell in study.seen]
  for method in methods:
    values = [study.distance(method, cell).mean for cell in study.seen]
    axes.scatter(shares, values, s=14, color=_colour(method), alpha=0.6, label=LABELS[method])
    if len(set(shares)) > 1:  # through one share goes no line
      slope, start = np.polyfit(np.log(shares), values, 1)
      axes.plot(shares, start + slope * np.log(shares), color=_colour(method))
  axes.set_yscale("symlog", linthresh=1)  # an unbiased KID may be negative
  axes.set(xscale="log", xlabel="share of training images in the cell (%)", ylabel="KID to real images of the cell")
  axes.legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=130, bbox_inches="tight")
  pyplot.close(figure)


def _plot_held_out(path: Path, study: Study, methods: Sequence[str], held: Sequence[str]) -> None:
  figure, axes = pyplot.subplots(figsize=(4 + 1.1 * len(held), 4.5))
  width = 0.8 / len(methods)
  for i, method in enumerate(methods):
    bars = [*(study.distance(method, cell) for cell in held), study.mean_distance(method, held)]
    places = np.arange(len(bars)) + (i - (len(methods) - 1) / 2) * width
    errors = [[bar.mean - bar.lo for bar in bars], [bar.hi - bar.mean for bar in bars]]
    axes.bar(places, [bar.mean for bar in bars], width, yerr=errors, color=_colour(method), label=LABELS[method],
             error_kw={"linewidth": 1})  # fmt: skip
  axes.set_xticks(np.arange(len(held) + 1), [*(cell.replace(",", "\n") for cell in held), "mean"], fontsize=8)
  axes.set(ylabel="KID to real images of the cell (95 % interval)")
  axes.legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=130, bbox_inches="tight")
  pyplot.close(figure)


def _grid(out: Path, real: ImageSet, study: Study, methods: Sequence[str], seed: int) -> None:
  """Rows: real, then each method; columns: the first test image of each held-out and of the two commonest cells."""
  with open(out / "plan.csv", newline="") as file:
    rows_of_key = {line["id"]: row for row, line in enumerate(csv.DictReader(file))}
  cells = [*study.held_out, *study.seen[:2]]
  first = [int(np.flatnonzero(real.schema.in_cell(real.attributes, real.schema.parse_cell(c)))[0]) for c in cells]
  rows = [[Image.fromarray(real.images[i]) for i in first]]
  for method in methods:
    folder = out / "runs" / f"{method}-{seed}" / "samples"
    rows.append([Image.open(folder / f"{rows_of_key[real.keys[i]]:06d}.png").convert("RGB") for i in first])
  figure, axes = pyplot.subplots(len(rows), len(cells), figsize=(1.3 * len(cells), 1.3 * len(rows)), squeeze=False)
  titles = [f"{cell}\n({'held out' if cell in study.held_out else 'seen'})" for cell in cells]
  for i, (label, pictures) in enumerate(zip(["real", *(LABELS[m] for m in methods)], rows)):
    for j, picture in enumerate(pictures):
      axes[i, j].imshow(picture, interpolation="nearest")
      axes[i, j].set(xticks=[], yticks=[])
      if i == 0:
        axes[i, j].set_title(titles[j].replace(",", "\n"), fontsize=6)
    axes[i, 0].set_ylabel(label, fontsize=6)
  figure.savefig(out / "grid.png", dpi=130, bbox_inches="tight")
  pyplot.close(figure)
