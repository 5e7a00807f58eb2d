"""HCN v1 and its losses against the method's formulas written in torch, torch's own losses, and counting."""

import math

import conditioner_parity
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as torch_functional
from conditioner_parity import (
  AGE,
  BATCH,
  CHEST,
  LEVELS,
  PARTLY_UNKNOWN,
  PARTLY_UNKNOWN_LEVELS,
  SEX,
  block,
  check_gradients_reach_everything,
  embed,
  linear,
  norm,
  race,
  torch_state,
  wide_params,
)

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.dropout import drop_attributes
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.interface import ConditionerOutput, level_indices
from compdiff_jax.conditioning.losses import loss_terms, ordinal_loss
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.models.functional import Functional

SMALL = {"d_node": 16, "d_ctx": 24, "aux_hidden_dim": 12}


def build(schema: Schema = CHEST, **config) -> Functional:
  return conditioner_parity.build(HCNConfig(**config), schema)


def reference(state: dict, levels: dict, uncertainty: bool = True) -> dict:
  """HCN v1 in evaluation, from a state_dict and level indices, attribute by attribute."""
  e = {name: embed(state, name, levels[name]) for name in levels}
  if set(levels) == {"age", "sex", "race"}:
    h_as = block(state, "compose_age_sex.net", torch.cat([e["age"], e["sex"]], 1))
    h_ar = block(state, "compose_age_race.net", torch.cat([e["age"], e["race"]], 1))
    h_sr = block(state, "compose_sex_race.net", torch.cat([e["sex"], e["race"]], 1))
    h = block(state, "compose_all.net", torch.cat([h_as, h_ar, h_sr], 1))
  elif set(levels) == {"sex", "race"}:
    h = block(state, "compose_sex_race.net", torch.cat([e["sex"], e["race"]], 1))
  else:
    (h,) = e.values()
  mu, log_sigma = h, torch.zeros_like(h)
  if uncertainty:
    mu = linear(state, "mu_head", h)
    log_sigma = linear(state, "logsigma_head", h).clamp(-5, 1)
  token = linear(state, "proj_ctx.1", norm(state, "proj_ctx.0", mu))
  logits = {name: block(state, f"{name}_classifier", token) for name in levels}
  parts = sum(e.values())
  return {"tokens": token[:, None], "mu": mu, "log_sigma": log_sigma, "h": h, "parts": parts, "logits": logits}


@pytest.mark.parametrize("num_races", [4, 3])
@pytest.mark.parametrize("age", [True, False])
def test_reference_parameters_at_full_size(age, num_races):
  schema = Schema((AGE, SEX, race(num_races)))
  names = ("age", "sex", "race") if age else ("sex", "race")
  shapes = build(schema, attributes=names, learned_nulls=False).shapes
  expected = {(True, 4): 3_695_883, (True, 3): 3_695_114, (False, 4): 1_848_582, (False, 3): 1_847_813}
  assert len(shapes) == (53 if age else 28)
  assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == expected[age, num_races]

  blocks = [f"{name}_classifier" for name in names] + ["compose_sex_race.net"]
  blocks += ["compose_age_sex.net", "compose_age_race.net", "compose_all.net"] if age else []
  keys = {f"emb_{name}.embedding" for name in names} | {"proj_ctx.0.scale", "proj_ctx.0.bias"}
  linears = ["mu_head", "logsigma_head", "proj_ctx.1"] + [f"{block}.{i}" for block in blocks for i in (1, 4)]
  keys |= {f"{linear}.{leaf}" for linear in linears for leaf in ("kernel", "bias")}
  keys |= {f"{block}.0.{leaf}" for block in blocks for leaf in ("scale", "bias")}
  assert set(shapes) == keys
  with_nulls = build(schema, attributes=names).shapes
  assert {name: with_nulls[name].shape for name in set(with_nulls) - keys} == {f"null_{name}": (256,) for name in names}


