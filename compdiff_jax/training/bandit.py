"""The search of FairDiffusion: a Gaussian process over few points in a small box, and its upper confidence bound.

Matern-5/2 kernel with one length scale a dimension, constant mean, observations scaled to unit variance. It has the
form of BoTorch's `SingleTaskGP` (a Gamma(3, 6) prior on length scales); float64 on the host, with SciPy's optimiser.
"""

import dataclasses

import numpy as np
from scipy import linalg, optimize

_ROOT5 = np.sqrt(5.0)
_LENGTH_PRIOR = (3.0, 6.0)  # shape and rate of the Gamma prior of the length scales
# Bounds of log length scale, log signal variance and log noise variance (observations have variance 1).
_BOUNDS = {"length": (np.log(0.02), np.log(20.0)), "signal": (np.log(1e-3), np.log(1e3)), "noise": (np.log(1e-4), 3.0)}
_RESTARTS = 5  # climbs of one search


@dataclasses.dataclass(frozen=True)
class GaussianProcess:
  """A fitted process.

  Attributes:
    x: observed points [N, D]; alpha: K^-1 (y - mean) [N]; factor: lower Cholesky factor of K + noise [N, N].
    length: length scales [D]; signal: variance of the function; mean: constant mean.
  """

  x: np.ndarray
  alpha: np.ndarray
  factor: np.ndarray
  length: np.ndarray
  signal: float
  mean: float

  def posterior(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the function at [M, D] (Rasmussen & Williams 2006, equations 2.25 and 2.26)."""
    k = matern(points, self.x, self.length, self.signal)
    solved = linalg.solve_triangular(self.factor, k.T, lower=True)
    variance = self.signal - np.sum(solved**2, axis=0)
    return self.mean + k @ self.alpha, np.sqrt(np.maximum(variance, 1e-12))

  def upper_confidence_bound(self, point: np.ndarray, beta: float) -> tuple[float, np.ndarray]:
    """mean + sqrt(beta) sd at one point [D], and its gradient [D]."""
    k = matern(point[None], self.x, self.length, self.signal)[0]
    difference = (point - self.x) / self.length  # [N, D]
    r = np.sqrt(np.sum(difference**2, axis=1))
    slope = -self.signal * 5 / 3 * (1 + _ROOT5 * r) * np.exp(-_ROOT5 * r)
    dk = slope[:, None] * difference / self.length  # [N, D]
    solved = linalg.cho_solve((self.factor, True), k)
    sd = np.sqrt(max(self.signal - k @ solved, 1e-12))
    return self.mean + k @ self.alpha + np.sqrt(beta) * sd, dk.T @ (self.alpha - np.sqrt(beta) * solved / sd)


def matern(a: np.ndarray, b: np.ndarray, length: np.ndarray, signal: float) -> np.ndarray:
  """signal (1 + sqrt5 r + 5/3 r^2) exp(-sqrt5 r), r = |(a - b) / length|: [M, D], [N, D] -> [M, N] (R & W, 4.17)."""
  r = np.sqrt(np.sum(((a[:, None] - b) / length) ** 2, axis=-1))
  return signal * (1 + _ROOT5 * r + 5 / 3 * r**2) * np.exp(-_ROOT5 * r)


def log_marginal_likelihood(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
  """log N(y; mean, K + noise) and its gradient with respect to theta (R & W, equations 2.30 and 5.9).

  Args:
    theta: D log length scales, log signal variance, log noise variance, mean: [D + 3].
    x: points [N, D]; y: observations [N].
  """
  length, signal, noise, mean = _unpack(theta)
  n = len(y)
  scaled = (x[:, None] - x) / length  # [N, N, D]
  r = np.sqrt(np.sum(scaled**2, axis=-1))
  decay = np.exp(-_ROOT5 * r)
  kernel = signal * (1 + _ROOT5 * r + 5 / 3 * r**2) * decay
  factor = linalg.cholesky(kernel + noise * np.eye(n), lower=True)
  alpha = linalg.cho_solve((factor, True), y - mean)
  value = -0.5 * (y - mean) @ alpha - np.log(np.diag(factor)).sum() - 0.5 * n * np.log(2 * np.pi)
  outer = np.outer(alpha, alpha) - linalg.cho_solve((factor, True), np.eye(n))
  by_length = 0.5 * np.einsum("ij,ijd->d", outer * signal * 5 / 3 * (1 + _ROOT5 * r) * decay, scaled**2)
  by_signal, by_noise = 0.5 * np.sum(outer * kernel), 0.5 * noise * np.trace(outer)
  return float(value), np.array([*by_length, by_signal, by_noise, alpha.sum()])


def _unpack(theta: np.ndarray) -> tuple[np.ndarray, float, float, float]:
  return np.exp(theta[:-3]), float(np.exp(theta[-3])), float(np.exp(theta[-2])), float(theta[-1])


def fit(x: np.ndarray, y: np.ndarray) -> GaussianProcess:
  """The process at the maximum of likelihood times prior, for observations `y` [N] at points `x` [N, D].

  Its mean and standard deviation are those of (y - mean(y)) / sd(y), which has its maximum at the same place.

  Raises:
    numpy.linalg.LinAlgError: no covariance could be factorised.
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  y = (y - y.mean()) / (y.std() or 1.0)
  dimensions = x.shape[1]
  shape, rate = _LENGTH_PRIOR

  def negative(theta):
    value, gradient = log_marginal_likelihood(theta, x, y)
    logs, length = theta[:dimensions], np.exp(theta[:dimensions])
    gradient[:dimensions] += shape - 1 - rate * length
    return -(value + np.sum((shape - 1) * logs - rate * length)), -gradient

  start = np.array([np.log(0.5)] * dimensions + [0.0, np.log(0.1), 0.0])
  bounds = [_BOUNDS["length"]] * dimensions + [_BOUNDS["signal"], _BOUNDS["noise"], (-3.0, 3.0)]
  theta = optimize.minimize(negative, start, jac=True, method="L-BFGS-B", bounds=bounds).x
  length, signal, noise, mean = _unpack(theta)
  factor = linalg.cholesky(matern(x, x, length, signal) + noise * np.eye(len(x)), lower=True)
  return GaussianProcess(x, linalg.cho_solve((factor, True), y - mean), factor, length, signal, mean)


def maximise(process: GaussianProcess, beta: float, rng: np.random.Generator, *, raw_samples: int) -> np.ndarray:
  """The point [D] of the unit box with the highest bound: the best of the climbs from the best draws."""
  points = rng.uniform(size=[raw_samples, process.x.shape[1]])
  mean, sd = process.posterior(points)
  starts = points[np.argsort(-(mean + np.sqrt(beta) * sd))[:_RESTARTS]]
  box = [(0.0, 1.0)] * points.shape[1]

  def negative(point):
    value, gradient = process.upper_confidence_bound(point, beta)
    return -value, -gradient

  climbs = [optimize.minimize(negative, start, jac=True, method="L-BFGS-B", bounds=box) for start in starts]
  return min(climbs, key=lambda climb: climb.fun).x
