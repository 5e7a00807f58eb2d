"""Sampling plans: reading with every kind of bad row, balanced and copied plans, and the verb."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from compdiff_jax import __main__ as command_line
from compdiff_jax import cli
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.data.records import RecordSet
from compdiff_jax.sampling.plan import PlanRow, balanced_plan, copied_plan, read_plan, write_plan
from data_prep import dataset

SCHEMA = Schema((
  Attribute("age", "continuous", low=0, high=100, bins=(18, 40, 60), unit="year"),
  Attribute("sex", "categorical", values=("male", "female")),
  Attribute("view", "categorical", values=("PA", "AP")),
))  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  """200 images, nobody under 18, women over 60 held out, some views unknown; text i belongs to view i % 3 - 1."""
  out = tmp_path_factory.mktemp("plan") / "set"
  picture = io.BytesIO()
  Image.new("L", (4, 4)).save(picture, "PNG")
  rng = np.random.default_rng(0)
  items = (
    {"key": f"k{i}", "patient": i, "image": picture.getvalue(), "text": f"Text {i}, view {i % 3 - 1}.",
     "attributes": {"age": float(rng.integers(18, 90)), "sex": int(rng.integers(2)), "view": i % 3 - 1},
     "findings": {}, "factors": {}} for i in range(200)
  )  # fmt: skip
  dataset.write_dataset(
    out, name="tiny", schema=SCHEMA, examples=items, description="Tiny.", size=4, command="test",
    held_out=dataset.parse_cells("age=60+,sex=female", SCHEMA),
  )  # fmt: skip
  return RecordSet(out)


def write(path, text: str):
  path.write_text(text)
  return path


def test_read_plan(tmp_path):
  head = "id,text,age,sex,view,seed,negative,extra\n"
  text = head + 'a,"Effusion, left.",71.5,female,,4294967295,"dark, noisy",x\nb,,,male,AP,0,,\n'
  first, second = read_plan(write(tmp_path / "plan.csv", text), SCHEMA)
  assert first.text == "Effusion, left." and first.seed == 2**32 - 1 and first.row == 0 and first.id == "a"
  assert first.attributes == {"age": 71.5, "sex": 1, "view": -1}
  assert (first.negative, second.negative) == ("dark, noisy", "")
  assert np.isnan(second.attributes["age"]) and second.attributes["view"] == 1 and second.row == 1


def test_seed_is_the_row_when_there_is_no_seed_column(tmp_path):
  path = write(tmp_path / "plan.csv", "text;age;sex;view\nA;1;male;PA\nB;2;male;PA\n")
  assert [row.seed for row in read_plan(path, SCHEMA)] == [0, 1]


HEAD = "id,text,age,sex,view,seed\n"
BAD = {
  "missing attribute": ("text,age,sex\na,1,male\n", "has no column 'view'"),
  "misspelt attribute": ("text,age,sx,view\na,1,male,PA\n", "no column 'sex'; did you mean 'sx'?"),
  "missing text": ("age,sex,view\n1,male,PA\n", "no column 'text'"),
  "unknown value": (HEAD + "a,t,50,male,PA,1\nb,t,50,mal,PA,2\n", "row 3 column sex: sex 'mal' is not one of"),
  "age as text": (HEAD + "a,t,old,male,PA,1\n", "row 2 column age: age 'old' is not a number"),
  "negative age": (HEAD + "a,t,-1,male,PA,1\n", "row 2 column age: age -1 is outside 0 to 100"),
  "seed as text": (HEAD + "a,t,50,male,PA,one\n", "row 2 column seed: 'one' is not an integer"),
  "real seed": (HEAD + "a,t,50,male,PA,1.5\n", "row 2 column seed"),
  "negative seed": (HEAD + "a,t,50,male,PA,-1\n", "row 2 column seed"),
  "large seed": (HEAD + "a,t,50,male,PA,4294967296\n", "row 2 column seed"),
  "empty seed": (HEAD + "a,t,50,male,PA,\n", "row 2 column seed: ''"),
  "duplicate id": (HEAD + "a,t,50,male,PA,1\na,t,50,male,PA,2\n", "row 3 column id: 'a' is already used in row 2"),
  "blank lines": (f"\n{HEAD}\n\na,t,5,male,PA,1\n\na,t,5,male,PA,2\n", "row 7 column id: 'a' is already used in row 5"),
  "short row": (HEAD + "a,t,50\n", "row 2 has 3 values instead of 6"),
  "no rows": (HEAD, "no data rows"),
  "empty file": ("", "no data rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_plan(tmp_path, capsys, name):
  path = write(tmp_path / "plan.csv", BAD[name][0])
  assert cli.run(lambda argv: read_plan(path, SCHEMA), "compdiff sample", []) == 2
  line = capsys.readouterr().err
  assert line.count("\n") == 1 and str(path) in line and BAD[name][1] in line


def test_models_without_nulls_take_all_attributes_or_none(tmp_path):
  rows = ["all,50,male,PA,1", "none,,,,1", "", "no view,50,male,,1", "view alone,,,PA,1"]
  path = write(tmp_path / "plan.csv", "\n".join(["text,age,sex,view,seed", *rows]))
  for some in ((), ("view",), ("age", "sex")):
    assert len(read_plan(path, SCHEMA, SCHEMA.subset(some))) == 4
  words = "plan.csv row 5: view left out, .* give all of age, sex, view, or none of them"
  with pytest.raises(InputError, match=words):
    read_plan(path, SCHEMA, SCHEMA)


def test_missing_plan(tmp_path):
  with pytest.raises(InputError, match="No such file"):
    read_plan(tmp_path / "none.csv", SCHEMA)


def test_plan_survives_the_file(tmp_path, records):
  rows = balanced_plan(records, ["age", "sex"], 3)
  write_plan(tmp_path / "plan.csv", rows, SCHEMA)
  again = read_plan(tmp_path / "plan.csv", SCHEMA)
  assert [(r.text, r.seed, r.row) for r in again] == [(r.text, r.seed, r.row) for r in rows]
  for a in SCHEMA:
    ours, theirs = ([r.attributes[a.name] for r in plan] for plan in (rows, again))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def level(row: PlanRow, name: str):
  """Independent of Schema: bins by comparison."""
  value = row.attributes[name]
  return sum(value >= edge for edge in (18, 40, 60)) if name == "age" else value


def test_every_cell_gets_its_rows(records):
  rows = balanced_plan(records, ["sex", "age"], 7)
  assert Counter((level(r, "age"), level(r, "sex")) for r in rows) == {(a, s): 7 for a in range(4) for s in range(2)}
  start = Counter((level(r, "age"), level(r, "sex")) for r in rows[:8])  # any beginning is balanced
  assert set(start.values()) == {1} and len(start) == 8
  assert [r.row for r in rows] == list(range(56)) and len({r.seed for r in rows}) == 56


def test_values_and_texts_come_from_the_training_split(records):
  source = records.split("train")
  train = [source[i] for i in range(len(source))]
  texts = {r["text"]: r["attributes"]["view"] for r in train}
  ages = {r["attributes"]["age"] for r in train}
  rows = balanced_plan(records, ["age", "sex"], 40)
  for row in rows:
    assert row.attributes["view"] == texts[row.text]  # not balanced: comes with its text, unknown included
    empty = level(row, "age") == 0 or (level(row, "age") == 3 and row.attributes["sex"] == 1)
    assert (row.attributes["age"] in ages) or empty
  assert len({row.text for row in rows}) > 0.8 * len(texts)
  young = [row.attributes["age"] for row in rows if level(row, "age") == 0]
  assert len(set(young)) == 80 and abs(np.mean(young) - 9) < 4 * 18 / np.sqrt(12 * 80)  # uniform on 0..18
  assert {row.attributes["view"] for row in balanced_plan(records, ["view"], 2)} == {0, 1}


def test_seed_decides_the_plan(records):
  assert balanced_plan(records, ["sex"], 5, seed=1) == balanced_plan(records, ["sex"], 5, seed=1)
  one, two = (balanced_plan(records, ["sex"], 50, seed=seed) for seed in (1, 2))
  assert [r.text for r in one] != [r.text for r in two] and not {r.seed for r in one} & {r.seed for r in two}


def test_copied_plan_is_the_split(records):
  rows = copied_plan(records, "test")
  source = records.split("test")
  assert len(rows) == len(source) > 0
  for i, row in enumerate(rows):
    assert (row.id, row.text, row.attributes) == (source[i]["key"], source[i]["text"], source[i]["attributes"])
  assert len({row.seed for row in rows}) == len(rows)


def verb(*options) -> int:
  return cli.run(command_line.main, "compdiff plan", ["plan", *map(str, options)])


def test_verb(records, tmp_path, capsys):
  out = tmp_path / "deep/plan.csv"
  assert verb("--data", records.path, "--balance=age,sex", "--per_cell=2", "--out", out) == 0
  assert len(read_plan(out, SCHEMA)) == 16 and "16 rows, 8 cells x 2" in capsys.readouterr().out
  assert verb("--data", records.path, "--like=test", "--out", tmp_path / "like.csv", "--seed=3") == 0
  assert len(read_plan(tmp_path / "like.csv", SCHEMA)) == records.splits["test"]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "like.csv"]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--balance=age,sx", "--per_cell=1"], "no attribute 'sx'; did you mean 'sex'?"),
    (["--balance=age,age", "--per_cell=1"], "each once"),
    (["--balance=age", "--per_cell=0"], "--per_cell 0 must be at least 1"),
    (["--balance=age", "--per_cell=two"], "--per_cell"),
    (["--balance=age"], "--per_cell=N goes with"),
    (["--like=test", "--per_cell=2"], "--per_cell=N goes with"),
    (["--like=test", "--split=val"], "--split goes with --balance"),
    (["--like=tset"], "no split 'tset'; did you mean 'test'?"),
    (["--balance=age", "--per_cell=1", "--like=test"], "either"),
    ([], "either"),
    (["--like=test", "--seed=-1"], "--seed -1"),
    (["--like=test", "--data=/nowhere"], "not a prepared data set"),
  ],
)
def test_bad_options(records, tmp_path, capsys, options, message):
  assert verb("--data", records.path, "--out", tmp_path / "plan.csv", *options) == 2
  line = capsys.readouterr().err
  assert line.startswith("compdiff plan: error: ") and line.count("\n") == 1 and message in line
  assert not list(tmp_path.iterdir())


def test_existing_plan_is_kept(records, tmp_path, capsys):
  out = write(tmp_path / "plan.csv", "mine")
  assert verb("--data", records.path, "--like=test", "--out", out) == 2
  assert "exists" in capsys.readouterr().err and out.read_text() == "mine"
  assert verb("--data", records.path, "--like=test", "--out", out / "below.csv") == 2
  assert "cannot write" in capsys.readouterr().err
