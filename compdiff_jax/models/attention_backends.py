"""softmax(query key^T / sqrt(D)) value: one function, computed by what suits the platform it is compiled for.

  TPU      Pallas splash attention for long self-attention, which never writes the scores to memory
  NVIDIA   cuDNN's flash attention, in float16 and bfloat16
  CPU      a loop over heads for long sequences in float32, whose scores stay in the cache
  else     XLA: two matrix products around a softmax

The choice is made when a program is lowered, not where the process runs, so a CPU that compiles for a TPU gets the
TPU's kernel. All of them multiply in the type of the inputs and keep scores, their softmax and all sums in float32.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from compdiff_jax.sharding import AXES, BATCH_AXES

# What config.attention may be: the platform's choice, or the plain form everywhere.
BACKENDS = ("auto", "xla")

# The widest head of the kernels and the loop; the autoencoder has one of 512.
_MAX_HEAD = 128
# Tokens that the TPU kernel loads at once. Below the smallest length, scores are small enough to be written.
_BLOCKS = (1024, 512, 256)
_MIN_LENGTH = 1024
# Scores of a head from which on the loop is the faster form on a CPU.
_MIN_SCORES = 2**16


def attention(
  query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = False, backend: str = "auto"
) -> jax.Array:
  """softmax(query key^T / sqrt(D)) value: the one entry point of every attention in this package.

  Scores are float32 whatever the input type, so a model that asks for `upcast_attention` (SD 2.1-768, whose scores
  overflow float16) needs no second path: products of float16 or bfloat16 numbers are exact in float32.

  Args:
    query: [B, T, H, D].
    key: [B, S, H, D].
    value: [B, S, H, D].
    causal: token t sees only tokens up to t.
    backend: "auto", or "xla" for the plain form on every platform.

  Returns:
    [B, T, H, D], in the type of `value`.
  """
  plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="xla")
  kernels = {}
  if backend == "auto":
    if not causal and splash_takes(query, key):
      kernels["tpu"] = splash
    if not causal and by_head_takes(query, key):
      kernels["cpu"] = by_head
    if cudnn_takes(query):
      kernels["cuda"] = functools.partial(in_even_lengths, causal=causal)
  if not kernels:
    return plain(query, key, value)
  return jax.lax.platform_dependent(query, key, value, default=plain, **kernels)


def cudnn_takes(query: jax.Array) -> bool:
  """Does cuDNN's flash attention compute these heads on the NVIDIA GPUs that this process may compile for?"""
  return query.dtype in (jnp.float16, jnp.bfloat16) and query.shape[-1] in range(8, _MAX_HEAD + 1, 8) and _has_cudnn()


@functools.cache
def _has_cudnn() -> bool:
  """Is cuDNN installed, without which its attention cannot be traced, and are this machine's GPUs from Ampere on?"""
  x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
  try:
    jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)
  except (RuntimeError, NotImplementedError):
    return False
  try:
    devices = jax.local_devices(backend="cuda")
  except RuntimeError:
    return True  # no GPU here, but a program may be compiled for one
  return all(float(device.compute_capability) >= 8 for device in devices)


def in_even_lengths(
  query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool, implementation: str = "cudnn"
) -> jax.Array:
  """Attention by `jax.nn.dot_product_attention`, which refuses to train with cuDNN on odd lengths, as the text's 77.

  A token of zeros is added to them, which as a key is masked.
  """
  length, key_length = query.shape[1], key.shape[1]
  mask = {}
  if key_length % 2:
    mask["key_value_seq_lengths"] = jnp.full(query.shape[:1], key_length, jnp.int32)
  query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
  out = jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation=implementation, **mask)
  return out[:, :length]


def splash_takes(query: jax.Array, key: jax.Array) -> bool:
  """Is this long self-attention in bfloat16, its length in whole blocks and its batch in whole rows a device?"""
  _, length, _, size = query.shape
  return (
    query.dtype == jnp.bfloat16
    and size <= _MAX_HEAD
    and length == key.shape[1] >= _MIN_LENGTH
    and length % _BLOCKS[-1] == 0
    and _splits_into_rows(query)
  )


def by_head_takes(query: jax.Array, key: jax.Array) -> bool:
  """Is this float32 with many scores a head, and its batch in whole rows a device?"""
  return (
    query.dtype == jnp.float32
    and query.shape[-1] <= _MAX_HEAD
    and query.shape[1] * key.shape[1] >= _MIN_SCORES
    and _splits_into_rows(query)
  )


