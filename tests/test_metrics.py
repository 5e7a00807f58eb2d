"""Metrics against independent sources: scipy's matrix square root, double loops, closed forms, null distributions."""

import numpy as np
import pytest
from scipy import linalg, stats

from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.evaluation import alignment, features, groups, kid, neighbours
from compdiff_jax.evaluation.frechet import (
  cross_trace_eigen,
  cross_trace_singular,
  frechet_distance,
  null_bias,
)

SCHEMA = Schema(
  (
    Attribute("age", "continuous", low=0, high=100, bins=(40, 60), unit="year"),
    Attribute("sex", "categorical", ("male", "female")),
    Attribute("group", "categorical", ("A", "B")),
  )
)


def correlated(rng, n, d, shift=0.0):
  mix = np.random.default_rng(7).normal(size=(d, d)) / np.sqrt(d)
  return rng.normal(size=(n, d)) @ mix + shift


# ---- Fréchet distance


def brute_force_fd(x, y):
  root = linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
  spread = np.trace(np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root)
  return np.sum((x.mean(0) - y.mean(0)) ** 2) + spread


@pytest.mark.parametrize(("n", "m"), [(60, 90), (300, 200)])
def test_fd_equals_scipy_sqrtm(n, m):
  rng = np.random.default_rng(0)
  x, y = correlated(rng, n, 16), 1.5 * correlated(rng, m, 16, 0.3)
  found = frechet_distance(x, y)
  assert found.value == pytest.approx(brute_force_fd(x, y), rel=1e-9)
  assert (found.n, found.m, found.d, found.rank_deficient) == (n, m, 16, False)


def test_fd_paths_agree_at_full_rank():
  rng = np.random.default_rng(1)
  x, y = correlated(rng, 200, 24), correlated(rng, 150, 24, 0.2)
  assert cross_trace_eigen(x, y) == pytest.approx(cross_trace_singular(x, y), rel=1e-10)


@pytest.mark.parametrize("n", [10, 200])
def test_fd_of_a_set_with_itself_is_zero(n):
  x = correlated(np.random.default_rng(2), n, 32)
  trace = x.var(0, ddof=1).sum()
  assert abs(2 * trace - 2 * cross_trace_singular(x, x)) < 1e-12 * trace
  assert abs(frechet_distance(x, x).value) < 1e-11 * trace
  assert frechet_distance(x, x).rank_deficient == (n == 10)


def test_fd_of_a_shift_is_its_squared_length_and_rotation_changes_nothing():
  rng = np.random.default_rng(3)
  x, y, delta = correlated(rng, 100, 8), correlated(rng, 120, 8, 0.4), rng.normal(size=8)
  assert frechet_distance(x, x + delta).value == pytest.approx(delta @ delta, rel=1e-9)
  rotation = linalg.qr(rng.normal(size=(8, 8)))[0]
  assert frechet_distance(x @ rotation, y @ rotation).value == pytest.approx(frechet_distance(x, y).value, rel=1e-9)


def test_fd_of_a_scaling_in_one_dimension():
  x = np.random.default_rng(4).normal(size=(50, 1))
  x -= x.mean()
  variance = x.var(ddof=1)
  assert frechet_distance(x, 3 * x).value == pytest.approx(variance * (1 - 3) ** 2, rel=1e-9)


def test_fd_null_matches_its_first_order_bias():
  rng = np.random.default_rng(5)
  d, n = 24, 400
  scale = np.sqrt(10 / np.arange(1, d + 1))
  draws = [frechet_distance(rng.normal(size=(n, d)) * scale, rng.normal(size=(n, d)) * scale) for _ in range(60)]
  assert np.mean([draw.value for draw in draws]) == pytest.approx(np.mean([d.null_bias for d in draws]), rel=0.05)
  isotropic = np.concatenate([np.eye(2), -np.eye(2)]) * np.sqrt(3 / 2)  # covariance: the identity
  # l = 1, twice: 2 + (sum over i != j of 1/2 + 2 * 1) / 2 = 3.5
  assert null_bias(isotropic, 10, 10) == pytest.approx(3.5 / 5)


# ---- KID


