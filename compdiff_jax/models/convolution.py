"""2D convolution: one function, computed by what suits the platform it is compiled for.

  CPU      1x1 convolutions as products with the kernel
           3x3 convolutions in float32 by Winograd's minimal filtering, where what it keeps fits in the cache
  else     XLA

Winograd's F(2x2, 3x3) computes four outputs from a tile of 4x4 inputs with 16 multiplications a channel instead of 36
(Lavin & Gray 2016, arXiv:1509.09308): y = A^T [(G g G^T) * (B^T d B)] A, for a tile d and a filter g. Over all tiles
and channels, each of the 16 is a matrix product. Sums of float32 numbers differ from the plain ones by rounding only.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from compdiff_jax.models.product import product

Padding = tuple[tuple[int, int], tuple[int, int]]
Matrix = Sequence[Sequence[float]]
Grid = Sequence[Sequence[jax.Array]]  # arrays of one shape, for each row and column of a tile

_TILE = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # B^T
_FILTER = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # G
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))  # A^T

# Strides and padding of a 3x3 convolution that keeps height and width.
_ONE = (1, 1)
_KEEP = ((1, 1), (1, 1))
_NONE = ((0, 0), (0, 0))
# Multiplications from which on a convolution repays its transforms, here and in compilation.
_MIN_WORK = 2**28
# Transformed inputs and outputs, in bytes: what no cache holds takes longer to write and read than the products save.
_MAX_BYTES = 2**25


def convolution(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> jax.Array:
  """[B, h, w, in] and [kh, kw, in, out] -> [B, h', w', out]: the one entry point of the networks' convolutions."""
  plain = functools.partial(_plain, strides=strides, padding=padding)
  if kernel.shape[:2] == strides == _ONE and padding == _NONE:
    return lax.platform_dependent(x, kernel, cpu=_pointwise, default=plain)
  if winograd_takes(x, kernel, strides, padding):
    return lax.platform_dependent(x, kernel, cpu=winograd, default=plain)
  return plain(x, kernel)


def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[B, h, w, in] and [1, 1, in, out] -> [B, h, w, out]: on a CPU in half the time, on a TPU with 1 % more bytes."""
  return product(x, kernel[0, 0])


def _plain(x: jax.Array, kernel: jax.Array, strides: tuple[int, int] = _ONE, padding: Padding = _KEEP) -> jax.Array:
  return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def winograd_takes(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> bool:
  """Is this a 3x3 convolution in float32 that keeps an even height and width, and is it the faster form?"""
  size, channels = kernel.shape[:2], kernel.shape[2:]
  pixels = math.prod(x.shape[:-1])
  return (
    x.dtype == jnp.float32
    and size == (3, 3)
    and strides == _ONE
    and padding == _KEEP
    and x.shape[1] % 2 == x.shape[2] % 2 == 0
    and pixels * math.prod(kernel.shape) >= _MIN_WORK
    and 4 * pixels * sum(channels) * x.dtype.itemsize <= _MAX_BYTES
  )


@jax.custom_vjp
def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """3x3 convolution with stride 1 and padding 1, [B, h, w, in] and [3, 3, in, out] -> [B, h, w, out]; h and w even."""
  products = [[tile @ filter_ for tile, filter_ in zip(*row)] for row in zip(_tiles(x), _filters(kernel))]
  return _interleave(_transform(_OUTPUT, products))


def _winograd_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return winograd(x, kernel), (x, kernel)


def _winograd_backward(inputs: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
  """By the input, every step of `winograd` transposed. By the kernel, the plain form: a CPU is slow at products that
  contract the long axis of tiles."""
  x, kernel = inputs
  of_outputs = _transform(_transposed(_OUTPUT), [[cotangent[:, i::2, j::2] for j in range(2)] for i in range(2)])
  of_tiles = [[tile @ filter_.T for tile, filter_ in zip(*row)] for row in zip(of_outputs, _filters(kernel))]
  (of_kernel,) = jax.linear_transpose(functools.partial(_plain, x), kernel)(cotangent)
  return _overlap(_transform(_transposed(_TILE), of_tiles)), of_kernel


winograd.defvjp(_winograd_forward, _winograd_backward)


def _transform(matrix: Matrix, grid: Grid) -> Grid:
  """M g M^T, for the numbers of every array of a grid."""
  columns = [_combine(matrix, column) for column in zip(*grid)]
  return [_combine(matrix, row) for row in zip(*columns)]


def _combine(matrix: Matrix, arrays: Sequence[jax.Array]) -> list[jax.Array]:
  return [sum(factor * array for factor, array in zip(row, arrays) if factor) for row in matrix]


def _transposed(matrix: Matrix) -> Matrix:
  return tuple(zip(*matrix))


def _filters(kernel: jax.Array) -> Grid:
  """G g G^T: [3, 3, in, out] -> 4x4 of [in, out]."""
  return _transform(_FILTER, kernel)


def _tiles(x: jax.Array) -> Grid:
  """B^T d B of overlapping tiles: [B, h, w, C] -> 4x4 of [B, h/2, w/2, C]."""
  height, width = x.shape[1:3]
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return _transform(
    _TILE, [[padded[:, i : i + height - 1 : 2, j : j + width - 1 : 2] for j in range(4)] for i in range(4)]
  )


def _overlap(grid: Grid) -> jax.Array:
  """The transpose of cutting tiles, 4x4 of [B, h/2, w/2, C] -> [B, h, w, C]: tiles are added where they overlap."""
  rows = [_overlap_along(2, row) for row in grid]
  return _overlap_along(1, rows)


def _overlap_along(axis: int, parts: Sequence[jax.Array]) -> jax.Array:
  """The first and the last of a tile's four places are the third of the tile before and the second of the one after."""
  shift = lambda part, by: lax.pad(  # noqa: E731
    part, jnp.zeros((), part.dtype), [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(part.ndim)]
  )
  places = jnp.stack([parts[1] + shift(parts[3], 1), parts[2] + shift(parts[0], -1)], axis + 1)
  return places.reshape(*places.shape[:axis], -1, *places.shape[axis + 2 :])


def _interleave(grid: Grid) -> jax.Array:
  """2x2 of [B, h/2, w/2, C] -> [B, h, w, C]."""
  places = jnp.stack([jnp.stack(row, 3) for row in grid], 2)
  batch, height, _, width, _, channels = places.shape
  return places.reshape(batch, 2 * height, 2 * width, channels)
