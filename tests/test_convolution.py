import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding

from compdiff_jax.models.convolution import convolution, winograd, winograd_takes

ONE = (1, 1)
PAD = ((1, 1), (1, 1))
# [B, h, w, in] and out; the last two are of the 18M-parameter UNet of benchmarks/, and large enough to be taken.
SHAPES = [((1, 2, 2, 3), 2), ((2, 4, 6, 5), 7), ((8, 8, 8, 256), 256), ((8, 32, 32, 64), 64)]


def _draw(shape: tuple[int, ...], out: int) -> list[np.ndarray]:
  """Input, kernel, and a cotangent of the output."""
  generator = np.random.default_rng(0)
  normal = lambda *shape: generator.standard_normal(shape, np.float32)  # noqa: E731
  return [normal(*shape), normal(3, 3, shape[-1], out) / (9 * shape[-1]) ** 0.5, normal(*shape[:-1], out)]


def _torch(x: np.ndarray, kernel: np.ndarray, cotangent: np.ndarray) -> list[np.ndarray]:
  """Output and gradients by input and kernel, computed by torch in float64."""
  nchw = lambda array: torch.from_numpy(array).double().permute(0, 3, 1, 2)  # noqa: E731
  inputs = nchw(x).requires_grad_()
  weight = torch.from_numpy(kernel).double().permute(3, 2, 0, 1).requires_grad_()
  y = torch.nn.functional.conv2d(inputs, weight, padding=len(kernel) // 2)
  of_inputs, of_weight = torch.autograd.grad(y, (inputs, weight), nchw(cotangent))
  return [
    y.detach().permute(0, 2, 3, 1).numpy(),
    of_inputs.permute(0, 2, 3, 1).numpy(),
    of_weight.permute(2, 3, 1, 0).numpy(),
  ]


def _with_gradients(function, x, kernel, cotangent):
  y, pull_back = jax.vjp(function, x, kernel)
  return [y, *pull_back(cotangent)]


@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_winograd_is_the_convolution(shape, out):
  arrays = _draw(shape, out)
  for ours, theirs in zip(jax.jit(lambda *a: _with_gradients(winograd, *a))(*arrays), _torch(*arrays)):
    np.testing.assert_allclose(ours, theirs, atol=5e-6 * np.abs(theirs).max())


def test_a_mesh_splits_it():
  arrays = _draw((8, 16, 16, 128), 128)
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
  specs = [jax.P(("data", "fsdp")), jax.P(None, None, "fsdp"), jax.P(("data", "fsdp"))]
  placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs)]
  function = lambda x, kernel: convolution(x, kernel, ONE, PAD)  # noqa: E731
  assert winograd_takes(*arrays[:2], ONE, PAD)
  for ours, theirs in zip(jax.jit(lambda *a: _with_gradients(function, *a))(*placed), _torch(*arrays)):
    np.testing.assert_allclose(ours, theirs, atol=5e-6 * np.abs(theirs).max())


@pytest.mark.parametrize(
  ("shape", "kernel", "dtype", "strides", "padding"),
  [
    ((8, 32, 32, 64), (3, 3, 64, 64), jnp.bfloat16, ONE, PAD),
    ((8, 32, 32, 64), (1, 1, 64, 640), jnp.float32, (2, 2), ((0, 0), (0, 0))),
    ((8, 32, 32, 64), (1, 1, 64, 640), jnp.float32, ONE, PAD),
    ((8, 32, 32, 64), (3, 3, 64, 64), jnp.float32, (2, 2), PAD),
    ((8, 32, 32, 64), (3, 3, 64, 64), jnp.float32, ONE, ((0, 1), (0, 1))),
    ((8, 33, 32, 64), (3, 3, 64, 64), jnp.float32, ONE, PAD),
    ((8, 32, 33, 64), (3, 3, 64, 64), jnp.float32, ONE, PAD),
    ((8, 16, 16, 64), (3, 3, 64, 64), jnp.float32, ONE, PAD),  # too little work
    ((32, 32, 32, 64), (3, 3, 64, 64), jnp.float32, ONE, PAD),  # too large for a cache
  ],
)
def test_what_it_does_not_take_is_computed_plainly(shape, kernel, dtype, strides, padding):
  x, kernel = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(kernel, dtype)
  assert not winograd_takes(x, kernel, strides, padding)
  jaxpr = jax.make_jaxpr(lambda x, kernel: convolution(x, kernel, strides, padding))(x, kernel)
  assert [equation.primitive.name for equation in jaxpr.eqns] == ["conv_general_dilated"]


def test_a_1x1_convolution_is_the_convolution():
  x, kernel, cotangent = _draw((2, 4, 6, 5), 7)
  kernel = kernel[1:2, 1:2]
  function = lambda x, kernel: convolution(x, kernel, ONE, ((0, 0), (0, 0)))  # noqa: E731
  for ours, theirs in zip(_with_gradients(function, x, kernel, cotangent), _torch(x, kernel, cotangent)):
    np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize(("size", "padding"), [(1, ((0, 0), (0, 0))), (3, PAD)])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_a_cpu_multiplies(platform, size, padding):
  x, kernel, _ = _draw((8, 32, 32, 64), 64)
  lowered = jax.jit(lambda x, kernel: convolution(x, kernel, ONE, padding)).trace(x, kernel[:size, :size])
  text = lowered.lower(lowering_platforms=(platform,)).as_text()
  assert ("dot_general" in text, "convolution" in text) == ((True, False) if platform == "cpu" else (False, True))
