import jax
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding

from compdiff_jax.models.product import product

# Rows, in, out: which side of the kernel's gradient is turned depends on the wider of the two.
SHAPES = [((6,), 3, 5), ((4, 6), 5, 3), ((4, 2, 3), 4, 4), ((4, 2, 3), 32, 8)]


def _draw(rows, inputs, outputs):
  generator = np.random.default_rng(0)
  shapes = (*rows, inputs), (inputs, outputs), (*rows, outputs)
  return [generator.standard_normal(shape, np.float32) for shape in shapes]


def _torch(x, kernel, cotangent):
  inputs, weight = (torch.from_numpy(array).double().requires_grad_() for array in (x, kernel))
  y = torch.nn.functional.linear(inputs, weight.T)
  return [y.detach(), *torch.autograd.grad(y, (inputs, weight), torch.from_numpy(cotangent).double())]


def _with_gradients(x, kernel, cotangent):
  y, pull_back = jax.vjp(product, x, kernel)
  return [y, *pull_back(cotangent)]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_value_and_gradients_are_torchs(rows, inputs, outputs):
  arrays = _draw(rows, inputs, outputs)
  for ours, theirs in zip(jax.jit(_with_gradients)(*arrays), _torch(*arrays)):
    np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max())


def test_a_mesh_splits_it():
  arrays = _draw((8, 4, 3), 32, 8)
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
  specs = [jax.P(("data", "fsdp")), jax.P("fsdp", None), jax.P(("data", "fsdp"))]
  placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs)]
  for ours, theirs in zip(jax.jit(_with_gradients)(*placed), _torch(*arrays)):
    np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_a_cpu_is_told_which_side_to_turn(platform):
  lowered = jax.jit(_with_gradients).trace(*_draw((4, 6), 5, 3)).lower(lowering_platforms=(platform,))
  assert ("optimization_barrier" in lowered.as_text()) == (platform == "cpu")
