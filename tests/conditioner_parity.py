"""What the tests of conditioners share: a schema, batches, wide weights, and the method's blocks written in torch."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as torch_functional

from compdiff_jax.conditioning.config import ConditionerConfig
from compdiff_jax.conditioning.losses import loss_terms
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.models.functional import Functional

torch.set_num_threads(1)

# Compiling is most of what these tests do.
FAST = {"xla_llvm_disable_expensive_passes": True}

AGE = Attribute("age", "continuous", low=0, high=100, bins=(18, 40, 60, 80), unit="year")
SEX = Attribute("sex", "categorical", values=("male", "female"))


def race(num_values: int) -> Attribute:
  return Attribute("race", "categorical", values=("white", "black", "asian", "hispanic")[:num_values])


CHEST = Schema((AGE, SEX, race(4)))
BATCH = {
  "age": jnp.asarray([0.0, 18.0, 39.5, 60.0, 79.0, 80.0, 100.0]),
  "sex": jnp.asarray([0, 1, 0, 1, 1, 0, 1]),
  "race": jnp.asarray([0, 1, 2, 3, 0, 1, 2]),
}
LEVELS = {"age": [0, 1, 1, 3, 3, 4, 4], "sex": [0, 1, 0, 1, 1, 0, 1], "race": [0, 1, 2, 3, 0, 1, 2]}
PARTLY_UNKNOWN = {
  "age": jnp.asarray([math.nan, 18.0, 39.5, math.nan, 79.0, 80.0, math.nan]),
  "sex": jnp.asarray([0, -1, 0, -1, 1, 0, -1]),
  "race": jnp.asarray([0, 1, -1, -1, 0, 1, -1]),
}
PARTLY_UNKNOWN_LEVELS = {
  "age": [-1, 1, 1, -1, 3, 4, -1],
  "sex": [0, -1, 0, -1, 1, 0, -1],
  "race": [0, 1, -1, -1, 0, 1, -1],
}
BATCHES = {"known": (BATCH, LEVELS), "partly unknown": (PARTLY_UNKNOWN, PARTLY_UNKNOWN_LEVELS)}


def build(config: ConditionerConfig, schema: Schema = CHEST) -> Functional:
  return Functional(lambda rngs: config.build(schema, rngs))


def count(model: Functional) -> int:
  return sum(math.prod(leaf.shape) for leaf in model.shapes.values())


def wide_params(model: Functional, std: float = 0.7) -> dict[str, jax.Array]:
  """Every parameter drawn with one wide deviation: log-sigma leaves its range, activations their linear part."""
  rng = np.random.default_rng(0)
  return {name: jnp.asarray(rng.normal(0, std, leaf.shape), jnp.float32) for name, leaf in model.shapes.items()}


def torch_state(params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
  """The state_dict that the reference would have for these parameters."""
  state = {}
  for name, value in params.items():
    value = np.array(value)
    transposed = name.endswith("kernel")  # in_proj_kernel too
    key = re.sub(r"\.(kernel|scale|embedding)$", ".weight", name).replace("in_proj_kernel", "in_proj_weight")
    state[key] = torch.from_numpy(value.T.copy() if transposed else value)
  return state


def linear(state, prefix: str, x: torch.Tensor) -> torch.Tensor:
  return x @ state[f"{prefix}.weight"].T + state[f"{prefix}.bias"]


def norm(state, prefix: str, x: torch.Tensor) -> torch.Tensor:
  return torch_functional.layer_norm(x, x.shape[-1:], state[f"{prefix}.weight"], state[f"{prefix}.bias"])


def block(state, prefix: str, x: torch.Tensor) -> torch.Tensor:
  """LayerNorm, Linear, SiLU, Linear under the keys 0, 1 and 4."""
  return linear(
    state, f"{prefix}.4", torch_functional.silu(linear(state, f"{prefix}.1", norm(state, f"{prefix}.0", x)))
  )


def embed(state, name: str, levels: Sequence[int]) -> torch.Tensor:
  """Rows of a table, and the null where the level is -1."""
  return torch.stack([state[f"emb_{name}.weight"][i] if i >= 0 else state[f"null_{name}"] for i in levels])


def block_keys(*prefixes: str) -> set[str]:
  """The parameters of blocks."""
  leaves = ("0.scale", "0.bias", "1.kernel", "1.bias", "4.kernel", "4.bias")
  return {f"{prefix}.{leaf}" for prefix in prefixes for leaf in leaves}


def linear_keys(*prefixes: str) -> set[str]:
  return {f"{prefix}.{leaf}" for prefix in prefixes for leaf in ("kernel", "bias")}


def check_gradients_reach_everything(model: Functional, std: float = 0.2, without_loss: Sequence[str] = ()) -> None:
  """Every parameter must get a finite gradient from tokens and losses, over known and unknown values."""
  params = wide_params(model, std)
  keys = jax.random.split(jax.random.key(1), 14)
  batch = {name: jnp.concatenate([BATCH[name], PARTLY_UNKNOWN[name]]) for name in BATCH}

  def loss(params):
    output = model(params, batch, keys=keys)
    terms = loss_terms(output)
    losses = [jnp.sum(v * w) for name, (v, w) in terms.items() if not name.startswith(("acc", "mae", "context"))]
    vector = 0 if output.time_vector is None else jnp.sum(output.time_vector**2)
    return sum(losses) + jnp.sum(output.tokens**2) + vector

  for name, gradient in jax.jit(jax.grad(loss), compiler_options=FAST)(params).items():
    assert np.all(np.isfinite(gradient)) and (np.any(gradient != 0) or name in without_loss), name


def check_draws_belong_to_the_sample(model: Functional) -> None:
  """A sample's result follows its key through a permutation of the batch; evaluation needs no keys and is another."""
  params = wide_params(model)
  keys = jax.random.split(jax.random.key(1), 7)
  run = jax.jit(lambda params, batch, keys: model(params, batch, keys=keys)._replace(regressions=None))
  order = np.asarray([3, 1, 0, 6, 5, 2, 4])
  permuted = {name: values[order] for name, values in BATCH.items()}
  for given in (keys, None):
    whole = run(params, BATCH, given)
    moved = run(params, permuted, None if given is None else given[order])
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(moved)):
      np.testing.assert_allclose(np.asarray(a)[order], b, atol=2e-4, rtol=1e-5)
  assert np.abs(run(params, BATCH, keys).tokens - whole.tokens).max() > 0.1
  np.testing.assert_array_equal(run(params, BATCH, None).tokens, whole.tokens)
