"""The phantom study's own arithmetic, reference and tables; the runs themselves are commands that other tests cover."""

import csv
import dataclasses

import numpy as np
import pytest

from benchmarks import phantom_study, study_report
from compdiff_jax.config import load_config
from compdiff_jax.data.records import RecordSet
from compdiff_jax.methods import CONDITIONERS

_CELLS = ("age=60-80,sex=male,group=A", "age=40-60,sex=male,group=B", "age=18-40,sex=female,group=D")
_HELD = "age=60-80,sex=male,group=C"


def test_every_method_has_one_budget_and_one_order_of_data(tmp_path):
  """After the study's settings, configs differ in where demographics go, and in nothing that costs or orders data."""
  settings = phantom_study.run_settings(7, phantom_study.BUDGETS["quick"])
  configs = {}
  for method in CONDITIONERS:
    path, *overrides = phantom_study.config_arguments(tmp_path, method, settings)
    configs[method] = load_config(path.removeprefix("--config="), overrides)
  for method, config in configs.items():
    for part in ("seed", "data", "train", "unet", "vae", "text_encoder", "scheduler", "sample", "dropout"):
      assert config[part] == configs["baseline"][part], (method, part)
    conditioned = config.conditioner.kind != "none"
    assert bool(config.prompt_attributes) == (not conditioned or method == "hcn"), method
  assert configs["fairdiffusion"].fairness.variant and configs["coind"].loss.coind


def test_reference_is_balanced_and_has_one_image_a_patient(tmp_path):
  phantom_study.write_reference(tmp_path / "reference", 1)
  source = RecordSet(tmp_path / "reference").split("test")
  schema = RecordSet(tmp_path / "reference").schema
  records = [source[i] for i in range(len(source))]
  columns = {a.name: np.array([r["attributes"][a.name] for r in records], a.dtype) for a in schema}
  assert [int(schema.in_cell(columns, cell).sum()) for cell in schema.cells()] == [1] * 32
  assert len({r["patient"] for r in records}) == 32


def test_figure_holds_both_kinds_of_uncertainty():
  figure = study_report.Figure.of([10.0, 12.0, 14.0], [1.0, 2.0, 2.0])
  assert figure.mean == 12 and figure.sd == pytest.approx(2)
  half = 1.96 * np.sqrt(4 / 3 + (1 + 4 + 4) / 3)  # the images' part does not shrink with the seeds
  assert (figure.lo, figure.hi) == pytest.approx((12 - half, 12 + half))
  one = study_report.Figure.of([5.0], [2.0])
  assert np.isnan(one.sd) and (one.lo, one.hi) == pytest.approx((5 - 3.92, 5 + 3.92)) and str(one) == "5"


def _measures(distance, kind):
  accuracy = {"synthetic": {"value": 0.5}, "real": {"value": 0.9}}
  names = ("sex accuracy", "group accuracy", "age mean absolute error", "all attributes")
  kid = {"value": distance, "lo": distance - 1.96, "hi": distance + 1.96, "null": {"reason": "few"}}
  return {"kind": kind, "n": 20, "kid": kid, "fd": {"value": 3.0}, "fidelity": dict.fromkeys(names, accuracy)}


def _run(shift):
  """Distances 10, 20, 30 of the seen cells, 40 of the held-out one, all moved by `shift`."""
  levels = {"sex=male": 12.0, "sex=female": 30.0, "group=A": 10.0, "age=60-80": 10.0}
  return {
    "overall": _measures(20 + shift, "overall"),
    **{name: _measures(value + shift, "attribute") for name, value in levels.items()},
    **{cell: _measures(10 * i + 10 + shift, "cell") for i, cell in enumerate(_CELLS)},
    "held-out (pair-seen)": _measures(40 + shift, "held-out"),
    _HELD: _measures(40 + shift, "cell"),
  }


_RESULTS = {
  "runs": {"baseline": {42: _run(0), 43: _run(2)}, "compdiff": {42: _run(-8), 43: _run(-6)}},
  "shares": dict(zip((*_CELLS, _HELD), (0.6, 0.3, 0.1, 0.0))),
  "held_out": [_HELD],
}


def test_study_figures():
  study = study_report.Study(_RESULTS)
  assert study.seen == list(_CELLS)
  assert study.equity_scaled("baseline", "sex").mean == pytest.approx(21 + 8 + 10)
  weighted = study.mean_distance("baseline", study.seen, [study.shares[cell] for cell in study.seen])
  assert weighted.mean == pytest.approx(0.6 * 11 + 0.3 * 21 + 0.1 * 31)
  # Independent errors of 1 each, weighted, and half the difference of the seeds squared.
  assert weighted.hi - weighted.mean == pytest.approx(1.96 * np.sqrt(0.36 + 0.09 + 0.01 + 2 / 2))


def test_tables_and_margins(tmp_path, monkeypatch):
  monkeypatch.setattr(study_report, "_grid", lambda *_: None)
  budget = dataclasses.replace(phantom_study.BUDGETS["quick"], seeds=(42, 43))
  study_report.write(tmp_path, _RESULTS, ["baseline", "compdiff"], budget, 60)
  text = (tmp_path / "tables.md").read_text()
  assert "all seen cells: 13 (10.2 to 15.8) against 21 (18.2 to 23.8), +38% lower; intervals disjoint" in text
  assert "held-out cells: 33 (30.2 to 35.8) against 41 (38.2 to 43.8), +20% lower; intervals disjoint" in text
  with open(tmp_path / "table2.csv", newline="") as file:
    rows = list(csv.reader(file))
  assert rows[1] == [_CELLS[0], "60.0%", "11 ± 1.41", "3 ± 1.41"] and len(rows) == 4
  for name in ("distance_by_share.png", "held_out.png"):
    assert (tmp_path / name).stat().st_size > 5000


def test_bad_arguments(fails, tmp_path):
  message = fails(phantom_study.main, "--out", tmp_path / "out", "--quick", "--methods", "compdif")
  assert "did you mean 'compdiff'" in message and not (tmp_path / "out").exists()
