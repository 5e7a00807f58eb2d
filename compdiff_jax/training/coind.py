"""CoInD (Gaudi, Sreekumar and Boddeti, ICLR 2025): the model's attributes are made conditionally independent.

If attribute i and the others are independent given the image, their scores add up at every x_t:

  eps(x_t, d) + eps(x_t, nothing) = eps(x_t, d_i) + eps(x_t, d without d_i)

The loss is the mean squared gap between the two sides, for one random attribute a sample. A combination that training
lacks is then the sum of parts that it has. The text is the same in all four, so the independence is conditional on the
text as well.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.interface import Attributes
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.diffusion.guidance import interleave
from compdiff_jax.diffusion.objective import denoising_loss
from compdiff_jax.latent_diffusion import LatentDiffusion, Params


def check(model: LatentDiffusion) -> None:
  """Raises an `InputError` where the conditioner cannot leave single attributes out."""
  config = model.conditioner_config
  if len(config.select(model.schema).names) < 2:
    raise InputError(f"loss.coind needs a conditioner of two attributes or more; conditioner.kind is {config.kind!r}")
  if not config.represents_unknown:
    raise InputError("loss.coind leaves single attributes out: the conditioner needs learned nulls")


def split_attributes(attributes: Attributes, schema: Schema, keys: jax.Array) -> tuple[dict, dict]:
  """({only attribute i}, {all others}) with one i drawn for each sample, and everything else unknown.

  Args:
    attributes: encoded values {name: [n, …]}; those of `schema` are split, others become unknown in both.
    schema: the attributes that the conditioner uses.
    keys: typed PRNG keys [n]; sample j is decided by keys[j] alone.
  """
  chosen = jax.vmap(lambda key: jax.random.randint(key, [], 0, len(schema.names)))(keys)
  only, others = {}, {}
  for index, attribute in enumerate(schema):
    values = jnp.asarray(attributes[attribute.name])
    unknown = jnp.asarray(attribute.unknown, values.dtype)
    own = (chosen == index).reshape(-1, *[1] * len(attribute.shape))
    only[attribute.name] = jnp.where(own, values, unknown)
    others[attribute.name] = jnp.where(own, unknown, values)
  return only, others


def num_rows(share: float, batch_size: int) -> int:
  """How many rows take part: the first of the global batch."""
  return max(1, round(share * batch_size))


def independence_gap(
  model: LatentDiffusion,
  params: Params,
  noisy: jax.Array,
  timesteps: jax.Array,
  text: jax.Array,
  attributes: Attributes,
  keys: Mapping[str, jax.Array],
  count: int,
) -> jax.Array:
  """Mean square of eps(d_i) + eps(d without d_i) - eps(d) - eps(nothing) of the first rows, float32 [count].

  Args:
    model, params: the networks and all their parameters.
    noisy: x_t [B, h, w, c]; timesteps: int [B]; text: text tokens [B, 77, C].
    attributes: encoded values {name: [B, …]} without attribute dropout.
    keys: typed PRNG keys by purpose, [B] each; "coind" draws i, "conditioner" is shared by the four conditions.
    count: how many rows.
  """
  noisy, timesteps, text, keys = jax.tree.map(lambda x: x[:count], (noisy, timesteps, text, dict(keys)))
  schema = model.conditioner_config.select(model.schema)
  whole = {name: jnp.asarray(attributes[name])[:count] for name in schema.names}
  only, others = split_attributes(whole, schema, keys["coind"])
  nothing = jax.tree.map(jnp.asarray, schema.unknown(count))

  # The four of a row stay next to each other, so that none leaves its device.
  four = lambda *parts: jax.tree.map(interleave, *parts)  # noqa: E731
  repeated = four(*[(noisy, timesteps, text, keys["conditioner"])] * 4)
  context, _ = model.join_context(params, repeated[2], four(only, others, whole, nothing), repeated[3])
  outputs = model.unet(params["unet"], repeated[0], repeated[1], *context).astype(jnp.float32)
  first, rest, full, empty = jnp.unstack(outputs.reshape(-1, 4, *outputs.shape[1:]), axis=1)
  return denoising_loss(first + rest, full + empty)