def _splits_into_rows(query: jax.Array) -> bool:
  mesh = jax.typeof(query).sharding.mesh
  shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES) if mesh.axis_names == AXES else 0
  return mesh.empty or (shares > 0 and query.shape[0] % shares == 0)


def _on_every_device(kernel: Callable[..., jax.Array], *inputs: jax.Array) -> jax.Array:
  """Calls a kernel on each device's part of query, key and value.

  The compiler can split neither a kernel nor a loop over devices, so the split is written down: rows over the batch
  axes of the mesh that the inputs live on, heads over its tensor axis where it divides them.
  """
  mesh = jax.typeof(inputs[0]).sharding.mesh
  if mesh.empty:
    return kernel(*inputs)
  spec = jax.P(BATCH_AXES, None, "tensor" if inputs[0].shape[2] % mesh.shape["tensor"] == 0 else None)
  return jax.shard_map(kernel, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*inputs)


def splash(query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False) -> jax.Array:
  """Attention by the Pallas TPU kernel (jax.experimental.pallas.ops.tpu.splash_attention); shapes as in `attention`.

  Args:
    query, key, value: [B, T, H, D]; T a multiple of 256.
    interpret: run as ordinary JAX operations, for tests without a TPU.
  """
  return _on_every_device(functools.partial(_splash_on_one_device, interpret=interpret), query, key, value)


def _splash_on_one_device(query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool) -> jax.Array:
  from jax.experimental.pallas.ops.tpu import splash_attention  # half a second that only long attention pays

  length, heads, size = query.shape[1:]
  block = next(block for block in _BLOCKS if length % block == 0)
  compute = min(block, 512)
  blocks = splash_attention.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=compute,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=compute,
    # The gradients of query, key and value in one pass over the scores; in two, they are computed once more.
    use_fused_bwd_kernel=True,
  )
  mask = splash_attention.MultiHeadMask([splash_attention.FullMask((length, length))] * heads)
  kernel = splash_attention.make_splash_mha(
    mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
  )
  query = query * size**-0.5  # the kernel does not scale
  return _heads_first(jax.vmap(kernel)(_heads_first(query), _heads_first(key), _heads_first(value)))


def _heads_first(x: jax.Array) -> jax.Array:
  """[B, T, H, D] to [B, H, T, D], and back."""
  return x.swapaxes(1, 2)


def by_head(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Attention, head by head; shapes as in `attention`.

  On a CPU the scores of a whole batch, 134 MB for 8 images, 4 heads and 1,024 tokens, cost far more to write and read
  than to compute. Those of a few heads stay in the cache. The gradient computes them again, as flash attention does
  (Dao et al. 2022, algorithm 4).
  """
  return _on_every_device(_by_head_on_one_device, query, key, value)


def _by_head_on_one_device(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  rows, length, heads, size = query.shape
  one_axis = lambda x: _heads_first(x).reshape(rows * heads, *x.shape[1::2])  # noqa: E731
  out = _heads_in_turn(one_axis(query * size**-0.5), one_axis(key), one_axis(value))
  return _heads_first(out.reshape(rows, heads, length, size))


@jax.custom_vjp
def _heads_in_turn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """softmax(query key^T) value for each of N heads: [N, T, D], [N, S, D], [N, S, D] -> [N, T, D]."""
  return _heads_forward(query, key, value)[0]


def _heads_forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  def head(_, inputs):
    query, key, value = inputs
    scores = query @ key.T
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    return None, (weights @ value / total, (largest + jnp.log(total))[:, 0])

  # Four heads a turn: parts of one head that have a single thread leave the other cores to the others.
  _, (out, log_totals) = jax.lax.scan(head, None, (query, key, value), unroll=4)
  return out, (query, key, value, out, log_totals)


def _heads_backward(kept: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
  """Gradients by query, key and value.

  Sums over queries contract the first axis of the scores, which a CPU would transpose. As products from the left it
  transposes queries and cotangents instead; the barriers keep the compiler from turning them round again.
  """

  def head(inputs):
    query, key, value, out, log_totals, cotangent = inputs
    shift = (out * cotangent).sum(-1, keepdims=True)
    weights = jnp.exp(query @ key.T - log_totals[:, None])
    of_scores = weights * (cotangent @ value.T - shift)
    query_t, cotangent_t = jax.lax.optimization_barrier((query.T, cotangent.T))
    of_key_t, of_value_t = jax.lax.optimization_barrier((query_t @ of_scores, cotangent_t @ weights))
    return of_scores @ key, of_key_t.T, of_value_t.T

  return jax.lax.map(head, (*kept, cotangent))


_heads_in_turn.defvjp(_heads_forward, _heads_backward)
