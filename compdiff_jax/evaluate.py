"""`compdiff evaluate`: compares a synthetic image set with real images, overall, per group and per intersection.

Fidelity compares with the real test split, features are standardised by the training split, and the copy check asks
whether synthetic images lie nearer to training images than held-out real images do.
"""

import datetime
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compdiff_jax import __version__, cli
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.evaluation import alignment, features, groups, image_sets, kid, neighbours, page, report
from compdiff_jax.evaluation.image_sets import ImageSet

LARGEST_SIDE = 256
SMALLEST_SIDE = 16
MAX_IMAGES = 5000
TRAIN_SAMPLE = 2000  # training images that standardise features and fit the reader of attributes
MIN_N = 20
# Above this share of misplaced cell mass the overall number says as much about the plan as about the pictures.
_COMPOSITION_WARNING = 0.1


def main(argv: list[str]) -> None:
  parser = cli.parser("compdiff evaluate", __doc__.splitlines()[0])
  parser.add_argument("--real", type=Path, required=True, help="prepared data set (data_prep)")
  parser.add_argument("--synthetic", type=Path, required=True, help="directory with manifest.csv, or a data set")
  parser.add_argument("--out", type=Path, required=True, help="new or empty directory for the report")
  parser.add_argument("--real_split", default="test", help="split of --real to compare with")
  parser.add_argument("--train_split", default="train", help="split of --real that the model was trained on")
  parser.add_argument("--synthetic_split", default="test", help="split of --synthetic where it is a data set")
  parser.add_argument("--extractors", default="radiomics,random-conv", help="the first one ranks")
  parser.add_argument("--size", type=int, help=f"common image side; the synthetic one, at most {LARGEST_SIDE}")
  parser.add_argument("--max_images", type=int, default=MAX_IMAGES, help="larger sets are drawn from, by --seed")
  parser.add_argument("--min_n", type=int, default=MIN_N, help="smaller groups are not evaluable")
  parser.add_argument("--seed", type=int, default=0, help="of draws and of the pictures shown")
  parser.add_argument("--vae_reconstructions", type=Path, help="PNG written by compdiff train-vae, shown in the report")
  args = parser.parse_args(argv)
  if args.min_n < 4:
    raise cli.InputError(f"--min_n {args.min_n} must be at least 4")
  if args.max_images < args.min_n:
    raise cli.InputError(f"--max_images {args.max_images} must be at least --min_n ({args.min_n})")
  if args.size is not None and args.size < SMALLEST_SIDE:
    raise cli.InputError(f"--size {args.size} must be at least {SMALLEST_SIDE}")
  if args.seed < 0:
    raise cli.InputError(f"--seed {args.seed} must not be negative")
  if args.real_split == args.train_split:
    raise cli.InputError(f"--real_split and --train_split are both {args.real_split!r}; compare with unseen patients")
  names = [name for name in args.extractors.split(",") if name]
  if not names:
    raise cli.InputError("--extractors is empty; give at least radiomics")
  extractors = [features.extractor(name) for name in names]

  with cli.whole_directory(args.out) as directory:
    # ---- Image sets
    clock = _Clock()
    pictures = {}
    if (args.synthetic / "grid.png").exists():
      pictures["Every intersection, same text and same noise"] = page.read_picture(args.synthetic / "grid.png")
    if args.vae_reconstructions:
      heading = "Autoencoder: originals above, reconstructions below"
      pictures[heading] = page.read_picture(args.vae_reconstructions)
    schema = image_sets.open_records(args.real).schema
    size = args.size or min(LARGEST_SIDE, image_sets.square_size(args.synthetic, args.synthetic_split))
    if size < SMALLEST_SIDE:
      raise cli.InputError(f"{args.synthetic}: images of {size} px are too small; {SMALLEST_SIDE} px are needed")
    draw = {"size": size, "limit": args.max_images, "seed": args.seed}
    synthetic = image_sets.load(args.synthetic, args.synthetic_split, schema=schema, **draw)
    real = image_sets.load(args.real, args.real_split, **draw)
    train = image_sets.load(args.real, args.train_split, size=size, reduce_to=neighbours.SIDE)
    if size > neighbours.SIDE:
      sample = image_sets.load(args.real, args.train_split, size=size, limit=TRAIN_SAMPLE, seed=args.seed)
    else:
      sample = train.take(image_sets.drawn(train.keys, TRAIN_SAMPLE, args.seed))
    clock.lap("read images")

    # ---- Measures
    results = evaluate_sets(
      real,
      synthetic,
      train,
      sample,
      extractors=extractors,
      reader=alignment.reader_for(real.name),
      min_n=args.min_n,
      seed=args.seed,
      clock=clock,
    )
    extra = image_sets.unlisted(args.synthetic)
    if extra:
      results["warnings"].append(f"{len(extra)} image files are not in the manifest and were not read: {extra[0]} …")

    # ---- Report
    results["run"] = _run_block(argv, clock)
    results = report.write(
      directory,
      results,
      real=real,
      synthetic=synthetic,
      train=train,
      pictures=pictures,
    )
  print(report.printed_table(results))
  for failure in results["failures"]:
    print(f"compdiff evaluate: {failure['block']} failed: {failure['reason']}", file=sys.stderr)
  print(f"report: {args.out / 'report.html'}")


