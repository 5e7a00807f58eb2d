"""FairDiffusion: weights, gap and search against brute force; resuming. On many devices: test_step."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import config_arguments

from compdiff_jax import default_config, train
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.metrics import read_metrics
from compdiff_jax.training import bandit, speed
from compdiff_jax.training.fairness import FairState, make_fairness
from compdiff_jax.training.step import sample_keys
from compdiff_jax.workdir import open_run

_SCHEMA = Schema(
  (
    Attribute("age", "continuous", low=0, high=100, bins=(40, 60), unit="year"),
    Attribute("sex", "categorical", values=("male", "female")),
  )
)
# Levels of age: 0, 1, 2, 1, unknown, 2; of sex: 0, 1, 1, unknown, 0, 0.
_ATTRIBUTES = {
  "age": np.array([39.5, 40, 60, 59, np.nan, 99], np.float32),
  "sex": np.array([0, 1, 1, -1, 0, 0], np.int32),
}
_LEVELS = ([0, 1, 2, 1, None, 2], [0, 1, 1, None, 0, 0])


def _fairness(variant="compdiff", **fields):
  config = default_config.base()
  config.fairness.update(variant=variant, **fields)
  return make_fairness(config, _SCHEMA)


def _weights(fairness, sigma):
  """The weights, and sigma times the draws of each sample's attributes, by loops."""
  keys = sample_keys(7, jnp.int32(3), 6)["fairness"]
  found = np.asarray(fairness.weights(jnp.asarray(sigma), fairness.groups(_ATTRIBUTES), keys))
  wanted = []
  for i in range(6):
    draws = np.asarray(jax.random.normal(keys[i], [2]))
    weight = 1.0
    for attribute, start in ((0, 0), (1, 3)):
      level = _LEVELS[attribute][i]
      if level is not None:
        weight += sigma[start + level] * draws[attribute]
    wanted.append(weight)
  return found, np.array(wanted)


def test_weights():
  sigma = np.array([0.1, 0.9, 0.5, 1.0, 0.7], np.float32) * 3  # wide enough for negative weights
  found, wanted = _weights(_fairness("published"), sigma)
  assert wanted.min() < 0
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  found, _ = _weights(_fairness("compdiff", min_weight=0.3), sigma)
  np.testing.assert_allclose(found, np.maximum(wanted, 0.3), rtol=1e-5)


def test_losses_are_normalised_as_each_variant_says():
  rng = np.random.default_rng(0)
  losses, errors, weights = rng.uniform(size=6), rng.uniform(size=6), rng.uniform(-1, 3, size=6)
  for variant, wanted in (("published", np.mean(weights * losses)), ("compdiff", weights @ losses / weights.sum())):
    fairness = _fairness(variant)
    terms = fairness.terms(losses, errors, weights, np.asarray(fairness.groups(_ATTRIBUTES)))
    values, weight = terms["diffusion"]
    assert np.sum(values * weight) / np.sum(weight) == pytest.approx(wanted)
    values, weight = terms["group_age_40-60"]
    assert np.sum(values * weight) / np.sum(weight) == pytest.approx((errors[1] + errors[3]) / 2)
    assert [int(v) for v in np.asarray(terms["group_sex_male"][1])] == [1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
  ("counts", "published", "compdiff"),
  [
    ([2, 1, 4, 3, 3], 5.0 + 2.0, 5.0 + 2.0),
    ([2, 0, 4, 3, 3], 2.0, 3.0 + 2.0),  # the largest mean is that of the absent group
    ([2, 0, 0, 3, 3], 2.0, 2.0),  # one group is no gap
    ([0, 0, 5, 0, 4], 0.0, 0.0),
    ([0, 0, 0, 0, 0], 0.0, 0.0),
  ],
)
def test_gap_with_absent_groups(counts, published, compdiff):
  means = jnp.array([1.0, 6.0, 4.0, 8.0, 6.0])
  for variant, wanted in (("published", published), ("compdiff", compdiff)):
    assert float(_fairness(variant).gap(means, jnp.array(counts))) == wanted


