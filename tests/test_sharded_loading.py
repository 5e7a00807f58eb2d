"""Weights are read straight into the shards: on eight devices, and in the memory of the process."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch_parity
from flax import nnx

from compdiff_jax.interop import keys, weights
from compdiff_jax.models.functional import Functional
from compdiff_jax.models.layers import Dense

LAYERS, WIDTH = 24, 1024


class Wide(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.List([Dense(WIDTH, 2 * WIDTH, rngs=rngs) for _ in range(LAYERS)])


wide = Functional(lambda rngs: Wide(rngs))
NUM_BYTES = sum(4 * np.prod(leaf.shape, dtype=int) for leaf in wide.shapes.values())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """About 200 MB, more than anything else that these tests hold."""
  path = tmp_path_factory.mktemp("wide") / "component"
  params = {key: np.full(spec.shape, i, np.float32) for i, (key, spec) in enumerate(wide.shapes.items())}
  params["layers.3.kernel"] = torch_parity.normal(0, WIDTH, 2 * WIDTH)
  weights.save_component(path, {}, params, "UNet2DConditionModel")
  return path


def test_each_device_gets_and_reads_its_share(directory, monkeypatch):
  read = []

  def slice_from_torch(*arguments):
    read.append(slice_of(*arguments))
    return read[-1]

  slice_of = keys.slice_from_torch
  monkeypatch.setattr(keys, "slice_from_torch", slice_from_torch)
  params = weights.load_component(directory, wide)
  held = dict.fromkeys(jax.devices(), 0)
  for value in params.values():
    for shard in value.addressable_shards:
      held[shard.device] += shard.data.nbytes
  assert len(held) == 8 and set(held.values()) == {NUM_BYTES // 8}
  assert sum(part.nbytes for part in read) == NUM_BYTES
  np.testing.assert_array_equal(params["layers.3.kernel"], torch_parity.normal(0, WIDTH, 2 * WIDTH))
  assert all(float(params[f"layers.{i}.bias"][0]) == list(params).index(f"layers.{i}.bias") for i in range(LAYERS))


def _memory(field: str) -> int:
  lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
  return int(lines[field].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
def test_the_process_never_holds_the_model_twice(directory, tmp_path):
  weights.load_component(directory, wide)  # what is loaded once for good
  before = _memory("VmRSS")
  Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
  params = jax.block_until_ready(weights.load_component(directory, wide))
  assert _memory("VmHWM") - before < 1.4 * NUM_BYTES
  assert len(params) == 2 * LAYERS


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
def test_writing_holds_one_tensor_at_a_time(directory, tmp_path):
  params = jax.block_until_ready(weights.load_component(directory, wide))
  params = {key: np.asarray(value) for key, value in params.items()}
  before = _memory("VmRSS")
  Path("/proc/self/clear_refs").write_text("5")
  weights.save_component(tmp_path / "out", {}, params, "UNet2DConditionModel", "float16")
  assert _memory("VmHWM") - before < 0.3 * NUM_BYTES
