"""Attribute dropout: in training some attributes become unknown, so that the learned nulls are trained."""

import jax
import jax.numpy as jnp

from compdiff_jax.conditioning.interface import Attributes
from compdiff_jax.conditioning.schema import Schema


def drop_attributes(
  attributes: Attributes, schema: Schema, keys: jax.Array, attribute_rate: float, full_rate: float
) -> dict[str, jax.Array]:
  """Turns values into unknown: each attribute with `attribute_rate`, all of a sample together with `full_rate`.

  One attribute is then unknown with probability 1 - (1 - attribute_rate)(1 - full_rate), 0.19 for 0.1 and 0.1, in
  addition to what the data leave unknown; the rule is that of the reference's CompDiff-2.

  Args:
    attributes: encoded values {name: [B, …]} of every attribute of the schema.
    schema: names the attributes and their unknown values.
    keys: typed PRNG keys [B]; sample i is decided by keys[i] alone.
    attribute_rate: probability in [0, 1] for each attribute on its own.
    full_rate: probability in [0, 1] for all attributes of a sample.

  Returns:
    The batch with the same names and dtypes.
  """
  draws = jax.vmap(lambda key: jax.random.uniform(key, [1 + len(schema.names)]))(keys)
  full = draws[:, 0] < full_rate
  dropped = {}
  for column, attribute in enumerate(schema, start=1):
    values = jnp.asarray(attributes[attribute.name])
    drop = full | (draws[:, column] < attribute_rate)
    drop = drop.reshape(-1, *[1] * len(attribute.shape))
    dropped[attribute.name] = jnp.where(drop, jnp.asarray(attribute.unknown, values.dtype), values)
  return dropped