def evaluate_sets(
  real: ImageSet,
  synthetic: ImageSet,
  train: ImageSet,
  sample: ImageSet,
  *,
  extractors: Sequence[features.Extractor],
  reader: alignment.Reader | None = None,
  min_n: int = MIN_N,
  seed: int = 0,
  clock: "_Clock | None" = None,
) -> dict[str, Any]:
  """All blocks of the report but `run`, as plain data; a pure function of the sets, the options and the seed.

  Args:
    real: held-out real images; synthetic: the images to judge; both at one size.
    train: the whole training split, reduced to at most `neighbours.SIDE` px, for the copy check.
    sample: training images at the common size: standardise the features, fit `reader`.
    extractors: the first one ranks.
    reader: measures attributes in images; without one the alignment block is absent, with a reason.
    min_n: smaller groups are not evaluable.
    seed: seed of all draws.
    clock: times the sections.
  """
  clock = clock or _Clock()
  warnings, failures = [], []

  def attempt(block: str, compute: Callable[[], Any]) -> Any:
    """A block that fails is listed as failed; the others stand."""
    try:
      return compute()
    except (ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
      failures.append({"block": block, "reason": f"{type(error).__name__}: {error}"})
      return None
    finally:
      clock.lap(block)

  schema = _common_schema(real, synthetic, warnings)
  held_out = _held_out_cells(real, schema, train, warnings)
  members = groups.make_groups(
    schema, held_out, real.attributes, synthetic.attributes, train.attributes, real.patients, min_n
  )
  sizes = groups.matched_sizes(members)
  gap = groups.composition_gap(schema, real.attributes, synthetic.attributes)
  if gap > _COMPOSITION_WARNING:
    warnings.append(
      f"the two sets are composed differently ({gap:.0%} of the cell shares differ): the overall distances mix that"
      " with image quality; read the groups"
    )
  for kind, images in (("real", real), ("synthetic", synthetic)):
    if images.total > len(images):
      warnings.append(f"{kind}: {len(images)} of {images.total} images were drawn (--max_images)")

  # ---- Fidelity
  rows = [_group_row(group) for group in members]
  fidelity: dict[str, dict] = {}
  described = []
  for extractor in extractors:
    name, label = extractor.name, extractor.label
    standardised = attempt(f"features {name}", lambda e=extractor: _standardised(e, sample, real, synthetic, warnings))
    if standardised is None:
      continue
    x, y, description = standardised
    described.append(description)
    scores = attempt(f"fidelity {name}", lambda x=x, y=y: _fidelity(members, schema, x, y, real.patients, sizes, seed))
    for row, own in zip(rows, scores or []):
      if own is not None:
        row["fidelity"][label] = own
    overall = rows[0]["fidelity"].get(label)
    if overall is not None:
      fidelity[label] = {"kid": {**overall["kid"], "subsets": _subsets(x, y, seed)}, "fd": overall["fd"]}
  if any(f["fd"]["rank_deficient"] for row in rows for f in row["fidelity"].values()):
    warnings.append("some Fréchet distances are rank deficient (marked): fewer images than features; KID ranks")

  # ---- Alignment and copies
  aligned = {"status": "absent", "reason": alignment.ABSENT}
  if reader is not None:
    aligned = attempt("alignment", lambda: _alignment(reader, schema, members, real, synthetic, sample, min_n))
    aligned = aligned or {"status": "failed", "reason": failures[-1]["reason"]}
  copies = attempt("neighbours", lambda: _copies(real, synthetic, train, members, seed))
  if copies and copies["status"] != "ok":
    warnings.append(f"copy check: {copies['status']}")
  unevaluable = [row["group"] for row in rows if row["refusal"]]
  return {
    "schema": {"name": "compdiff-evaluation", "version": 1},
    "inputs": {
      "preprocessing": image_sets.PREPROCESSING.format(size=real.images.shape[1]),
      "real": _describe(real),
      "synthetic": {**_describe(synthetic), "sampling": dict(synthetic.sampling)},
      "train": {**_describe(train), "sample": len(sample)},
      "attributes": schema.to_json(),
      "held_out": [schema.cell_name(cell) for cell in held_out],
      "composition_gap": gap,
      "min_n": min_n,
      "seed": seed,
    },
    "extractors": described,
    "fidelity": fidelity,
    "groups": rows,
    "matched_sizes": sizes,
    "alignment": aligned,
    "neighbours": copies,
    "refused": unevaluable,
    "warnings": warnings,
    "failures": failures,
  }


class _Clock:
  """Seconds per section; repeated laps of one name add up."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last = time.perf_counter()

  def lap(self, name: str) -> None:
    now = time.perf_counter()
    self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
    self._last = now


def _common_schema(real: ImageSet, synthetic: ImageSet, warnings: list[str]) -> Schema:
  """The attributes both sets have; one name with two definitions is an error."""
  shared = []
  for attribute in real.schema.grouping:
    if attribute.name not in synthetic.schema.names:
      warnings.append(f"the synthetic set has no attribute {attribute.name!r}: no groups by it")
    elif synthetic.schema[attribute.name] != attribute:
      raise cli.InputError(
        f"attribute {attribute.name!r} is defined differently in the real set {real.name} and the synthetic set"
        f" {synthetic.name}; compare their schema.json"
      )
    else:
      shared.append(attribute.name)
  if not shared:
    raise cli.InputError(f"the sets {real.name} and {synthetic.name} share no attribute; compare their schema.json")
  return real.schema.subset(shared)


def _held_out_cells(real: ImageSet, schema: Schema, train: ImageSet, warnings: list[str]) -> list[dict[str, int]]:
  """The data set's held-out cells that can be told apart here and that training really lacks."""
  cells = []
  for text in real.held_out:
    cell = real.schema.parse_cell(text)
    if not set(cell) <= set(schema.names):
      warnings.append(f"held-out cell {text} needs an attribute that the synthetic set lacks; it is not marked")
    elif schema.in_cell(train.attributes, cell).any():
      count = int(schema.in_cell(train.attributes, cell).sum())
      warnings.append(f"cell {text} is listed as held out but training holds {count} images of it; it is not marked")
    else:
      cells.append(cell)
  return cells


def _group_row(group: groups.Group) -> dict[str, Any]:
  return {
    "group": group.name,
    "kind": group.kind,
    "held_out": group.held_out,
    "n_real": len(group.real),
    "n_patients": group.n_patients,
    "n_synthetic": len(group.synthetic),
    "n_train": group.n_train,
    "refusal": group.refusal,
    "fidelity": {},
  }


def _standardised(
  extractor: features.Extractor, sample: ImageSet, real: ImageSet, synthetic: ImageSet, warnings: list[str]
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
  """z-scored features of both sets, and what the report says about the extractor."""
  standardise = features.Standardisation.fit(extractor.extract(sample.images))
  raw = extractor.extract(real.images), extractor.extract(synthetic.images)
  dropped = int((~standardise.kept).sum())
  moved = standardise.moved(raw[1])
  if moved:
    warnings.append(f"{extractor.name}: {moved} features are constant in training but vary here; they go unmeasured")
  return *(standardise(features_) for features_ in raw), {
    "name": extractor.name,
    "label": extractor.label,
    "sha256": extractor.sha256,
    "dimension": int(standardise.kept.sum()),
    "dropped_constant": dropped,
    "standardised_by": (
      f"mean and sd of {standardise.n} images of {sample.name} {sample.split}, limited at {features.LIMIT:g} sd"
    ),
    "note": extractor.note,
  }


def _fidelity(
  members: Sequence[groups.Group],
  schema: Schema,
  x: np.ndarray,
  y: np.ndarray,
  patients: np.ndarray,
  sizes: Mapping[str, int],
  seed: int,
) -> list[dict[str, Any] | None]:
  """The scores of every group; None for one that is not evaluable."""
  return [
    None if group.refusal else groups.fidelity(group, members, schema, x, y, patients, sizes[group.kind], seed)
    for group in members
  ]


def _subsets(x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, Any]:
  """KID in its published form: mean and standard deviation over subsets."""
  size = kid.default_subset_size(len(x), len(y))
  mean, sd = kid.subset_kid(x, y, size, np.random.default_rng(seed))
  return {"size": size, "count": kid.SUBSETS, "mean": mean, "sd": sd}


def _alignment(
  reader: alignment.Reader,
  schema: Schema,
  members: Sequence[groups.Group],
  real: ImageSet,
  synthetic: ImageSet,
  sample: ImageSet,
  min_n: int,
) -> dict[str, Any]:
  reader.fit(sample.images, sample.attributes, schema)
  predicted, predicted_real = reader.predict(synthetic.images), reader.predict(real.images)
  found = alignment.fidelity(schema, members, synthetic.attributes, predicted, real.attributes, predicted_real, min_n)
  return {"status": "ok", "reader": f"{type(reader).__name__} fitted on {len(sample)} real training images", **found}


def _copies(
  real: ImageSet, synthetic: ImageSet, train: ImageSet, members: Sequence[groups.Group], seed: int
) -> dict[str, Any]:
  """The copy check at the training images' (reduced) size; pairs are named by key."""
  side = train.images.shape[1]
  small = [np.stack([image_sets.reduced(image, side) for image in s.images]) for s in (synthetic, real)]
  wanted = {g.name: g.synthetic for g in members if not g.refusal}
  found = neighbours.copy_check(*small, train.images, wanted, seed)
  for pair in found["pairs"]:
    pair.update(synthetic=str(synthetic.keys[pair["synthetic"]]), train=str(train.keys[pair["train"]]))
  return found


def _describe(images: ImageSet) -> dict[str, Any]:
  return {
    "name": images.name,
    "split": images.split,
    "images": len(images),
    "total": images.total,
    "patients": len(np.unique(images.patients)) if images.split else None,
    "files": dict(images.source_sizes),
    "content_sha256": images.content,
    "unknown": {a.name: int((~a.is_known(images.attributes[a.name])).sum()) for a in images.schema.grouping},
  }


def _run_block(argv: Sequence[str], clock: _Clock) -> dict[str, Any]:
  """What differs between two runs on the same inputs; kept apart so that the rest can be compared byte by byte."""
  packages = {name: importlib.metadata.version(name) for name in ("jax", "numpy", "scipy", "pillow")}
  return {
    "command": f"compdiff evaluate {' '.join(argv)}",
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "versions": {"compdiff_jax": __version__, "python": platform.python_version(), **packages},
    "seconds": {name: round(seconds, 2) for name, seconds in clock.seconds.items()},
  }
