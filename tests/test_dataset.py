"""data_prep.dataset: splits, hold-outs, rejected rows, the data card, and that nothing half-written looks complete."""

import csv
import hashlib
import io
import json
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from compdiff_jax import cli
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.data.records import RecordSet, decode_image
from data_prep import dataset, verify
from data_prep.rows import RowError

SCHEMA = Schema((
  Attribute("age", "continuous", low=0, high=100, bins=(40, 60), unit="year"),
  Attribute("sex", "categorical", values=("male", "female")),
  Attribute("group", "categorical", values=("A", "B")),
))  # fmt: skip


def png(value: int) -> bytes:
  data = io.BytesIO()
  Image.new("L", (8, 8), value % 256).save(data, "PNG")
  return data.getvalue()


def examples(count: int, images_per_patient: int = 2, seed: int = 0):
  rng = np.random.default_rng(seed)
  for i in range(count):
    yield {
      "key": f"k{i}",
      "patient": f"p{i // images_per_patient}",
      "image": png(i),
      "text": f"text {i}",
      "attributes": {
        "age": float(rng.integers(0, 100)),
        "sex": int(rng.integers(-1, 2)),
        "group": int(rng.integers(2)),
      },
      "findings": {"effusion": "positive"},
      "factors": {},
    }


def write(out, items, **changes):
  options = {"name": "tiny", "schema": SCHEMA, "description": "Tiny.", "size": 8, "command": "test"}
  return dataset.write_dataset(out, examples=items, **{**options, **changes})


def records(path):
  """{split: list of records}."""
  opened = RecordSet(path)
  sources = {split: opened.split(split) for split in opened.splits}
  return {split: [source[i] for i in range(len(source))] for split, source in sources.items()}


def read_csv(path):
  with open(path, newline="") as file:
    return list(csv.DictReader(file))


def test_every_example_is_stored_once_and_unchanged(tmp_path, capsys):
  items = list(examples(200))
  counts = write(tmp_path / "set", items)
  stored = {record["key"]: record for split in records(tmp_path / "set").values() for record in split}
  assert sum(counts.values()) == len(stored) == 200
  for item in items:
    record = stored[item["key"]]
    assert record["image"] == item["image"] and record["text"] == item["text"]
    assert record["findings"] == item["findings"] and record["attributes"] == item["attributes"]
  assert decode_image(stored["k7"]["image"])[0, 0].tolist() == [7, 7, 7]
  assert "200 rows in = 200 written + 0 rejected" in capsys.readouterr().out


def test_tensorflow_datasets_reads_the_directory(tmp_path):
  write(tmp_path / "set", examples(100))
  source = tfds.builder_from_directory(tmp_path / "set").as_data_source("train")
  ours = records(tmp_path / "set")["train"]
  assert len(source) == len(ours)
  theirs = source[3]
  assert theirs["key"].decode() == ours[3]["key"] and theirs["image"] == ours[3]["image"]
  assert float(theirs["attributes"]["age"]) == ours[3]["attributes"]["age"]


def test_damaged_descriptions(tmp_path):
  write(tmp_path / "set", examples(20), fractions=(1, 0, 0))
  whole = (tmp_path / "set/dataset_info.json").read_text()
  for name in ("holdout.json", "latents.json", "dataset_info.json"):
    for content in (whole[:-30], "[]", "{}"):
      (tmp_path / "set" / name).write_text(content)
      with pytest.raises(InputError, match=rf"{name} (is not valid JSON|has no) .*; prepare the data set again"):
        RecordSet(tmp_path / "set")
    (tmp_path / "set" / name).unlink()
    (tmp_path / "set/dataset_info.json").write_text(whole)


def test_patients_are_in_one_split_by_their_own_hash(tmp_path):
  write(tmp_path / "all", examples(400))
  write(tmp_path / "some", (item for item in examples(400) if int(item["key"][1:]) % 4 < 2))
  where = {r["key"]: (split, r["patient"]) for split, members in records(tmp_path / "all").items() for r in members}
  for i in range(0, 400, 2):
    assert where[f"k{i}"] == where[f"k{i + 1}"]
  digest = hashlib.sha256(b"compdiff-jax/tiny\0p5").hexdigest()
  assert where["k10"][1] == digest[:16]
  draw = int(digest[16:32], 16) / 16**16
  assert where["k10"][0] == ("train" if draw < 0.8 else "val" if draw < 0.9 else "test")
  for split, members in records(tmp_path / "some").items():
    assert all(where[r["key"]] == (split, r["patient"]) for r in members)  # whoever else is in the data


