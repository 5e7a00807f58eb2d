"""What a run says about its speed: operations against torch's counter and closed forms, step times by a fake clock."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import config_arguments
from network_configs import SD21_BASE
from torch.utils.flop_counter import FlopCounterMode
from torch_parity import build_jax, build_torch

from compdiff_jax import sharding, train
from compdiff_jax.ahead_of_time.chips import chip
from compdiff_jax.ahead_of_time.flops import count_flops
from compdiff_jax.metrics import read_metrics
from compdiff_jax.training.speed import Profile, StepClock, describe, parse_profile


def _shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def _conv(x, kernel, strides=1):
  return jax.lax.conv_general_dilated(
    x, kernel, (strides, strides), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def test_products_and_convolutions_in_closed_form():
  assert count_flops(jnp.matmul, _shape(5, 3, 7), _shape(5, 7, 11)) == 2 * 5 * 3 * 7 * 11
  x, kernel = _shape(2, 8, 8, 3), _shape(3, 3, 3, 5)
  for strides in (1, 2):
    forward = 2 * (2 * (8 // strides) ** 2) * 5 * (9 * 3)
    assert count_flops(lambda x, k, s=strides: _conv(x, k, s), x, kernel) == forward
    # Each of the two gradients costs as much as the convolution, which itself nobody needs here.
    gradients = jax.grad(lambda x, k, s=strides: jnp.sum(_conv(x, k, s)), (0, 1))
    assert count_flops(gradients, x, kernel) == 2 * forward


def test_loops_branches_shards_and_what_nobody_needs():
  x = _shape(8, 8)
  once = 2 * 8**3
  loop = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=6)[0]  # noqa: E731
  assert count_flops(loop, x) == 6 * once
  assert count_flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), x) == 2 * once
  assert count_flops(lambda x: (x @ x @ x, x @ x)[1], x) == once
  assert count_flops(jax.jit(lambda x: (x @ x @ x, x @ x)), x) == 3 * once
  assert count_flops(lambda x: jax.jit(lambda x: (x @ x @ x, x @ x))(x)[1], x) == once
  # A block that is computed again runs three products forward, three again and six backward, but for the last forward.
  mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
  rows = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"))
  assert count_flops(rows, x, x) == once
  with pytest.raises(ValueError, match="cannot be counted"):
    count_flops(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x), x)


def test_stable_diffusion_counts_as_torch_does_and_as_by_hand():
  functional = build_jax("unet", SD21_BASE["unet"])
  arguments = _shape(1, 64, 64, 4), _shape(1, dtype=jnp.int32), _shape(1, 77, 1024)
  forward = count_flops(functional, functional.shapes, *arguments)
  assert forward == pytest.approx(0.804e12, rel=1e-3)
  gradient = jax.grad(lambda *a: jnp.sum(functional(*a)))
  backward_too = count_flops(gradient, functional.shapes, *arguments)
  assert 2.9 * forward < backward_too < 3 * forward
  with torch.device("meta"), FlopCounterMode(display=False) as counter:
    model = build_torch("unet", SD21_BASE["unet"])
    output = model(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 1024)).sample
    theirs = counter.get_total_flops()
    output.sum().backward()
  assert forward == theirs
  # torch recomputes the attention scores on the way back, which is work of its kernel and not of the model.
  assert backward_too == pytest.approx(counter.get_total_flops(), rel=0.03)


class _Step:
  """Results of a step that ends at a certain time."""

  def __init__(self, clock: "_Clock", end: float):
    self._clock, self._end = clock, end

  def is_ready(self) -> bool:
    return self._clock.time >= self._end

  def block_until_ready(self) -> None:
    self._clock.time = max(self._clock.time, self._end)


class _Clock:
  """Devices that take one step after the other, and a source of batches; time passes by waiting only."""

  def __init__(self, steps: list[float], waits: list[float]):
    self.time, self._free = 100.0, 100.0
    self._steps, self._waits = iter(steps), waits

  def __call__(self) -> float:
    return self.time

  def batches(self):
    for seconds in self._waits:
      self.time += seconds
      yield None

  def run(self) -> _Step:
    self._free = max(self._free, self.time) + next(self._steps)
    return _Step(self, self._free)


def _reports(steps, waits, every, **options):
  world = _Clock(steps, waits)
  clock = StepClock(images=10, devices=2, now=world, **{"peak": None, **options})
  clock.flops = 4e12
  batches = world.batches()
  reports = []
  for number in range(1, len(steps) + 1):
    clock.next(batches)
    clock.started(world.run())
    if number % every == 0:
      clock.drain()
      reports.append(clock.report())
  return reports


def test_step_times_leave_the_first_step_out():
  first, second = _reports([60.0, 2.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0], [0.0] * 8, every=4, peak=2e12)
  assert first["first_step_seconds"] == 60 and "first_step_seconds" not in second
  assert first["step_seconds_p50"] == 2 and first["step_seconds_p99"] == pytest.approx(3.96)
  assert first["images_per_second"] == pytest.approx(30 / 8)
  assert second["images_per_second"] == pytest.approx(10)
  assert second["tflops_per_second_per_device"] == pytest.approx(2.0)
  assert second["mfu"] == pytest.approx(1.0) and "mfu" not in _reports([1.0, 1.0], [0.0, 0.0], every=2)[0]
  assert first["data_wait_share"] == second["data_wait_share"] == 0
  assert "MFU 100.0%" in describe(second) and "step 1/1/1 s" in describe(second)


def test_a_report_of_the_first_step_alone():
  first, second = _reports([60.0, 2.0], [1.0, 0.0], every=1)
  assert first == {"first_step_seconds": 61.0} and describe(first) == "first step after 61.0 s"
  assert second["images_per_second"] == 5


def test_waiting_for_input_counts_where_the_devices_have_nothing_to_do():
  # Batches take half a step: they come while the devices are busy with the step before.
  assert _reports([1.0] * 9, [0.5] * 9, every=9)[0]["data_wait_share"] == 0
  # Batches take three steps. All is waiting but the last step, for which no batch is awaited any more.
  starved = _reports([1.0] * 9, [3.0] * 9, every=9)[0]
  assert starved["step_seconds_p50"] == 3 and starved["data_wait_share"] == pytest.approx(21 / 22)


def test_pauses_are_no_training_time():
  world = _Clock([1.0] * 4, [0.0] * 4)
  clock = StepClock(10, 1, None, world)
  for _ in range(4):
    clock.next(world.batches())
    clock.started(world.run())
    with clock.paused():
      world.time += 50
  assert clock.report()["step_seconds_p99"] == 1


def test_peaks_are_those_of_known_chips_only():
  """The peaks are those of the vendors' data sheets; H100 and H200 are the SXM modules."""
  assert chip(jax.devices()[0]) is None
  peaks = {"TPU v5 lite": 197, "TPU v5": 459, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989, "NVIDIA H200 NVL": 835}
  for kind, peak in peaks.items():
    assert chip(types.SimpleNamespace(device_kind=kind)).flops == peak * 1e12
  for kind, memory in {"NVIDIA A100-SXM4-80GB": 80, "NVIDIA A100-SXM4-40GB": 40, "NVIDIA A100-PCIE-40GB": 40}.items():
    assert chip(types.SimpleNamespace(device_kind=kind)).hbm_bytes == memory * 2**30


