"""The phantom: a pure function of (seed, index), exact ground truth, and a reader that recovers what was drawn."""

import dataclasses
import io
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from compdiff_jax import cli
from compdiff_jax.data.records import RecordSet
from compdiff_jax.evaluation.phantom_factors import FactorReader, measure
from data_prep.phantom import FACTORS, FINDINGS, SCHEMA, PhantomImages, example, rows
from data_prep.phantom import __main__ as command
from data_prep.phantom.draw import draw, expose
from data_prep.phantom.population import Person, draw_findings, expected_anatomy, sample_factors, visit_of
from data_prep.phantom.report import write_report

NEUTRAL = dict(rib_phase=0.02, vessel_phase=1.0, arm_abduction=0.08, exposure=1.0, blur=0.014, noise=0.01)
POSE = dict(shift_u=0.0, shift_v=0.0, rotation=0.0)
NOTHING = dict.fromkeys(FINDINGS, False)


SIXTY = Person(60.0, 0, 0)  # a man of group A


def average(person=SIXTY, present=NOTHING, zone=("right", "upper")):
  """The factors of the average person."""
  factors = expected_anatomy(person) | NEUTRAL | POSE
  draw_findings(factors, dict(present), zone, np.random.default_rng(0))
  return factors


@pytest.fixture(scope="module")
def population():
  """Images [N, 64, 64], attributes, findings present [N, 5] and factors of 1,000 phantoms."""
  people, present, _, factors = zip(*(sample_factors(7, i) for i in range(1000)))
  images = np.stack([expose(draw(f, 64), f["noise"], np.random.default_rng(i)) for i, f in enumerate(factors)])
  attributes = {a.name: np.array([getattr(p, a.name) for p in people], a.dtype) for a in SCHEMA}
  present = np.array([[row[name] for name in FINDINGS] for row in present])
  return images, attributes, present, {name: np.array([f[name] for f in factors]) for name in FACTORS}


def test_an_example_depends_on_seed_and_index_only():
  alone = example(3, 17, 32)
  row = list(rows(3, 18))[17]
  assert {**row, "image": PhantomImages(3, 32)(row["image"])} == alone
  assert example(4, 17, 32)["image"] != alone["image"]
  assert example(3, 18, 32)["image"] != alone["image"]
  image = Image.open(io.BytesIO(alone["image"]))
  assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))


def test_factors_redraw_the_stored_image():
  for index in range(5):
    stored = example(0, index, 64)
    pixels = np.asarray(Image.open(io.BytesIO(stored["image"]))) / 255
    factors = json.loads(json.dumps(stored["factors"]))
    assert set(factors) == set(FACTORS)
    assert np.std(pixels - draw(factors, 64)) == pytest.approx(factors["noise"], rel=0.15)


def test_visits_of_a_patient_share_the_anatomy():
  several = [i for i in range(400) if visit_of(0, i)[1] > 0]
  assert 60 < len(several) < 200
  for i in several[:20]:
    first, visit = visit_of(0, i)
    (old, _, _, before), (new, _, _, after) = sample_factors(0, first), sample_factors(0, i)
    assert (new.sex, new.group) == (old.sex, old.group) and 0 <= new.age - old.age <= 3 * visit
    assert before["rib_phase"] == after["rib_phase"] and before["shift_u"] != after["shift_u"]
    assert example(0, i, 16)["patient"] == example(0, first, 16)["patient"] == f"P{first:06d}"


def test_population_is_imbalanced_as_stated_and_every_cell_occurs():
  people = [sample_factors(0, i)[0] for i in range(2000)]
  age = SCHEMA["age"].levels(np.array([p.age for p in people]))
  group = np.array([p.group for p in people])
  np.testing.assert_allclose(np.bincount(group) / 2000, (0.65, 0.19, 0.08, 0.08), atol=0.03)
  shares = np.bincount(age, minlength=4) / 2000
  assert shares[1] + shares[2] > 0.7 and 0.04 < shares[0] < 0.15 and 0.07 < shares[3] < 0.2
  assert len({(a, p.sex, p.group) for a, p in zip(age, people)}) == 4 * 2 * 4
  assert min(p.age for p in people) >= 18 and max(p.age for p in people) <= 95
  means = [np.mean([p.age for p in people if p.group == g]) for g in (0, 3)]
  assert means[0] > means[1] + 3


