"""The Gaussian process against SciPy's multivariate normal and brute force; its maximiser on a known optimum."""

import numpy as np
import pytest
from scipy import stats

from compdiff_jax.training import bandit


@pytest.fixture(scope="module")
def points():
  rng = np.random.default_rng(3)
  return rng.uniform(size=[9, 3]), rng.normal(size=9)


def _matern(a, b, length, signal):
  """Matern-5/2 one pair at a time."""
  k = np.empty([len(a), len(b)])
  for i in range(len(a)):
    for j in range(len(b)):
      r = np.sqrt(5) * np.linalg.norm((a[i] - b[j]) / length)
      k[i, j] = signal * (1 + r + r * r / 3) * np.exp(-r)
  return k


def test_likelihood_is_that_of_a_multivariate_normal_and_its_gradient_is_right(points):
  x, y = points
  theta = np.array([np.log(0.3), np.log(0.8), np.log(2.0), np.log(1.7), np.log(0.2), 0.4])
  value, gradient = bandit.log_marginal_likelihood(theta, x, y)
  covariance = _matern(x, x, np.exp(theta[:3]), 1.7) + 0.2 * np.eye(9)
  assert value == pytest.approx(stats.multivariate_normal([0.4] * 9, covariance).logpdf(y), rel=1e-10)
  for i, slope in enumerate(gradient):
    shift = 1e-5 * np.eye(6)[i]
    values = [bandit.log_marginal_likelihood(theta + sign * shift, x, y)[0] for sign in (-1, 1)]
    assert slope == pytest.approx((values[1] - values[0]) / 2e-5, rel=1e-5, abs=1e-8), i


def test_posterior_is_the_conditional_normal(points):
  """Of the process that `fit` found: mean and sd by inverting the joint covariance."""
  x, y = points
  process = bandit.fit(x, y)
  new = np.random.default_rng(4).uniform(size=[5, 3])
  noisy = process.factor @ process.factor.T
  inverse = np.linalg.inv(noisy)
  np.testing.assert_allclose(np.triu(noisy, 1), np.triu(_matern(x, x, process.length, process.signal), 1), atol=1e-10)
  cross = _matern(new, x, process.length, process.signal)
  scaled = (y - y.mean()) / y.std()
  mean, sd = process.posterior(new)
  np.testing.assert_allclose(mean, process.mean + cross @ inverse @ (scaled - process.mean), rtol=1e-7, atol=1e-9)
  variance = process.signal - np.diag(cross @ inverse @ cross.T)
  np.testing.assert_allclose(sd, np.sqrt(variance), rtol=1e-6)
  for point, m, s in zip(new, mean, sd):
    bound, gradient = process.upper_confidence_bound(point, 0.1)
    assert bound == pytest.approx(m + np.sqrt(0.1) * s, rel=1e-9)
    for i in range(3):
      shift = 1e-6 * np.eye(3)[i]
      up, down = (process.upper_confidence_bound(point + sign * shift, 0.1)[0] for sign in (1, -1))
      assert gradient[i] == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-6)


def test_fit_does_not_depend_on_scale_and_offset(points):
  x, y = points
  a, b = bandit.fit(x, y), bandit.fit(x, 5 - 0.001 * (5 - y))
  np.testing.assert_allclose(a.length, b.length, rtol=1e-5)


@pytest.mark.parametrize("optimum", [(0.2, 0.7), (1.0, 0.0)])
def test_search_closes_in_on_the_optimum(optimum):
  """Minus a noisy squared distance; the second optimum is a corner of the box."""
  rng = np.random.default_rng(0)
  x = rng.uniform(size=[40, 2])
  y = -np.sum((x - optimum) ** 2, axis=1) + 0.01 * rng.normal(size=40)
  found = bandit.maximise(bandit.fit(x, y), 0.1, rng, raw_samples=32)
  np.testing.assert_allclose(found, optimum, atol=0.08)


def test_equal_observations_can_be_fitted():
  x = np.random.default_rng(0).uniform(size=[6, 2])
  assert np.isfinite(bandit.fit(x, np.zeros(6)).posterior(x)).all()
