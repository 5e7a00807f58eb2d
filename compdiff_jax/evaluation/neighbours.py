"""The training image nearest to each synthetic image, and how near held-out real images come: a first copy check.

Distances are root mean square pixel differences of images reduced to at most 64 px, in [0, 1] units, in float32.
"""

from collections.abc import Mapping

import numpy as np

SIDE = 64
QUANTILES = (0.01, 0.05, 0.5)
LEAST_REAL = 100  # one hundredth of fewer held-out images is less than one image
_ROWS = 512
_PLANTED = 20
_NOISE = 2.0  # grey levels of 255


def as_vectors(images: np.ndarray, grey: bool) -> np.ndarray:
  """uint8 [N, S, S, 3] to float32 [N, P] whose Euclidean distance is the RMS difference.

  The conversion comes before any subtraction: uint8 differences wrap around.

  Args:
    images: the images.
    grey: compare the mean of the channels; for grey data, where a generator's faint colour cast is no difference.
  """
  vectors = images.astype(np.float32) / 255
  vectors = (vectors.mean(-1) if grey else vectors).reshape(len(images), -1)
  return vectors / np.float32(np.sqrt(vectors.shape[1]))


def is_grey(images: np.ndarray) -> bool:
  """Whether the three channels of every image are equal."""
  return bool((images[..., 0] == images[..., 1]).all() and (images[..., 1] == images[..., 2]).all())


def nearest_rows(queries: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Index and Euclidean distance of the nearest of `points` [M, P] for each of `queries` [N, P], blockwise."""
  index = np.empty(len(queries), np.int64)
  squares = np.einsum("np,np->n", points, points)
  for start in range(0, len(queries), _ROWS):
    block = queries[start : start + _ROWS]
    index[start : start + _ROWS] = np.argmin(squares - 2 * block @ points.T, axis=1)
  # |a|^2 + |b|^2 - 2ab loses all digits for near copies, which are what is looked for; the winner is measured directly.
  distance = np.concatenate(
    [
      np.linalg.norm(queries[i : i + _ROWS] - points[index[i : i + _ROWS]], axis=1)
      for i in range(0, len(queries), _ROWS)
    ]
  )
  return index, distance


def copy_check(
  synthetic: np.ndarray,
  real: np.ndarray,
  train: np.ndarray,
  groups: Mapping[str, np.ndarray],
  seed: int,
  pairs: int = 8,
) -> dict:
  """Distances to the training split, the most similar pairs, and the share of synthetic images nearer than real ones.

  Args:
    synthetic, real, train: uint8 [N, S, S, 3] at one size; `real` is the held-out real set.
    groups: rows of `synthetic` of each evaluable group.
    seed: of the noise on the planted copies.
    pairs: number of most similar pairs to list.

  Returns:
    `status`: "ok", "not evaluable (…)" or "void: …"; `threshold`: the distance under which 1 % of held-out real images
    fall; `below`: share of synthetic images under it per group; `real`: the same of held-out real images; `control`:
    the same of planted training copies with light noise, which must be 1 for the check to mean anything; quantiles of
    both sets, as far as they have the images; `pairs` [{synthetic, train, distance}] as row numbers. Without
    `LEAST_REAL` real images there is no threshold and no share, and a void check has no other figure than `control`.
  """
  grey = is_grey(train)
  rng = np.random.default_rng(seed)
  planted = train[rng.permutation(len(train))[:_PLANTED]]
  planted = np.clip(np.rint(planted + rng.normal(0, _NOISE, planted.shape)), 0, 255).astype(np.uint8)
  points = as_vectors(train, grey)
  index, distance = nearest_rows(as_vectors(synthetic, grey), points)
  real_distance = nearest_rows(as_vectors(real, grey), points)[1]
  order = np.lexsort((np.arange(len(distance)), distance))[:pairs]
  found = {
    "status": f"not evaluable (n={len(real)} held-out real images; their 1 % distance needs {LEAST_REAL})",
    "space": f"pixels, {train.shape[1]}x{train.shape[2]} px, {'grey' if grey else 'RGB'}, RMS difference in [0, 1]",
    "n_synthetic": len(synthetic),
    "n_real": len(real),
    "n_train": len(train),
    "quantiles": {"synthetic": _quantiles(distance), "real": _quantiles(real_distance)},
    "threshold": None,
    "below": {},
    "real": None,
    "control": None,
    "pairs": [{"synthetic": int(i), "train": int(index[i]), "distance": float(distance[i])} for i in order],
  }
  if len(real) < LEAST_REAL:
    return found
  threshold = float(np.quantile(real_distance, 0.01))
  control = _share(nearest_rows(as_vectors(planted, grey), points)[1] < threshold)
  if control["count"] < control["n"]:
    status = f"void: {control['count']} of {control['n']} planted copies of training images were found"
    return {**found, "status": status, "control": control, "quantiles": {"synthetic": {}, "real": {}}, "pairs": []}
  return {
    **found,
    "status": "ok",
    "threshold": threshold,
    "below": {name: _share(distance[rows] < threshold) for name, rows in groups.items()},
    "real": _share(real_distance < threshold),
    "control": control,
  }


def _quantiles(values: np.ndarray) -> dict[str, float]:
  """Those below which at least one of the images lies."""
  return {f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES if q * len(values) >= 1}


def _share(hits: np.ndarray) -> dict[str, float]:
  return {"value": float(hits.mean()), "count": int(hits.sum()), "n": len(hits)}