def test_prevalence_rises_with_age():
  ages, hearts = zip(
    *((p.age, there["cardiomegaly"]) for p, there, _, _ in (sample_factors(1, i) for i in range(1500)))
  )
  ages, hearts = np.array(ages), np.array(hearts)
  assert hearts[ages > 70].mean() > 1.5 * hearts[ages < 55].mean()


def test_texts_name_what_is_drawn_and_never_an_attribute():
  rng = np.random.default_rng(0)
  forbidden = {"man", "woman", "men", "women", "boy", "girl", "year", "years", "old", "age", "aged", "elderly", "young"}
  forbidden |= {text.lower() for a in SCHEMA for text in (a.name, *a.values)}
  for present in itertools.product([False, True], repeat=len(FINDINGS)):
    present = dict(zip(FINDINGS, present))
    for zone in itertools.product(("left", "right"), ("upper", "mid", "lower")):
      text, stated = write_report(present, zone, rng)
      words = set(re.findall(r"[a-z0-9]+", text.lower()))
      assert text and not words & forbidden and not any(word.isdigit() for word in words)
      assert {name for name, said in stated.items() if said == "positive"} == {
        n for n, there in present.items() if there
      }
      if present["opacity"]:
        assert f"{zone[0]} {zone[1]} zone" in text.lower()
      if not any(present.values()):
        assert "No acute cardiopulmonary abnormality." in text
  assert len({write_report(dict(NOTHING, cardiomegaly=True), zone, rng)[0] for _ in range(60)}) > 5


@pytest.mark.parametrize("pair", [("age", "sex"), ("age", "group"), ("sex", "group")])
def test_each_pair_of_attributes_interacts(pair):
  low, high = dict(age=30.0, sex=0, group=0), dict(age=85.0, sex=1, group=3)
  corners = {}
  for choice in itertools.product((0, 1), repeat=2):
    changed = {name: (low, high)[c][name] for name, c in zip(pair, choice)}
    corners[choice] = draw(average(Person(**(low | changed))), 64)
  # Brightness of the whole picture, not only some factor, departs from the sum of the two effects.
  interaction = corners[1, 1] - corners[1, 0] - corners[0, 1] + corners[0, 0]
  assert np.abs(interaction).max() > 0.05


def test_no_factor_has_a_three_way_interaction():
  total = dict.fromkeys(expected_anatomy(SIXTY), 0.0)
  for corner in itertools.product((0, 1), repeat=3):
    person = Person((30.0, 85.0)[corner[0]], corner[1], (1, 3)[corner[2]])
    for name, value in expected_anatomy(person).items():
      total[name] += (-1) ** sum(corner) * value
  np.testing.assert_allclose(list(total.values()), 0, atol=1e-12)


def test_patients_left_is_on_the_right_of_the_image():
  normal = draw(average(), 64)
  left = draw(average(present=NOTHING | {"effusion_left": True}), 64) - normal
  assert left[:, 32:].sum() > 10 and abs(left[:, :32]).sum() < 0.05 * left[:, 32:].sum()
  spot = draw(average(present=NOTHING | {"opacity": True}, zone=("right", "upper")), 64) - normal
  row, column = np.unravel_index(spot.argmax(), spot.shape)
  assert column < 28 and row < 28
  device = draw(average(present=NOTHING | {"pacemaker": True}), 64) - normal
  assert np.unravel_index(device.argmax(), device.shape)[1] > 36


