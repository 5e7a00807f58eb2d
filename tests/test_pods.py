"""The page about TPU pods: what a chip sends, by brute force; and a page from reports, whichever are there."""

import json

import pytest
from conftest import REPOSITORY

from benchmarks import pods
from compdiff_jax.ahead_of_time import stand_ins
from compdiff_jax.ahead_of_time.program import TrainingProgram, model_flops
from compdiff_jax.conditioning.demographics import SCHEMA
from compdiff_jax.config import load_config


def _ring(size, members):
  """Bytes that a member of a ring sends until every one has every part of an array: one part a round."""
  part, rounds = size / members, 0
  have = [{member} for member in range(members)]
  newest = list(range(members))
  while any(len(parts) < members for parts in have):
    newest = [newest[member - 1] for member in range(members)]
    for member, part_number in enumerate(newest):
      have[member].add(part_number)
    rounds += 1
  return part * rounds


@pytest.mark.parametrize(("chips", "slices", "fsdp"), [(8, 1, 1), (16, 1, 8), (16, 1, 16), (8, 2, 4), (4, 4, 2)])
def test_traffic(chips, slices, fsdp):
  """Gathering passes every part around the ring once, and summing is scattering (the same in reverse) and gathering."""
  ici, dcn = pods.traffic(chips, slices, fsdp, parameters=1000)
  state = _ring(2000, fsdp) * 3
  copies = 2 * _ring(2000 / fsdp, chips // fsdp)
  assert ici == pytest.approx(state + copies)
  assert dcn == pytest.approx(2 * _ring(2000 / chips, slices))


def test_constants_are_those_of_the_config(tmp_path):
  config = load_config(str(REPOSITORY / pods.CONFIG), ["--config.train.batch_size=1"])
  config, _ = stand_ins.with_networks(config, tmp_path)
  assert TrainingProgram(config, SCHEMA, "moments").trained_parameters == pods.PARAMETERS
  assert model_flops(config, SCHEMA, "moments") == pytest.approx(pods.IMAGE_FLOPS, rel=1e-3)


def test_page_from_some_reports(tmp_path, monkeypatch):
  reports = tmp_path / "reports"
  reports.mkdir()
  monkeypatch.setattr(pods, "REPORTS", reports)
  monkeypatch.setattr(pods, "PAGE", tmp_path / "pods.md")
  facts = {
    "topology": "v6e:4x4",
    "slices": 1,
    "devices": 16,
    "batch_size": 128,
    "mesh": {"data": 4, "fsdp": 4, "tensor": 1},
    "remat": "none",
    "fits": True,
    "memory": {"arguments": 2**32, "peak": 10 * 2**30, "available": 32 * 2**30},
    "estimated_seconds": 0.125,
    "memory_bound_seconds": 0.25,
    "ici_seconds": 0.02,
    "collectives": [{"kind": "all-gather", "network": "ICI", "sent_bytes": 3 * 10**9}],
    "machine": "2026-11-25, a machine.",
  }
  (reports / "v6e-16.json").write_text(json.dumps(facts))
  exchange = {"kind": "send", "network": "DCN", "sent_bytes": 2 * 10**8}
  two = facts | {"topology": "v5e:4x4", "slices": 2, "devices": 32, "batch_size": 256, "memory_bound_seconds": 0.1}
  two |= {"ici_seconds": 0.04, "dcn_seconds": 0.015, "collectives": [*facts["collectives"], exchange]}
  (reports / "v5e-16x2.json").write_text(json.dumps(two))
  silent = {name: value for name, value in facts.items() if name != "estimated_seconds"}
  (reports / "v5p-8.json").write_text(json.dumps(silent | {"topology": "v5p:2x2x1", "devices": 4, "batch_size": 64}))
  pods.main(["--only", ""])
  page = (tmp_path / "pods.md").read_text()
  assert "| `v6e:4x4`, 16 |" in page and "| 10.00 |" in page and "| 3.00 |" in page and "a machine." in page
  assert "| `v5e:4x4` × 2, 32 |" in page and "--slices=2 --inputs=moments --config.train.batch_size=256" in page
  assert "Not compiled yet: v5e-16, v5e-256, v5p-128, v6e-256;" in page
  # The bytes of v6e take longer than the step is estimated to: eight images in 0.25 s. Of v5p nothing is estimated.
  assert "by that, images/s a chip are 32 (v6e-16)." in page and "| 0.125 † |" in page

  def row(start):
    return next(line for line in page.splitlines() if line.startswith(start))

  def paper(chips, slices, fsdp):
    return [size / 1e9 for size in pods.traffic(chips, slices, fsdp)]

  ici, dcn = paper(16, 1, 4)[0], paper(16, 2, 4)[1]
  compiled = f"0.125 (compiled †) | 3.00 | {ici:.2f} | 20 |"
  assert row("| `v6e:4x4` |") == f"| `v6e:4x4` | 16 | {compiled}  |  |  | {0.125 / 0.145:.0%} |"
  # Two slices without a program of their own send inside what one sends, and between them what the formula says.
  share = f"{0.125 / (0.145 + dcn / 12.5):.0%}"
  assert row("| `v6e:4x4` × 2") == f"| `v6e:4x4` × 2 | 32 | {compiled}  | {dcn:.3f} | {dcn * 80:.0f} | {share} |"
  # Half of 400 GB/s, as 2x4 closes no ring.
  ici = paper(8, 1, 4)[0]
  assert f"|  | {ici:.2f} | {ici * 5:.0f} |  |  |  | {0.125 / (0.125 + ici / 200):.0%} |" in row("| `v6e:2x4` |")
  ici, dcn = paper(16, 2, 8)
  assert f"| 3.00 | {ici:.2f} | 40 | 0.200 | {dcn:.3f} | 15 | {0.125 / 0.18:.0%} |" in row("| `v5e:4x4` × 2")
  assert "(assumed)" in row("| `v5e:4x4` |") and "{" not in page
