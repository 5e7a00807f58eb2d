"""Losses on eight fake devices: every mesh, conditioner and option of training gives those of one device.

The networks are the smallest that have every kind of parameter; test_step.py has a whole UNet, test_processes.py whole
runs. Tolerances are those of float32 sums in another order.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from stand_in import StandIn

from compdiff_jax import default_config, sharding
from compdiff_jax.conditioning.family import config_from_dict
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.models.attention import Transformer2D
from compdiff_jax.models.functional import Functional
from compdiff_jax.models.layers import Conv, Embed
from compdiff_jax.models.lora import LoRA
from compdiff_jax.models.unet import timestep_embedding
from compdiff_jax.models.unet_blocks import ResnetBlock2D
from compdiff_jax.training.step import TrainingStep
from data_prep.phantom.population import SCHEMA

_STEPS = 3
_BATCH = 16
_WIDTH = 16
_LOSS = {"rel": 1e-4, "abs": 1e-5}
_PARAMETER = 2e-5

# What is switched on with each conditioner: one compiled program shows several options.
_OPTIONS = {
  "none": {},
  "hcn": {"fairness.variant": "compdiff"},
  "typed": {
    "conditioner.num_registers": 1,
    "conditioner.d_time_emb": _WIDTH,
    "conditioner.film_channels": (_WIDTH,),
    "conditioner.film_hidden": 8,
  },
  "flat": {"conditioner.mode": "separate", "loss.coind": 1.0},
  "additive": {"lora.rank": 2},
}
_SIZES = {"d_node": 8, "d_ctx": _WIDTH, "aux_hidden_dim": 8, "freq_dim": 8}
# Attention and feed-forward layers split over `tensor` as in Megatron-LM (Shoeybi et al. 2019), one of them twice.
_RULES = (
  (r"unet\..*\.to_[qkv]\.kernel", (None, "tensor")),
  (r"unet\..*\.to_out\.0\.kernel", ("tensor", "fsdp")),
  (r"unet\..*\.net\.0\.proj\.kernel", (None, "tensor")),
  (r"unet\..*\.net\.2\.kernel", ("tensor",)),
)
_MIXED = {"data": 2, "fsdp": 2, "tensor": 2}


class _UNet(nnx.Module):
  """One residual block and one transformer block between two convolutions."""

  def __init__(self, rngs):
    self.conv_in = Conv(3, _WIDTH, rngs=rngs)
    self.resnet = ResnetBlock2D(
      _WIDTH, _WIDTH, groups=4, eps=1e-5, activation=jax.nn.silu, time_channels=_WIDTH, rngs=rngs
    )
    self.transformer = Transformer2D(
      _WIDTH, heads=2, context_channels=_WIDTH, num_layers=1, groups=4, linear_projection=True, rngs=rngs
    )
    self.conv_out = Conv(_WIDTH, 3, rngs=rngs)

  def __call__(self, sample, timesteps, context, time_vector=None, film=None):
    time = timestep_embedding(timesteps, _WIDTH)
    h = self.resnet(self.conv_in(sample), time if time_vector is None else time + time_vector)
    if film is not None:
      gamma, beta = film[0]
      h = gamma[:, None, None] * h + beta[:, None, None]
    return self.conv_out(self.transformer(h, context))


class _Model(StandIn):
  """The text encoder is a table."""

  def encode_text(self, params, input_ids):
    return self.text_encoder(params["text_encoder"], input_ids)


def _model(config):
  conditioner_config = config_from_dict(config.conditioner.to_dict())
  unet = Functional(_UNet)
  lora = LoRA(unet.shapes, ("to_q", "to_v"), config.lora.rank, 0.5) if config.lora.rank else None
  conditioner = Functional(lambda rngs: conditioner_config.build(SCHEMA, rngs))
  trained = ("lora" if lora else "unet", *(["conditioner"] if conditioner.shapes else []), "text_encoder")
  return _Model(
    schema=SCHEMA,
    schedule=NoiseSchedule(),
    unet_config=None,
    vae_config=None,
    text_config=None,
    conditioner_config=conditioner_config,
    unet=unet,
    vae=None,
    text_encoder=Functional(lambda rngs: Embed(8, _WIDTH, rngs=rngs)),
    conditioner=conditioner,
    trained=trained,
    image_size=2,
    lora=lora,
  )


def _random(shapes):
  """Parameters without a compiled program; neither zero nor one anywhere, so that each has a gradient."""
  rng = np.random.default_rng(0)
  return {name: rng.normal(name.endswith("scale"), 0.3, x.shape).astype(np.float32) for name, x in shapes.items()}


def _batch():
  """Rows whose five unknown values lie unevenly over devices and micro-batches."""
  rng = np.random.default_rng(1)
  attributes = {
    a.name: rng.uniform(a.low, a.high, _BATCH).astype(a.dtype)
    if a.kind == "continuous"
    else rng.integers(0, len(a.values), _BATCH).astype(a.dtype)
    for a in SCHEMA
  }
  attributes["sex"][:5] = SCHEMA["sex"].unknown
  images = rng.integers(0, 255, [_BATCH, 2, 2, 3], np.uint8)
  return {"images": images, "input_ids": rng.integers(0, 8, [_BATCH, 6], np.int32), "attributes": attributes}


@functools.cache
def _train(kind, data=1, fsdp=1, tensor=1, accumulation=1, rules=()):
  """(metrics of each step, the state before, the state after)."""
  config = default_config.base(kind)
  config.update_from_flattened_dict(_OPTIONS[kind])
  config.conditioner.update({name: size for name, size in _SIZES.items() if name in config.conditioner})
  # With a large eps Adam's update is smooth in the gradient: rounding does not flip the sign of a step.
  config.train.update(accumulation=accumulation, warmup_steps=0, learning_rate=0.02, eps=1e-2, ema_decay=0.5)
  model = _model(config)
  config.sharding_rules = rules
  training = TrainingStep(model, config, np.zeros(6, np.int32))
  mesh = sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, jax.devices()[: data * fsdp * tensor])
  params = {name: _random(model.component(name).shapes) for name in model.trained}
  before = jax.device_get(training.create(params))
  state = jax.device_put(before, training.shardings(mesh))
  frozen = {"unet": _random(model.unet.shapes)} if model.lora else {}
  frozen = jax.device_put(frozen, sharding.replicated(mesh))
  batch = jax.device_put(_batch(), sharding.batch_sharding(mesh))
  step = training.jit(mesh)
  rows = []
  for _ in range(_STEPS):
    state, metrics = step(state, frozen, batch, config.seed)
    rows.append(jax.device_get(metrics))
  return rows, before, state


def _assert_same(ours, theirs):
  for row, expected in zip(ours[0], theirs[0], strict=True):
    assert row.keys() == expected.keys()
    for name, value in row.items():
      assert value == pytest.approx(expected[name], **_LOSS), name
  before, after, expected = theirs[1], jax.device_get(ours[2]), jax.device_get(theirs[2])
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=_PARAMETER)
  for name in ("params", "ema"):
    jax.tree.map(close, getattr(after, name), getattr(expected, name))
    # What was compared has moved, all of it, by much more than the tolerance.
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), getattr(expected, name), getattr(before, name))
    assert min(jax.tree.leaves(moved)) > 20 * _PARAMETER, moved
  jax.tree.map(functools.partial(close, rtol=1e-5, atol=1e-4), after.fairness, expected.fairness)


_MESHES = [{"data": 8}, {"fsdp": 2}, {"data": 2, "fsdp": 4}, {"fsdp": 8}, {"tensor": 2}, _MIXED]


@pytest.mark.parametrize("mesh", _MESHES, ids=lambda mesh: "-".join(f"{axis}{size}" for axis, size in mesh.items()))
@pytest.mark.parametrize("kind", _OPTIONS)
def test_every_mesh_gives_the_losses_of_one_device(kind, mesh):
  """All conditioners with two micro-batches on the mesh and one on the device."""
  ours, theirs = _train(kind, **mesh, accumulation=1 if kind == "none" else 2, rules=_RULES), _train(kind)
  for name in {"hcn": ["kl", "fair_loss_gap"], "flat": ["coind"]}.get(kind, []):
    assert theirs[0][0][name] > 0
  _assert_same(ours, theirs)


def test_what_a_device_holds():
  """Parameters, moments and EMA lie where the rules say, else where fsdp divides."""
  _, _, state = _train("none", **_MIXED, rules=_RULES)
  moments = next(x for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
  for tree in (state.params, state.ema, moments.mu, moments.nu):
    shares = {name: leaf.size // leaf.addressable_shards[0].data.size for name, leaf in tree["unet"].items()}
    block = "transformer.transformer_blocks.0"
    assert shares[f"{block}.attn1.to_q.kernel"] == 2 and shares[f"{block}.attn1.to_out.0.kernel"] == 4
    assert shares["resnet.conv1.kernel"] == 2 and shares["conv_out.bias"] == 1
  assert state.params["unet"][f"{block}.attn1.to_q.kernel"].sharding.spec == jax.P(None, "tensor")