def test_split_shares_follow_the_fractions():
  draws = np.array([dataset.patient_hash(f"p{i}", "salt")[1] for i in range(20_000)])
  share = np.mean(draws < 0.8)
  assert abs(share - 0.8) < 4 * np.sqrt(0.8 * 0.2 / 20_000)


@pytest.mark.parametrize("salt", ["zebra", "my zebra salt", "it's zebra", 'a "zebra" \'s', "--zebra=quagga"])
def test_salt_changes_the_hashes_and_is_not_written(tmp_path, salt):
  command = dataset.command_line("python -m x", ["--salt", salt, "--out", "set", f"--salt={salt}", "--num=3"])
  write(tmp_path / "open", examples(100))
  write(tmp_path / "set", examples(100), salt=salt, command=command)
  assert "python -m x --salt=SECRET --out set --salt=SECRET --num=3" in (tmp_path / "set/README.md").read_text()
  for path in (tmp_path / "set").iterdir():
    assert b"zebra" not in path.read_bytes() and b"quagga" not in path.read_bytes()
  patients = [{r["patient"] for s in records(tmp_path / name).values() for r in s} for name in ("open", "set")]
  assert len(patients[1]) == 50 and not patients[0] & patients[1]


def test_the_salt_cannot_be_abbreviated():
  """The card would not know it."""
  parser = cli.parser("test", "")
  dataset.add_arguments(parser)
  with pytest.raises(InputError, match="--sal"):
    parser.parse_args(["--out", "set", "--sal=zebra"])


def test_same_input_gives_the_same_bytes(tmp_path):
  for name in ("a", "b"):
    write(tmp_path / name, examples(100), held_out=dataset.parse_cells("age=40-60,sex=female", SCHEMA))
  names = sorted(path.name for path in (tmp_path / "a").iterdir())
  assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
  assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_held_out_patients_leave_train_and_val(tmp_path):
  items = list(examples(600))
  write(tmp_path / "plain", items)
  write(tmp_path / "set", items, held_out=dataset.parse_cells("age=40-60,sex=female,group=B;age=60+,sex=male", SCHEMA))

  def held(attributes):
    age, sex, group = attributes["age"], attributes["sex"], attributes["group"]
    return (40 <= age < 60 and sex == 1 and group == 1) or (age >= 60 and sex == 0)

  patients = {item["patient"] for item in items if held(item["attributes"])}
  keys = {item["key"] for item in items if item["patient"] in patients}
  before, after = records(tmp_path / "plain"), records(tmp_path / "set")
  for split in ("train", "val"):
    assert {r["key"] for r in after[split]} == {r["key"] for r in before[split]} - keys
  assert keys <= {r["key"] for r in after["test"]}
  holdout = json.loads((tmp_path / "set/holdout.json").read_text())
  assert RecordSet(tmp_path / "set").held_out == ("age=40-60,sex=female,group=B", "age=60+,sex=male")
  moved = [r for split in ("train", "val") for r in before[split] if r["key"] in keys]
  assert holdout["moved_to_test"]["images"] == len(moved)
  assert sum(holdout["cost"].values()) == sum(not held(r["attributes"]) for r in moved)
  assert holdout["images"]["age=60+,sex=male"] == sum(
    item["attributes"]["age"] >= 60 and item["attributes"]["sex"] == 0 for item in items
  )
  # Sex unknown, age 60+: may belong to the second cell, nobody knows.
  maybe = sum(r["attributes"]["age"] >= 60 and r["attributes"]["sex"] == -1 for r in after["train"])
  assert holdout["maybe_in_train"]["age=60+,sex=male"] == maybe > 0