def brute_force_kid(x, y):
  def mean(pairs):
    values = [(float(a @ b) / len(a) + 1) ** 3 for a, b in pairs]
    return sum(values) / len(values)

  within = [mean([(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
  return sum(within) - 2 * mean([(a, b) for a in x for b in y])


def test_kid_equals_a_double_loop():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(14, 5)), rng.normal(size=(11, 5)) + 0.5
  assert kid.kid(x, y) == pytest.approx(brute_force_kid(x, y), rel=1e-12)
  in_x, in_y = kid.draw(rng, 14, 6, 4), kid.draw(rng, 11, 7, 4)
  assert in_x.sum(1).tolist() == [6] * 4
  expected = [brute_force_kid(x[a], y[b]) for a, b in zip(in_x, in_y)]
  np.testing.assert_allclose(kid.kid_of_subsets(x, y, in_x, in_y), expected, rtol=1e-12)


@pytest.mark.parametrize("n", [50, 200])
def test_kid_is_unbiased_under_the_null_and_not_clipped(n):
  rng = np.random.default_rng(n)
  draws = np.array([kid.kid(rng.normal(size=(n, 12)), rng.normal(size=(n, 12))) for _ in range(120)])
  assert abs(draws.mean()) < 3 * draws.std() / np.sqrt(len(draws))
  assert (draws < 0).any()


def test_kid_does_not_depend_on_block_size(monkeypatch):
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(40, 6)), rng.normal(size=(30, 6))
  whole = kid.kid(x, y)
  monkeypatch.setattr(kid, "_BLOCK", 7)
  assert kid.kid(x, y) == pytest.approx(whole, rel=1e-12)


def test_kid_subset_must_be_smaller_than_both_sets():
  rng = np.random.default_rng(2)
  x, y = rng.normal(size=(30, 4)), rng.normal(size=(20, 4))
  with pytest.raises(ValueError, match="must be smaller"):
    kid.subset_kid(x, y, 20, rng)
  mean, sd = kid.subset_kid(x, y, kid.default_subset_size(30, 20), rng)
  assert sd > 0
  assert np.isfinite(mean)


# ---- Groups and intervals


def attributes(age, sex, group):
  return {"age": np.array(age, np.float32), "sex": np.array(sex, np.int32), "group": np.array(group, np.int32)}


def test_groups_counts_refusals_and_held_out_status():
  real = attributes(*np.repeat([[30, 30, 50, 70, np.nan], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0]], 5, axis=1))
  synthetic = attributes(*np.repeat([[30, 30, 30, 70, 70], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]], 5, axis=1))
  # (70, female, B) is absent; its pairs (70, female), (70, B), (female, B) are all there.
  train = attributes([70, 70, 30], [1, 0, 1], [0, 1, 1])
  cell = SCHEMA.parse_cell("age=60+,sex=female,group=B")
  patients = np.array([f"{p}{i}" for p in "ppqrs" for i in range(5)])
  found = groups.make_groups(SCHEMA, [cell], real, synthetic, train, patients, min_n=10)
  by_name = {g.name: g for g in found}
  assert by_name["overall"].refusal == ""
  assert by_name["overall"].n_train == 3
  young = by_name["age=0-40"]
  assert (len(young.real), len(young.synthetic), young.n_patients, young.refusal) == (10, 15, 5, "")
  assert by_name["sex=female"].n_patients == 10
  held = by_name["age=60+,sex=female,group=B"]
  assert held.held_out == "pair-seen"
  assert held.refusal == "not evaluable (n=5 real, 10 synthetic; needs 10)"
  assert by_name["held-out (pair-seen)"].synthetic.tolist() == list(range(15, 25))
  assert by_name["age=60+,sex=female"].held_out == ""  # a parent of the held-out cell was seen
  assert "age=40-60,sex=male" not in by_name  # no image on either side
  assert groups.held_out_status(SCHEMA, cell, attributes([70, 70], [1, 0], [0, 1])) == "pair-unseen"
  assert groups.held_out_status(SCHEMA, cell, attributes([70], [1], [1])) == ""
  few_patients = groups.make_groups(SCHEMA, [], real, synthetic, train, np.full(25, "p"), min_n=4)
  assert few_patients[0].refusal == "not evaluable (1 real patients; needs 2)"


@pytest.mark.parametrize("min_n", range(4, 10))
def test_a_group_too_small_for_size_matching_leaves_the_others_alone(min_n):
  """Groups of 3 to 10 real patients: KID exists at two fifths of 5 and more."""
  rng = np.random.default_rng(0)
  counts = np.arange(3, 11)
  cells = np.repeat(np.arange(8), counts)
  schema = Schema((Attribute("dose", "categorical", tuple("abcdefgh")),))
  columns, units = {"dose": cells}, np.arange(len(cells)).astype(str)
  members = groups.make_groups(schema, [], columns, columns, columns, units, min_n)
  for group, count in zip(members[1:], counts):
    assert bool(group.refusal) == (count < max(min_n, 5)), group
    if count == 4 and min_n == 4:
      assert "4 real patients, 4 synthetic images; KID at two fifths needs 5 of each" in group.refusal
  x, y = rng.normal(size=(2, len(cells), 6))
  for group in members:
    if not group.refusal:
      size = groups.matched_sizes(members)[group.kind]
      found = groups.fidelity(group, members, schema, x, y, units, size, 0)
      assert size >= 2 and np.isfinite(found["kid"]["matched"]["mean"])