@pytest.mark.parametrize(
  "names, config",
  [
    (("age", "sex", "race"), {}),
    (("sex", "race"), {}),
    (("race", "sex"), {}),
    (("sex",), {}),
    (("age", "sex", "race"), {"use_uncertainty": False}),
  ],
)
@pytest.mark.parametrize("batch, levels", [(BATCH, LEVELS), (PARTLY_UNKNOWN, PARTLY_UNKNOWN_LEVELS)])
def test_equals_the_method_with_wide_weights(names, config, batch, levels):
  model = build(attributes=names, **SMALL, **config)
  params = wide_params(model)
  output = jax.jit(model)(params, batch)
  used = {name: levels[name] for name in CHEST.names if name in names}
  expected = reference(torch_state(params), used, config.get("use_uncertainty", True))
  for field in ("tokens", "mu", "log_sigma", "h", "parts"):
    np.testing.assert_allclose(getattr(output, field), expected[field], atol=2e-4, rtol=2e-5, err_msg=field)
  assert set(output.logits) == set(names)
  for name in names:
    np.testing.assert_allclose(output.logits[name], expected["logits"][name], atol=5e-4, rtol=2e-5)
    np.testing.assert_array_equal(output.targets[name], levels[name])
  if config.get("use_uncertainty", True) and len(names) > 1:
    assert float(output.log_sigma.min()) == -5 and float(output.log_sigma.max()) == 1


def test_initial_distributions():
  params = build(attributes=("sex", "race"), d_ctx=64, aux_hidden_dim=0).init(jax.random.key(0))
  for name in ("emb_sex.embedding", "emb_race.embedding", "null_sex", "null_race"):
    assert float(params[name].std()) == pytest.approx(0.02, rel=0.2), name
  for head, bias in (("mu_head", 0), ("logsigma_head", -1)):
    assert float(params[f"{head}.kernel"].std()) == pytest.approx(0.01, rel=0.02)
    np.testing.assert_array_equal(params[f"{head}.bias"], np.full(256, bias, np.float32))
  for leaf in ("kernel", "bias"):  # torch: uniform up to 1 / sqrt(fan in)
    assert float(jnp.abs(params[f"compose_sex_race.net.1.{leaf}"]).max()) == pytest.approx(512**-0.5, rel=0.01)
  assert not np.array_equal(params["null_sex"], params["null_race"])


def test_without_nulls_unknown_gives_the_zero_token_and_no_loss():
  model = build(**SMALL, learned_nulls=False)
  params = wide_params(model)
  run = jax.jit(model)
  output = run(params, PARTLY_UNKNOWN)
  known = [False, False, False, False, True, True, False]
  np.testing.assert_array_equal(output.conditioned, known)
  np.testing.assert_array_equal(np.any(np.asarray(output.tokens) != 0, axis=(1, 2)), known)
  np.testing.assert_array_equal(output.tokens[4:6], run(params, BATCH).tokens[4:6])
  for name, (_, weight) in loss_terms(output).items():
    np.testing.assert_array_equal(weight, np.float32(known), err_msg=name)


def test_an_attribute_that_is_not_used_changes_nothing():
  model = build(attributes=("sex", "race"), **SMALL)
  params = wide_params(model)
  other_ages = {**BATCH, "age": BATCH["age"][::-1]}
  run = jax.jit(model)
  np.testing.assert_array_equal(run(params, BATCH).tokens, run(params, other_ages).tokens)