@pytest.mark.parametrize(
  ("factor", "values"),
  [
    ("heart_width_ratio", (0.40, 0.46, 0.52, 0.58)),
    ("thorax_half_width", (0.56, 0.62, 0.68)),
    ("thorax_aspect", (1.05, 1.15, 1.25)),
    ("diaphragm_right", (0.26, 0.34, 0.42)),
    ("diaphragm_left", (0.32, 0.40, 0.48)),
    ("shoulder_half_width", (0.80, 0.86, 0.92)),
    ("clavicle_tilt", (2.0, 10.0, 18.0, 26.0)),
    ("tissue_level", (0.54, 0.60, 0.66)),
    ("lung_level", (0.18, 0.23, 0.28)),
    ("aortic_knob", (0.09, 0.13, 0.17)),
    ("rib_contrast", (0.05, 0.10, 0.15)),
    ("spine_contrast", (0.07, 0.15, 0.23)),
    ("effusion_left_height", (0.15, 0.3, 0.45)),
    ("effusion_right_height", (0.15, 0.3, 0.45)),
    ("breast_density", (0.0, 0.1, 0.2)),
    ("opacity_density", (0.0, 0.15, 0.3)),
    ("pacemaker", (0.0, 1.0)),
  ],
)
def test_moving_a_factor_moves_its_measurement(factor, values):
  images = np.stack([draw(average() | {factor: value}, 64) for value in values])
  names, measured = measure(images)
  assert (np.diff(measured[:, names.index(factor)]) > 0).all()


def test_measurements_follow_the_drawn_factors(population):
  images, _, present, factors = population
  names, measured = measure(images)
  healthy = ~present.any(1)
  for factor, chosen, least in (
    ("heart_width_ratio", slice(None), 0.9),
    ("thorax_half_width", slice(None), 0.95),
    ("thorax_aspect", healthy, 0.85),
    ("shoulder_half_width", slice(None), 0.95),
    ("clavicle_tilt", slice(None), 0.9),
    ("tissue_level", slice(None), 0.9),
    ("lung_level", slice(None), 0.85),
    ("rib_contrast", healthy, 0.85),
    ("aortic_knob", healthy, 0.9),
  ):
    found = np.corrcoef(measured[chosen, names.index(factor)], factors[factor][chosen])[0, 1]
    assert found > least, (factor, found)
  # So do the findings: a linear function of the measurements, fitted to 700 images, tells them in the other 300.
  inputs = np.column_stack([(measured - measured.mean(0)) / measured.std(0), np.ones(len(images))])
  scores = inputs[700:] @ np.linalg.lstsq(inputs[:700], present[:700].astype(float))[0]
  for name, own, there in zip(FINDINGS, scores.T, present[700:].T):
    auroc = stats.mannwhitneyu(own[there], own[~there]).statistic / (there.sum() * (~there).sum())
    assert auroc > 0.85, (name, auroc)


def test_measure_accepts_other_sizes_and_colour():
  names, small = measure(draw(average(), 64)[None])
  _, large = measure(np.repeat((draw(average(), 256)[None, :, :, None] * 255).astype(np.uint8), 3, axis=-1))
  for factor in ("heart_width_ratio", "thorax_half_width", "tissue_level"):
    at = names.index(factor)
    assert large[0, at] == pytest.approx(small[0, at], abs=0.02)
  with pytest.raises(cli.InputError, match="shape"):
    measure(np.zeros([64, 64]))
  with pytest.raises(cli.InputError, match="0 to 1"):
    measure(np.full([1, 64, 64], 200.0))


def test_reader_on_clear_and_on_soft_images(population):
  images, attributes, _, _ = population
  train, test = slice(0, 700), slice(700, None)
  known = {name: values[train] for name, values in attributes.items()}
  reader = FactorReader().fit(images[train], known, SCHEMA)
  noise = np.random.default_rng(1).standard_normal(images[test].shape) * 4 / 255
  soft = np.clip(ndimage.gaussian_filter(images[test] / 255, [0, 0.7, 0.7]) + noise, 0, 1)
  for kind, sex, group, years in ((images[test], 0.97, 0.9, 6), (soft, 0.95, 0.85, 8)):
    read = reader.predict(kind)
    assert np.mean(read["sex"] == attributes["sex"][test]) >= sex
    assert np.mean(read["group"] == attributes["group"][test]) >= group
    assert np.mean(np.abs(read["age"] - attributes["age"][test])) <= years
    assert {name: values.dtype for name, values in read.items()} == {a.name: a.dtype for a in SCHEMA}
  again = FactorReader().fit(images[train], known, SCHEMA)
  np.testing.assert_array_equal(again.predict(soft)["age"], reader.predict(soft)["age"])


