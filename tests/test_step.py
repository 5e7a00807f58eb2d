"""The jitted step with a whole UNet: its losses, their weights, the optimizer. Every mesh: test_meshes.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import config_arguments

from compdiff_jax import sharding
from compdiff_jax.config import load_config
from compdiff_jax.data.records import RecordSet, decode_image
from compdiff_jax.data.tokenizer import load_tokenizer
from compdiff_jax.latent_diffusion import LatentDiffusion
from compdiff_jax.metrics import mean_over_steps
from compdiff_jax.training.optimizer import learning_rate_schedule, make_optimizer
from compdiff_jax.training.step import TrainingStep, sample_keys

_STEPS = 3


class _Setting:
  """A tiny model, a batch with unknowns, and its training step compiled once for each mesh."""

  def __init__(self, workspace):
    path, *overrides = config_arguments(workspace)
    self.config = load_config(path.removeprefix("--config="), [*overrides, "--config.train.batch_size=16"])
    record_set = RecordSet(self.config.data.path)
    self.schema = record_set.schema
    self.model = LatentDiffusion.from_config(self.config, self.schema)
    self.tokenizer = load_tokenizer(self.config.weights.tokenizer)
    self.params = self.model.initial_params(jax.random.key(0), self.config.weights)
    self.frozen = self.model.load_frozen(self.config.weights)
    source = record_set.split("train")
    records = [source[i] for i in range(16)]
    self.batch = {
      "images": np.stack([decode_image(r["image"], 32) for r in records]),
      "input_ids": self.tokenizer([r["text"] for r in records]),
      "attributes": {a.name: np.asarray([r["attributes"][a.name] for r in records], a.dtype) for a in self.schema},
    }
    self.batch["attributes"]["sex"][:5] = -1  # unknowns, unevenly over devices and micro-batches

  @functools.cache  # noqa: B019 (one instance, for the module)
  def program(self, data, fsdp, accumulation, variant):
    config = self.config.copy_and_resolve_references()
    config.train.accumulation = accumulation
    config.fairness.variant = variant
    mesh = sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": 1}, jax.devices()[: data * fsdp])
    training = TrainingStep(self.model, config, self.tokenizer.empty_ids)
    return mesh, training, training.jit(mesh)

  def curve(self, data=1, fsdp=1, accumulation=1, variant="", **attributes):
    """Metrics of a few steps and the state after them; `attributes` replaces columns of the batch."""
    mesh, training, step = self.program(data, fsdp, accumulation, variant)
    # A copy: the step donates its state, and the parameters serve every test.
    state = jax.device_put(training.create(jax.tree.map(jnp.copy, self.params)), training.shardings(mesh))
    frozen = jax.device_put(self.frozen, sharding.replicated(mesh))
    batch = {**self.batch, "attributes": {**self.batch["attributes"], **attributes}}
    rows = []
    for _ in range(_STEPS):
      before = state
      state, metrics = step(before, frozen, jax.device_put(batch, sharding.batch_sharding(mesh)), self.config.seed)
      rows.append({name: float(value) for name, value in metrics.items()})
      kept = [leaf for leaf in jax.tree.leaves(before) if not leaf.is_deleted()]
      assert not kept, "the step donates its whole state: the memory of the old one is the new one's"
    return rows, state


@pytest.fixture(scope="module")
def setting(workspace):
  return _Setting(workspace)


@pytest.fixture(scope="module")
def reference(setting):
  return setting.curve()


def test_same_losses_on_four_devices_with_accumulation(setting, reference):
  rows, state = setting.curve(data=2, fsdp=2, accumulation=2)
  for ours, theirs in zip(rows, reference[0]):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
      assert value == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), name
  ours, theirs = jax.device_get((state.params, reference[1].params))
  # Adam divides by the gradient's size, so rounding in a gradient near zero moves a weight by up to the step size.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2 * _STEPS * 1e-3), ours, theirs)


@pytest.fixture(scope="module")
def fair_reference(setting):
  return setting.curve(variant="compdiff")


def test_fairness_weights_the_denoising_loss_alone(reference, fair_reference):
  """In the first step, before parameters differ. Groups are those of the data, whatever dropout hides."""
  plain, fair = reference[0][0], fair_reference[0][0]
  assert abs(fair["diffusion"] / plain["diffusion"] - 1) > 1e-3
  for name in ("kl", "composition", "aux_age", "aux_sex", "aux_group"):
    assert fair[name] == pytest.approx(plain[name], rel=1e-5), name
  assert int(fair_reference[1].fairness.count) == _STEPS


def test_sample_keys_do_not_depend_on_the_batch_size_but_on_seed_and_step():
  data = lambda keys: np.asarray(jax.random.key_data(keys["noise"]))  # noqa: E731
  small, large = sample_keys(1, jnp.int32(5), 4), sample_keys(1, jnp.int32(5), 9)
  np.testing.assert_array_equal(data(small), data(large)[:4])
  assert len({tuple(row) for row in data(large)}) == 9
  assert not np.array_equal(data(small), data(sample_keys(2, jnp.int32(5), 4)))
  assert not np.array_equal(data(small), data(sample_keys(1, jnp.int32(6), 4)))


def test_unknown_attributes_do_not_reach_the_auxiliary_loss(setting, reference):
  """A known value that changes moves its loss; with every attribute unknown there is none, and the total lacks it."""
  sex = setting.batch["attributes"]["sex"].copy()
  sex[10] = 1 - sex[10]
  assert setting.curve(sex=sex)[0][0]["aux_sex"] != reference[0][0]["aux_sex"]
  rows, _ = setting.curve(**setting.schema.unknown(16))
  heads = [name for name in rows[0] if name.startswith(("aux_", "acc_"))]
  assert len(heads) == 6 and all(np.isnan(rows[0][name]) for name in heads)
  without = rows[0]["diffusion"] + setting.config.loss.composition * rows[0]["composition"]
  assert rows[0]["loss"] == pytest.approx(without, rel=1e-5) and np.isfinite(rows[0]["grad_norm"])


def test_reports_leave_out_steps_without_a_sample():
  rows = [{"loss": 1.0, "acc_sex": np.nan, "acc_age": np.nan}, {"loss": 3.0, "acc_sex": 0.5, "acc_age": np.nan}]
  assert mean_over_steps(rows) == {"loss": 2.0, "acc_sex": 0.5}


def test_total_loss_is_the_weighted_sum_of_its_terms(setting, reference):
  config = setting.config
  for step, row in enumerate(reference[0]):
    heads = [row[name] for name in row if name.startswith("aux_")]
    kl_weight = config.loss.kl * min(1, step / config.loss.kl_anneal_steps)
    assert row["kl_weight"] == pytest.approx(kl_weight)
    expected = (
      row["diffusion"]
      + kl_weight * row["kl"]
      + config.loss.composition * row["composition"]
      + config.loss.auxiliary * np.mean(heads)
    )
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_learning_rate_warms_up_and_ends_at_zero(setting):
  config = setting.config.copy_and_resolve_references()
  config.train.update(steps=100, warmup_steps=10, learning_rate=1e-3)
  schedule = learning_rate_schedule(config.train)
  assert [float(schedule(k)) for k in (0, 5, 10)] == pytest.approx([0, 5e-4, 1e-3])
  assert float(schedule(55)) == pytest.approx(1e-3 * 0.5 * (1 + np.cos(np.pi * 45 / 90)))
  assert float(schedule(100)) == pytest.approx(0, abs=1e-12) and float(schedule(1000)) == pytest.approx(0, abs=1e-12)


def test_weight_decay_touches_kernels_only(setting):
  """With a zero gradient AdamW moves exactly the decayed parameters."""
  config = setting.config.copy_and_resolve_references()
  params = setting.params
  config.train.update(warmup_steps=0, weight_decay=0.5)
  optimizer = make_optimizer(config.train)
  updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
  for part, leaves in updates.items():
    for name, update in leaves.items():
      assert bool(jnp.any(update != 0)) == (name.endswith("kernel") and bool(jnp.any(params[part][name] != 0))), name
