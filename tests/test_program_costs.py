"""Collectives, bytes and operations, read from compiled and from traced programs."""

import jax
import jax.numpy as jnp
import pytest

from compdiff_jax import sharding
from compdiff_jax.ahead_of_time.flops import count_jaxpr
from compdiff_jax.ahead_of_time.hlo import Program

_ROW = jax.P("data")


def _program(function, *shapes):
  mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
  mapped = jax.shard_map(function, mesh=mesh, in_specs=_ROW, out_specs=_ROW, check_vma=False)
  return Program(jax.jit(mapped).lower(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]).compile().as_text())


def test_collectives_are_counted_with_their_bytes_and_loops():
  """Each device holds [2, 16] float32, 128 bytes."""

  def program(x):
    x, _ = jax.lax.scan(lambda c, _: (jax.lax.psum(c, "data") * 0.5, None), x, None, length=7)
    whole = jax.lax.all_gather(x, "data")
    part = jax.lax.psum_scatter(whole, "data")
    return jax.lax.ppermute(part, "data", [(i, (i + 1) % 8) for i in range(8)])

  found = {one.kind: one for one in _program(program, (16, 16)).collectives()}
  assert (found["all-reduce"].times, found["all-reduce"].size) == (7, 128)
  assert (found["all-gather"].times, found["all-gather"].size) == (1, 8 * 128)
  assert (found["reduce-scatter"].times, found["reduce-scatter"].size) == (1, 8 * 128)
  assert found["collective-permute"].size == 128
  assert not any(one.between_slices for one in found.values())
  # In a ring of 8, each device passes 7 of the 8 parts on, for a sum twice.
  sent = {kind: one.sent for kind, one in found.items()}
  assert sent == {
    "all-reduce": 7 * 2 * 7 * 16,
    "all-gather": 7 * 128,
    "reduce-scatter": 7 * 128,
    "collective-permute": 128,
  }


def test_asynchronous_and_slice_crossing_forms():
  text = """HloModule m, is_scheduled=true, num_partitions=24
%loop (p: f32[8]) -> f32[8] {
  %ag = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %rs = bf16[4]{0} reduce-scatter(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}
%started (q: bf16[4]) -> bf16[8] {
  ROOT %ag.1 = bf16[8]{0} all-gather(%q), replica_groups={{0,1}}, frontend_attributes={chain_id="7"}
}
%finished (q: bf16[4]) -> bf16[8] {
  ROOT %ag.2 = bf16[8]{0:S(1)} all-gather(%q), replica_groups={{0,1}}, frontend_attributes={chain_id="7"}
}
%kept (x: bf16[8]) -> bf16[2] {
  %ar = bf16[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = bf16[2]{0:T(8)} dynamic-slice(%ar, %offset), dynamic_slice_sizes={2}
}
%condition (p: (s32[], f32[8])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit.1), direction=LT
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%t), condition=%c, body=%loop, backend_config={"known_trip_count":{"n":"3"}}
  %v = f32[8] while(%t), condition=%condition, body=%loop, metadata={op_name="jit(f)/while"}
  %r = f32[4] all-reduce(%x), replica_groups=mesh['a'=4,'b'=6] {'a':(1)2,'b'}, to_apply=%add
  %e = f32[4]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  %s = (f32[64]{0}, u32[], token[]) send(%b), frontend_attributes={_handler_name="xla_megascale_runtime"}
  %t = (f32[64]{0}, u32[], token[]) send(%b), is_host_transfer=true
  %a = bf16[8] fusion(%w), kind=kCustom, calls=%started
  %z = bf16[8] fusion(%a), kind=kCustom, calls=%finished
  %k = bf16[2] fusion(%z), kind=kCustom, calls=%kept
  %g = ((f32[2]{0}, bf16[4]{0}), (f32[8]{0}, bf16[16]{0})) all-gather-start(%x, %y), replica_groups={{0,1,2,3}}
  %p = ((f32[8]{0}, f32[16]{0}), (f32[2]{0}, f32[4]{0})) reduce-scatter-start(%x, %y), replica_groups={{0,1,2,3}}
}
"""
  assert [tuple(one) for one in Program(text).collectives()] == [
    ("all-gather", 128, 3, False, 4),
    ("reduce-scatter", 32, 3, False, 4),
    ("all-gather", 128, 5, False, 4),  # a TPU program states the length of a loop in its condition only
    ("reduce-scatter", 32, 5, False, 4),
    ("all-reduce", 16, 1, False, 12),
    ("all-reduce", 16, 1, False, 24),  # all devices
    ("send", 256, 1, True, 1),
    ("all-gather", 16, 1, False, 2),  # one that runs beside other work
    ("reduce-scatter", 16, 1, False, 4),  # a sum of which a device keeps its part
    ("all-gather", 64, 1, False, 4),  # several arrays at once, as on GPUs: the parts, then the whole
    ("reduce-scatter", 96, 1, False, 4),  # the whole, then the parts
  ]


