"""Records and the Grain pipeline: every record once an epoch, another order each epoch, exact resume."""

import io
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.data.input_pipeline import training_batches
from compdiff_jax.data.prompts import format_prompt
from compdiff_jax.data.records import RecordSet, decode_image, write_description, write_split

_SCHEMA = Schema(
  (
    Attribute("age", "continuous", low=0, high=100, bins=(18, 40, 60, 80), unit="year"),
    Attribute("sex", "categorical", values=("male", "female")),
  )
)
_COUNT = 21


def _png(value, size=8):
  buffer = io.BytesIO()
  Image.fromarray(np.full([size, size], value, np.uint8)).save(buffer, "PNG")
  return buffer.getvalue()


@pytest.fixture
def record_set(tmp_path):
  """Images whose grey value is their index; three shards."""
  records = [
    {
      "key": f"k{i}",
      "patient": f"p{i}",
      "image": _png(i),
      "text": f"text {i}",
      "attributes": {"age": float("nan") if i == 3 else float(i), "sex": i % 3 - 1},
      "findings": '{"effusion": "positive"}',
      "factors": "{}",
    }
    for i in range(_COUNT)
  ]
  splits = [write_split(tmp_path, "tiny", "train", _SCHEMA, records, num_shards=3)]
  write_description(tmp_path, "tiny", _SCHEMA, splits, "a tiny set")
  return RecordSet(tmp_path)


def _order(batches, count):
  return [int(image[0, 0, 0]) for _ in range(count) for image in next(batches)["images"]]


def test_records_come_back_as_written(record_set):
  source = record_set.split("train")
  assert len(source) == _COUNT and record_set.schema == _SCHEMA
  for i in (0, 3, _COUNT - 1):
    record = pickle.loads(pickle.dumps(source))[i]
    assert record["key"] == f"k{i}" and record["text"] == f"text {i}"
    assert record["image"] == _png(i) and record["findings"] == {"effusion": "positive"}
    assert record["attributes"]["sex"] == i % 3 - 1
    np.testing.assert_equal(record["attributes"]["age"], np.nan if i == 3 else float(i))
  with pytest.raises(IndexError):
    source[_COUNT]


def test_tfds_reads_the_directory_by_itself(record_set):
  import tensorflow_datasets as tfds

  source = tfds.builder_from_directory(str(record_set.path)).as_data_source("train")
  assert len(source) == _COUNT and source[5]["key"] == b"k5"


def test_every_epoch_holds_every_record_in_an_order_of_its_own(record_set):
  draw = lambda seed: _order(training_batches(record_set, "train", batch_size=7, image_size=8, seed=seed), 6)  # noqa: E731
  order = draw(seed=1)
  first, second = order[:_COUNT], order[_COUNT:]
  assert sorted(first) == sorted(second) == list(range(_COUNT))
  assert first != second != list(range(_COUNT))
  assert draw(seed=1) == order != draw(seed=2)


def test_iterator_state_resumes_exactly_and_batches_cross_epochs(record_set):
  make = lambda: training_batches(record_set, "train", batch_size=4, image_size=8, seed=0)  # noqa: E731
  whole = _order(make(), 12)
  batches = make()
  assert _order(batches, 5) == whole[:20]
  state = batches.get_state()
  resumed = make()
  resumed.set_state(state)
  assert _order(resumed, 7) == whole[20:]


def test_batches_have_the_promised_types(record_set):
  batch = next(training_batches(record_set, "train", batch_size=4, image_size=4, seed=0))
  assert batch["images"].shape == (4, 4, 4, 3) and batch["images"].dtype == np.uint8
  assert batch["attributes"]["age"].dtype == np.float32 and batch["attributes"]["sex"].dtype == np.int32