@pytest.mark.parametrize(
  ("others", "status"),
  [
    ([(20, 1, 1), (50, 0, 1), (50, 1, 0)], "pair-seen"),  # each pair of (50, female, B) occurs somewhere
    ([(20, 1, 1), (50, 0, 1), (20, 0, 0)], "pair-unseen"),  # age 50 never with female
  ],
)
def test_status_of_a_hand_made_holdout(tmp_path, others, status):
  rows = [(50, 1, 1), *others * 3]
  items = [
    {**item, "attributes": dict(zip(SCHEMA.names, row))} for item, row in zip(examples(len(rows), 1), rows)
  ]  # fmt: skip
  cells = dataset.parse_cells("age=40-60,sex=female,group=B", SCHEMA)
  write(tmp_path / "set", items, held_out=cells, fractions=(1, 0, 0))
  assert list(json.loads((tmp_path / "set/holdout.json").read_text())["status"].values()) == [status]
  assert RecordSet(tmp_path / "set").splits == {"train": len(rows) - 1, "test": 1}


def failure(tmp_path, items, **changes):
  """The message of a failing run; checks that the run left no data set and no temporary directory."""
  before = set(tmp_path.iterdir())
  with pytest.raises(InputError) as caught:
    write(tmp_path / "set", items, **changes)
  assert "\n" not in str(caught.value)
  assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"set.rejected.csv"}
  return str(caught.value)


def test_holdout_that_removes_a_level_is_refused(tmp_path):
  cells = dataset.parse_cells("sex=female,group=A;sex=female,group=B", SCHEMA)
  message = failure(tmp_path, examples(400, 1), held_out=cells)
  assert "sex=female" in message and "training split" in message


def test_holdout_of_a_cell_without_images_is_refused(tmp_path):
  """The rarest cells that do occur are named; a record of unknown sex is in none of them."""
  people = [(20, 0)] * 40 + [(50, 0)] * 30 + [(70, 1)] * 2 + [(20, 1)] + [(50, -1)] * 3
  items = [{**item, "attributes": {"age": float(age), "sex": sex, "group": 0}}
           for item, (age, sex) in zip(examples(len(people), 1), people)]  # fmt: skip
  message = failure(tmp_path, items, held_out=dataset.parse_cells("age=60+,sex=female;age=40-60,sex=female", SCHEMA))
  assert "hold-out age=40-60,sex=female: no image" in message and "--num" in message
  assert message.endswith("occur: age=0-40,sex=female (1); age=60+,sex=female (2); age=40-60,sex=male (30)")
  # The same where the only image of the cell turns out to be unreadable.
  items[0] = {**items[0], "attributes": {"age": 50.0, "sex": 1, "group": 0}, "image": b"bad"}
  cells = dataset.parse_cells("age=40-60,sex=female", SCHEMA)
  assert "hold-out age=40-60,sex=female: no image" in failure(tmp_path, items, held_out=cells, encode=readable)


def readable(image: bytes) -> bytes:
  if image == b"bad":
    raise RowError("unreadable image: it is bad")
  return image


def test_unknown_level_in_a_holdout_is_refused():
  for spec, words in (("age=40-60,sex=femal", "female"), (" ; ", "names no cell")):
    with pytest.raises(InputError, match=words):
      dataset.parse_cells(spec, SCHEMA)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_empty_split_is_named(tmp_path, split):
  first = {"train": 0.0, "val": 0.8, "test": 0.9}[split]
  width = {"train": 0.8, "val": 0.1, "test": 0.1}[split]

  def elsewhere(item):
    return not first <= dataset.patient_hash(item["patient"], "compdiff-jax/tiny")[1] < first + width

  assert f"the {split} split would be empty" in failure(tmp_path, filter(elsewhere, examples(100)))


def test_split_of_share_zero_may_be_absent(tmp_path):
  write(tmp_path / "set", examples(100), fractions=(0, 0.5, 0.5))
  assert set(RecordSet(tmp_path / "set").splits) == {"val", "test"}


def test_no_rows_at_all(tmp_path):
  assert "no rows" in failure(tmp_path, [])


def test_duplicate_keys_are_rejected_rows(tmp_path, capsys):
  items = list(examples(100))
  items.append({**items[3], "text": "other", "file": "x.png", "row": 102})
  write(tmp_path / "set", items)
  (row,) = read_csv(tmp_path / "set/rejected.csv")
  assert (row["file"], row["row"]) == ("x.png", "102") and "duplicate key: k3" in row["reason"]
  stored = [r for split in records(tmp_path / "set").values() for r in split]
  assert len(stored) == 100 and "text 3" in {r["text"] for r in stored}
  assert "101 rows in = 100 written + 1 rejected" in capsys.readouterr().out