def test_bytes_are_those_of_the_compiler_and_loops_multiply_them():
  def once(x, w):
    return jnp.tanh(x @ w) + x

  def loop(x, w):
    return jax.lax.scan(lambda c, _: (once(c, w), None), x, None, length=9)[0]

  shapes = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 2
  single, repeated = (jax.jit(f).lower(*shapes).compile() for f in (once, loop))
  alone, each = Program(single.as_text()).bytes_accessed()
  assert alone == each and alone == pytest.approx(single.cost_analysis()["bytes accessed"], rel=0.1)
  total, each = Program(repeated.as_text()).bytes_accessed()
  assert total - each == pytest.approx(8 * alone, rel=0.01)


def test_kernels_are_counted_by_hand():
  """Attention of [B, H, T, D] has products of 2 B H T T D operations.

  Two of them forward; backward the scores, their gradient and those of query, key and value, all from one pass.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  rows, heads, tokens, size = 2, 3, 512, 64
  blocks = splash.BlockSizes(
    block_q=256,
    block_kv=256,
    block_kv_compute=128,
    block_q_dkv=256,
    block_kv_dkv=256,
    block_kv_dkv_compute=128,
    use_fused_bwd_kernel=True,
  )
  mask = splash.MultiHeadMask([splash.FullMask((tokens, tokens))] * heads)
  kernel = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)

  def plain(q, k, v):
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k)
    return jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(scores), v)

  def attention(q, k, v):
    return jax.lax.platform_dependent(q, k, v, tpu=jax.vmap(kernel), default=plain)

  def loss(q, k, v):
    return jnp.sum(attention(q, k, v) ** 2)

  shapes = [jax.ShapeDtypeStruct((rows, heads, tokens, size), jnp.float32)] * 3
  product = 2 * rows * heads * tokens * tokens * size
  forward = jax.make_jaxpr(attention)(*shapes).jaxpr
  gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*shapes).jaxpr
  assert count_jaxpr(forward, "tpu") == count_jaxpr(forward, "tpu", kernels_only=True) == 2 * product
  assert count_jaxpr(gradient, "tpu", kernels_only=True) == 7 * product
  # Besides the kernels, sum(o * do) of every query.
  assert count_jaxpr(gradient, "tpu") == 7 * product + 2 * rows * heads * tokens * size
  assert count_jaxpr(forward) == 2 * product and count_jaxpr(gradient) == 6 * product
  assert count_jaxpr(gradient, kernels_only=True) == 0
  # A mesh of several devices: the kernel's shapes are those of one.
  mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1}, jax.devices()[:2])
  split = jax.shard_map(attention, mesh=mesh, in_specs=_ROW, out_specs=_ROW, check_vma=False)
  assert count_jaxpr(jax.make_jaxpr(split)(*shapes).jaxpr, "tpu") == 2 * product
