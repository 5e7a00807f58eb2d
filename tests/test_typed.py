"""The typed conditioner against the method written in torch, exact parameter counts, and its losses in closed form."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as torch_functional
from conditioner_parity import (
  AGE,
  BATCH,
  BATCHES,
  CHEST,
  LEVELS,
  SEX,
  block,
  block_keys,
  build,
  check_draws_belong_to_the_sample,
  check_gradients_reach_everything,
  count,
  embed,
  linear,
  linear_keys,
  norm,
  race,
  torch_state,
  wide_params,
)

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.dropout import drop_attributes
from compdiff_jax.conditioning.losses import loss_terms
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.conditioning.typed import TypedConfig
from compdiff_jax.default_config import base
from compdiff_jax.training.step import loss_coefficients

SMALL = {"d_node": 16, "d_ctx": 24, "aux_hidden_dim": 12, "freq_dim": 10, "flat_hidden": 20}
STAGES = {
  "2a": ({"multi_token": False}, 4_339_503),
  "2b": ({}, 6_315_567),
  "2c": ({"d_time_emb": 1280}, 6_644_527),
  "2d": ({"composer": "transformer", "d_time_emb": 1280}, 4_803_375),
  "2b_flat": ({"composer": "flat"}, 6_317_559),
}
NAMES = ("age", "sex", "race")


def reference(
  state: dict, batch: dict, levels: dict, *, composer="hierarchical", multi_token=True, registers=0
) -> dict:
  """CompDiff-2 in evaluation for age (years), sex and race, from a state_dict."""
  half = state["age_encoder.0.weight"].shape[1] // 2
  frequencies = torch.tensor([math.exp(-math.log(1e4) * k / half) for k in range(half)])
  rows = []
  for years in np.asarray(batch["age"]).tolist():
    if math.isnan(years):
      rows.append(state["null_age"])
      continue
    features = torch.cat([torch.cos(years * frequencies), torch.sin(years * frequencies)])
    rows.append(linear(state, "age_encoder.2", torch_functional.silu(linear(state, "age_encoder.0", features))))
  e = {
    "age": torch.stack(rows),
    "sex": embed(state, "sex", levels["sex"]),
    "race": embed(state, "race", levels["race"]),
  }
  x = torch.cat(list(e.values()), 1)
  extra = state["register_tokens"].expand(len(x), -1, -1) if registers else None
  if composer == "hierarchical":
    pairs = [block(state, f"compose_{a}_{b}.net", torch.cat([e[a], e[b]], 1)) for a, b in itertools.combinations(e, 2)]
    h = block(state, "compose_all.net", torch.cat(pairs, 1))
    contexts = [block(state, f"ctx_{n}.net", torch.cat([e[n], h], 1)) for n in e] if multi_token else []
  elif composer == "flat":
    h = block(state, "flat_stage2.net", block(state, "flat_stage1.net", x))
    contexts = block(state, "flat_stage3.net", torch.cat([x, h], 1)).chunk(3, 1) if multi_token else []
  else:
    width = len(state["cls_token"])
    layer = torch.nn.TransformerEncoderLayer(
      width, 4, 2 * width, activation=torch_functional.gelu, batch_first=True, norm_first=True
    )
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    own = {key.removeprefix("composer."): value for key, value in state.items() if key.startswith("composer.")}
    encoder.load_state_dict(own)
    sequence = torch.stack([*e.values(), state["cls_token"].expand(len(x), -1)], 1)
    sequence = torch.cat([sequence, *([extra] if registers else [])], 1)
    with torch.no_grad():
      out = encoder(sequence + state["type_emb"])
    h, contexts, extra = out[:, 3], list(out[:, :3].unbind(1)) if multi_token else [], out[:, 4:]
  mu = linear(state, "mu_head", h)

  def project(name, node):
    return linear(state, f"proj_{name}.1", norm(state, f"proj_{name}.0", node))

  tokens = [project(name, node) for name, node in zip(NAMES, contexts)] + [project("cls", mu)]
  heads = dict(zip(NAMES, tokens)) if multi_token else dict.fromkeys(NAMES, tokens[0])
  aux = {
    "age": block(state, "age_regressor", heads["age"]),
    "sex": block(state, "sex_classifier", heads["sex"]),
    "race": block(state, "race_classifier", heads["race"]),
    "joint": block(state, "joint_classifier", tokens[-1]),
  }
  if registers:
    tokens += list(project("reg", extra).unbind(1))
  return {
    "tokens": torch.stack(tokens, 1),
    "mu": mu,
    "log_sigma": linear(state, "logsigma_head", h).clamp(-5, 1),
    "h": h,
    "parts": sum(e.values()),
    "time_vector": linear(state, "time_proj", mu) if "time_proj.weight" in state else None,
    "aux": aux,
  }


def state_keys(stage: str) -> set[str]:
  """The reference's keys, in our leaf names."""
  keys = {"null_age", "null_sex", "null_race", "emb_sex.embedding", "emb_race.embedding", "proj_cls.0.scale"}
  keys |= {"proj_cls.0.bias"} | linear_keys("age_encoder.0", "age_encoder.2", "mu_head", "logsigma_head", "proj_cls.1")
  keys |= block_keys("sex_classifier", "race_classifier", "age_regressor", "joint_classifier")
  if stage != "2a":
    keys |= linear_keys(*(f"proj_{name}.1" for name in NAMES))
    keys |= {f"proj_{name}.0.{leaf}" for name in NAMES for leaf in ("scale", "bias")}
  if stage in ("2a", "2b", "2c"):
    keys |= block_keys("compose_age_sex.net", "compose_age_race.net", "compose_sex_race.net", "compose_all.net")
  if stage in ("2b", "2c"):
    keys |= block_keys(*(f"ctx_{name}.net" for name in NAMES))
  if stage == "2b_flat":
    keys |= block_keys("flat_stage1.net", "flat_stage2.net", "flat_stage3.net")
  if stage in ("2c", "2d"):
    keys |= linear_keys("time_proj")
  if stage == "2d":
    keys |= {"cls_token", "type_emb"}
    for i in range(2):
      layer = f"composer.layers.{i}"
      keys |= linear_keys(f"{layer}.self_attn.out_proj", f"{layer}.linear1", f"{layer}.linear2")
      keys |= {f"{layer}.self_attn.in_proj_kernel", f"{layer}.self_attn.in_proj_bias"}
      keys |= {f"{layer}.{norm}.{leaf}" for norm in ("norm1", "norm2") for leaf in ("scale", "bias")}
  return keys


