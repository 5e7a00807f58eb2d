"""data_prep.holdout: what leaves training, what remains, and that neither attributes nor words leak."""

import csv
import json
from collections import Counter

import pytest
import tensorflow_datasets as tfds
from test_dataset import SCHEMA, examples, records, write

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.data.records import RecordSet
from data_prep import holdout, text_leaks, verify
from data_prep.leaks import Scanner, read_patterns

_LICENCE = "Use for research only; see https://example.org/terms."
_CELL = "age=40-60,sex=female,group=B"


def _read_csv(path):
  with open(path, newline="") as file:
    return list(csv.DictReader(file))


def _inside(attributes):
  return 40 <= attributes["age"] < 60 and attributes["sex"] == 1 and attributes["group"] == 1


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp("holdout") / "source"
  items = [{**item, "attribution": {"licence": f"L{i % 3}"}} for i, item in enumerate(examples(500))]
  write(path, items, licence=_LICENCE)
  return path


def _run(source, out, *options):
  holdout.main(["--data", str(source), "--out", str(out), *options])
  return json.loads((out / "holdout.json").read_text())


def test_cell_and_its_patients_leave_training_and_nothing_is_lost(source, tmp_path):
  before = records(source)
  found = _run(source, tmp_path / "out", "--cells", _CELL)
  after = records(tmp_path / "out")
  patients = {r["patient"] for members in before.values() for r in members if _inside(r["attributes"])}
  for split in ("train", "val"):
    assert [r["key"] for r in after[split]] == [r["key"] for r in before[split] if r["patient"] not in patients]
  stored = {r["key"]: r for members in after.values() for r in members}
  assert len(stored) == 500
  for r in (r for members in before.values() for r in members):
    new = stored[r["key"]]
    assert {**r, "attributes": 0} == {**new, "attributes": 0}
    assert repr(r["attributes"]) == repr(new["attributes"])
  assert found["status"] == {_CELL: "pair-seen"} and found["text"]["status"] == "no leak"
  assert found["proof"]["images_checked"] == len(after["train"]) + len(after["val"])
  assert found["proof"]["images_in_held_out_cells"] == found["proof"]["images_of_held_out_patients"] == 0
  assert RecordSet(tmp_path / "out").held_out == (_CELL,)
  # Every marginal of the cell is still there.
  ages = [r["attributes"]["age"] for r in after["train"]]
  assert any(40 <= age < 60 for age in ages)

  listed = _read_csv(tmp_path / "out" / "holdout_images.csv")
  assert {line["key"] for line in listed} == {r["key"] for r in after["test"] if _inside(r["attributes"])}
  assert {(line["cell"], line["status"]) for line in listed} == {(_CELL, "pair-seen")}
  splits = {r["key"]: split for split, members in after.items() for r in members}
  for line in _read_csv(tmp_path / "out" / "attribution.csv"):
    assert line["split"] == splits[line["key"]] and line["licence"] == f"L{int(line['key'][1:]) % 3}"
  card = (tmp_path / "out" / "README.md").read_text()
  assert f"| {_CELL} |" in card and f"## Licence\n\n{_LICENCE}" in card
  assert tfds.builder_from_directory(tmp_path / "out").info.redistribution_info.license == _LICENCE


def test_values_at_the_edges_of_bins_do_not_leak(tmp_path):
  """0.7 as it is stored is below the float64 0.7; whole hundredths tell on which side of an edge a record lies."""
  schema = Schema((Attribute("dose", "continuous", low=0, high=1, bins=(0.3, 0.7)), SCHEMA["sex"]))
  items = [
    {**item, "attributes": {"dose": (0.1, 0.3, 0.5, 0.7, 0.9)[i % 5], "sex": i % 2}}
    for i, item in enumerate(examples(400, images_per_patient=1))
  ]
  write(tmp_path / "source", items, schema=schema)
  _run(tmp_path / "source", tmp_path / "out", "--cells", "dose=0.3-0.7,sex=male;dose=0.7+,sex=female")
  every = {(dose, sex) for dose in (10, 30, 50, 70, 90) for sex in (0, 1)}
  held_out = {(30, 0), (50, 0), (70, 1), (90, 1)}
  for split, members in records(tmp_path / "out").items():
    found = {(round(100 * r["attributes"]["dose"]), r["attributes"]["sex"]) for r in members}
    assert found == (every if split == "test" else every - held_out)


def test_earlier_holdouts_are_kept(source, tmp_path):
  _run(source, tmp_path / "one", "--cells", _CELL)
  found = _run(tmp_path / "one", tmp_path / "two", "--cells", "age=0-40,sex=male,group=A")
  assert found["cells"] == [_CELL, "age=0-40,sex=male,group=A"]
  _, problems = verify.verify(tmp_path / "two")
  assert not problems.counts


