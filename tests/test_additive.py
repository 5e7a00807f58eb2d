"""The additive conditioner: an analysis of variance by hand, and what shrinkage does to cells that training lacks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from conditioner_parity import (
  BATCHES,
  CHEST,
  SEX,
  block,
  build,
  check_gradients_reach_everything,
  linear,
  race,
  torch_state,
  wide_params,
)

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.additive import AdditiveConfig
from compdiff_jax.conditioning.losses import loss_terms
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.default_config import base
from compdiff_jax.training.step import loss_coefficients

SMALL = {"d_node": 16, "d_ctx": 24, "aux_hidden_dim": 12, "freq_dim": 10}


def reference(state: dict, batch: dict, levels: dict) -> torch.Tensor:
  half = state["effect_age.0.weight"].shape[1] // 2
  frequencies = torch.tensor([1e4 ** (-k / half) for k in range(half)])
  nodes = []
  for i, years in enumerate(np.asarray(batch["age"]).tolist()):
    node = state["base"].clone()
    level = {name: column[i] for name, column in levels.items()}
    if level["age"] >= 0:
      angles = years * frequencies
      hidden = linear(state, "effect_age.0", torch.cat([torch.cos(angles), torch.sin(angles)]))
      node += linear(state, "effect_age.2", hidden * torch.sigmoid(hidden))
    for name in ("sex", "race"):
      node += state[f"effect_{name}.weight"][level[name]] if level[name] >= 0 else 0
    for (a, _), (b, size) in itertools.combinations({"age": 5, "sex": 2, "race": 4}.items(), 2):
      if level[a] >= 0 and level[b] >= 0:
        node += state[f"interaction_{a}_{b}.weight"][level[a] * size + level[b]]
    if min(level.values()) >= 0:
      node += state["interaction_all.weight"].reshape(5, 2, 4, -1)[level["age"], level["sex"], level["race"]]
    nodes.append(node)
  return linear(state, "proj_ctx", torch.stack(nodes))


def test_equals_the_sum_of_its_effects():
  model = build(AdditiveConfig(**SMALL))
  params, run = wide_params(model), jax.jit(model)
  state = torch_state(params)
  for batch, levels in BATCHES.values():
    output = run(params, batch)
    tokens = reference(state, batch, levels)
    np.testing.assert_allclose(output.tokens[:, 0], tokens, atol=5e-4, rtol=5e-5)
    np.testing.assert_allclose(output.logits["race"], block(state, "race_classifier", tokens), atol=1e-3, rtol=5e-5)
    np.testing.assert_array_equal(output.targets["age"], levels["age"])
  sizes = {name: float((state[name] ** 2).mean(1).sum()) for name in state if name.startswith("interaction")}
  penalty = sum(sizes.values()) + sizes["interaction_all.weight"]  # which counts twice
  np.testing.assert_allclose(loss_terms(output)["interaction"][0], np.full(7, penalty), rtol=1e-5)
  nothing = run(params, CHEST.unknown(2)).tokens
  np.testing.assert_allclose(nothing[:, 0], linear(state, "proj_ctx", state["base"].expand(2, -1)), atol=1e-4)


def test_interactions_start_at_zero_and_their_penalty_is_in_the_loss():
  params = build(AdditiveConfig(**SMALL)).init(jax.random.key(0))
  assert not any(np.any(value) for name, value in params.items() if name.startswith("interaction"))
  own = AdditiveConfig(interaction_penalty=0.3).loss_weights
  assert loss_coefficients(base().loss, own, jnp.int32(0), ["interaction"]) == {"interaction": 0.3}


def test_every_parameter_gets_a_gradient():
  check_gradients_reach_everything(build(AdditiveConfig(**SMALL)))


def fitted(model, params, batch, wanted):
  """Parameters after fitting tokens to targets [B, 3] under the penalty, the projection being the identity."""
  params |= {"proj_ctx.kernel": jnp.eye(3), "proj_ctx.bias": jnp.zeros(3)}
  optimizer = optax.adam(0.05)

  @jax.jit
  def fit(params):
    def loss(params):
      output = model(params, batch)
      error = jnp.mean((output.tokens[:, 0] - wanted) ** 2)
      return error + 0.01 * jnp.mean(loss_terms(output)["interaction"][0])

    def step(carry, _):
      params, state = carry
      gradient = jax.grad(loss)(params)
      gradient |= {name: jnp.zeros_like(x) for name, x in gradient.items() if name.startswith("proj_ctx")}
      updates, state = optimizer.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=1500)[0][0]

  return fit(params)


THREE = {"d_node": 3, "d_ctx": 3, "aux_hidden_dim": 0}


def test_a_pair_that_training_lacks_is_the_sum_of_its_main_effects():
  """A token is fitted to targets with one strong interaction; the cell that is left out keeps no interaction."""
  model = build(AdditiveConfig(**THREE), Schema((SEX, race(3))))
  cells = np.asarray([(s, r) for s in range(2) for r in range(3) if (s, r) != (1, 2)])
  batch = {"sex": jnp.asarray(cells[:, 0]), "race": jnp.asarray(cells[:, 1])}
  wanted = jnp.asarray([[s, r == 1, 2.0 * (s == 1 and r == 1)] for s, r in cells], jnp.float32)
  params = fitted(model, model.init(jax.random.key(0)), batch, wanted)
  assert "interaction_all.embedding" not in params
  table = np.asarray(params["interaction_sex_race.embedding"])
  assert np.abs(table[5]).max() < 1e-3  # the cell without data; Adam never moved it from zero
  assert table[4, 2] > 0.3  # the strong interaction is there
  unseen = model(params, {"sex": jnp.asarray([1]), "race": jnp.asarray([2])}).tokens[0, 0]
  effects = params["base"] + params["effect_sex.embedding"][1] + params["effect_race.embedding"][2]
  np.testing.assert_allclose(unseen, effects, atol=1e-3)


def test_a_triple_that_training_lacks_is_the_sum_of_main_effects_and_pairs():
  """Targets have an interaction of all three attributes, and one cell alone to learn a pair and it from.

  Where penalties lambda a^2 and 2 lambda b^2 are balanced by one gradient, a is 2 b.
  """
  view = Attribute("view", "categorical", values=("frontal", "lateral"))
  model = build(AdditiveConfig(**THREE), Schema((SEX, race(2), view)))
  cells = np.asarray([cell for cell in itertools.product(range(2), repeat=3) if cell != (1, 1, 0)])
  batch = dict(zip(("sex", "race", "view"), map(jnp.asarray, cells.T)))
  wanted = jnp.asarray([[s, r, 4.0 * (s and r and v)] for s, r, v in cells], jnp.float32)
  params = fitted(model, model.init(jax.random.key(0)), batch, wanted)
  table = np.asarray(params["interaction_all.embedding"])
  assert np.abs(table[6]).max() < 1e-3 and table[7, 2] > 0.1
  np.testing.assert_allclose(params["interaction_sex_race.embedding"][3], 2 * table[7], rtol=0.05, atol=0.02)
  unseen = model(params, {"sex": jnp.asarray([1]), "race": jnp.asarray([1]), "view": jnp.asarray([0])}).tokens[0, 0]
  rows = {"effect_sex": 1, "effect_race": 1, "effect_view": 0}
  rows |= {"interaction_sex_race": 3, "interaction_sex_view": 2, "interaction_race_view": 2}
  effects = params["base"] + sum(params[f"{name}.embedding"][row] for name, row in rows.items())
  np.testing.assert_allclose(unseen, effects, atol=1e-3)


def test_sizes():
  shapes = {name: leaf.shape for name, leaf in build(AdditiveConfig()).shapes.items()}
  assert shapes["interaction_age_sex.embedding"] == (10, 256) and shapes["interaction_age_race.embedding"] == (20, 256)
  assert shapes["interaction_sex_race.embedding"] == (8, 256) and shapes["effect_race.embedding"] == (4, 256)
  assert shapes["interaction_all.embedding"] == (40, 256)
  assert shapes["effect_age.0.kernel"] == (128, 256) and shapes["base"] == (256,)


def test_a_table_that_would_be_too_large_is_refused():
  """Three sets of findings with 56 states each; their pairs are no matter."""
  labels = tuple(f"finding_{i}" for i in range(14))
  schema = Schema(tuple(Attribute(name, "multilabel", values=labels) for name in ("first", "second", "third")))
  words = r"first, second, third have 175,616 combinations.*conditioner\.interaction_of_all=False"
  with pytest.raises(InputError, match=words):
    build(AdditiveConfig(**THREE), schema)
  shapes = build(AdditiveConfig(**THREE, interaction_of_all=False), schema).shapes
  assert shapes["interaction_first_second.embedding"].shape == (56 * 56, 3)
  assert "interaction_all.embedding" not in shapes

  many = tuple(f"finding_{i}" for i in range(80))
  pair = Schema(tuple(Attribute(name, "multilabel", values=many) for name in ("first", "second")))
  with pytest.raises(InputError, match=r"first, second have 102,400 combinations.* conditioner\.attributes(\n|$)"):
    build(AdditiveConfig(**THREE), pair)


@pytest.mark.parametrize("field", ["d_node", "interaction_penalty", "dropout", "freq_dim"])
def test_refused_configs(field):
  with pytest.raises(InputError, match=f"conditioner: .*{field}"):
    AdditiveConfig.from_dict({field: -1.0 if field in ("interaction_penalty", "dropout") else -1})