def test_a_run_reports_its_speed_and_writes_a_trace(workspace, tmp_path):
  workdir = tmp_path / "run"
  train.main([*config_arguments(workspace), "--config.train.steps=4", f"--workdir={workdir}", "--profile=3:4"])
  first, second = read_metrics(workdir)
  assert first["first_step_seconds"] > 0
  for row in (first, second):
    assert row["images_per_second"] == pytest.approx(8 / np.mean([row["step_seconds_p50"]]), rel=0.5)
    assert 0 < row["step_seconds_p50"] <= row["step_seconds_p90"] <= row["step_seconds_p99"]
    assert row["tflops_per_second_per_device"] > 0 and 0 <= row["data_wait_share"] <= 1
    assert "mfu" not in row, "nobody knows the peak of this CPU"
  (trace,) = (workdir / "profile").rglob("*.xplane.pb")
  assert trace.stat().st_size > 0


def test_steps_that_a_resumed_run_has_behind_it_are_not_traced(tmp_path):
  profile = Profile(parse_profile("3:4", 8), tmp_path / "profile", StepClock(10, 1, None))
  for step in range(5, 9):
    profile.before(step)
  profile.close()
  assert not (tmp_path / "profile").exists()
  assert parse_profile("", 8) == range(0)


@pytest.mark.parametrize("window", ["5", "3:2", "0:1", "3:9", "a:b"])
def test_impossible_profiles_are_refused(workspace, tmp_path, fails, window):
  arguments = [*config_arguments(workspace), "--config.train.steps=8", f"--workdir={tmp_path / 'run'}"]
  assert "give START:STOP" in fails(train.main, *arguments, f"--profile={window}")
  assert not (tmp_path / "run").exists()