@pytest.mark.parametrize("names", [("age", "sex", "group"), ("sex", "group")])
def test_rarest_cells_are_those_with_fewest_training_images(source, tmp_path, names):
  found = _run(source, tmp_path / "out", "--rarest", "2", "--attributes", ",".join(names))
  counts = Counter()
  for r in records(source)["train"]:
    age, sex, group = (r["attributes"][name] for name in ("age", "sex", "group"))
    if sex >= 0:
      level = {"age": ("0-40", "40-60", "60+")[(age >= 40) + (age >= 60)], "sex": ("male", "female")[sex]}
      counts[",".join(f"{name}={ {**level, 'group': 'AB'[group]}[name] }" for name in names)] += 1
  removed = [counts[cell] for cell in found["cells"]]
  assert removed == sorted(counts.values())[:2]


@pytest.mark.parametrize(
  ("text", "named"),
  [
    ("A 52 year old woman. Small effusion.", {"age": {1}, "sex": {1}}),
    ("52-year-old man", {"age": {1}, "sex": {0}}),
    ("Female, aged 39, group B", {"age": {0}, "sex": {1}, "group": {1}}),
    ("fifty-two year old. She has a pacemaker.", {"age": {1}, "sex": {1}}),
    ("67F with cough; 61 y/o", {"age": {2}, "sex": {1}}),
    ("in her early sixties", {"age": {2}, "sex": {1}}),
    ("___ yo F with cough", {"sex": {1}}),
    ("45yo M, effusion", {"age": {1}, "sex": {0}}),
    ("72-year-old F", {"age": {2}, "sex": {1}}),
    ("Age: 45. Sex: F.", {"age": {1}, "sex": {1}}),
    ("Patient F with cough", {"sex": {1}}),
    ("F/72, 45/M, 30 y M", {"age": {0, 1, 2}, "sex": {0, 1}}),
    ("8 F catheter tip. Nodule 2.5 F. Correlate with MR. Patient F/U. 72 year old f/u", {"age": {2}}),
    ("Nodule, 2 year F/U. Recommend 1 yr F/U CT. 12 F/U, ___ F/U, ___ M. Smith.", {}),
    ("___F. Cough.", {"sex": {1}}),
    *((text, {"sex": {1}}) for text in ("Both females.", "ladies", "girls", "Mrs. Doe", "mother of two", "Ms Doe")),
    *((text, {"sex": {1}}) for text in ("pregnant", "herself", "Pregnancies", "ovarian cyst", "wife")),
    *((text, {"sex": {0}}) for text in ("two males", "boys", "gentlemen", "prostate", "himself", "Mr Doe", "fathers")),
    *((text, {"age": {2}}) for text in ("aged 72y", "AGE:72Y", "age seventy-two", "aged seventy two", "72-y-o")),
    *((text, {"age": {0}}) for text in ("8-week-old", "a 7 month old", "seven-year-old", "aged 6 weeks", "age twelve")),
    ("Female, 72. Men 65", {"age": {2}, "sex": {0, 1}}),
    ("Female, 72 mm? Women, 65.5", {"sex": {1}}),
    ("Dressing, ageless image, average 72, stage 3. Manage one nodule. Fracture 8 weeks old, 12 days of MS.", {}),
    ("Correlate with MR, MRS. MS. Miss-placed line. Prosthesis, hernia, seasons. Sister Mary Joseph nodule.", {}),
    ("A left effusion of 52 mm, 50 m away, B lines, 3 weeks old. Shear. Manubrium. 2 yearly films.", {}),
  ],
)
def test_words_that_name_a_level(text, named):
  assert {name: set(levels) for name, levels in Scanner(SCHEMA)(text).items()} == named


def _items(texts, attributes=None):
  """500 records without words; {index: text} replaces some texts, and `attributes` their attributes."""
  items = [{**item, "text": texts.get(i, "No effusion.")} for i, item in enumerate(examples(500, images_per_patient=1))]
  for i in texts:
    items[i]["attributes"] = attributes or items[i]["attributes"]
  return items


def _with_texts(texts, tmp_path, attributes=None):
  write(tmp_path / "source", _items(texts, attributes))
  return tmp_path / "source"