def test_composition_gap_is_total_variation():
  a = attributes([30, 30, 70, 70], [0, 0, 1, 1], [0, 0, 0, 0])
  b = attributes([30, 70, 70, 70], [0, 1, 1, 0], [0, 0, 0, 0])
  assert groups.composition_gap(SCHEMA, a, a) == 0
  assert groups.composition_gap(SCHEMA, a, b) == pytest.approx(0.25)


def test_draws_take_one_image_a_patient_and_parts_share_no_patient():
  rng = np.random.default_rng(0)
  units = np.array(["a"] * 5 + ["b"] * 3 + list("cdefgh"))
  first, second = groups.patient_draws(rng, units, 4, 50, parts=2)
  assert (first.sum(1) == 4).all()
  assert (second.sum(1) == 4).all()
  for one, two in zip(first, second):
    drawn = [*units[one], *units[two]]
    assert len(set(drawn)) == len(drawn)
  assert (first | second).any(0).all()  # every image of a patient can be drawn
  assert groups.patient_draws(rng, units, 5, 1, parts=2) is None
  assert (groups.half_draws(rng, units, 20).sum(1) == 7).all()


def test_half_sample_interval_covers_the_true_distance():
  """The 95 % interval of KID holds the population value in about 95 % of repetitions (binomial tolerance)."""
  rng = np.random.default_rng(0)
  shift, d, n = 0.8, 6, 120
  truth = np.mean([kid.kid(rng.normal(size=(1500, d)), rng.normal(size=(1500, d)) + shift) for _ in range(8)])
  everyone = attributes(np.full(n, 30), np.zeros(n), np.zeros(n))
  units = np.arange(n).astype(str)
  members = groups.make_groups(SCHEMA, [], everyone, everyone, everyone, units, min_n=20)
  hits = 0
  for seed in range(60):
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, d)) + shift
    found = groups.fidelity(members[0], members, SCHEMA, x, y, units, 40, seed)["kid"]
    hits += found["lo"] <= truth <= found["hi"]
    assert found["lo"] < found["value"] < found["hi"]
  assert 51 <= hits <= 60