@pytest.mark.parametrize("stage", STAGES)
def test_reference_parameters_at_full_size(stage):
  config, parameters = STAGES[stage]
  model = build(TypedConfig(**config))
  assert set(model.shapes) == state_keys(stage)
  assert count(model) == parameters
  shapes = {name: leaf.shape for name, leaf in model.shapes.items()}
  assert shapes["joint_classifier.4.kernel"] == (512, 40) and shapes["age_encoder.0.kernel"] == (128, 256)
  if stage == "2d":
    assert shapes["type_emb"] == (4, 256) and shapes["composer.layers.1.self_attn.in_proj_kernel"] == (256, 768)
  if stage == "2b_flat":
    assert shapes["flat_stage3.net.1.kernel"] == (1024, 664) and shapes["flat_stage2.net.4.kernel"] == (664, 256)


def test_three_races_and_composers_alone():
  assert count(build(TypedConfig(), Schema((AGE, SEX, race(3))))) == 6_309_668
  sizes = {}
  for composer, multi_token in (("hierarchical", True), ("hierarchical", False), ("flat", True), ("transformer", True)):
    model = build(TypedConfig(composer=composer, multi_token=multi_token))
    parts = ("compose_", "ctx_", "flat_", "composer.", "cls_token", "type_emb")
    own = {name: leaf for name, leaf in model.shapes.items() if name.startswith(parts)}
    sizes[composer, multi_token] = sum(math.prod(leaf.shape) for leaf in own.values())
  assert sizes == {
    ("hierarchical", True): 2_896_640,
    ("hierarchical", False): 1_711_616,
    ("flat", True): 2_898_632,
    ("transformer", True): 1_055_488,
  }
  assert abs(sizes["flat", True] / sizes["hierarchical", True] - 1) < 0.02