def test_too_many_rejected_rows(tmp_path):
  rejected = [{"file": f"{i}.png", "row": i, "reason": "missing image file: it"} for i in range(10)]
  message = failure(tmp_path, [*examples(90), *rejected])
  assert "10 of 100 rows rejected (10.0%, limit 5.0%" in message and "set.rejected.csv" in message
  assert read_csv(tmp_path / "set.rejected.csv")[9] == {"file": "9.png", "row": "9", "reason": rejected[9]["reason"]}
  write(tmp_path / "set", [*examples(90), *rejected], max_rejected=0.1)
  assert len(read_csv(tmp_path / "set/rejected.csv")) == 10


def test_taken_output_is_left_alone(tmp_path):
  (tmp_path / "set").mkdir()
  (tmp_path / "set/precious").write_text("data")
  assert "not empty" in failure(tmp_path, examples(50))
  assert [path.name for path in (tmp_path / "set").iterdir()] == ["precious"]
  (tmp_path / "file").write_text("data")
  with pytest.raises(InputError, match="cannot write"):
    write(tmp_path / "file/set", examples(50))


@pytest.mark.parametrize("existing", [False, True])
def test_interrupt_leaves_nothing_that_looks_complete(tmp_path, existing, capsys):
  def interrupted():
    yield from examples(50)
    raise KeyboardInterrupt

  if existing:
    (tmp_path / "set").mkdir()
  assert cli.run(lambda argv: write(tmp_path / "set", interrupted()), "test", []) == 130
  assert [path.name for path in tmp_path.iterdir()] == (["set"] if existing else [])
  assert not existing or not any((tmp_path / "set").iterdir())
  with pytest.raises(InputError, match="not a prepared data set"):
    RecordSet(tmp_path / "set")


def test_card_counts_what_is_stored(tmp_path):
  write(tmp_path / "set", examples(300), held_out=dataset.parse_cells("age=40-60,sex=female,group=B", SCHEMA))
  ages = ("0-40", "40-60", "60+")
  expected = Counter()
  for split, members in records(tmp_path / "set").items():
    for r in members:
      age, sex, group = (r["attributes"][name] for name in SCHEMA.names)
      cell = (ages[(age >= 40) + (age >= 60)], ("male", "female", "unknown")[sex], "AB"[group])
      expected[(*cell, split)] += 1
  table = read_csv(tmp_path / "set/cells.csv")
  found = {(r["age"], r["sex"], r["group"], s): int(r[s]) for r in table for s in ("train", "val", "test")}
  assert {cell: count for cell, count in found.items() if count} == expected
  assert ("40-60", "female", "B", "train") in found  # empty cells are listed
  text = (tmp_path / "set/README.md").read_text()
  assert "300 rows in = 300 images written + 0 rows rejected" in text and "age=40-60,sex=female,group=B" in text
  with Image.open(tmp_path / "set/sheet.png") as sheet:
    assert sheet.width > 1000 and np.ptp(np.asarray(sheet)) == 255


def test_bad_fractions():
  assert dataset.parse_fractions("0.7,0.1,0.2") == (0.7, 0.1, 0.2)
  for text in ("1,2", "0.5,0.5,0.5", "a,b,c", "1.2,-0.1,-0.1"):
    with pytest.raises(InputError, match="--fractions"):
      dataset.parse_fractions(text)


def test_repeated_images_are_reported_and_the_set_verifies(tmp_path, capsys):
  items = list(examples(100))
  items[70]["image"] = items[12]["image"]
  write(tmp_path / "set", items)
  (line,) = read_csv(tmp_path / "set" / "duplicates.csv")
  keys = {line["key"], line["same_as"]}
  assert keys == {"k12", "k70"} and line["other_patient"] == "yes"
  assert "1 images repeat an earlier one" in capsys.readouterr().out
  counts, found = verify.verify(tmp_path / "set")
  assert sum(counts.values()) == 100 and not found.counts
