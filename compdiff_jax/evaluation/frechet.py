"""Fréchet distance between two feature sets, in float64, without a matrix square root of a product."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Frechet:
  """A Fréchet distance with what is needed to judge it.

  Attributes:
    value: squared Fréchet distance of the two fitted Gaussians.
    n, m: rows of the real and of the synthetic set; d: feature dimension.
    rank_deficient: min(n, m) - 1 < d, so that at least one covariance is singular and `value` is mostly bias.
    null_bias: first-order expectation of `value` when both sets come from the real distribution (`null_bias`).
  """

  value: float
  n: int
  m: int
  d: int
  rank_deficient: bool
  null_bias: float


def frechet_distance(real: np.ndarray, synthetic: np.ndarray) -> Frechet:
  """|mu_x - mu_y|^2 + tr Sx + tr Sy - 2 tr((Sx Sy)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017, equation 6).

  Args:
    real: [N, d] features; synthetic: [M, d]. Covariances use N - 1 and M - 1.
  """
  real, synthetic = np.asarray(real, np.float64), np.asarray(synthetic, np.float64)
  (n, d), m = real.shape, len(synthetic)
  if min(n, m) < 2:
    raise ValueError(f"the Fréchet distance needs at least two images a set, got {n} and {m}")
  cross = cross_trace_eigen if min(n, m) >= d else cross_trace_singular
  shift = real.mean(0) - synthetic.mean(0)
  spread = real.var(0, ddof=1).sum() + synthetic.var(0, ddof=1).sum()
  value = shift @ shift + spread - 2 * cross(real, synthetic)
  return Frechet(float(value), n, m, d, min(n, m) - 1 < d, null_bias(real, n, m))


def cross_trace_eigen(x: np.ndarray, y: np.ndarray) -> float:
  """tr((Sx Sy)^(1/2)) as the sum of root eigenvalues of Sx^(1/2) Sy Sx^(1/2), which is symmetric; d x d work."""
  values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(x, rowvar=False)))
  root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
  product = root @ np.atleast_2d(np.cov(y, rowvar=False)) @ root
  return float(np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum())


def cross_trace_singular(x: np.ndarray, y: np.ndarray) -> float:
  """The same as the sum of singular values of X~ Y~^T (N x M), X~ the centred rows over sqrt(N - 1); any rank."""
  x = (x - x.mean(0)) / np.sqrt(len(x) - 1)
  y = (y - y.mean(0)) / np.sqrt(len(y) - 1)
  return float(np.linalg.svd(x @ y.T, compute_uv=False).sum())


def null_bias(real: np.ndarray, n: int, m: int) -> float:
  """First-order bias of the distance between n and m rows of one Gaussian with the covariance of `real`.

  (1/n + 1/m) [sum_i l_i + 1/2 sum_ij l_i l_j (1 + delta_ij) / (l_i + l_j)] with eigenvalues l. Accurate for
  n, m >= 2d, an over-estimate below.
  """
  centred = (real - real.mean(0)) / np.sqrt(len(real) - 1)
  # The Gram matrix has the covariance's non-zero eigenvalues; the smaller of the two is decomposed.
  product = centred @ centred.T if len(real) < real.shape[1] else centred.T @ centred
  values = np.linalg.eigvalsh(product)
  values = values[values > 1e-12 * values.max()]
  pairs = values[:, None] * values / (values[:, None] + values)
  return float((1 / n + 1 / m) * (values.sum() + (pairs.sum() + np.trace(pairs)) / 2))
