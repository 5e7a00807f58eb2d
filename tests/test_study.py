"""The phantom study's own arithmetic, reference and tables; the runs themselves are commands that other tests cover."""

import argparse
import csv
import dataclasses
import os
import types
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from benchmarks import linear_reader, phantom_study, real_study, study_loss, study_report, study_runs
from compdiff_jax import cli, plan
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.config import load_config
from compdiff_jax.data.records import RecordSet
from compdiff_jax.evaluation import image_sets
from compdiff_jax.methods import CONDITIONERS
from compdiff_jax.sampling.plan import read_plan
from compdiff_jax.workdir import open_run
from data_prep.phantom.population import SCHEMA

_FUNDUS = Path(os.environ.get("COMPDIFF_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "fundus"
_CELLS = ("age=60-80,sex=male,group=A", "age=40-60,sex=male,group=B", "age=18-40,sex=female,group=D")
_HELD = "age=60-80,sex=male,group=C"


@pytest.mark.parametrize(
  ("attributes", "networks"),
  [(SCHEMA.names, phantom_study.NETWORKS), (("grade", "eye", "maculopathy"), real_study.NETWORKS)],
)
def test_every_method_has_one_budget_and_one_order_of_data(tmp_path, attributes, networks):
  """After the study's settings, configs differ in where demographics go, and in nothing that costs or orders data."""
  study = study_runs.Study(tmp_path, attributes, networks, phantom_study.BUDGETS["quick"])
  configs = {}
  for method in CONDITIONERS:
    path, *overrides = study_runs.config_arguments(study, method, study_runs.run_settings(7, study.budget))
    configs[method] = load_config(path.removeprefix("--config="), overrides)
  for method, config in configs.items():
    config.data.path = config.data.path.rsplit("-")[0]  # moments of the same records, with other words in the prompt
    for part in ("seed", "data", "train", "unet", "vae", "text_encoder", "scheduler", "sample"):
      assert config[part] == configs["baseline"][part], (method, part)
    assert any(config.dropout.values()) == (method == "coind"), method
    in_prompt = {"baseline": 3, "fairdiffusion": 3, "hcn": 1}.get(method, 0)
    in_tokens = config.conditioner.attributes if config.conditioner.kind != "none" else ()
    assert (*config.prompt_attributes, *in_tokens) == attributes and len(config.prompt_attributes) == in_prompt
  assert configs["fairdiffusion"].fairness.variant and configs["coind"].loss.coind


def test_sizes_of_the_reference_that_are_none(capsys, tmp_path):
  for sizes in ("3", "0,5", "a,b"):
    assert cli.run(phantom_study.main, "study", ["--out", str(tmp_path / "new"), f"--real={sizes}"]) == 2
    assert f"--real: {sizes!r} is not two numbers" in capsys.readouterr().err
  assert not (tmp_path / "new").exists()


def test_a_study_goes_on_with_the_sizes_it_has(tmp_path):
  """Another --real than that of the reference that is there would change nothing: refused."""
  phantom_study.prepare(tmp_path, 400, 1, 2)
  phantom_study.prepare(tmp_path, 400, 1, 2)
  with pytest.raises(cli.InputError, match="has 40 images and not 48"):
    phantom_study.prepare(tmp_path, 400, 1, 3)
  with pytest.raises(cli.InputError, match=r"holds out age=18-40,sex=female,group=A;.* go on with these \(--cells\)"):
    phantom_study.prepare(tmp_path, 400, 1, 2, phantom_study.HELD_OUT[1:])


def test_a_study_goes_on_with_the_budget_it_has(tmp_path):
  """Runs that are finished would else be reported under a budget that they never had; more seeds may come."""
  study = study_runs.Study(tmp_path, SCHEMA.names, phantom_study.NETWORKS, phantom_study.BUDGETS["quick"])
  study_runs._check_same_study(study)
  more = dataclasses.replace(study, budget=dataclasses.replace(study.budget, seeds=(1, 2, 3, 4)))
  study_runs._check_same_study(more)
  other = dataclasses.replace(study, budget=dataclasses.replace(study.budget, steps=7))
  with pytest.raises(cli.InputError, match=r"study.json has steps 600 and not 7"):
    study_runs._check_same_study(other)


def test_reference_is_balanced_and_has_one_image_a_patient(tmp_path):
  phantom_study.write_reference(tmp_path / "reference", seen=1, held_out=2)
  source = RecordSet(tmp_path / "reference").split("test")
  schema = RecordSet(tmp_path / "reference").schema
  records = [source[i] for i in range(len(source))]
  columns = {a.name: np.array([r["attributes"][a.name] for r in records], a.dtype) for a in schema}
  sizes = {schema.cell_name(cell): int(schema.in_cell(columns, cell).sum()) for cell in schema.cells()}
  assert sizes == {cell: 2 if cell in phantom_study.HELD_OUT else 1 for cell in sizes}
  assert len({r["patient"] for r in records}) == len(records) == 40


def test_held_out_cells_are_balanced_and_every_pair_stays_in_training():
  held = [SCHEMA.parse_cell(text) for text in phantom_study.HELD_OUT]
  other_sex = ";".join(SCHEMA.cell_name({**cell, "sex": 1 - cell["sex"]}) for cell in held)
  assert not set(phantom_study._cells(other_sex)) & set(phantom_study.HELD_OUT)
  with pytest.raises(argparse.ArgumentTypeError, match="do not name all of age, sex, group"):
    phantom_study._cells("age=18-40,sex=male")
  seen = [cell for cell in SCHEMA.cells() if cell not in held]
  for a, b in (("age", "sex"), ("age", "group"), ("sex", "group")):
    assert len({(cell[a], cell[b]) for cell in seen}) == SCHEMA[a].num_levels * SCHEMA[b].num_levels
    assert len({(cell[a], cell[b]) for cell in held}) == 8


def test_figure_holds_both_kinds_of_uncertainty():
  figure = study_report.Figure.of([10.0, 12.0, 14.0], [1.0, 2.0, 2.0])
  assert figure.mean == 12 and figure.sd == pytest.approx(2)
  # The images' part does not shrink with the seeds. Freedom 2 (13/3)^2 / (4/3)^2 = 21.1, quantile of a table.
  half = 2.079 * np.sqrt(4 / 3 + (1 + 4 + 4) / 3)
  assert (figure.lo, figure.hi) == pytest.approx((12 - half, 12 + half), rel=1e-4)
  few = study_report.Figure.of([10.0, 12.0, 14.0])
  assert few.hi - 12 == pytest.approx(4.303 * np.sqrt(4 / 3), rel=1e-4)
  one = study_report.Figure.of([5.0], [2.0])
  assert np.isnan(one.sd) and (one.lo, one.hi) == pytest.approx((5 - 3.92, 5 + 3.92), rel=1e-4) and str(one) == "5"


@pytest.mark.parametrize("image_sd", [0.0, 0.5, 2.0])
def test_intervals_of_three_seeds_hold_the_truth_as_often_as_they_say(image_sd):
  """The seeds of a study vary, and all of them are judged on one set of images."""
  rng = np.random.default_rng(0)
  seeds, images = rng.normal(size=[4000, 3]), image_sd * rng.normal(size=[4000, 1])
  figures = [study_report.Figure.of(values, [image_sd] * 3) for values in seeds + images]
  assert 0.935 < np.mean([figure.lo < 0 < figure.hi for figure in figures]) < 0.97


def _measures(distance, kind):
  accuracy = {"synthetic": {"value": 0.5}, "real": {"value": 0.9}}
  names = ("sex accuracy", "group accuracy", "age mean absolute error", "all attributes")
  kid = {"value": distance, "lo": distance - 1.96, "hi": distance + 1.96, "null": {"reason": "few"}}
  kid["halves"] = [distance - 3, distance + 3] * 2  # far from each other, but alike for every method
  fidelity = dict.fromkeys(names, accuracy)
  return {"kind": kind, "n": 20, "kid": kid, "fd": {"value": 3.0}, "fidelity": fidelity, "losses": [1.0, 3.0]}


def _run(shift):
  """Distances 10, 20, 30 of the seen cells, 40 of the held-out one, all moved by `shift`."""
  levels = {"sex=male": 12.0, "sex=female": 30.0, "group=A": 10.0, "age=60-80": 10.0}
  return {
    "overall": _measures(20 + shift, "overall"),
    **{name: _measures(value + shift, "attribute") for name, value in levels.items()},
    **{cell: _measures(10 * i + 10 + shift, "cell") for i, cell in enumerate(_CELLS)},
    "held-out (pair-seen)": _measures(40 + shift, "held-out"),
    _HELD: _measures(40 + shift, "cell") | {"losses": [100 + shift, 102 + shift, 98 + shift]},
  }


_RESULTS = {
  "runs": {"baseline": {42: _run(0), 43: _run(2)}, "compdiff": {42: _run(-8), 43: _run(-6)}},
  "shares": dict(zip((*_CELLS, _HELD), (0.6, 0.3, 0.1, 0.0))),
  "held_out": [_HELD],
  "schema": SCHEMA,
  "real": types.SimpleNamespace(images=np.zeros([96, 32, 32, 3], np.uint8)),
}


def test_study_figures():
  study = study_report.Study(_RESULTS)
  assert study.seen == list(_CELLS)
  assert study.equity_scaled("baseline", "sex") == "39 ± 1.41"  # 21 + 8 + 10; the distances between levels are fixed
  assert "not evaluable (group=B, group=C" in study.equity_scaled("baseline", "group")
  assert study.fidelity("baseline", "overall", "sex accuracy") == "0.5 ± 0"
  weighted = study.mean_distance("baseline", study.seen, [study.shares[cell] for cell in study.seen])
  assert weighted.mean == pytest.approx(0.6 * 11 + 0.3 * 21 + 0.1 * 31)
  # Independent errors of 1 each, weighted, and half the difference of the seeds squared.
  quantile = stats.t.ppf(0.975, (0.46 + 1) ** 2)
  assert weighted.hi - weighted.mean == pytest.approx(quantile * np.sqrt(0.36 + 0.09 + 0.01 + 2 / 2))


def test_loss_figures():
  """Images differ by far more than methods; the difference between methods does not see that."""
  study = study_report.Study(_RESULTS)
  loss, gap = study.loss("baseline", [_HELD]), study.loss_difference("compdiff", "baseline", [_HELD])
  assert loss.mean == pytest.approx(101)
  quantile = stats.t.ppf(0.975, (4 / 3 + 1) ** 2)
  assert loss.hi - loss.mean == pytest.approx(quantile * np.sqrt(4 / 3 + 2 / 2))  # three images; two seeds, 2 apart
  values = [-8 / 1.00, -8 / 1.02]
  assert gap.mean == pytest.approx(np.mean(values))
  assert gap.hi - gap.mean == pytest.approx(12.706 * np.std(values, ddof=1) / np.sqrt(2), rel=1e-4)


def test_tables_and_margins(tmp_path, monkeypatch):
  monkeypatch.setattr(study_report, "_grid", lambda *_: None)
  budget = dataclasses.replace(phantom_study.BUDGETS["quick"], seeds=(42, 43, 44, 45))
  runs = {name: {**own, 44: own[42], 45: own[43]} for name, own in _RESULTS["runs"].items()}
  study_report.write(tmp_path, _RESULTS | {"runs": runs}, ["baseline", "compdiff"], budget, "Toy", 60)
  text = (tmp_path / "tables.md").read_text()
  assert "seen cells: 13 (11.2 to 14.8) against 21 (19.2 to 22.8), 38% lower; intervals disjoint" in text
  assert text.count("Difference on the same images: -8 (-8 to -8)") == 2  # what seeds and images share cancels
  assert "held-out cells: 33 (30.7 to 35.3) against 41 (38.7 to 43.3), 20% lower; intervals disjoint" in text
  with open(tmp_path / "table2.csv", newline="") as file:
    rows = list(csv.reader(file))
  assert rows[1] == [_CELLS[0], "60.0%", "11 ± 1.15", "3 ± 1.15"] and len(rows) == 4
  with open(tmp_path / "table5.csv", newline="") as file:
    assert [row[4] for row in csv.reader(file)] == ["held out, % above text baseline", "", "-7.92 (-8.07 to -7.78)"]
  for name in ("distance_by_share.png", "held_out.png"):
    assert (tmp_path / name).stat().st_size > 5000


def test_one_seen_cell_has_no_trend(tmp_path):
  figure = study_report.Figure.of([1.0, 2.0], [0.1, 0.1])
  study = types.SimpleNamespace(seen=_CELLS[:1], shares={_CELLS[0]: 0.2}, distance=lambda *_: figure)
  with warnings.catch_warnings():
    warnings.simplefilter("error", np.exceptions.RankWarning)
    study_report._plot_shares(tmp_path / "plot.png", study, ["baseline", "compdiff"])
  assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_run_that_was_stopped_is_not_sampled(tmp_path, monkeypatch):
  """SIGTERM ends training with status 0; the run is not finished, and its pictures would be those of an early step."""
  study = study_runs.Study(tmp_path, SCHEMA.names, phantom_study.NETWORKS, phantom_study.BUDGETS["quick"])
  monkeypatch.setattr(study_runs.train, "main", lambda argv: None)
  monkeypatch.setattr(study_runs.sample, "main", lambda argv: pytest.fail("sampled"))
  with pytest.raises(study_runs.cli.RunError, match="training was stopped; the same command goes on"):
    study_runs.run_job(study, types.SimpleNamespace(job="baseline:42", core=None))


def test_loss_of_a_real_image_is_that_under_its_own_condition(workspace, trained, tmp_path):
  """One row by hand, from the closed form of the noising."""
  plan.main([f"--data={workspace / 'data'}", "--like=test", f"--out={tmp_path / 'plan.csv'}"])
  found = study_loss.losses(trained, tmp_path / "plan.csv", workspace / "data")
  run = open_run(trained)
  model, rows = run.model, read_plan(tmp_path / "plan.csv", run.model.schema)
  params = run.load_params("ema")[1]
  real = image_sets.load(workspace / "data", "test")
  image = real.images[list(real.keys).index(rows[3].id)][None]
  attributes = {a.name: np.asarray([rows[3].attributes[a.name]], a.dtype) for a in model.schema}
  context, _ = model.context(params, run.tokenizer([rows[3].text]), attributes)
  unet = jax.jit(model.unet.__call__)
  latents = np.split(np.asarray(model.moments(params, image)), 2, axis=-1)[0] * model.vae_config.scaling_factor
  errors = []
  for t in study_loss.TIMESTEPS:
    noise = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(t), 3), latents.shape[1:]))
    kept = float(model.schedule.alphas_cumprod[t])
    noisy = np.sqrt(kept) * latents + np.sqrt(1 - kept) * noise
    errors.append(np.mean((np.asarray(unet(params["unet"], noisy, np.array([t]), *context)) - noise) ** 2))
  assert found.shape == (len(rows),) and found[3] == pytest.approx(np.mean(errors), rel=1e-4)
  assert np.std(found) > 1e-3  # another row's would not do


