"""FLAT and the absent conditioner against the method written in torch, and exact parameter counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as torch_functional
from conditioner_parity import (
  BATCHES,
  CHEST,
  SEX,
  block,
  block_keys,
  build,
  check_gradients_reach_everything,
  count,
  embed,
  linear,
  linear_keys,
  norm,
  torch_state,
  wide_params,
)

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.flat import FlatConfig
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.losses import loss_terms
from compdiff_jax.conditioning.none import NoConditionerConfig
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.default_config import base
from compdiff_jax.training.step import loss_coefficients

SMALL = {"d_node": 16, "d_ctx": 24, "aux_hidden_dim": 12}
NAMES = ("age", "sex", "race")


def reference(state: dict, levels: dict, mode: str, heads: str) -> tuple[torch.Tensor, dict]:
  """Tokens [B, T, c] and logits {name: [B, K]}."""
  e = {name: embed(state, name, levels[name]) for name in NAMES}
  if mode == "single":
    hidden = torch_functional.gelu(norm(state, "fusion.1", linear(state, "fusion.0", torch.cat(list(e.values()), 1))))
    tokens = dict.fromkeys(NAMES, linear(state, "fusion.3", hidden))
  else:
    tokens = {name: linear(state, f"proj_{name}", e[name]) for name in NAMES}
  layer = linear if heads == "shallow" else block
  logits = {name: layer(state, f"cls_{name}", tokens[name]) for name in NAMES}
  return torch.stack(list(tokens.values()), 1)[:, : 1 if mode == "single" else 3], logits


@pytest.mark.parametrize(
  ("mode", "heads", "tensors", "parameters"),
  [
    ("single", "shallow", 15, 934_155),
    ("single", "deep", 27, 2_509_067),
    ("separate", "shallow", 15, 803_595),
    ("separate", "deep", 27, 2_378_507),
  ],
)
def test_reference_parameters_at_full_size(mode, heads, tensors, parameters):
  model = build(FlatConfig(mode=mode, heads=heads, unconditional="zeros"))
  assert count(model) == parameters and len(model.shapes) == tensors
  keys = {f"emb_{name}.embedding" for name in NAMES}
  keys |= linear_keys("fusion.0", "fusion.3") if mode == "single" else linear_keys(*(f"proj_{name}" for name in NAMES))
  keys |= {"fusion.1.scale", "fusion.1.bias"} if mode == "single" else set()
  classifiers = [f"cls_{name}" for name in NAMES]
  keys |= linear_keys(*classifiers) if heads == "shallow" else block_keys(*classifiers)
  assert set(model.shapes) == keys
  with_nulls = set(build(FlatConfig(mode=mode, heads=heads)).shapes)
  assert with_nulls - keys == {f"null_{name}" for name in NAMES}


@pytest.mark.parametrize("mode", ["single", "separate"])
@pytest.mark.parametrize("heads", ["shallow", "deep"])
def test_equals_the_method_with_wide_weights(mode, heads):
  model = build(FlatConfig(**SMALL, mode=mode, heads=heads))
  params, run = wide_params(model), jax.jit(model)
  for batch, levels in BATCHES.values():
    output = run(params, batch)
    tokens, logits = reference(torch_state(params), levels, mode, heads)
    np.testing.assert_allclose(output.tokens, tokens, atol=5e-4, rtol=5e-5)
    terms = loss_terms(output)
    for name in NAMES:
      np.testing.assert_allclose(output.logits[name], logits[name], atol=1e-3, rtol=5e-5)
      values, weight = terms[f"aux_{name}"]
      wanted = torch_functional.cross_entropy(logits[name], torch.tensor(levels[name]), ignore_index=-1)
      assert float(jnp.sum(values * weight) / jnp.sum(weight)) == pytest.approx(float(wanted), rel=1e-4)
  # The three cross-entropies share the weight equally; there is no latent and no composition.
  assert set(terms) == {"context_norm", *(f"{kind}_{name}" for kind in ("aux", "acc") for name in NAMES)}
  coefficients = loss_coefficients(base().loss, FlatConfig().loss_weights, jnp.int32(9), list(terms))
  assert coefficients == pytest.approx({f"aux_{name}": 1 / 3 for name in NAMES})


def test_initial_distributions():
  params = build(FlatConfig(heads="deep")).init(jax.random.key(0))
  for name in ("fusion.0.kernel", "fusion.3.kernel", "cls_age.1.kernel", "cls_race.4.kernel", "emb_age.embedding"):
    assert float(params[name].std()) == pytest.approx(0.02, rel=0.1), name
  for name in ("fusion.0.bias", "fusion.3.bias", "cls_age.1.bias", "cls_race.4.bias"):
    assert not np.any(params[name]), name


def test_without_nulls_an_unknown_value_makes_zero_tokens_and_no_loss():
  model = build(FlatConfig(**SMALL, mode="separate", unconditional="zeros"))
  output = jax.jit(model)(wide_params(model), BATCHES["partly unknown"][0])
  known = [False, False, False, False, True, True, False]
  np.testing.assert_array_equal(np.any(np.asarray(output.tokens) != 0, axis=(1, 2)), known)
  for name, (_, weight) in loss_terms(output).items():
    np.testing.assert_array_equal(weight, np.float32(known), err_msg=name)


def test_gradients_and_draws():
  model = build(FlatConfig(**SMALL, heads="deep", dropout=0.5))
  check_gradients_reach_everything(model)
  params, keys = wide_params(model), jax.random.split(jax.random.key(1), 7)
  batch = BATCHES["known"][0]
  run = jax.jit(lambda keys: model(params, batch, keys=keys))
  # Only the heads have dropout; the token is the same in training.
  np.testing.assert_array_equal(run(keys).tokens, run(None).tokens)
  assert np.abs(run(keys).logits["sex"] - run(None).logits["sex"]).max() > 0.1
  order = np.asarray([3, 1, 0, 6, 5, 2, 4])
  permuted = {name: values[order] for name, values in batch.items()}
  moved = jax.jit(lambda keys: model(params, permuted, keys=keys))(keys[order])
  np.testing.assert_allclose(run(keys).logits["race"][order], moved.logits["race"], atol=1e-4)


def test_no_conditioner_adds_nothing():
  model = build(NoConditionerConfig(d_ctx=24))
  output = model({}, BATCHES["known"][0])
  assert not model.shapes and output.tokens.shape == (7, 0, 24) and output.time_vector is None
  assert not loss_terms(output)
  assert NoConditionerConfig().select(CHEST).names == ()


@pytest.mark.parametrize("config", [FlatConfig(), HCNConfig()])
def test_a_number_without_bins_is_refused(config):
  """Its table would have one row for all values. Where it is not selected it may be there."""
  schema = Schema((SEX, Attribute("age", "continuous", low=0, high=100, unit="year")))
  with pytest.raises(InputError, match=r"conditioner: age is a number without bins.*kind 'typed' or 'additive'"):
    build(config, schema)
  build(dataclasses.replace(config, attributes=("sex",)), schema)
