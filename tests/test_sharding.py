"""Meshes, rules, the start-up table and recomputation. Losses on many meshes: test_meshes.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compdiff_jax import sharding
from compdiff_jax.cli import InputError
from compdiff_jax.models.functional import Functional
from compdiff_jax.models.remat import POLICIES, rematerialized
from compdiff_jax.models.unet import UNet2DCondition, UNetConfig
from compdiff_jax.training.overview import print_overview
from compdiff_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class _Device:
  id: int
  slice_index: int
  process_index: int
  platform: str
  device_kind: str


def _devices(slices, per_slice, platform):
  """As the runtime numbers them, but told out of order."""
  found = [
    _Device(id=s * per_slice + i, slice_index=s, process_index=s, platform=platform, device_kind=platform)
    for s in range(slices)
    for i in range(per_slice)
  ]
  return found[1::2] + found[::2]


def test_slices_share_the_data_axis_alone():
  mesh = sharding.make_mesh({"data": -1, "fsdp": 2, "tensor": 2}, _devices(2, 8, "gpu"))
  assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2}
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  np.testing.assert_array_equal(slices, np.repeat([0, 0, 1, 1], 4).reshape(4, 2, 2))
  with pytest.raises(InputError, match="multiple of the 2 slices"):
    sharding.make_mesh({"data": 1, "fsdp": 16, "tensor": 1}, _devices(2, 8, "tpu"))


@pytest.mark.parametrize(
  ("sizes", "words"),
  [
    ({"data": 3, "fsdp": 1, "tensor": 1}, "does not divide 8 devices"),
    ({"data": -1, "fsdp": -1, "tensor": 1}, "one axis may be -1"),
    ({"data": 0, "fsdp": 1, "tensor": 1}, "does not divide"),
    ({"data": 2, "fsdp": 2, "tensor": 1}, "needs 4 devices, 8 are present"),
  ],
)
def test_mesh_that_does_not_fit_is_refused(sizes, words):
  with pytest.raises(InputError, match=words):
    sharding.make_mesh(sizes)


@pytest.mark.parametrize(
  ("rule", "words"),
  [
    ((".*", ("fsdp",)), "not divisible by fsdp"),
    ((".*", ("fsdb",)), "did you mean 'fsdp'"),
    ((".*", (None, None, "fsdp")), "more axes than"),
    (("(", ("fsdp",)), "no regular expression"),
  ],
)
def test_bad_rule_is_named(rule, words):
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
  with pytest.raises(InputError, match=words):
    sharding.parameter_spec("unet.conv_in.bias", (12,), (rule,), mesh)


def test_default_rule_takes_the_largest_divisible_axis_or_none():
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
  spec = lambda *shape: sharding.parameter_spec("a.b", shape, (), mesh)  # noqa: E731
  assert spec(3, 3, 16, 24) == jax.P(None, None, None, "fsdp")
  assert spec(16, 12) == jax.P("fsdp")
  assert spec(12, 9) == jax.P()


def test_table_shows_every_placement_with_its_bytes(capsys):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
  params = {"unet": {"big": shape(64, 32), "small": shape(8), "odd": shape(3, 5)}}
  state = TrainState(shape(), params, params, ())
  print_overview(state, sharding.tree_shardings(state, (), mesh), mesh, every_parameter=True)
  lines = [line.replace(" ", "") for line in capsys.readouterr().err.splitlines()]
  assert "|unet.big|(64,32)|fsdp|2,048|" in lines  # 64 * 32 * 4 bytes over 4
  assert "|unet.odd|(3,5)|whole|60|" in lines
  assert "|unet|fsdp|2|2,056|2,056|" in lines and "|unet|whole|1|15|60|" in lines


_TINY = UNetConfig(
  down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), block_out_channels=(8,),
  layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
)  # fmt: skip


def _count(jaxpr, name):
  """How often a primitive stands in a jaxpr and the jaxprs inside it."""
  total = 0
  for equation in jaxpr.eqns:
    total += equation.primitive.name == name
    for value in equation.params.values():
      for inner in value if isinstance(value, (list, tuple)) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        total += _count(inner, name) if hasattr(inner, "eqns") else 0
  return total


@pytest.fixture(scope="module")
def losses():
  """{policy: (loss and gradient, jaxpr of the gradient)} of a small UNet."""
  keys = jax.random.split(jax.random.key(0), 3)
  inputs = jax.random.normal(keys[1], (2, 8, 8, 4)), jnp.array([3, 700]), jax.random.normal(keys[2], (2, 5, 8))
  results = {}
  for policy in POLICIES:
    unet = Functional(lambda rngs, policy=policy: UNet2DCondition(_TINY, remat=policy, rngs=rngs))
    loss = lambda params, unet=unet: jnp.mean(unet(params, *inputs) ** 2)  # noqa: E731
    params = unet.init(keys[0])
    results[policy] = jax.jit(jax.value_and_grad(loss))(params), jax.make_jaxpr(jax.grad(loss))(params).jaxpr
  return results


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "none"])
def test_recomputing_changes_no_loss_and_no_gradient(losses, policy):
  (value, grads), _ = losses[policy]
  (expected, expected_grads), _ = losses["none"]
  assert float(value) == pytest.approx(float(expected), rel=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected_grads)


def test_every_block_recomputes_what_its_policy_says(losses):
  """5 residual blocks and 4 transformers; only where nothing is kept do their convolutions run again.

  The feed-forward layer of each transformer recomputes for itself, inside of a block in both of its passes.
  """
  blocks = {policy: _count(jaxpr, "remat2") for policy, (_, jaxpr) in losses.items()}
  assert blocks == {"none": 4, "matmuls": 9 + 2 * 4, "blocks": 9 + 2 * 4}
  convolutions = {policy: _count(jaxpr, "conv_general_dilated") for policy, (_, jaxpr) in losses.items()}
  assert convolutions["none"] == convolutions["matmuls"] < convolutions["blocks"]


def test_unknown_policy_is_refused():
  with pytest.raises(InputError, match="did you mean 'blocks'"):
    rematerialized(nnx.Module, "block")
