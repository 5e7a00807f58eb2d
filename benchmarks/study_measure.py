"""What the study measures of one run: distances and attribute fidelity, over all seen cells, per group and per cell.

Beside what is measured on samples stand the denoising losses of real images (`study_loss`), by cell.

The measures are those of `compdiff evaluate`. Seen and held-out cells are never pooled. Real images are compared as the
autoencoder that all methods share reproduces them: the distance is then that of the diffusion models, which is what
methods differ in, and not the noise of the detector, which no autoencoder passes on.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.linear_reader import LinearReader
from compdiff_jax.cli import write_whole
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.evaluation import alignment, features, groups, image_sets
from compdiff_jax.evaluation.image_sets import ImageSet
from compdiff_jax.interop.weights import load_component, read_config
from compdiff_jax.models.functional import Functional
from compdiff_jax.models.vae import AutoencoderKL, VAEConfig, denormalize_pixels, normalize_pixels

EXTRACTOR = "radiomics"
LOSSES = "losses.npy"  # of a run: those of `study_loss`
_TRAIN_SAMPLE = 2000  # training images that standardise features and fit the reader of attributes


def finished(run: Path) -> bool:
  """Whether a run has all its images, and its losses."""
  job, manifest = run / "samples" / "job.json", run / "samples" / "manifest.csv"
  if not (job.exists() and manifest.exists() and (run / LOSSES).exists()):
    return False
  return len(manifest.read_text().splitlines()) == 1 + json.loads(job.read_text())["rows"]


class Yardstick:
  """Everything that is the same for every run: real features, the reader of attributes and what it reads off them."""

  def __init__(self, out: Path, reference: Path, min_n: int):
    self.min_n = min_n
    self.real = image_sets.load(reference, "test")
    train = image_sets.load(out / "data", "train")
    sample = train.take(image_sets.drawn(train.keys, _TRAIN_SAMPLE, 0))
    self.schema: Schema = self.real.schema
    self.train = train.attributes
    self.held_out = [self.schema.parse_cell(text) for text in train.held_out]
    self._extract = features.extractor(EXTRACTOR).extract
    reproduce = reproduction(out / "vae")
    self._standardise = features.Standardisation.fit(self._extract(reproduce(sample.images)))
    reproduced = reproduce(self.real.images)
    self._real = self._standardise(self._extract(reproduced))
    self._reader = alignment.reader_for(self.real.name) or LinearReader()
    self._reader.fit(sample.images, sample.attributes, self.schema)
    self._read_real = self._reader.predict(reproduced)

  def shares(self) -> dict[str, float]:
    """The share of training images in each cell."""
    total = len(next(iter(self.train.values())))
    return {self.schema.cell_name(c): self.schema.in_cell(self.train, c).sum() / total for c in self.schema.cells()}

  def measure(self, synthetic: ImageSet, losses: np.ndarray) -> dict[str, dict[str, Any]]:
    """{group: measures} for a set that copies the reference's texts and attributes row by row.

    `losses` [N] are those of the real images themselves.
    """
    found = self._standardise(self._extract(synthetic.images))
    read = self._reader.predict(synthetic.images)
    held = [self.schema.in_cell(self.real.attributes, cell) for cell in self.held_out]
    held = np.logical_or.reduce(held) if held else np.zeros(len(self.real), bool)
    rows: dict[str, dict[str, Any]] = {}
    for own, cells in ((~held, []), (held, self.held_out)):
      if own.any():
        rows |= self._measure_part(own, cells, synthetic, found, read, losses[own])
    return rows

  def _measure_part(
    self, own: np.ndarray, held_out: list, synthetic: ImageSet, found: np.ndarray, read: Mapping, losses: np.ndarray
  ) -> dict[str, Any]:
    """The seen or the held-out cells. `own` selects their rows, the same in both sets."""
    recorded, requested = _rows(self.real.attributes, own), _rows(synthetic.attributes, own)
    patients = self.real.patients[own]
    members = groups.make_groups(self.schema, held_out, recorded, requested, self.train, patients, self.min_n)
    sizes = groups.matched_sizes(members)
    aligned = alignment.fidelity(
      self.schema, members, requested, _rows(read, own), recorded, _rows(self._read_real, own), self.min_n
    )
    # Marginals of the held-out cells are those cells once more, differently sorted.
    kinds = ("held-out", "cell") if held_out else ("overall", "attribute", "cell")
    rows = {}
    for group, measured in zip(members, aligned["groups"]):
      if group.kind in kinds and not group.refusal:
        x, y = self._real[own], found[own]
        scores = groups.fidelity(group, members, self.schema, x, y, patients, sizes[group.kind], seed=0)
        rows[group.name] = {"kind": group.kind, "n": len(group.real), **scores, "fidelity": measured["measures"]}
        if group.kind == "cell":  # for differences between methods, on the same draws
          halves = groups.half_sample_kid(x[group.real], y[group.synthetic], patients[group.real], seed=0)[1:]
          rows[group.name]["kid"]["halves"] = halves.round(5).tolist()
          rows[group.name]["losses"] = losses[group.real].round(6).tolist()
    return rows


def reproduction(directory: Path) -> Callable[[np.ndarray], np.ndarray]:
  """uint8 images [N, S, S, 3] as the autoencoder of `directory` reproduces them."""
  config = VAEConfig.from_dict(read_config(directory, "AutoencoderKL"))
  vae = Functional(lambda rngs: AutoencoderKL(config, dtype=jnp.float32, rngs=rngs))
  params = load_component(directory, vae)

  @jax.jit
  def pass_through(batch):
    moments = vae(params, normalize_pixels(batch), method="encode")
    return denormalize_pixels(vae(params, jnp.split(moments, 2, axis=-1)[0], method="decode"))

  return lambda images: features.in_batches(pass_through, images).astype(np.uint8)


def _rows(columns: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
  return {name: np.asarray(values)[mask] for name, values in columns.items()}


def measure_all(out: Path, reference: Path, methods: Sequence[str], seeds: Sequence[int], min_n: int) -> dict[str, Any]:
  """Measures every run that has no result yet.

  Returns {"runs": {method: {seed: {group: measures}}}, "shares": {cell: share of training}, "held_out": cells,
  "schema", "real": the images compared with}.
  """
  yardstick = Yardstick(out, reference, min_n)
  order = np.argsort(_plan_keys(out))  # image i of a run copies the reference's record of plan row i
  runs: dict[str, dict[int, Any]] = {method: {} for method in methods}
  (out / "results").mkdir(exist_ok=True)
  for method in methods:
    for seed in seeds:
      path = out / "results" / f"{method}-{seed}.json"
      if not path.exists():
        run = out / "runs" / f"{method}-{seed}"
        synthetic, losses = image_sets.load(run / "samples"), np.load(run / LOSSES)
        write_whole(path, json.dumps(yardstick.measure(synthetic.take(order), losses[order]), indent=1))
      runs[method][seed] = json.loads(path.read_text())
  held_out = [yardstick.schema.cell_name(cell) for cell in yardstick.held_out]
  return {
    "runs": runs,
    "shares": yardstick.shares(),
    "held_out": held_out,
    "schema": yardstick.schema,
    "real": yardstick.real,
  }


def _plan_keys(out: Path) -> np.ndarray:
  """The reference's key of each row of the plan, which copied them in order."""
  with open(out / "plan.csv", newline="") as file:
    return np.array([line["id"] for line in csv.DictReader(file)])