@pytest.mark.parametrize(
  "config",
  [
    {},
    {"multi_token": False, "d_time_emb": 8},
    {"num_registers": 2, "d_time_emb": 8},
    {"composer": "flat", "num_registers": 1},
    {"composer": "flat", "multi_token": False},
    {"composer": "transformer", "num_registers": 2, "d_time_emb": 8},
    {"composer": "transformer", "multi_token": False},
  ],
)
def test_equals_the_method_with_wide_weights(config):
  model = build(TypedConfig(**SMALL, **config))
  params = wide_params(model)
  run = jax.jit(model)
  options = {"registers" if name == "num_registers" else name: v for name, v in config.items() if name != "d_time_emb"}
  for batch, levels in BATCHES.values():
    output = run(params, batch)
    expected = reference(torch_state(params), batch, levels, **options)
    for field in ("tokens", "mu", "log_sigma", "h", "parts"):
      np.testing.assert_allclose(getattr(output, field), expected[field], atol=5e-4, rtol=5e-5, err_msg=field)
    if "d_time_emb" in config:
      np.testing.assert_allclose(output.time_vector, expected["time_vector"], atol=5e-4, rtol=5e-5)
    else:
      assert output.time_vector is None
    for name in ("sex", "race", "joint"):
      np.testing.assert_allclose(output.logits[name], expected["aux"][name], atol=1e-3, rtol=5e-5, err_msg=name)
    np.testing.assert_allclose(output.regressions["age"].prediction, expected["aux"]["age"][:, 0], atol=1e-3, rtol=5e-5)
    joint = [-1 if -1 in row else (row[0] * 2 + row[1]) * 4 + row[2] for row in zip(*levels.values())]
    np.testing.assert_array_equal(output.targets["joint"], joint)
  assert float(output.log_sigma.min()) == -5 and float(output.log_sigma.max()) == 1


def test_auxiliary_loss_is_the_weighted_mean_of_its_heads():
  """(CE sex + CE race + 10 smooth L1 of age / 100 + CE joint / 2) / 3.5, unknown values left out of their terms."""
  model = build(TypedConfig(**SMALL))
  params = wide_params(model)
  for batch, levels in BATCHES.values():
    terms = jax.tree.map(np.asarray, loss_terms(jax.jit(model)(params, batch)))
    heads = reference(torch_state(params), batch, levels)["aux"]
    joint = [-1 if -1 in row else (row[0] * 2 + row[1]) * 4 + row[2] for row in zip(*levels.values())]
    expected = {}
    for name, target in (("sex", levels["sex"]), ("race", levels["race"]), ("joint", joint)):
      expected[name] = torch_functional.cross_entropy(heads[name], torch.tensor(target), ignore_index=-1)
    known = ~np.isnan(batch["age"])
    ages = torch.tensor(np.asarray(batch["age"])[known])
    predicted = heads["age"][:, 0][torch.tensor(known)]
    expected["age"] = 10 * torch_functional.smooth_l1_loss(predicted, ages / 100)
    means = {}
    for name, value in expected.items():
      values, weight = terms[f"aux_{name}"]
      means[f"aux_{name}"] = (values * weight).sum() / weight.sum()
      assert means[f"aux_{name}"] == pytest.approx(float(value), rel=1e-4), name
    values, weight = terms["mae_age"]
    assert (values * weight).sum() / weight.sum() == pytest.approx(
      float((predicted * 100 - ages).abs().mean()), rel=1e-4
    )
    coefficients = loss_coefficients(base().loss, TypedConfig().loss_weights, jnp.int32(0), list(means))
    total = sum(coefficients[name] * means[name] for name in means)
    wanted = (expected["sex"] + expected["race"] + expected["age"] + 0.5 * expected["joint"]) / 3.5
    assert total == pytest.approx(float(wanted), rel=1e-4)


def test_kl_is_annealed_from_zero():
  """The weight at step k is 0.005 min(1, k / 5000); the first step has none."""
  weights = [float(loss_coefficients(base().loss, {}, jnp.int32(k), ["kl"])["kl"]) for k in (0, 1, 2500, 5000, 9999)]
  assert weights == pytest.approx([0, 1e-6, 0.0025, 0.005, 0.005])


@pytest.mark.parametrize("composer", ["hierarchical", "flat", "transformer"])
def test_every_parameter_gets_a_gradient(composer):
  check_gradients_reach_everything(build(TypedConfig(**SMALL, composer=composer, num_registers=1, d_time_emb=8)))


