"""Recomputation: blocks whose activations are computed again in the backward pass, instead of kept until then."""

import functools
from typing import Any

import jax
from flax import nnx
from jax import lax

from compdiff_jax.cli import InputError, nearest

# Convolutions and linear layers, but no product with a batch axis: attention scores are the largest activations.
_KEPT = (lax.conv_general_dilated_p,)


def _save_matmuls(primitive: Any, *args: Any, **params: Any) -> bool:
  return primitive in _KEPT or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


# What a block keeps between the forward and the backward pass. Its inputs are always kept.
POLICIES = {
  "none": jax.checkpoint_policies.everything_saveable,  # all activations: fastest, most memory
  "matmuls": _save_matmuls,  # outputs of convolutions and linear layers; norms, activations and attention are redone
  "blocks": jax.checkpoint_policies.nothing_saveable,  # nothing: least memory, one more forward pass
}


@functools.cache
def rematerialized(block: type[nnx.Module], policy: str) -> type[nnx.Module]:
  """`block` as a class whose call follows the named policy; parameters and results are the same."""
  if policy not in POLICIES:
    raise InputError(f"config.remat is {policy!r}{nearest(policy, POLICIES)}")
  if policy == "none":
    return block
  return type(block.__name__, (block,), {"__call__": nnx.remat(block.__call__, policy=POLICIES[policy])})
