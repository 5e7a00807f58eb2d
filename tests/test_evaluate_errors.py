"""What `compdiff evaluate` says to bad input: exit status 2, one line, and nothing is written."""

import hashlib
import json

import pytest
from discs import read_manifest, run, write_manifest, write_real


def refused(capsys, out, status):
  """The one line on stderr; nothing may be left of the output."""
  error = capsys.readouterr().err.strip()
  assert status == 2, error
  assert error.count("\n") == 0
  assert error.startswith("compdiff evaluate: error: ")
  assert not out.exists()
  assert not list(out.parent.glob(f".{out.name}.partial-*"))
  return error


def change_row(synthetic, index, **values):
  rows = read_manifest(synthetic)
  rows[index].update(values)
  write_manifest(synthetic, rows)


def damage_missing(synthetic):
  (synthetic / "005.png").unlink()


def damage_altered(synthetic):
  (synthetic / "005.png").write_bytes((synthetic / "006.png").read_bytes())


def damage_truncated(synthetic):
  data = (synthetic / "005.png").read_bytes()[:200]
  (synthetic / "005.png").write_bytes(data)
  change_row(synthetic, 5, sha256=hashlib.sha256(data).hexdigest())


def damage_column(synthetic):
  rows = read_manifest(synthetic)
  write_manifest(synthetic, [{k: v for k, v in row.items() if k != "sex"} for row in rows])


def damage_value(synthetic):
  change_row(synthetic, 5, sex="woman")


def damage_age(synthetic):
  change_row(synthetic, 5, age="-3")


def damage_twice(synthetic):
  change_row(synthetic, 6, file="005.png")


def damage_empty(synthetic):
  manifest = synthetic / "manifest.csv"
  manifest.write_text(manifest.read_text().splitlines()[0] + "\n")


def damage_unfinished(synthetic):
  (synthetic / "job.json").write_text(json.dumps({"rows": 500}))


def damage_schema(synthetic):
  data = json.loads((synthetic / "schema.json").read_text())
  data[0]["bins"] = [30]
  (synthetic / "schema.json").write_text(json.dumps(data))


def damage_grid(synthetic):
  (synthetic / "grid.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (damage_missing, ("005.png is missing", "manifest.csv row 7")),
    (damage_altered, ("005.png was altered", "manifest.csv row 7")),
    (damage_truncated, ("005.png", "cannot be read")),
    (damage_column, ("manifest.csv has no column 'sex'",)),
    (damage_value, ("manifest.csv row 7", "sex 'woman' is not one of male, female")),
    (damage_age, ("manifest.csv row 7", "age -3 is outside 0 to 100")),
    (damage_twice, ("manifest.csv row 8", "005.png is listed twice, first in row 7")),
    (damage_empty, ("lists no image",)),
    (damage_unfinished, ("holds 110 of 500 planned images",)),
    (damage_schema, ("attribute 'age' is defined differently",)),
    (damage_grid, ("grid.png is not a readable picture",)),
  ],
)
def test_bad_synthetic_set(disc_sets, synthetic, tmp_path, capsys, damage, words):
  damage(synthetic)
  error = refused(capsys, tmp_path / "out", run(disc_sets[0], synthetic, tmp_path / "out"))
  assert all(word in error for word in words), error


@pytest.mark.parametrize(
  ("option", "words"),
  [
    ("--real_split=tset", "has no split 'tset'; did you mean 'test'?"),
    ("--real_split=train", "are both 'train'"),
    ("--extractors=radiomic", "unknown extractor 'radiomic'; did you mean 'radiomics'?"),
    ("--min_n=2", "must be at least 4"),
    ("--size=8", "must be at least 16"),
    ("--max_images=3", "must be at least --min_n"),
    ("--seed=-1", "--seed -1 must not be negative"),
    ("--vae_reconstructions=none.png", "none.png is not a readable picture"),
    ("--seeds=3", "unrecognized arguments: --seeds=3"),
  ],
)
def test_bad_option(disc_sets, tmp_path, capsys, option, words):
  assert words in refused(capsys, tmp_path / "out", run(*disc_sets, tmp_path / "out", option))


def test_output_that_is_taken_is_left_alone(disc_sets, tmp_path, capsys):
  out = tmp_path / "out"
  out.mkdir()
  (out / "note.txt").write_text("mine")
  assert run(*disc_sets, out) == 2
  assert "is not empty" in capsys.readouterr().err
  assert [file.name for file in out.iterdir()] == ["note.txt"]


def test_directories_of_the_wrong_kind(disc_sets, tmp_path, capsys):
  error = refused(capsys, tmp_path / "out", run(disc_sets[1], disc_sets[1], tmp_path / "out"))
  assert "is not a prepared data set" in error
  empty = tmp_path / "empty"
  empty.mkdir()
  error = refused(capsys, tmp_path / "out", run(disc_sets[0], empty, tmp_path / "out"))
  assert "holds neither manifest.csv nor dataset_info.json" in error


def test_a_patient_in_two_splits_is_refused(disc_sets, tmp_path, capsys):
  real = write_real(tmp_path / "real", shared_patient=True)
  error = refused(capsys, tmp_path / "out", run(real, disc_sets[1], tmp_path / "out"))
  assert "patient p is in the splits 'train' and 'val'" in error
