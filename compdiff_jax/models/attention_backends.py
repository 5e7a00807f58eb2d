"""softmax(query key^T / sqrt(D)) value: one function, computed by what suits the platform it is compiled for.

  TPU      Pallas splash attention for long self-attention, which never writes the scores to memory
  NVIDIA   cuDNN's flash attention, in float16 and bfloat16
  else     XLA: two matrix products around a softmax

The choice is made when a program is lowered, not where the process runs, so a CPU that compiles for a TPU gets the
TPU's kernel. All three multiply in the type of the inputs and keep scores, their softmax and all sums in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp

from compdiff_jax.sharding import AXES, BATCH_AXES

# What config.attention may be: the platform's choice, or the plain form everywhere.
BACKENDS = ("auto", "xla")

# The widest head of both kernels; the autoencoder has one of 512.
_MAX_HEAD = 128
# Tokens that the TPU kernel loads at once. Below the smallest length, scores are small enough to be written.
_BLOCKS = (1024, 512, 256)
_MIN_LENGTH = 1024


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
    if cudnn_takes(query):
      kernels["cuda"] = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
  if not kernels:
    return plain(query, key, value)
  return jax.lax.platform_dependent(query, key, value, default=plain, **kernels)


def cudnn_takes(query: jax.Array) -> bool:
  """Does cuDNN's flash attention compute these heads on this machine's GPUs?"""
  return query.dtype in (jnp.float16, jnp.bfloat16) and query.shape[-1] in range(8, _MAX_HEAD + 1, 8) and _flash_gpu()


@functools.cache
def _flash_gpu() -> bool:
  """NVIDIA GPUs from Ampere on. The program can only be traced where they are: cuDNN is asked what it supports."""
  try:
    devices = jax.local_devices(backend="cuda")
  except RuntimeError:
    return False
  return all(float(device.compute_capability) >= 8 for device in devices)


def splash_takes(query: jax.Array, key: jax.Array) -> bool:
  """Is this long self-attention in bfloat16, its length in whole blocks and its batch in whole rows a device?"""
  rows, length, _, size = query.shape
  mesh = jax.typeof(query).sharding.mesh
  return (
    query.dtype == jnp.bfloat16
    and size <= _MAX_HEAD
    and length == key.shape[1] >= _MIN_LENGTH
    and length % _BLOCKS[-1] == 0
    and (mesh.empty or (mesh.axis_names == AXES and rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0))
  )


def splash(query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False) -> jax.Array:
  """Attention by the Pallas TPU kernel (jax.experimental.pallas.ops.tpu.splash_attention); shapes as in `attention`.

  The compiler cannot split a kernel over devices, so the split is written down: rows over the batch axes of the mesh
  that the inputs live on, heads over its tensor axis where it divides them.

  Args:
    query, key, value: [B, T, H, D]; T a multiple of 256.
    interpret: run as ordinary JAX operations, for tests without a TPU.
  """
  heads = query.shape[2]
  mesh = jax.typeof(query).sharding.mesh
  if mesh.empty:
    return _splash_on_one_device(query, key, value, interpret=interpret)
  spec = jax.P(BATCH_AXES, None, "tensor" if heads % mesh.shape["tensor"] == 0 else None)
  kernel = functools.partial(_splash_on_one_device, interpret=interpret)
  return jax.shard_map(kernel, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(query, key, value)


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
  heads_first = lambda x: x.swapaxes(1, 2)  # noqa: E731
  query = query * size**-0.5  # the kernel does not scale
  return heads_first(jax.vmap(kernel)(heads_first(query), heads_first(key), heads_first(value)))