@pytest.mark.parametrize("config", [{"dropout": 0.5}, {"dropout": 0.0}])
def test_training_draws_belong_to_the_sample(config):
  """A sample's result follows its key through a permutation and a split of the batch."""
  model = build(attributes=("sex", "race"), **SMALL, **config)
  params = wide_params(model)
  keys = jax.random.split(jax.random.key(1), 7)
  run = jax.jit(lambda batch, keys: model(params, batch, keys=keys))
  whole = run(BATCH, keys)
  order = np.asarray([3, 1, 0, 6, 5, 2, 4])
  permuted = run({name: values[order] for name, values in BATCH.items()}, keys[order])
  thirds = [run({n: v[cut] for n, v in BATCH.items()}, keys[cut]) for cut in (slice(0, 3), slice(3, 6))]
  joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *thirds)
  for a, b, c in zip(jax.tree.leaves(whole), jax.tree.leaves(permuted), jax.tree.leaves(joined)):
    np.testing.assert_allclose(a[order], b, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(a[:6], c, atol=1e-4, rtol=1e-5)
  evaluation = run(BATCH, None)
  assert np.abs(whole.tokens - evaluation.tokens).max() > 0.1
  # Without dropout only the latent is random, so everything before it is the evaluation's.
  assert np.allclose(whole.h, evaluation.h) == (config["dropout"] == 0)
  equal = run({name: values * 0 for name, values in BATCH.items()}, keys)
  assert np.abs(equal.tokens[0] - equal.tokens[1]).max() > 0.1


def test_latent_noise_is_standard_normal_times_sigma():
  """Sigma is read from how often noise turns the sign of a difference that the token keeps."""
  model = build(attributes=("sex",), d_node=2, d_ctx=2, dropout=0.0, aux_hidden_dim=0)
  params = wide_params(model)
  count = 20_000
  keys = jax.random.split(jax.random.key(2), count)
  sigma = 0.4
  zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
  params = zeros | {
    "mu_head.bias": jnp.asarray([1.0, -1.0]),
    "logsigma_head.bias": jnp.full([2], math.log(sigma)),
    "proj_ctx.0.scale": jnp.ones([2]),
    "proj_ctx.1.kernel": jnp.eye(2),
  }
  tokens = jax.jit(model)(params, {"sex": jnp.zeros([count], int)}, keys=keys).tokens[:, 0]
  # LayerNorm of two numbers keeps the sign of their difference, here N(2, 2 sigma^2).
  flipped = float(jnp.mean(tokens[:, 0] < 0))
  expected = 0.5 * math.erfc(2 / math.sqrt(2 * sigma**2) / math.sqrt(2))
  assert flipped == pytest.approx(expected, abs=4 * math.sqrt(expected / count))


def test_losses_equal_torch():
  rng = np.random.default_rng(3)
  mu, log_sigma, h, parts = (rng.normal(0, 2, [5, 9]).astype(np.float32) for _ in range(4))
  parts[1] = 0  # torch's bound on the norm decides
  logits = {name: rng.normal(0, 3, [5, k]).astype(np.float32) for name, k in (("age", 5), ("sex", 2))}
  targets = {"age": np.asarray([4, -1, 0, 2, -1]), "sex": np.asarray([0, 1, -1, 1, 0])}
  everyone = np.ones(5, bool)
  latent = {"mu": mu, "log_sigma": log_sigma, "h": h, "parts": parts}
  tokens = rng.normal(0, 2, [5, 3, 4]).astype(np.float32)
  output = ConditionerOutput(tokens, **latent, logits=logits, targets=targets, conditioned=everyone)
  terms = jax.tree.map(np.asarray, loss_terms(output))
  normal = torch.distributions.Normal
  kl = torch.distributions.kl_divergence(
    normal(torch.tensor(mu), torch.tensor(log_sigma).exp()), normal(torch.zeros(5, 9), torch.ones(5, 9))
  )
  np.testing.assert_allclose(terms["kl"][0], kl.sum(1), rtol=1e-5)
  cosine = torch_functional.cosine_similarity(torch.tensor(h), torch.tensor(parts), eps=1e-8)
  np.testing.assert_allclose(terms["composition"][0], 1 - cosine, atol=1e-6)
  for name in logits:
    values, weight = terms[f"aux_{name}"]
    mean = torch_functional.cross_entropy(torch.tensor(logits[name]), torch.tensor(targets[name]), ignore_index=-1)
    assert (values * weight).sum() / weight.sum() == pytest.approx(float(mean), rel=1e-5)
    known = targets[name] >= 0
    right = logits[name][known].argmax(1) == targets[name][known]
    accuracy, weight = terms[f"acc_{name}"]
    assert (accuracy * weight).sum() / weight.sum() == pytest.approx(right.mean())
  np.testing.assert_allclose(terms["context_norm"][0], torch.tensor(tokens).norm(dim=2).mean(1), rtol=1e-5)
  assert set(terms) == {"context_norm", "kl", "composition", "aux_age", "acc_age", "aux_sex", "acc_sex"}
  assert all(values.dtype == np.float32 and weight.dtype == np.float32 for values, weight in terms.values())


def test_ordinal_losses_equal_their_definitions():
  rng = np.random.default_rng(4)
  logits, targets = rng.normal(0, 2, [6, 5]).astype(np.float32), np.asarray([0, 4, 2, 1, 3, 2])
  log_p = torch.log_softmax(torch.tensor(logits), 1)
  p = log_p.exp().numpy().astype(np.float64)
  for sigma in (0.75, 2.0):
    expected = []
    for row, y in zip(log_p, targets):
      wanted = np.asarray([math.exp(-0.5 * ((k - y) / sigma) ** 2) for k in range(5)])
      expected.append(-float((torch.tensor(wanted / wanted.sum()) * row).sum()))
    np.testing.assert_allclose(ordinal_loss(logits, targets, "soft", sigma), expected, rtol=1e-5)
  cross_entropy = -log_p.numpy()[np.arange(6), targets]
  squares = [sum((p[i, : k + 1].sum() - (k >= y)) ** 2 for k in range(5)) for i, y in enumerate(targets)]
  cumulative = ordinal_loss(logits, targets, "cumulative", 1.0)
  np.testing.assert_allclose(cumulative, cross_entropy + 0.5 * np.asarray(squares), rtol=1e-5)
  np.testing.assert_allclose(ordinal_loss(logits, targets, "cross_entropy", 1.0), cross_entropy, rtol=1e-5)
  # A narrow target is the hard one; being two levels off costs more than one level off.
  np.testing.assert_allclose(ordinal_loss(logits, targets, "soft", 0.05), cross_entropy, rtol=1e-5)
  sure = 9.0 * np.eye(5, dtype=np.float32)
  for loss in ("soft", "cumulative"):
    near, far = (float(ordinal_loss(sure[[k]], np.asarray([1]), loss, 0.75)[0]) for k in (2, 4))
    assert near < far
  assert ordinal_loss(sure[[2]], np.asarray([1]), "cross_entropy", 1.0) == pytest.approx(
    float(ordinal_loss(sure[[4]], np.asarray([1]), "cross_entropy", 1.0)[0])
  )


@pytest.mark.parametrize("loss", ["soft", "cumulative"])
def test_ordinal_age(loss):
  """Bins are embedded cumulatively, and the bins of age alone are judged by the ordinal loss."""
  config = HCNConfig(**SMALL, ordinal_encoder=True, ordinal_loss=loss)
  model = conditioner_parity.build(config)
  params = wide_params(model)
  output = jax.jit(model)(params, PARTLY_UNKNOWN)
  state = torch_state(params)
  assert set(state) == set(torch_state(wide_params(build(**SMALL))))
  state["emb_age.weight"] = torch.cumsum(state["emb_age.weight"], 0)
  np.testing.assert_allclose(output.h, reference(state, PARTLY_UNKNOWN_LEVELS)["h"], atol=5e-4, rtol=2e-5)
  terms = loss_terms(output)
  for name, own in (("age", loss), ("sex", "cross_entropy")):
    targets = np.asarray(PARTLY_UNKNOWN_LEVELS[name])
    known = targets >= 0
    expected = ordinal_loss(output.logits[name], targets, own, config.soft_sigma)
    np.testing.assert_allclose(np.asarray(terms[f"aux_{name}"][0])[known], expected[known], rtol=1e-4)
    np.testing.assert_array_equal(terms[f"aux_{name}"][1], np.float32(known))
  # The expected middle of the bins 0-18, 18-40, … against the age in years; nothing of the kind for sex.
  values, weight = terms["mae_age"]
  years = np.asarray(PARTLY_UNKNOWN["age"])
  expected = np.abs(
    torch.softmax(torch.tensor(np.asarray(output.logits["age"])), 1).numpy() @ [9, 29, 50, 70, 90] - years
  )
  np.testing.assert_array_equal(weight, np.float32(~np.isnan(years)))
  np.testing.assert_allclose(np.asarray(values)[weight > 0], expected[weight > 0], rtol=1e-4)
  assert "mae_sex" not in terms


def test_kl_without_uncertainty_is_half_the_squared_norm():
  model = build(**SMALL, use_uncertainty=False)
  output = jax.jit(model)(wide_params(model), BATCH)
  np.testing.assert_allclose(loss_terms(output)["kl"][0], 0.5 * np.sum(np.square(output.h), axis=1), rtol=1e-5)


@pytest.mark.parametrize("config", [{}, {"attributes": ("sex", "race"), "learned_nulls": False}])
def test_gradients_reach_every_parameter(config):
  check_gradients_reach_everything(build(**SMALL, **config))


def test_attribute_dropout_rate_and_kinds():
  count = 40_000
  keys = jax.random.split(jax.random.key(5), count)
  attributes = {"age": jnp.full([count], 30.0), "sex": jnp.ones([count], int), "race": jnp.zeros([count], int)}
  dropped = drop_attributes(attributes, CHEST, keys, attribute_rate=0.1, full_rate=0.1)
  unknown = {name: ~np.asarray(CHEST[name].is_known(values)) for name, values in dropped.items()}
  assert np.isnan(dropped["age"][unknown["age"]]).all() and (dropped["sex"][unknown["sex"]] == -1).all()
  for name, mask in unknown.items():
    assert mask.mean() == pytest.approx(0.19, abs=0.008), name
    assert dropped[name].dtype == attributes[name].dtype
    np.testing.assert_array_equal(dropped[name][~mask], attributes[name][~mask])
  together = np.logical_and.reduce(list(unknown.values()))
  assert together.mean() == pytest.approx(0.1 + 0.9 * 0.1**3, abs=0.006)
  pair = (unknown["age"] & unknown["sex"]).mean()
  assert pair == pytest.approx(0.1 + 0.9 * 0.1**2, abs=0.006)


def test_attribute_dropout_belongs_to_the_sample():
  keys = jax.random.split(jax.random.key(6), 7)
  whole = drop_attributes(BATCH, CHEST, keys, 0.5, 0.2)
  order = np.asarray([6, 0, 5, 1, 4, 2, 3])
  permuted = drop_attributes({n: v[order] for n, v in BATCH.items()}, CHEST, keys[order], 0.5, 0.2)
  for name in BATCH:
    np.testing.assert_array_equal(whole[name][order], permuted[name])
  untouched = drop_attributes(PARTLY_UNKNOWN, CHEST, keys, 0.0, 0.0)
  for name in BATCH:
    np.testing.assert_array_equal(untouched[name], PARTLY_UNKNOWN[name])
    assert np.all(level_indices(CHEST[name], drop_attributes(BATCH, CHEST, keys, 0.0, 1.0)[name]) == -1)


def test_levels_at_the_edges_of_bins():
  ages = [0, 17.999, 18, 39.999, 40, 59, 60, 79.999, 80, 100, math.nan]
  expected = [-1 if math.isnan(age) else sum(age >= edge for edge in AGE.bins) for age in ages]
  np.testing.assert_array_equal(jax.jit(lambda x: level_indices(AGE, x))(jnp.asarray(ages)), expected)
  np.testing.assert_array_equal(AGE.levels(np.asarray(ages, np.float32)), expected)


def test_levels_at_edges_that_binary_fractions_miss():
  """Counted in hundredths: i/100 reaches the edges 1/100 to i/100, freshly encoded, stored and in the conditioner."""
  hundredths = np.arange(101)
  dose = Attribute("dose", "continuous", low=0, high=2, bins=tuple(hundredths[1:] / 100))
  values = [dose.encode(f"{i / 100}") for i in hundredths]
  np.testing.assert_array_equal(dose.levels(values), hundredths)
  np.testing.assert_array_equal(dose.levels(np.asarray(values, dose.dtype)), hundredths)
  np.testing.assert_array_equal([dose.levels(np.asarray(value)[None])[0] for value in values], hundredths)
  np.testing.assert_array_equal(level_indices(dose, jnp.asarray(values, dose.dtype)), hundredths)


def test_config_round_trip_and_errors():
  config = HCNConfig.from_dict({"attributes": ["sex", "race"], "d_node": 8})
  assert config.attributes == ("sex", "race") and HCNConfig.from_dict(config.to_dict()) == config
  for bad in ({"d_nod": 8}, {"d_node": 0}, {"dropout": 1.0}, {"aux_hidden_dim": -1}):
    with pytest.raises(InputError, match=f"conditioner.*{next(iter(bad))}"):
      HCNConfig.from_dict(bad)
  with pytest.raises(InputError, match="no attribute 'sexx'; did you mean 'sex'"):
    build(attributes=("sexx",))
  same = tuple(Attribute(name, "categorical", values=("x", "y")) for name in ("a", "b_c", "a_b", "c"))
  with pytest.raises(InputError, match="same name"):
    build(Schema(same))
