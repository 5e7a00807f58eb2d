"""Operations of a program, counted in its jaxpr: what the model asks for, whichever kernels a compiler makes of it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

# Matrix products in cuDNN's attention; the gradient computes the scores once more.
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


class _What(NamedTuple):
  """What is counted.

  Attributes:
    platform: whose branch of `jax.lax.platform_dependent` runs; "": the one for all platforms that are not named.
    kernels_only: only what runs inside kernels, Pallas' or cuDNN's.
  """

  platform: str = ""
  kernels_only: bool = False


def count_flops(function: Callable[..., Any], *shapes: Any) -> int:
  """Operations of one call on arguments of these shapes (pytrees of arrays or `jax.ShapeDtypeStruct`).

  A multiplication with its addition counts 2. Matrix products and convolutions count, as is usual for MFU; norms,
  activations, softmax and the optimizer, about 1 % of a Stable Diffusion UNet, do not.
  """
  return count_jaxpr(jax.make_jaxpr(function)(*shapes).jaxpr)


def count_jaxpr(jaxpr: core.Jaxpr, platform: str = "", kernels_only: bool = False) -> int:
  """`count_flops` of a traced program, on all devices together, when it is lowered for "tpu", "cuda" or "cpu".

  Without a platform it is the model that counts, in its plain form, and not what kernels do to save memory.
  A loop counts as often as it runs and a Pallas kernel once for each cell of its grid; the compiler counts a loop once
  and kernels not at all. `kernels_only` counts nothing but kernels.
  """
  return _count(jaxpr, None, _What(platform, kernels_only))


def _count(jaxpr: core.Jaxpr, used: Sequence[bool] | None, what: _What) -> int:
  """`used` says which results are needed: what only the others need, is not run."""
  live = {var for var, needed in zip(jaxpr.outvars, used or [True] * len(jaxpr.outvars)) if needed and _is_var(var)}
  total = 0
  for equation in reversed(jaxpr.eqns):
    needed = [var in live for var in equation.outvars]
    if any(needed) or equation.effects:  # kernels write their results
      live.update(filter(_is_var, equation.invars))
      total += _equation_flops(equation, needed, what)
  return total


def _is_var(atom: Any) -> bool:
  return isinstance(atom, core.Var)


def _equation_flops(equation: core.JaxprEqn, needed: list[bool], what: _What) -> int:
  params, kind = equation.params, equation.primitive.name
  if kind == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return 0 if what.kernels_only else 2 * math.prod(equation.outvars[0].aval.shape) * depth
  if kind == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    _, inputs, *window = params["dimension_numbers"].rhs_spec
    taps = kernel[inputs] * math.prod(kernel[axis] for axis in window)
    # The gradient of a strided convolution puts zeros between its inputs; they are not multiplied.
    flops = 2 * math.prod(equation.outvars[0].aval.shape) * taps // math.prod(params["lhs_dilation"])
    return 0 if what.kernels_only else flops
  if kind in _CUDNN_PRODUCTS:
    rows, length, heads, size = equation.invars[0].aval.shape
    return _CUDNN_PRODUCTS[kind] * 2 * rows * heads * length * equation.invars[1].aval.shape[1] * size
  if kind == "cond":
    return _branch_flops(params, needed, what)
  if kind == "scan":
    return params["length"] * _count(params["jaxpr"].jaxpr, None, what)
  if kind == "shard_map":
    return params["mesh"].size * _count(params["jaxpr"], None, what)
  if kind == "pallas_call":
    return math.prod(params["grid_mapping"].grid) * _count(params["jaxpr"], None, _What(what.platform))
  inner = sum(_inner_flops(part, needed, what) for part in core.jaxprs_in_params(params))
  if kind == "while" and inner:
    raise ValueError("the operations of a loop whose length is not known cannot be counted")
  return inner


def _branch_flops(params: dict[str, Any], needed: list[bool], what: _What) -> int:
  """Of the platform's branch; of the largest where the choice is made while the program runs."""
  for platforms, branch in zip(params.get("branches_platforms") or (), params["branches"]):
    if platforms is None or what.platform in platforms:  # None: every platform that is not named
      return _count(branch.jaxpr, needed, what)
  return max(_count(branch.jaxpr, needed, what) for branch in params["branches"])


def _inner_flops(jaxpr: core.Jaxpr, needed: list[bool], what: _What) -> int:
  """Of a program that is called, as `jax.jit` and `jax.checkpoint` do; then its results are those of the call."""
  return _count(jaxpr, needed if len(needed) == len(jaxpr.outvars) else None, what)