def test_sigma_explores_and_the_history_grows():
  fairness = _fairness(window=4, exploitation=0.75, sigma_init=0.5)
  state = fairness.create()
  means, counts = jnp.array([1.0, 2.0, 3.0, 1.0, 1.5]), jnp.ones(5)
  for step in range(5):
    before = np.asarray(state.sigma)
    assert fairness.due(step) == (step == 4)
    state, metrics = fairness.advance(state, means, counts, 0, jnp.int32(step))
    assert float(metrics["fair_loss_gap"]) == 2.5 and float(metrics["fair_sigma_update"]) == (step == 4)
    assert float(metrics["fair_sigma_mean"]) == pytest.approx(before.mean())
    assert float(metrics["fair_sigma_std"]) == pytest.approx(before.std(), abs=1e-7)
    np.testing.assert_array_equal(state.sigmas[step], before)
    drawn = (np.asarray(state.sigma) - 0.75 * before) / 0.25
    assert (drawn > -1e-6).all() and (drawn < 1 + 1e-6).all() and np.ptp(drawn) > 0.05
  assert int(state.count) == 5


def _history(fairness, optimum):
  rng = np.random.default_rng(1)
  sigmas = rng.uniform(size=[31, 5]).astype(np.float32)
  gaps = 0.1 * np.sum((sigmas[:, :2] - optimum) ** 2, axis=1).astype(np.float32)
  return FairState(jnp.full([5], 0.3), jnp.asarray(sigmas), jnp.asarray(gaps), jnp.int32(31))


def test_search_moves_sigma_to_the_small_gap_and_clears_the_history():
  fairness = _fairness(exploitation=1.0)  # no exploration on top
  state = _history(fairness, (0.2, 0.8))
  found = fairness.search(state, 0, 30)
  np.testing.assert_allclose(found.sigma[:2], (0.2, 0.8), atol=0.1)
  assert int(found.count) == 0 and not np.any(found.gaps) and not np.any(found.sigmas)
  again = fairness.search(state, 0, 30)
  np.testing.assert_array_equal(found.sigma, again.sigma)


def test_sigma_goes_on_when_no_process_can_be_fitted(monkeypatch):
  fairness = _fairness()
  state = _history(fairness, (0.2, 0.8))
  bad = fairness.search(state._replace(gaps=state.gaps.at[3].set(jnp.nan)), 0, 30)
  np.testing.assert_array_equal(bad.sigma, state.sigma)

  def singular(*_):
    raise np.linalg.LinAlgError("not positive definite")

  monkeypatch.setattr(bandit, "fit", singular)
  bad = fairness.search(state, 0, 30)
  np.testing.assert_array_equal(bad.sigma, state.sigma)
  assert int(bad.count) == 0


def test_attributes_choose_the_groups():
  fairness = _fairness(attributes=("sex",))
  assert fairness.group_names == ("group_sex_male", "group_sex_female")
  assert _fairness(variant="") is None


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"variant": "publishd"}, "did you mean 'published'"),
    ({"attributes": ("race",)}, "no attribute 'race'"),
  ],
)
def test_bad_values_are_named(fields, words):
  with pytest.raises(InputError, match=words):
    _fairness(**{"variant": "compdiff", **fields})


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(workspace, tmp_path):
  """The checkpoint at step 4 lies inside a window; the search of step 5 needs what was recorded before it."""
  whole, resumed = tmp_path / "whole", tmp_path / "resumed"
  arguments = [
    *config_arguments(workspace),
    "--config.train.steps=8",
    "--config.logging.keep_checkpoints=9",
    "--config.fairness.variant=published",
    "--config.fairness.window=5",
  ]
  train.main([*arguments, f"--workdir={whole}"])
  shutil.copytree(whole, resumed)
  shutil.rmtree(resumed / "checkpoints" / "8")
  train.main([*arguments, f"--workdir={resumed}"])
  rows = [
    [{k: v for k, v in row.items() if k not in speed.FIELDS} for row in read_metrics(w)] for w in (whole, resumed)
  ]
  assert rows[0] == rows[1] and len(rows[0]) == 4
  assert rows[0][-1].keys() >= {"fair_sigma_mean", "fair_sigma_std", "fair_sigma_update", "fair_loss_gap"}
  ours, theirs = (open_run(workdir).load_params("raw")[1] for workdir in (whole, resumed))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