@pytest.mark.parametrize("composer", ["hierarchical", "transformer"])
def test_draws_belong_to_the_sample(composer):
  check_draws_belong_to_the_sample(build(TypedConfig(**SMALL, composer=composer, dropout=0.5)))


def test_initial_distributions():
  model = build(TypedConfig(composer="transformer", num_registers=4, aux_hidden_dim=0, d_ctx=32, d_time_emb=8))
  params = model.init(jax.random.key(0))
  # The UNet's own time embedding is left as it is at first.
  assert not np.any(params["time_proj.kernel"]) and not np.any(params["time_proj.bias"])
  for name in ("null_age", "null_sex", "cls_token", "type_emb"):
    assert float(params[name].std()) == pytest.approx(0.02, rel=0.2), name
  assert float(params["register_tokens"].std()) == pytest.approx(0.02, rel=0.2)
  attention = "composer.layers.0.self_attn"
  bound = math.sqrt(6 / (256 + 768))  # xavier uniform over the stacked matrix
  assert float(jnp.abs(params[f"{attention}.in_proj_kernel"]).max()) == pytest.approx(bound, rel=0.01)
  for bias in ("in_proj_bias", "out_proj.bias"):
    assert not np.any(params[f"{attention}.{bias}"])
  assert float(jnp.abs(params["age_encoder.0.kernel"]).max()) == pytest.approx(128**-0.5, rel=0.01)


def test_a_fresh_number_does_not_hide_a_fresh_category():
  """Differences between the embeddings of two ages are no larger than those between two levels of sex or race."""
  model = build(TypedConfig(aux_hidden_dim=0, d_ctx=8, multi_token=False))
  params = model.init(jax.random.key(0))
  base = {"age": jnp.full(3, 50.0), "sex": jnp.zeros(3, jnp.int32), "race": jnp.zeros(3, jnp.int32)}

  def spread(name, values):
    parts = np.asarray(jax.jit(model)(params, {**base, name: jnp.asarray(values)}).parts)
    return parts.std(axis=0).mean()

  age = spread("age", [20.0, 50.0, 80.0])
  assert spread("sex", [0, 1, 1]) > age and spread("race", [0, 1, 2]) > age


def test_near_ages_are_near():
  """In the space of a fresh age encoder 50 is nearer to 51 than to 90, and every year is a vector of its own."""
  model = build(TypedConfig(attributes=("age",), aux_hidden_dim=0, d_ctx=8, multi_token=False))
  ages = jnp.asarray([50.0, 51.0, 90.0, 50.5])
  e = np.asarray(jax.jit(model)(model.init(jax.random.key(0)), {"age": ages}).parts)
  near, far, fraction = (np.linalg.norm(e[0] - e[i]) for i in (1, 2, 3))
  assert 0 < fraction < near < far


def test_partial_conditioning():
  """What is left unspecified is the null, whatever stood there; each set of known attributes has tokens of its own."""
  model = build(TypedConfig(**SMALL))
  params, run = wide_params(model), jax.jit(model)
  sets = [set(names) for k in range(4) for names in itertools.combinations(NAMES, k)]
  one = {"age": 63.0, "sex": 1, "race": 2}
  batch = {
    name: np.asarray([one[name] if name in known else CHEST[name].unknown for known in sets], CHEST[name].dtype)
    for name in NAMES
  }
  tokens = np.asarray(run(params, batch).tokens).reshape(len(sets), -1)
  differences = np.abs(tokens[:, None] - tokens[None]).max(-1) + np.eye(len(sets))
  assert differences.min() > 1e-2 and np.isfinite(tokens).all()


def test_unconditional_zeros_are_for_samples_of_which_nothing_is_known():
  model = build(TypedConfig(**SMALL, d_time_emb=8, unconditional="zeros"))
  params, batch = wide_params(model), BATCHES["partly unknown"][0]
  output = jax.jit(model)(params, batch)
  known = np.asarray([True, True, True, False, True, True, False])
  np.testing.assert_array_equal(output.conditioned, known)
  np.testing.assert_array_equal(np.any(np.asarray(output.tokens) != 0, axis=(1, 2)), known)
  np.testing.assert_array_equal(np.any(np.asarray(output.time_vector) != 0, axis=1), known)
  with_nulls = jax.jit(build(TypedConfig(**SMALL, d_time_emb=8)))(params, batch)
  np.testing.assert_allclose(output.tokens[known], np.asarray(with_nulls.tokens)[known], atol=1e-5)


