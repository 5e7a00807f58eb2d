"""Reads attributes off real pictures: ridge regression on their thumbnails, fitted on real training images.

Nothing makes such a reader right by construction. So its figure on real test images of other patients stands beside
every figure on generated ones, and an attribute that it does not read clearly above chance is void.
"""

from collections.abc import Mapping

import numpy as np

from compdiff_jax.conditioning.schema import Schema

_SIDE = 16  # pixels of a thumbnail
_LIMIT = 3.0  # standard deviations
_PENALTY = 0.1


class LinearReader:
  """`alignment.Reader` for any schema: one ridge regression a level, every level weighing alike."""

  def fit(self, images: np.ndarray, attributes: Mapping[str, np.ndarray], schema: Schema) -> "LinearReader":
    """Fits on uint8 images [N, H, W, 3] with encoded attributes {name: [N]}; unknown values are left out."""
    thumbnails = _thumbnails(images)
    self._mean, self._sd = thumbnails.mean(0), np.maximum(thumbnails.std(0), 1e-6)
    self._schema, self._rows, self._weights = schema, self._features(images), {}
    for a in schema:
      levels = a.levels(np.asarray(attributes[a.name]))
      known = levels >= 0
      counts = np.bincount(levels[known], minlength=a.num_levels)
      cost = np.diag(_PENALTY * counts[levels[known]] / counts[levels[known]].mean())
      kernel = self._rows[known] @ self._rows[known].T
      self._weights[a.name] = known, np.linalg.solve(kernel + cost, np.eye(a.num_levels)[levels[known]] - 0.5)
    return self

  def predict(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """Encoded values {name: [N]}: the level of the highest score, for a number the middle of its bin."""
    features, values = self._features(images), {}
    for a in self._schema:
      known, weights = self._weights[a.name]
      level = (features @ self._rows[known].T @ weights).argmax(1)
      if a.kind == "continuous":
        edges = np.array([a.low, *a.bins, a.high])
        level = ((edges[1:] + edges[:-1]) / 2)[level]
      values[a.name] = level.astype(a.dtype)
    return values

  def _features(self, images: np.ndarray) -> np.ndarray:
    scores = np.clip((_thumbnails(images) - self._mean) / self._sd, -_LIMIT, _LIMIT) / np.sqrt(len(self._mean))
    return np.concatenate([scores, np.full([len(scores), 1], 0.3)], axis=1)


def _thumbnails(images: np.ndarray) -> np.ndarray:
  """Block means, [N, 16 * 16 * 3]."""
  n, height, width, _ = images.shape
  blocks = images.astype(np.float64).reshape(n, _SIDE, height // _SIDE, _SIDE, width // _SIDE, 3)
  return blocks.mean((2, 4)).reshape(n, -1)