def test_real_against_real_lies_in_its_null_band():
  rng = np.random.default_rng(3)
  n, d = 120, 6
  columns = attributes(np.full(n, 30), np.zeros(n), np.zeros(n))
  units = np.repeat(np.arange(n // 2), 2).astype(str)
  members = groups.make_groups(SCHEMA, [], columns, columns, columns, units, min_n=20)
  sizes = groups.matched_sizes(members)
  assert sizes["overall"] == 24  # two fifths of 60 patients
  inside = []
  for seed in range(30):
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    found = groups.fidelity(members[0], members, SCHEMA, x, y, units, 24, seed)["kid"]
    inside.append(found["share_inside_null"])
  assert 0.90 < np.mean(inside) < 0.98
  far = groups.fidelity(members[0], members, SCHEMA, x, y + 2, units, 24, 0)["kid"]
  assert far["share_inside_null"] == 0
  assert far["excess"] > 0


def test_wilson_interval_matches_scipy():
  for hits, n in ((0, 20), (7, 20), (20, 20), (93, 200)):
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(alignment.wilson(hits / n, n), expected, atol=1e-4)


@pytest.mark.parametrize(("hits", "n", "void"), [(7, 10, True), (10, 10, False), (31, 50, True), (63, 100, False)])
def test_an_attribute_is_void_where_its_interval_reaches_chance(hits, n, void):
  """Half of the images are male: chance is 0.5. 7 of 10 and 31 of 50 are 0.10 above it, and may be chance."""
  schema = SCHEMA.subset(["sex"])
  recorded = {"sex": np.arange(n) % 2}
  read = {"sex": np.where(np.arange(n) < hits, recorded["sex"], 1 - recorded["sex"])}
  found = alignment.fidelity(schema, [], recorded, read, recorded, read, min_n=4)
  low = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson").low
  assert found["attributes"]["sex"]["status"].startswith("void: ") == (low <= 0.5) == void


# ---- Features


def test_radiomics_are_deterministic_and_independent_of_the_batch():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (70, 32, 32, 3), np.uint8)
  for name in features.REGISTRY:
    extractor = features.extractor(name)
    whole = extractor.extract(images)
    assert whole.dtype == np.float64
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(extractor.extract(images[::-1])[::-1], whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(extractor.extract(images[3:4])[0], whole[3], rtol=1e-5, atol=1e-6)


def test_radiomics_of_known_images():
  flat = np.full((1, 32, 32, 3), 51, np.uint8)
  stripes = flat.copy()
  stripes[:, :, ::2] = 204
  first, second = features.radiomics(np.concatenate([flat, stripes]))
  assert len(first) == 63
  assert first[:2] == pytest.approx([0.2, 0.0], abs=1e-12)
  assert second[:2] == pytest.approx([0.5, 0.3])
  assert first[9] == 0  # entropy of one grey level
  assert second[9] == pytest.approx(1)  # two levels, equally often: one bit
  contrast, correlation = 10, 11
  # Levels 3 and 12: horizontal and both diagonal neighbours differ by 9, vertical ones are equal.
  pairs = {"across": 2 * 32 * 31, "diagonal": 2 * 2 * 31 * 31, "down": 2 * 31 * 32}
  differing = pairs["across"] + pairs["diagonal"]
  assert second[contrast] == pytest.approx(81 * differing / (differing + pairs["down"]))
  assert first[correlation] == 1


def test_standardisation_drops_constants_and_limits_outliers():
  rng = np.random.default_rng(0)
  train = np.column_stack([rng.normal(3, 2, 500), np.full(500, 0.7)])
  standardise = features.Standardisation.fit(train)
  assert standardise.kept.tolist() == [True, False]
  scores = standardise(train)
  assert abs(scores.mean()) < 0.05
  assert 0.9 < scores.std() < 1
  assert standardise(np.array([[1e6, 0.7]])).item() == pytest.approx(features.LIMIT)
  assert standardise.moved(np.array([[3.0, 0.7]])) == 0
  assert standardise.moved(np.array([[3.0, 0.9]])) == 1


# ---- Nearest training images


def test_nearest_rows_equal_brute_force(monkeypatch):
  monkeypatch.setattr(neighbours, "_ROWS", 3)
  rng = np.random.default_rng(0)
  queries, points = rng.normal(size=(10, 7)).astype(np.float32), rng.normal(size=(25, 7)).astype(np.float32)
  index, distance = neighbours.nearest_rows(queries, points)
  table = np.linalg.norm(queries[:, None] - points, axis=-1)
  assert index.tolist() == table.argmin(1).tolist()
  np.testing.assert_allclose(distance, table.min(1), rtol=1e-6)


def test_copies_of_training_images_are_found_where_they_are():
  rng = np.random.default_rng(1)
  train, real, synthetic = (rng.integers(0, 256, (n, 16, 16, 3), np.uint8) for n in (60, 150, 40))
  synthetic[10:20] = np.clip(train[:10].astype(int) + 1, 0, 255)
  rows = {"overall": np.arange(40), "copied": np.arange(10, 20), "new": np.arange(20, 40)}
  found = neighbours.copy_check(synthetic, real, train, rows, seed=0, pairs=4)
  assert found["below"]["copied"]["value"] == 1
  assert found["below"]["new"]["value"] <= 0.1
  assert found["control"]["value"] == 1
  # Position 1.49 of the sorted distances: two lie under it.
  assert (found["status"], found["real"]) == ("ok", {"value": 2 / 150, "count": 2, "n": 150})
  assert all(pair["synthetic"] - 10 == pair["train"] for pair in found["pairs"])
  assert found["pairs"][0]["distance"] == pytest.approx(1 / 255, rel=0.02)


def test_one_hundredth_of_few_images_is_no_threshold():
  rng = np.random.default_rng(2)
  train, real, synthetic = (rng.integers(0, 256, (n, 16, 16, 3), np.uint8) for n in (60, 99, 40))
  found = neighbours.copy_check(synthetic, real, train, {"overall": np.arange(40)}, seed=0)
  assert found["status"] == "not evaluable (n=99 held-out real images; their 1 % distance needs 100)"
  assert (found["threshold"], found["real"], found["control"], found["below"]) == (None, None, None, {})
  assert [list(found["quantiles"][side]) for side in ("synthetic", "real")] == [["0.05", "0.5"]] * 2
  assert len(found["pairs"]) == 8


def test_a_check_that_misses_planted_copies_is_void():
  """Held-out images that are training images themselves leave no distance under which copies would be conspicuous."""
  rng = np.random.default_rng(3)
  train, synthetic = (rng.integers(0, 256, (n, 16, 16, 3), np.uint8) for n in (120, 40))
  found = neighbours.copy_check(synthetic, train, train, {"overall": np.arange(40)}, seed=0)
  assert found["status"] == "void: 0 of 20 planted copies of training images were found"
  assert (found["below"], found["pairs"], found["threshold"]) == ({}, [], None)
  assert found["quantiles"] == {"synthetic": {}, "real": {}}
