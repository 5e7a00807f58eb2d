"""Reads attributes of phantom radiographs off measurements of their pixels.

`measure` takes edges, profiles and contrasts from each image. On top of them `FactorReader` fits one small quadratic
function per attribute, on real training images only. Its figure on real test images belongs beside every figure on
generated ones.
"""

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.evaluation.phantom_measure import brightness, measure

__all__ = ["FactorReader", "measure"]

_BLUR = 0.7  # pixels at 64 x 64, and noise: what a small autoencoder does to an image
_NOISE = 4 / 255
_PENALTY = 1e-2  # of the ridge regression, a share of the number of rows
_COPIES = 2  # of each training image's measurements, at other attributes


def _expand(x: np.ndarray) -> np.ndarray:
  """x, its squares and pairwise products: [N, F] -> [N, F (F + 3) / 2]."""
  first, second = np.triu_indices(x.shape[1])
  return np.concatenate([x, x[:, first] * x[:, second]], axis=1)


class _Standardise:
  """Centres and scales columns; values outside the central 99 % of the training range are clipped to it."""

  def __init__(self, x: np.ndarray):
    self.low, self.high = np.percentile(x, [0.5, 99.5], axis=0)
    x = np.clip(x, self.low, self.high)
    self.mean, self.scale = x.mean(0), np.maximum(x.std(0), 1e-6)

  def __call__(self, x: np.ndarray) -> np.ndarray:
    return (np.clip(x, self.low, self.high) - self.mean) / self.scale


def _design(attributes: Mapping[str, np.ndarray], schema: Schema) -> np.ndarray:
  """Main effects and pairwise interactions of the attributes, [N, D]; an unseen triple needs no term of its own."""
  blocks = []
  for a in schema:
    values = np.asarray(attributes[a.name])
    if a.kind == "categorical":
      blocks.append(np.eye(len(a.values))[values.astype(np.int64)][:, 1:])
    else:
      t = (2 * values - a.low - a.high) / (a.high - a.low)
      blocks.append(np.stack([t, t * t, t**3], axis=1))
  products = [
    (first[:, :, None] * second[:, None, :]).reshape(len(first), -1)
    for i, first in enumerate(blocks)
    for second in blocks[i + 1 :]
  ]
  return np.concatenate([np.ones([len(blocks[0]), 1]), *blocks, *products], axis=1)


def _rebalance(
  raw: np.ndarray, attributes: Mapping[str, np.ndarray], schema: Schema, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Moves every measurement to attributes drawn evenly and independently.

  A reader fitted to the imbalanced images would learn which combinations are common, and would misread the rare and the
  held-out ones. So the part of the measurements that main effects and pairs of attributes explain is replaced by that
  of the new attributes; the rest (anatomy, findings, noise) stays. Returns measurements and the new attributes.
  """
  design = _design(attributes, schema)
  effects = np.linalg.solve(design.T @ design + 1e-2 * np.eye(design.shape[1]), design.T @ raw)
  even = {}
  for a in schema:
    if a.kind == "categorical":
      even[a.name] = rng.integers(len(a.values), size=len(raw))
    else:
      even[a.name] = rng.uniform(attributes[a.name].min(), attributes[a.name].max(), len(raw))
  return raw + (_design(even, schema) - design) @ effects, even


def _fit_ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Ridge regression of y [N, T] on x [N, F]; weights [F, T], intercepts [T]."""
  mean = x.mean(0)
  inner = x - mean
  gram = inner.T @ inner + _PENALTY * len(x) * np.eye(x.shape[1])
  weights = np.linalg.solve(gram, inner.T @ (y - y.mean(0)))
  return weights, y.mean(0) - mean @ weights


class FactorReader:
  """Reads attributes off phantom radiographs; a quadratic function of the measurements for each."""

  def fit(self, images: np.ndarray, attributes: Mapping[str, np.ndarray], schema: Schema) -> "FactorReader":
    """Fits on real training images. Half of the fit sees them blurred and noisy, so that soft images are read too.

    Args:
      images: as `measure` takes them, N of them.
      attributes: encoded values {name: [N]}; images with an unknown one are left out.
      schema: the attributes to read.
    """
    known = np.logical_and.reduce([np.asarray(a.is_known(np.asarray(attributes[a.name]))) for a in schema])
    if known.sum() < 2:
      raise InputError("fewer than two training images have all attributes known; there is nothing to fit")
    rng = np.random.default_rng(0)
    clear = brightness(images)[known]
    noise = _NOISE * rng.standard_normal(clear.shape, dtype=np.float32)
    soft = np.clip(ndimage.gaussian_filter(clear, [0, _BLUR, _BLUR]) + noise, 0, 1)
    given = {a.name: np.asarray(attributes[a.name])[known] for a in schema}
    measured = [measure(kind)[1] for kind in (clear, soft)]
    drawn = [_rebalance(x, given, schema, rng) for x in measured for _ in range(_COPIES)]
    raw = np.concatenate([x for x, _ in drawn])
    targets = {a.name: np.concatenate([even[a.name] for _, even in drawn]) for a in schema}
    self._schema = schema
    self._inner = _Standardise(raw)
    expanded = _expand(self._inner(raw))
    self._outer = _Standardise(expanded)
    columns = [
      np.eye(len(a.values))[targets[a.name]] if a.kind == "categorical" else targets[a.name][:, None] for a in schema
    ]
    self._weights, self._bias = _fit_ridge(self._outer(expanded), np.concatenate(columns, axis=1).astype(np.float64))
    return self

  def predict(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """Encoded attribute values {name: [N]}: the category of the highest score, or a number clipped to the range."""
    scores = self._outer(_expand(self._inner(measure(images)[1]))) @ self._weights + self._bias
    at, values = 0, {}
    for a in self._schema:
      width = len(a.values) if a.kind == "categorical" else 1
      own = scores[:, at : at + width]
      at += width
      values[a.name] = (own.argmax(1) if a.kind == "categorical" else np.clip(own[:, 0], a.low, a.high)).astype(a.dtype)
    return values