def test_text_that_completes_a_cell_moves_its_patient(tmp_path, capsys):
  """The table does not know the sex; the text does."""
  texts = {i: "Woman with effusion." for i in range(40)}
  source = _with_texts(texts, tmp_path, {"age": 50.0, "sex": -1, "group": 1})
  before = records(source)
  keys = {f"k{i}" for i in texts}
  tested = sum(r["key"] in keys for r in before["test"])
  moved = sum(r["key"] in keys for split in ("train", "val") for r in before[split])
  found = _run(source, tmp_path / "out", "--cells", _CELL)
  # A builder's own --holdout does the same.
  items = _items(texts, {"age": 50.0, "sex": -1, "group": 1})
  write(tmp_path / "built", items, held_out=[SCHEMA.parse_cell(_CELL)])
  built = json.loads((tmp_path / "built" / "holdout.json").read_text())
  assert built == {name: value for name, value in found.items() if name != "proof"}
  for place in ("out", "built"):
    after = records(tmp_path / place)
    assert keys <= {r["key"] for r in after["test"]} and moved > 20
    leaks = _read_csv(tmp_path / place / "holdout_leaks.csv")
    assert {(line["key"], line["split"], line["level"]) for line in leaks} == {(key, "test", "female") for key in keys}
    card = (tmp_path / place / "README.md").read_text()
    assert "texts of train and val no leak, in those of test leaks: sex (holdout_leaks.csv)" in card
  assert found["text"]["moved_by_text"] == moved and found["text"]["status"] == "no leak"
  # Plans made with --like copy the texts of test into prompts.
  test = found["text"]["test"]
  assert test == {"status": "leaks: sex", "texts_scanned": len(after["test"]), "texts_naming_a_level": moved + tested}
  lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
  assert lines.count(f"{len(after['train']) + len(after['val'])} training and validation texts scanned: no leak") == 2
  counts = found["moved_to_test"]
  images = f"{counts['images']} images of {counts['patients']} patients, {moved} images by their text"
  assert lines.count(f"moved to test: {images}") == 2
  assert sum(line.startswith(f"0 of them and {len(keys)} of {len(after['test'])} test texts") for line in lines) == 2
  # Those of unknown sex, aged 40 to 60, of group B, whose text says nothing.
  maybe = sum(40 <= a["age"] < 60 and a["sex"] < 0 and a["group"] for a in (r["attributes"] for r in after["train"]))
  assert lines.count(f"{maybe} training images may belong to it: an attribute of theirs is unknown") == 2 and maybe


def test_text_against_the_table_moves_nobody_and_is_reported(tmp_path, capsys):
  """Men of the table, 40 to 60, of group B, whose texts say otherwise of the sex."""
  texts = {i: "A 50 year old woman." for i in range(40)}
  attributes = {"age": 50.0, "sex": 0, "group": 1}
  source = _with_texts(texts, tmp_path, attributes)
  write(tmp_path / "built", _items(texts, attributes), held_out=[SCHEMA.parse_cell(_CELL)])
  before, after = records(source), records(tmp_path / "built")
  keys = {f"k{i}" for i in texts}
  training = {r["key"] for split in ("train", "val") for r in before[split]} & keys
  assert training and training == {r["key"] for split in ("train", "val") for r in after[split]} & keys
  leaks = _read_csv(tmp_path / "built" / "holdout_leaks.csv")
  assert {line["key"] for line in leaks if line["level"] == "female" and line["split"] != "test"} == training
  text = json.loads((tmp_path / "built" / "holdout.json").read_text())["text"]
  assert text["moved_by_text"] == 0 and text["status"] == "leaks: age, sex"
  assert "patients, 0 images by their text" in capsys.readouterr().out
  with pytest.raises(InputError, match=f"{len(training)} training and validation texts name a level"):
    holdout.main(["--data", str(source), "--out", str(tmp_path / "out"), "--cells", _CELL])


def test_texts_are_not_read_without_a_holdout():
  assert text_leaks.placed([None] * 3, ["train"] * 3, {}, (), SCHEMA) == [False] * 3


def test_text_that_names_a_level_is_an_error_that_lists_it(tmp_path):
  source = _with_texts({3: "A 52 year old.", 8: "Seen in a woman.", 9: "A man of 20."}, tmp_path,
                       {"age": 20.0, "sex": 0, "group": 0})  # fmt: skip
  training = {r["key"] for split in ("train", "val") for r in records(source)[split]}
  wanted = {entry for entry in (("k3", "age", "40-60"), ("k8", "sex", "female")) if entry[0] in training}
  assert wanted
  before = set(tmp_path.iterdir())
  with pytest.raises(InputError, match="--allow_text_leaks"):
    holdout.main(["--data", str(source), "--out", str(tmp_path / "out"), "--cells", _CELL])
  assert {path.name for path in set(tmp_path.iterdir()) - before} == {"out.leaks.csv"}
  lines = _read_csv(tmp_path / "out.leaks.csv")
  assert {(line["key"], line["attribute"], line["level"]) for line in lines} == wanted
  found = _run(source, tmp_path / "allowed", "--cells", _CELL, "--allow_text_leaks")
  assert found["text"]["status"] == "leaks: " + ", ".join(sorted({attribute for _, attribute, _ in wanted}))
  listed = {line["key"] for line in _read_csv(tmp_path / "allowed" / "holdout_leaks.csv") if line["split"] != "test"}
  assert found["text"]["texts_naming_a_level"] == len(listed)


