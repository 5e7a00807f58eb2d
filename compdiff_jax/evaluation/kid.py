"""Kernel Inception Distance's estimator: unbiased squared MMD with the cubic kernel (Binkowski et al. 2018, section 4).

Its expectation is 0 for equal distributions at every sample size, so negative values are legal and never clipped.
"""

import numpy as np

SUBSETS = 100
LARGEST_SUBSET = 1000
_BLOCK = 1024


def polynomial_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """k(a, b) = (a.b / d + 1)^3 for rows [N, d] and [M, d]: float64 [N, M]."""
  return _cube(a @ b.T / a.shape[1] + 1)


def _cube(values: np.ndarray) -> np.ndarray:
  return values * values * values  # NumPy's ** 3 calls pow and is twenty times slower


def kid(real: np.ndarray, synthetic: np.ndarray) -> float:
  """The full-sample U-statistic: mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j)."""
  return float(kid_of_subsets(real, synthetic, np.ones([1, len(real)]), np.ones([1, len(synthetic)]))[0])


def kid_of_subsets(x: np.ndarray, y: np.ndarray, in_x: np.ndarray, in_y: np.ndarray) -> np.ndarray:
  """The U-statistic of R pairs of subsets at once.

  Args:
    x, y: features [N, d], [M, d].
    in_x, in_y: membership (0 or 1) of each row in each subset, [R, N] and [R, M]; at least two members each.

  Returns:
    float64 [R]. The kernel is evaluated once for all subsets, in blocks of rows.
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  in_x, in_y = np.asarray(in_x, np.float64), np.asarray(in_y, np.float64)
  sizes = in_x.sum(1), in_y.sum(1)
  if min(sizes[0].min(), sizes[1].min()) < 2:
    raise ValueError("KID needs at least two images a set")
  return (
    _within(x, in_x) / (sizes[0] * (sizes[0] - 1))
    + _within(y, in_y) / (sizes[1] * (sizes[1] - 1))
    - 2 * _between(x, y, in_x, in_y) / (sizes[0] * sizes[1])
  )


def subset_kid(
  real: np.ndarray, synthetic: np.ndarray, subset_size: int, rng: np.random.Generator
) -> tuple[float, float]:
  """Mean and standard deviation over 100 random subsets of `subset_size` images a side, the form KID is published in.

  `subset_size` must be smaller than both sets: at equality every subset is the same one and the deviation a fiction.
  """
  if subset_size >= min(len(real), len(synthetic)):
    raise ValueError(f"KID subset size {subset_size} must be smaller than both sets ({len(real)}, {len(synthetic)})")
  picks = [draw(rng, size, subset_size, SUBSETS) for size in (len(real), len(synthetic))]
  values = kid_of_subsets(real, synthetic, *picks)
  return float(values.mean()), float(values.std(ddof=1))


def default_subset_size(n: int, m: int) -> int:
  """min(1000, half the smaller set)."""
  return min(LARGEST_SUBSET, min(n, m) // 2)


def draw(rng: np.random.Generator, total: int, size: int, count: int) -> np.ndarray:
  """`count` subsets of `size` out of `total` without replacement, as membership [count, total]."""
  order = rng.permuted(np.tile(np.arange(total), (count, 1)), axis=1)
  picks = np.zeros([count, total], bool)
  np.put_along_axis(picks, order[:, :size], True, axis=1)
  return picks


def _within(x: np.ndarray, w: np.ndarray) -> np.ndarray:
  """sum_{i != j} w_i w_j k(x_i, x_j) for each row of w."""
  diagonal = _cube(np.einsum("nd,nd->n", x, x) / x.shape[1] + 1)
  return _between(x, x, w, w) - (w * w) @ diagonal


def _between(x: np.ndarray, y: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
  total = np.zeros(len(v))
  for start in range(0, len(x), _BLOCK):
    rows = slice(start, start + _BLOCK)
    total += np.einsum("rn,nr->r", v[:, rows], polynomial_kernel(x[rows], y) @ w.T)
  return total