def test_reading_needs_no_tensorflow(record_set):
  code = (
    "import sys; from compdiff_jax.data.records import RecordSet;"
    f"RecordSet({str(record_set.path)!r}).split('train')[0]; assert 'tensorflow' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("damage", ["missing", "truncated", "not_json", "fewer"])
def test_damaged_directories_are_named(record_set, damage, tmp_path):
  shard = tmp_path / "tiny-train.array_record-00001-of-00003"
  if damage == "missing":
    shard.unlink()
  elif damage == "truncated":
    shard.write_bytes(shard.read_bytes()[:-100])
  elif damage == "fewer":
    shutil.copy(tmp_path / "tiny-train.array_record-00000-of-00003", shard)
    write_split(tmp_path, "tiny", "train", _SCHEMA, [], num_shards=3)
  else:
    (tmp_path / "dataset_info.json").write_text("{")
  with pytest.raises(InputError, match="dataset_info.json" if damage == "not_json" else "tiny-train"):
    RecordSet(tmp_path).split("train")


def test_absent_split_names_those_there_are(record_set):
  with pytest.raises(InputError, match="did you mean 'train'"):
    record_set.split("trian")


def test_decode_image_is_rgb_and_resizes():
  image = decode_image(_png(7), size=4)
  assert image.shape == (4, 4, 3) and (image == 7).all()


def test_prompt_puts_known_attributes_first_and_leaves_unknown_out():
  values = {"age": 54.4, "sex": 0}
  assert format_prompt("Clear.", values, _SCHEMA) == "Clear."
  assert format_prompt("Clear.", values, _SCHEMA, ("age", "sex")) == "54 year old male. Clear."
  assert format_prompt("Clear.", {"age": float("nan"), "sex": 1}, _SCHEMA, ("age", "sex")) == "female. Clear."
  assert format_prompt("Clear.", _SCHEMA.unknown(1) | {"age": float("nan"), "sex": -1}, _SCHEMA, ("age",)) == "Clear."


def test_schema_levels_cells_and_json():
  age = _SCHEMA["age"]
  np.testing.assert_array_equal(age.levels(np.array([0, 17.9, 18, 79.9, 80, np.nan])), [0, 0, 1, 3, 4, -1])
  assert age.level_names == ("0-18", "18-40", "40-60", "60-80", "80+")
  assert Schema.from_json(_SCHEMA.to_json()) == _SCHEMA and len(_SCHEMA.cells()) == 10
  for cell in _SCHEMA.cells():
    assert _SCHEMA.parse_cell(_SCHEMA.cell_name(cell)) == cell
  for level in range(5):
    assert age.levels(np.array([age.representative(level)]))[0] == level


@pytest.mark.parametrize("text", ["age=60-81", "sexx=male", "age=80+,age=0-18", "sex"])
def test_bad_cells_are_refused(text):
  with pytest.raises(InputError):
    _SCHEMA.parse_cell(text)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"name": "a b", "kind": "categorical", "values": ("x", "y")}, "identifier"),
    ({"name": "a", "kind": "categorical", "values": ("x", "x")}, "two different"),
    ({"name": "a", "kind": "categorical", "values": ("x", "none")}, "stands for unknown"),
    ({"name": "a", "kind": "continuous", "low": 5, "high": 5}, "low < high"),
    ({"name": "a", "kind": "continuous", "low": 0, "high": 9, "bins": (4, 3)}, "must rise"),
    ({"name": "a", "kind": "ordinal"}, "must be one of 'categorical', 'continuous', 'multilabel'"),
  ],
)
def test_bad_attributes_are_refused(fields, words):
  with pytest.raises(InputError, match=words):
    Attribute(**fields)


@pytest.mark.parametrize(
  ("name", "text", "words"),
  [
    ("age", "old", "not a number"),
    ("age", "-1", "outside 0 to 100"),
    ("age", "155", "outside"),
    ("sex", "X", "not one"),
  ],
)
def test_values_outside_the_schema_are_refused(name, text, words):
  with pytest.raises(ValueError, match=words):
    _SCHEMA[name].encode(text)