def test_stage_2e_trains_its_nulls_on_a_fifth_of_the_samples():
  keys = jax.random.split(jax.random.key(3), 20_000)
  batch = {name: jnp.broadcast_to(values[0], [20_000]) for name, values in BATCH.items()}
  dropped = drop_attributes(batch, CHEST, keys, attribute_rate=0.1, full_rate=0.1)
  for attribute in CHEST:
    share = 1 - float(jnp.mean(attribute.is_known(dropped[attribute.name])))
    assert share == pytest.approx(0.19, abs=0.01)  # three standard errors


@pytest.mark.parametrize("composer", ["hierarchical", "flat", "transformer"])
def test_any_number_of_attributes(composer):
  """Four attributes make six pairs, then the whole; one attribute is the whole."""
  view = Attribute("view", "categorical", values=("PA", "AP", "supine"))
  four = Schema((*CHEST, view))
  model = build(TypedConfig(**SMALL, composer=composer), four)
  batch = {**BATCH, "view": jnp.asarray([0, 1, 2, -1, 0, 1, 2])}
  output = jax.eval_shape(model, model.shapes, batch)
  assert output.tokens.shape == (7, 5, 24) and output.logits["joint"].shape == (7, 120)
  if composer == "hierarchical":
    pairs = {"_".join(pair) for pair in itertools.combinations(four.names, 2)}
    assert {name.split(".")[0] for name in model.shapes if name.startswith("compose_")} == {
      "compose_all",
      *(f"compose_{pair}" for pair in pairs),
    }
    assert model.shapes["compose_all.net.0.scale"].shape == (6 * 16,)
  one = build(TypedConfig(**SMALL, composer=composer, attributes=("sex",)))
  assert jax.eval_shape(one, one.shapes, BATCH).tokens.shape == (7, 2, 24)


def test_four_attributes_equal_the_method():
  view = Attribute("view", "categorical", values=("PA", "AP", "supine"))
  schema = Schema((SEX, race(4), view, Attribute("eye", "categorical", values=("left", "right"))))
  levels = {**{n: LEVELS[n] for n in ("sex", "race")}, "view": [0, 1, 2, 0, 1, 2, -1], "eye": [0, 0, 1, 1, 0, -1, 1]}
  model = build(TypedConfig(**SMALL), schema)
  params = wide_params(model)
  output = jax.jit(model)(params, {name: jnp.asarray(values) for name, values in levels.items()})
  state = torch_state(params)
  e = {name: embed(state, name, values) for name, values in levels.items()}
  pairs = [block(state, f"compose_{a}_{b}.net", torch.cat([e[a], e[b]], 1)) for a, b in itertools.combinations(e, 2)]
  h = block(state, "compose_all.net", torch.cat(pairs, 1))
  np.testing.assert_allclose(output.h, h, atol=5e-4, rtol=5e-5)


@pytest.mark.parametrize(
  ("config", "words"),
  [
    ({"composer": "transfomer"}, "did you mean 'transformer'"),
    ({"unconditional": "zero"}, "did you mean 'zeros'"),
    ({"freq_dim": 7}, "freq_dim must be even"),
    ({"num_registers": 2, "multi_token": False}, "registers need multi_token=True"),
    ({"composer": "transformer", "d_node": 10}, "transformer_heads is 4; it must divide d_node 10"),
  ],
)
def test_refused_configs(config, words):
  with pytest.raises(InputError, match=f"conditioner: .*{words}"):
    TypedConfig.from_dict(config)


def test_reserved_names_are_refused():
  with pytest.raises(InputError, match="'cls' has the name of a part of the network"):
    build(TypedConfig(**SMALL), Schema((SEX, Attribute("cls", "categorical", values=("a", "b")))))


def test_parameters_of_training_alone_may_be_left_out():
  """Heads leave and nothing else changes."""
  with_heads, without = (set(build(TypedConfig(aux_hidden_dim=size)).shapes) for size in (512, 0))
  assert with_heads - without == block_keys("sex_classifier", "race_classifier", "age_regressor", "joint_classifier")
  assert without < with_heads
