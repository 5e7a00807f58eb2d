"""No conditioner: the text baseline, and plain Stable Diffusion. Demographics may still stand in the prompt."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.conditioning.config import ConditionerConfig
from compdiff_jax.conditioning.interface import Attributes, ConditionerOutput
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.models.config import check_positive


@dataclasses.dataclass(frozen=True)
class NoConditionerConfig(ConditionerConfig):
  """`d_ctx` is the width of the cross-attention context, to which nothing is added."""

  d_ctx: int = 1024

  kind = "none"

  def __post_init__(self):
    check_positive(self, "d_ctx")

  def select(self, schema: Schema) -> Schema:
    return Schema(())

  def build(self, schema: Schema, rngs: nnx.Rngs) -> "NoConditioner":
    return NoConditioner(self)


class NoConditioner(nnx.Module):
  """Zero tokens, no parameters, no losses."""

  def __init__(self, config: NoConditionerConfig):
    self.config = config

  def __call__(self, attributes: Attributes, *, keys: jax.Array | None = None) -> ConditionerOutput:
    """Tokens [B, 0, d_ctx]; B is 1 where there are no attributes to tell the size of the batch."""
    batch = len(next(iter(attributes.values()))) if attributes else 1
    return ConditionerOutput(jnp.zeros([batch, 0, self.config.d_ctx]), conditioned=jnp.ones([batch], bool))