def test_reader_reads_a_cell_it_never_saw(population):
  images, attributes, _, _ = population
  cell = SCHEMA.parse_cell("age=60-80,sex=female,group=D")
  train = ~SCHEMA.in_cell(attributes, cell)
  reader = FactorReader().fit(images[train], {name: x[train] for name, x in attributes.items()}, SCHEMA)
  rng = np.random.default_rng(0)
  people = [Person(float(age), 1, 3) for age in rng.integers(60, 80, 40)]
  anatomy = [average(p) | {"shift_u": rng.normal(0, 0.012), "exposure": rng.normal(1, 0.012)} for p in people]
  read = reader.predict(np.stack([expose(draw(f, 64), 0.01, rng) for f in anatomy]))
  assert np.mean(read["group"] == 3) >= 0.9 and np.mean(read["sex"] == 1) >= 0.95
  assert np.mean(np.abs(read["age"] - [p.age for p in people])) < 6


def test_reader_leaves_unknown_attributes_out(population):
  images, attributes, _, _ = population
  attributes = {name: values[:300].copy() for name, values in attributes.items()}
  attributes["age"][::3], attributes["sex"][1::3] = np.nan, -1
  read = FactorReader().fit(images[:300], attributes, SCHEMA).predict(images[300:400])
  assert np.isfinite(read["age"]).all() and set(read["sex"]) <= {0, 1}
  attributes["age"][:] = np.nan
  with pytest.raises(cli.InputError, match="known"):
    FactorReader().fit(images[:300], attributes, SCHEMA)


def test_command_writes_a_data_set(tmp_path, capsys):
  out = tmp_path / "phantom"
  arguments = ["--out", str(out), "--num", "120", "--size", "16", "--holdout", "age=60-80,sex=female,group=A"]
  assert cli.run(command.main, "phantom", arguments) == 0
  assert "rarest cell: age=" in capsys.readouterr().out
  data = RecordSet(out)
  assert sum(data.splits.values()) == 120 and data.held_out == ("age=60-80,sex=female,group=A",)
  record = data.split("train")[0]
  index = int(record["key"].removeprefix("phantom-"))
  drawn = example(0, index, 16)
  assert record["image"] == drawn["image"] and record["factors"] == drawn["factors"] and record["text"] == drawn["text"]
  assert dataclasses.asdict(sample_factors(0, index)[0]) == record["attributes"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--num", "0"], "--num 0"),
    (["--num", "few"], "--num"),
    (["--num", "20", "--size", "15"], "--size 15"),
    (["--num", "20", "--size", "1025"], "--size 1025"),
    (["--num", "20", "--seed", "-1"], "--seed -1"),
    (["--num", "20", "--holdout", "age=70"], "age has no level '70'"),
    (["--num", "20", "--holdout", "region=D"], "no attribute 'region'"),
    (["--num", "90", "--size", "16", "--holdout", "sex=female"], "sex=female"),
    (["--num", "90", "--size", "16", "--holdout", "age=80+,sex=female,group=D"], "no image lies in this cell; give"),
    (["--num", "1", "--size", "16"], "split would be empty"),
    (["--num", "20", "--sizes", "16"], "--sizes"),
  ],
)
def test_bad_arguments_exit_with_one_line(tmp_path, capsys, arguments, message):
  out = tmp_path / "phantom"
  assert cli.run(command.main, "phantom", ["--out", str(out), *arguments]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
  assert not out.exists()
