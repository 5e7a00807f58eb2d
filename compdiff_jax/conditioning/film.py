"""Feature-wise modulation (FiLM, Perez et al. 2018) of the UNet's residual blocks by a node of the conditioner.

After every residual block the features become gamma h + beta, with one gamma and beta for each channel. The heads start
at gamma 1 and beta 0, so training starts from the UNet as it is. Parameter paths are those of the reference's
FiLMAdapter.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from compdiff_jax.conditioning.blocks import Silu
from compdiff_jax.conditioning.interface import Modulation
from compdiff_jax.models.layers import Dense, LayerNorm


class FiLM(nnx.Module):
  """LayerNorm and two layers that all blocks share, then two linear heads for each block."""

  def __init__(self, d_node: int, d_hidden: int, channels: Sequence[int], rngs: nnx.Rngs):
    layers = [LayerNorm(d_node), Dense(d_node, d_hidden, rngs=rngs), Silu(), Dense(d_hidden, d_hidden, rngs=rngs)]
    self.shared_encoder = nnx.List([*layers, Silu()])
    self.gamma_heads = nnx.List([_constant(d_hidden, width, 1.0, rngs) for width in channels])
    self.beta_heads = nnx.List([_constant(d_hidden, width, 0.0, rngs) for width in channels])

  def __call__(self, node: jax.Array, conditioned: jax.Array) -> Modulation:
    """`node` [B, d] to the modulation; `conditioned` bool [B] says where it is not the identity."""
    for layer in self.shared_encoder:
      node = layer(node)

    def heads(layers, identity):
      return [jnp.where(conditioned[:, None], head(node), identity) for head in layers]

    return tuple(zip(heads(self.gamma_heads, 1.0), heads(self.beta_heads, 0.0)))


def _constant(d_in: int, d_out: int, value: float, rngs: nnx.Rngs) -> Dense:
  """A linear layer whose output is `value` at first."""
  layer = Dense(d_in, d_out, rngs=rngs)
  layer.kernel = nnx.Param(jnp.zeros([d_in, d_out]))
  layer.bias = nnx.Param(jnp.full([d_out], value))
  return layer
