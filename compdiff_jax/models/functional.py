"""A module split once into a pure function and one flat dict of parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from compdiff_jax.models.layers import Conv, Dense

Params = Mapping[str, jax.Array]


class Functional:
  """A network as a pure function of its parameters.

  The parameters are a flat dict with dotted keys, `{"down_blocks.0.resnets.0.conv1.kernel": array}`, so that sharding
  rules, optimizer groups and key tables are all patterns on one kind of name. `init` and the call are pure: they may be
  traced by `jax.jit`, differentiated and mapped.

  Attributes:
    shapes: `{key: jax.ShapeDtypeStruct}` of every parameter, in the order in which `init` returns them.
  """

  def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
    """`build(rngs)` returns the module. It is only traced here: a full-size model costs no memory."""
    self._build = build
    module = nnx.eval_shape(lambda: build(_Keys(jax.random.key(0))))
    self._layers = {_dotted(path): layer for path, layer in nnx.iter_graph(module) if isinstance(layer, (Dense, Conv))}
    # Naming Param makes the split fail when a module holds anything else, such as hidden random state.
    self._graph, state = nnx.split(module, nnx.Param)
    self._paths = {_dotted(path): path for path, _ in nnx.to_flat_state(state)}
    self.shapes: dict[str, jax.ShapeDtypeStruct] = _flatten(state)

  def init(self, key: jax.Array) -> dict[str, jax.Array]:
    """Freshly drawn parameters, a pure function of the random key.

    Best called outside `jax.jit`: one small program for each array size compiles faster than one large program.
    """
    return _flatten(nnx.split(self._build(_Keys(key)), nnx.Param)[1])

  def __call__(self, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
    """Calls `method` of the module whose parameters are `params`; the other arguments are the method's own."""
    leaves = [(path, nnx.Param(params[key])) for key, path in self._paths.items()]
    module = nnx.merge(self._graph, nnx.from_flat_state(leaves))
    return getattr(module, method)(*args, **kwargs)

  def converted(self, params: Params) -> dict[str, jax.Array]:
    """The parameters, those of linear and convolutional layers in the types that these convert them to anyway.

    For calls in a loop, which would convert them in each: XLA moves that out of the loop on TPUs, on GPUs it does not.
    """
    types = {f"{path}.{name}": layer.dtype for path, layer in self._layers.items() for name in ("kernel", "bias")}
    return {key: value.astype(types.get(key, value.dtype)) for key, value in params.items()}


class _Keys:
  """What networks use of `nnx.Rngs`, with its keys, but counted in Python.

  A counter in the traced program makes building the SD 2.1 UNet abstractly eight times as slow.
  """

  def __init__(self, key: jax.Array):
    self._key = key
    self._count = 0

  def params(self) -> jax.Array:
    key = jax.random.fold_in(self._key, self._count)
    self._count += 1
    return key


def _dotted(path: tuple[str | int, ...]) -> str:
  return ".".join(map(str, path))


def _flatten(state: nnx.State) -> dict[str, Any]:
  return {_dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}