def test_bad_arguments(fails, tmp_path):
  message = fails(phantom_study.main, "--out", tmp_path / "out", "--quick", "--methods", "compdif")
  assert "did you mean 'compdiff'" in message
  for option in ("--methods=", "--seeds=x", "--seeds=1,", "--steps=0", "--workers=-1"):
    assert option.split("=")[0] in fails(phantom_study.main, "--out", tmp_path / "out", "--quick", option)
  assert not (tmp_path / "out").exists()


def test_linear_reader_reads_what_is_there_and_no_more():
  """A bright half tells the side; the other attribute is in no pixel, and images of one patient do not give it away."""
  schema = Schema(
    (
      Attribute("side", "categorical", values=("left", "right")),
      Attribute("dose", "continuous", low=0, high=30, bins=(10, 20), unit="mg"),
    )
  )
  rng = np.random.default_rng(0)
  side, dose = rng.integers(0, 2, 300), rng.uniform(0, 30, 300)
  images = rng.integers(0, 60, [300, 32, 32, 3])
  for image, right in zip(images, side):
    image[8:16, 20:28] += 60 * right
    image[8:16, 4:12] += 60 * (1 - right)
  unknown = np.where(np.arange(300) < 20, -1, side)  # left out of the fit
  train = {"side": unknown[:200].astype(np.int32), "dose": dose[:200].astype(np.float32)}
  reader = linear_reader.LinearReader().fit(images[:200].astype(np.uint8), train, schema)
  read = reader.predict(images[200:].astype(np.uint8))
  assert (read["side"] == side[200:]).all()
  assert set(np.unique(read["dose"])) <= {5, 15, 25}
  levels = schema["dose"].levels
  assert (levels(read["dose"]) == levels(dose[200:].astype(np.float32))).mean() < 0.5


@pytest.mark.skipif(not _FUNDUS.is_dir(), reason=f"real fundus photographs are not at {_FUNDUS}; set COMPDIFF_SHARED")
def test_real_study_groups_grades(tmp_path):
  real_study.prepare(tmp_path / "data", real_study.CASES["fundus"], _FUNDUS)
  records = RecordSet(tmp_path / "data")
  assert records.schema["grade"].values == ("no DR", "NPDR", "PDR")
  train = [records.split("train")[i]["attributes"] for i in range(len(records.split("train")))]
  cell = records.schema.parse_cell(real_study.CASES["fundus"].held_out)
  columns = {a.name: np.array([row[a.name] for row in train], a.dtype) for a in records.schema}
  assert len(train) > 100 and not records.schema.in_cell(columns, cell).any()