def test_patterns_of_the_user_replace_the_built_in_ones(tmp_path):
  path = tmp_path / "patterns.json"
  path.write_text(
    json.dumps({"sex": {"female": ["\\bfrau\\b"]}, "age": {"number": ["(\\d+) Jahre"], "60+": ["Senior"]}})
  )
  scanner = Scanner(SCHEMA, read_patterns(path, SCHEMA))
  assert {n: set(levels) for n, levels in scanner("Frau, 52 Jahre").items()} == {"sex": {1}, "age": {1}}
  assert {n: set(levels) for n, levels in scanner("senior woman, group A").items()} == {"age": {2}, "group": {0}}
  for content, words in (
    ({"sex": {"femal": ["x"]}}, "did you mean 'female'"),
    ({"sex": {"female": ["("]}}, "no regular expression"),
    ({"age": {"number": ["years"]}}, "needs a group"),
    ({"race": {"Asian": ["x"]}}, "no attribute 'race'"),
    ([1], "no JSON object"),
  ):
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=words):
      read_patterns(path, SCHEMA)


def test_race_and_short_sex_names():
  schema = Schema(
    (
      Attribute("sex", "categorical", values=("M", "F")),
      Attribute("race", "categorical", values=("White", "Black", "Hispanic")),
    )
  )
  scanner = Scanner(schema)
  for text, race in (("African American woman", 1), ("African-Americans", 1), ("Latinas: she", 2), ("Whites", 0)):
    assert {n: set(levels) for n, levels in scanner(f"{text} (her)").items()} == {"sex": {1}, "race": {race}}


_RACES = Attribute("race", "categorical", values=("white", "black", "asian", "other"))


@pytest.mark.parametrize(
  ("text", "named"),
  [
    ("No other acute finding. Others unchanged, another.", set()),
    ("White-out of the left lung, black blood, white matter. Lungs white, patient rotated.", set()),
    ("72 year old. White matter disease. 60F, white matter. Whites of the eyes. He blacks out.", set()),
    ("54 year old White. Effusion.", {"white"}),
    ("54 year old other male. Effusion.", {"other"}),
    ("A white 60-year-old woman", {"white"}),
    ("white patient", {"white"}),
    ("72 yo Black F with cough", {"black"}),
    ("60 M/white. 72/F/Black woman", {"white", "black"}),
    ("an image of a Black, Female, 61 years old patient", {"black"}),
    ("an image of a Other, Female, 61 years old patient", {"other"}),
    ("White, 61 years old", {"white"}),
    ("Race: other", {"other"}),
    ("race/ethnicity: White", {"white"}),
    ("Other races; white race", {"other", "white"}),
    ("Asian", {"asian"}),
  ],
)
def test_races_that_are_ordinary_words(text, named):
  found = Scanner(Schema((_RACES,)))(text).get("race", {})
  assert {_RACES.values[level] for level in found} == named


@pytest.mark.parametrize(
  ("race", "text"),
  [
    ("other", "No other acute finding, others unchanged."),
    ("white", "White-out of a lung."),
    ("black", "Black blood."),
  ],
)
def test_ordinary_words_move_nobody_and_stop_no_holdout(tmp_path, race, text):
  schema = Schema((SCHEMA["sex"], _RACES))
  items = [
    {**item, "text": text, "attributes": {"sex": i % 2, "race": (-1, 0, 1, 2, 3)[i % 5]}}
    for i, item in enumerate(examples(300, images_per_patient=1))
  ]
  cell = f"sex=female,race={race}"
  write(tmp_path / "source", items, schema=schema)
  write(tmp_path / "built", items, schema=schema, held_out=[schema.parse_cell(cell)])
  found = _run(tmp_path / "source", tmp_path / "out", "--cells", cell)
  for description in (found, json.loads((tmp_path / "built" / "holdout.json").read_text())):
    assert description["text"]["status"] == "no leak" and description["text"]["moved_by_text"] == 0
    assert not any(description["cost"].values())


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ([], "either --cells"),
    (["--cells", _CELL, "--rarest", "1"], "either --cells"),
    (["--rarest", "99"], "training has images in 12 cells"),
    (["--cells", "age=40-60,sex=femal"], "did you mean 'female'"),
    (["--cells", ";"], "names no cell"),
    (["--cells", "sex=female,group=A;sex=female,group=B"], "sex=female would remain"),
    (["--cells", _CELL, "--attributes", "sex"], "--attributes goes with it"),
  ],
)
def test_bad_arguments(source, tmp_path, fails, options, words):
  message = fails(holdout.main, "--data", source, "--out", tmp_path / "out", *options)
  assert words in message
  assert not list(tmp_path.iterdir())
