"""Attention: every backend against the closed form in float64, which one is taken, and programs lowered for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
import torch_parity
from conftest import config_arguments

from compdiff_jax import sharding
from compdiff_jax.ahead_of_time import program
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.config import load_config
from compdiff_jax.latent_diffusion import LatentDiffusion
from compdiff_jax.models.attention_backends import (
  attention,
  by_head,
  by_head_takes,
  cudnn_takes,
  in_even_lengths,
  splash,
  splash_takes,
)

_ONE_ROW_A_DEVICE = {"data": 2, "fsdp": 4, "tensor": 1}


def _closed_form(query, key, value, causal=False):
  scores = np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
  if causal:
    scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
  return np.einsum("bhts,bshd->bthd", scipy.special.softmax(scores, axis=-1), value)


def _torch_gradients(query, key, value, cotangent):
  """Gradients of sum(attention * cotangent) in float64, by torch."""
  leaves = [torch.from_numpy(x.astype(np.float64)).requires_grad_() for x in (query, key, value)]
  q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
  weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)
  ((weights @ v).transpose(1, 2) * torch.from_numpy(cotangent)).sum().backward()
  return [leaf.grad.numpy() for leaf in leaves]


@pytest.mark.parametrize("causal", [False, True])
def test_plain_form(causal):
  query, key, value = (torch_parity.normal(seed, 2, 6, 3, 4) for seed in range(3))
  expected = _closed_form(query.astype(np.float64), key, value, causal)
  np.testing.assert_allclose(attention(query, key, value, causal=causal), expected, rtol=0, atol=1e-6)


def test_scores_are_float32():
  """Scores near 1,000 whose differences float16 and bfloat16 would round away or overflow."""
  query = jnp.full((1, 1, 1, 64), 16, jnp.bfloat16)
  key = jnp.full((1, 2, 1, 64), 8, jnp.bfloat16).at[0, 1, 0, 0].set(8.25)
  value = jnp.stack([jnp.zeros(64), jnp.ones(64)]).astype(jnp.bfloat16)[None, :, None]
  expected = scipy.special.expit(16 * 0.25 / 8)
  np.testing.assert_allclose(attention(query, key, value), expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize(("length", "size", "devices"), [(512, 64, 1), (256, 40, 8)])
def test_splash_and_its_gradient(length, size, devices):
  """Interpreted on the CPU, in float32; whole on one device, then split over the rows of eight."""
  query, key, value, cotangent = (torch_parity.normal(seed, devices, length, 2, size) for seed in range(4))
  inputs = jax.tree.map(jnp.asarray, (query, key, value, cotangent))
  if devices > 1:
    inputs = jax.device_put(inputs, sharding.batch_sharding(sharding.make_mesh(_ONE_ROW_A_DEVICE)))

  @jax.jit
  def both(query, key, value, cotangent):
    out, gradient = jax.vjp(functools.partial(splash, interpret=True), query, key, value)
    return out, gradient(cotangent)

  out, gradients = both(*inputs)
  np.testing.assert_allclose(out, _closed_form(query.astype(np.float64), key, value), rtol=0, atol=2e-6)
  for ours, theirs in zip(gradients, _torch_gradients(query, key, value, cotangent)):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("length", "key_length", "devices"), [(256, 256, 1), (300, 77, 1), (256, 256, 8)])
def test_by_head_and_its_gradient(length, key_length, devices):
  """Whole on one device, then rows and heads split over eight."""
  lengths = (length, key_length, key_length, length)
  arrays = [torch_parity.normal(seed, 4, n, 2, 24) for seed, n in enumerate(lengths)]
  inputs = jax.tree.map(jnp.asarray, arrays)
  if devices > 1:
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    inputs = jax.device_put(inputs, sharding.batch_sharding(mesh))

  @jax.jit
  def both(query, key, value, cotangent):
    out, gradient = jax.vjp(by_head, query, key, value)
    return out, gradient(cotangent)

  compiled = both.lower(*inputs).compile()
  assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "all-reduce"))
  out, gradients = compiled(*inputs)
  np.testing.assert_allclose(out, _closed_form(arrays[0].astype(np.float64), *arrays[1:3]), rtol=0, atol=2e-6)
  for ours, theirs in zip(gradients, _torch_gradients(*arrays)):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


def test_by_head_with_scores_whose_exponential_overflows():
  query, key, value = (torch_parity.normal(seed, 1, 256, 1, 16) for seed in range(3))
  query *= 50
  expected = _closed_form(query.astype(np.float64), key, value)
  np.testing.assert_allclose(by_head(*map(jnp.asarray, (query, key, value))), expected, rtol=0, atol=5e-4)


def test_by_head_takes_many_scores_in_float32():
  long, wide = _heads(8, 256, dtype=jnp.float32), _heads(8, 256, size=512, dtype=jnp.float32)
  assert by_head_takes(*long) and by_head_takes(*_heads(8, 1024, 77, dtype=jnp.float32))
  assert not by_head_takes(*_heads(8, 64, dtype=jnp.float32)) and not by_head_takes(*_heads(8, 256))
  assert not by_head_takes(*wide)
  text = jax.jit(attention).trace(long[0], long[1], long[1]).lower(lowering_platforms=("cpu",)).as_text()
  assert "stablehlo.while" in text
  plain = jax.jit(attention).trace(long[0], long[1], long[1]).lower(lowering_platforms=("cuda",)).as_text()
  assert "stablehlo.while" not in plain


def _heads(rows, length, key_length=None, size=64, dtype=jnp.bfloat16, mesh=None):
  where = sharding.batch_sharding(mesh) if mesh else None
  return [jax.ShapeDtypeStruct((rows, n, 2, size), dtype, sharding=where) for n in (length, key_length or length)]


def _takes(*abstract):
  found = []
  jax.eval_shape(lambda query, key: found.append(splash_takes(query, key)), *abstract)
  return found[0]


def test_splash_takes_long_self_attention_and_leaves_the_rest():
  mesh = sharding.make_mesh(_ONE_ROW_A_DEVICE)
  for length in (1024, 4096, 48 * 48, 96 * 96):  # levels of 512 and 768 pixels
    assert _takes(*_heads(8, length))
  assert _takes(*_heads(16, 1024, mesh=mesh))
  assert not _takes(*_heads(8, 256))
  assert not _takes(*_heads(8, 1024 + 128))
  assert not _takes(*_heads(8, 4096, 77))
  assert not _takes(*_heads(8, 4096, dtype=jnp.float32))
  assert not _takes(*_heads(8, 4096, size=512))  # of an autoencoder


def test_splash_leaves_rows_that_the_devices_cannot_share():
  mesh = sharding.make_mesh(_ONE_ROW_A_DEVICE)
  found = []

  def part(x):
    query = x[:4]  # as CoInD takes some rows of a batch
    found.append(splash_takes(query, query))
    return query

  jax.jit(part).trace(_heads(8, 1024, mesh=mesh)[0])
  assert found == [False]


@pytest.fixture(scope="module")
def setting(workspace):
  """A run whose self-attention is 1,024 tokens long, in bfloat16, and its schema."""
  path, *overrides = config_arguments(workspace)
  config = load_config(path.removeprefix("--config="), [*overrides, "--config.data.image_size=128"])
  config.compute_dtype = "bfloat16"
  return config, Schema.load(workspace / "data" / "schema.json")


def _kernels(traced, platform="tpu"):
  """Different kernels in the program; blocks of one shape share theirs."""
  return traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")


@pytest.mark.parametrize(
  ("changes", "kernels"),
  [
    # The kernel, again where it is recomputed and keeps what the gradient needs, and the gradient.
    ({"mesh.fsdp": 4, "remat": "matmuls"}, 3),
    # In a scan, and a second pass of the UNet over four times a quarter of the rows.
    ({"train.accumulation": 2, "train.batch_size": 64, "loss.coind": 1.0}, 2),
  ],
  ids=["fsdp and remat", "accumulation and CoInD"],
)
def test_training_step_lowered_for_tpu(setting, changes, kernels):
  """Lowered on a machine without one."""
  config, schema = setting[0].copy_and_resolve_references(), setting[1]
  config.update_from_flattened_dict(changes)
  assert _kernels(program.trace("train", config, schema, jax.devices(), "moments").traced) == kernels


def test_the_platform_and_the_backend_choose():
  query, key = _heads(8, 1024, mesh=sharding.make_mesh(_ONE_ROW_A_DEVICE))
  traced = jax.jit(attention).trace(query, key, key)
  assert _kernels(traced) == 1 and _kernels(traced, "cpu") == 0 and _kernels(traced, "cuda") == 0
  plain = jax.jit(functools.partial(attention, backend="xla")).trace(query, key, key)
  assert _kernels(plain) == 0


def test_sampler_lowered_for_tpu(setting):
  """The kernel is in the loop's body."""
  assert _kernels(program.trace_sampler(*setting, jax.devices()).traced) == 1


