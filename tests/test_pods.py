"""The page about TPU pods: what a chip sends, by brute force; and a page from reports, whichever are there."""

import json

import pytest

from benchmarks import pods
from compdiff_jax.ahead_of_time.program import TrainingStep, model_flops
from compdiff_jax.conditioning.schema import Schema
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


def test_constants_are_those_of_the_config(tmp_path, monkeypatch):
  pods.prepare(tmp_path)
  config = load_config(str(pods.Path(pods.__file__).parents[1] / pods.CONFIG), ["--config.train.batch_size=1"])
  monkeypatch.chdir(tmp_path)
  schema = Schema.load(tmp_path / "data" / "chest" / "schema.json")
  assert TrainingStep(config, schema, "moments").trained_parameters == pods.PARAMETERS
  assert model_flops(config, schema, "moments") == pytest.approx(pods.IMAGE_FLOPS, rel=1e-3)


def test_page_from_some_reports(tmp_path, monkeypatch):
  reports = tmp_path / "reports"
  reports.mkdir()
  monkeypatch.setattr(pods, "REPORTS", reports)
  monkeypatch.setattr(pods, "PAGE", tmp_path / "pods.md")
  facts = {
    "topology": "v6e:4x4",
    "devices": 16,
    "batch_size": 128,
    "mesh": {"data": 4, "fsdp": 4, "tensor": 1},
    "remat": "none",
    "fits": True,
    "memory": {"arguments": 2**32, "peak": 10 * 2**30, "available": 32 * 2**30},
    "estimated_seconds": 0.125,
    "collectives": [{"kind": "all-gather", "network": "ICI", "sent_bytes": 3 * 10**9}],
    "machine": "2026-11-25, a machine.",
  }
  (reports / "v6e-16.json").write_text(json.dumps(facts))
  pods.main(["--only", ""])
  page = (tmp_path / "pods.md").read_text()
  assert "| `v6e:4x4`, 16 |" in page and "| 10.00 |" in page and "| 3.00 |" in page and "a machine." in page
  assert "Not compiled yet: v5e-16, v5e-256, v5p-8, v5p-128, v6e-256;" in page
  # Half of 400 GB/s, as 4x4 closes no ring.
  ici, _ = pods.traffic(16, 1, 4)
  row = next(line for line in page.splitlines() if line.startswith("| `v6e:4x4` |"))
  assert f"| 0.125 (compiled) | {ici / 1e9:.2f} | {ici / 200e6:.0f} |" in row
  assert f"| {0.125 / (0.125 + ici / 200e9):.0%} | 100% |" in row
  assert "(assumed)" in page and "{" not in page