def test_unknown_backend_is_refused(setting):
  config = setting[0].copy_and_resolve_references()
  config.attention = "flash"
  with pytest.raises(InputError, match=r"config\.attention is 'flash'"):
    LatentDiffusion.from_config(config, setting[1])


@pytest.mark.parametrize(
  ("length", "key_length", "causal"), [(6, 4, False), (6, 5, False), (5, 5, True), (5, 4, False), (7, 5, True)]
)
def test_odd_lengths_are_filled_up_without_being_seen(length, key_length, causal):
  """cuDNN trains on even lengths alone; here the plain form stands in for it."""
  query, key, value, cotangent = (
    torch_parity.normal(seed, 2, n, 3, 8) for seed, n in enumerate((length, key_length, key_length, length))
  )
  compute = functools.partial(in_even_lengths, causal=causal, implementation="xla")
  out, gradient = jax.vjp(compute, *map(jnp.asarray, (query, key, value)))
  exact = [x.astype(np.float64) for x in (query, key, value)]
  np.testing.assert_allclose(out, _closed_form(*exact, causal), rtol=0, atol=1e-6)
  if not causal:
    for ours, theirs in zip(gradient(cotangent), _torch_gradients(*exact, cotangent.astype(np.float64))):
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.skipif(
  jax.default_backend() != "gpu" or not cudnn_takes(_heads(1, 8)[0]),
  reason="needs an NVIDIA GPU from Ampere on, and jax[cuda]",
)
@pytest.mark.parametrize(("length", "key_length", "causal"), [(256, 256, False), (256, 77, False), (77, 77, True)])
def test_cudnn_and_its_gradient(length, key_length, causal):
  lengths = (length, key_length, key_length, length)
  arrays = [torch_parity.normal(seed, 2, n, 2, 64) for seed, n in enumerate(lengths)]
  rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]

  @jax.jit
  def both(query, key, value, cotangent):
    out, gradient = jax.vjp(functools.partial(attention, causal=causal), query, key, value)
    return out, gradient(cotangent)

  assert "__cudnn" in both.lower(*rounded).as_text()
  out, gradients = both(*rounded)
  exact = [np.asarray(x, np.float64) for x in rounded]
  np.testing.assert_allclose(np.asarray(out, np.float64), _closed_form(*exact[:3], causal), rtol=0, atol=2e-2)
  if not causal:
    for ours, theirs in zip(gradients, _torch_gradients(*exact)):
      np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=0, atol=4e-2)


def test_cudnn_leaves_wide_heads_and_float32():
  """The autoencoder's one head of 512 is too wide, on any GPU."""
  assert not cudnn_takes(_heads(1, 64, size=512)[0])
  assert not cudnn_takes(_heads(1, 64, size=60)[0])
  assert not cudnn_takes(_heads(1, 64, dtype=jnp.float32)[0])
