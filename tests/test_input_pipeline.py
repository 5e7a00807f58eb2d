"""Records and the Grain pipeline: order, hosts, resuming, mixing, balance and prefetch, by brute force."""

import ast
import io
import itertools
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading

import ml_collections
import numpy as np
import pytest
from conftest import PATIENCE
from PIL import Image

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.data.input_pipeline import device_batches, open_training_sets, training_batches
from compdiff_jax.data.order import balanced_groups
from compdiff_jax.data.prompts import format_prompt
from compdiff_jax.data.records import (
  ExampleParser,
  RecordSet,
  decode_image,
  features,
  write_description,
  write_split,
)
from compdiff_jax.sharding import batch_sharding, local_rows, make_mesh

_SCHEMA = Schema(
  (
    Attribute("age", "continuous", low=0, high=100, bins=(18, 40, 60, 80), unit="year"),
    Attribute("sex", "categorical", values=("male", "female")),
  )
)
_COUNT = 21


def _png(value):
  return _draw(value, 8)


def _draw(value, size):
  buffer = io.BytesIO()
  Image.fromarray(np.full([size, size], value, np.uint8)).save(buffer, "PNG")
  return buffer.getvalue()


def _write(directory, count=_COUNT, first=0, num_shards=3, sexes=(-1, 0, 1), pictures=()):
  """Images whose grey value is their index from `first` on, but for those in `pictures`."""
  records = [
    {
      "key": f"k{i}",
      "patient": f"p{i}",
      "image": dict(pictures).get(i, _png(first + i)),
      "text": f"text {i}",
      "attributes": {"age": float("nan") if i == 3 else float(i), "sex": sexes[i % len(sexes)]},
      "findings": '{"effusion": "positive"}',
      "factors": "{}",
    }
    for i in range(count)
  ]
  directory.mkdir(exist_ok=True)
  splits = [write_split(directory, "tiny", "train", _SCHEMA, records, num_shards)]
  write_description(directory, "tiny", _SCHEMA, splits, "a tiny set")
  return RecordSet(directory)


@pytest.fixture
def record_set(tmp_path):
  return _write(tmp_path)


def _batches(sets, **options):
  sets = sets if isinstance(sets, list) else [(sets, 1.0)]
  return iter(training_batches(sets, **{"image_size": 8, "seed": 0, **options}))


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


def test_parser_gives_what_tfds_gives(record_set):
  """The fast path of reading, against TFDS's own parser, for an image record and a latent record."""
  rng = np.random.default_rng(0)
  common = {"key": "ü", "patient": "", "text": "Höhe\n", "findings": '{"a": "positive"}', "factors": "{}"}
  common["attributes"] = {"age": float("nan"), "sex": -1}
  pictures = {"image": b"\0\xff"}, {"moments": rng.bytes(64), "input_ids": rng.integers(0, 49408, 77, np.int32)}
  for latents, picture in enumerate(pictures):
    description = features(_SCHEMA, bool(latents))
    data = description.serialize_example(description.encode_example({**common, **picture}))
    ours, theirs = ExampleParser(description)(data), description.deserialize_example_np(data)
    assert ours.keys() == theirs.keys()
    assert ours["key"] == theirs["key"].decode() == "ü" and ours["findings"] == json.loads(theirs["findings"])
    for name in ("attributes", *picture):
      np.testing.assert_equal(ours[name], theirs[name])


def test_every_epoch_holds_every_record_in_an_order_of_its_own(record_set):
  draw = lambda seed: _order(_batches(record_set, batch_size=7, seed=seed), 6)  # noqa: E731
  order = draw(seed=1)
  first, second = order[:_COUNT], order[_COUNT:]
  assert sorted(first) == sorted(second) == list(range(_COUNT))
  assert first != second != list(range(_COUNT))
  assert draw(seed=1) == order != draw(seed=2)
  assert draw(seed=2)[:_COUNT] != second  # a seed is not another seed's later epoch


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("first_step", [0, 5])
def test_hosts_share_the_batches_of_one_host_from_any_step(record_set, hosts, first_step):
  whole = np.reshape(_order(_batches(record_set, batch_size=8), 12), [12, 8])
  steps = 12 - first_step
  parts = [
    np.reshape(_order(_batches(record_set, batch_size=8, rows=rows, first_step=first_step), steps), [steps, -1])
    for rows in np.split(np.arange(8), hosts)
  ]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[first_step:])


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 4}, {"workers": 2}])
def test_threads_and_worker_processes_do_not_change_the_batches(record_set, options):
  expected = _order(_batches(record_set, batch_size=4, threads=1), 6)
  batches = _batches(record_set, batch_size=4, **options)
  assert _order(batches, 6) == expected
  batches.close()


def test_sets_are_mixed_in_their_proportions(tmp_path):
  sets = [(_write(tmp_path / "a"), 1.0), (_write(tmp_path / "b", 10, first=100, num_shards=1), 0.25)]
  draws = np.array(_order(_batches(sets, batch_size=50), 20))
  assert np.mean(draws >= 100) == pytest.approx(0.2, abs=0.002)
  for stretch in draws.reshape(10, 100):  # in every stretch, not only on average
    assert 19 <= np.sum(stretch >= 100) <= 21
  assert set(draws) == {*range(_COUNT), *range(100, 110)}
  own = draws[draws >= 100]
  for start in range(0, len(own) // 10 * 10, 10):  # the epochs of a set are its own
    assert sorted(own[start : start + 10]) == list(range(100, 110))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_cells_are_drawn_as_n_to_the_minus_tau(tmp_path, tau):
  records = _write(tmp_path, 24, sexes=(0, 0, 0, 0, 1, -1))  # 16 male, 4 female, 4 unknown
  draws = np.array(_order(_batches(records, batch_size=60, balance=("sex",), balance_tau=tau), 20))
  sex = records.attributes("train")["sex"][draws]
  weight = {0: 16.0**-tau, 1: 4.0**-tau, -1: 4.0**-tau}
  total = 16 * weight[0] + 4 * weight[1] + 4 * weight[-1]
  for value, count in ((0, 16), (1, 4), (-1, 4)):
    expected = count * weight[value] / total
    assert np.mean(sex == value) == pytest.approx(expected, abs=0.005)
    shares = np.bincount(draws[sex == value], minlength=24)
    assert (
      np.count_nonzero(shares) == count and np.ptp(shares[shares > 0]) <= 1
    )  # inside a cell every record equally often


def test_cells_of_several_attributes_cross(tmp_path):
  columns = {"age": np.array([5, 5, 30, 30, np.nan, 5], np.float32), "sex": np.array([0, 1, 0, 0, 1, 0], np.int32)}
  groups = balanced_groups(columns, _SCHEMA, ("age", "sex"), 1.0)
  assert sorted(group.numbers.tolist() for group in groups) == [[0, 5], [1], [2, 3], [4]]
  assert [group.weight for group in groups] == [0.25] * 4


def test_attribute_columns_are_those_of_the_records(record_set):
  source, columns = record_set.split("train"), record_set.attributes("train")
  for name, values in columns.items():
    np.testing.assert_equal(values, np.array([source[i]["attributes"][name] for i in range(_COUNT)], values.dtype))
  (record_set.path / "attributes-train.npz").write_bytes(b"")
  with pytest.raises(InputError, match=r"attributes-train\.npz cannot be read"):
    record_set.attributes("train")


@pytest.mark.parametrize(
  ("data", "words"),
  [
    ({"mix": ("b",)}, "not \\(path, weight\\)"),
    ({"mix": (("b", 0.0),)}, "weight above 0"),
    ({"mix": (("b", "x"),)}, "not \\(path, weight\\)"),
    ({"mix": (("nowhere", 1.0),)}, "nowhere is not a prepared data set"),
    ({"mix": (("other", 1.0),)}, "other attributes"),
    ({"mix": (("small", 1.0),)}, "prepare larger"),
    ({"balance": ("sx",)}, "data.balance: no attribute 'sx'; did you mean 'sex'"),
  ],
)
def test_sets_that_do_not_fit_are_refused(tmp_path, monkeypatch, data, words):
  monkeypatch.chdir(tmp_path)
  for name in ("a", "b", "other", "small"):
    _write(tmp_path / name)
  Schema(_SCHEMA.attributes[:1]).save(tmp_path / "other" / "schema.json")
  shutil.rmtree(tmp_path / "small")
  monkeypatch.setattr(sys.modules[__name__], "_png", lambda value: _draw(value, 4))
  _write(tmp_path / "small")
  with pytest.raises(InputError, match=words):
    open_training_sets(ml_collections.ConfigDict({"path": "a", "image_size": 8, "mix": (), "balance": (), **data}))


def test_device_batches_are_the_host_batches_on_every_mesh(record_set):
  expected = _order(_batches(record_set, batch_size=8), 5)
  for sizes in ({"data": 8, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
    placement = batch_sharding(make_mesh(sizes))
    rows = local_rows(placement, 8)
    batches = device_batches(
      training_batches([(record_set, 1.0)], batch_size=8, image_size=8, seed=0, rows=rows), placement, 8
    )
    first = next(batches)
    assert first["images"].sharding == placement == first["attributes"]["sex"].sharding
    order = [int(v) for v in first["images"][:, 0, 0, 0]] + [
      int(v) for _ in range(4) for v in next(batches)["images"][:, 0, 0, 0]
    ]
    batches.close()
    assert order == expected


def test_batches_are_placed_before_they_are_asked_for(record_set):
  """The first batch is in use; the ones after it are read and transferred meanwhile."""
  placement = batch_sharding(make_mesh({"data": 8, "fsdp": 1, "tensor": 1}))
  seen = threading.Semaphore(0)
  batches = training_batches([(record_set, 1.0)], batch_size=8, image_size=8, seed=0)
  batches = device_batches(batches.map(lambda batch: (seen.release(), batch)[1]), placement, 8)
  next(batches)
  assert all(seen.acquire(timeout=PATIENCE) for _ in range(3))
  batches.close()


_HOST = """
import sys, jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from compdiff_jax.data.input_pipeline import device_batches, training_batches
from compdiff_jax.data.records import RecordSet
from compdiff_jax.sharding import batch_sharding, local_rows, make_mesh
placement = batch_sharding(make_mesh({"data": 2, "fsdp": 2, "tensor": 1}, jax.devices()[::-1]))
rows = local_rows(placement, 8)
batches = training_batches(
  [(RecordSet(sys.argv[3]), 1.0)], batch_size=8, image_size=8, seed=0, rows=rows, first_step=3
)
batches = device_batches(batches, placement, 8)
for _ in range(3):
  images = next(batches)["images"]
  assert images.shape == (8, 8, 8, 3)
  shards = ((s.index[0].start, *np.asarray(s.data)[:, 0, 0, 0].tolist()) for s in images.addressable_shards)
  print(*shards, sep=";")
batches.close()  # a thread that still transfers when the interpreter ends aborts the process
"""


def test_two_processes_make_the_global_batches_of_one(record_set):
  """Two hosts of two devices, in an order of devices that is not that of the hosts."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _HOST, address, str(i), str(record_set.path)], env=env, stdout=-1, stderr=-1, text=True
    )
    for i in range(2)
  ]
  results = [process.communicate(timeout=PATIENCE) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], results
  expected = np.reshape(_order(_batches(record_set, batch_size=8), 6), [6, 4, 2])[3:]
  lines = [output.splitlines()[-3:] for output, _ in results]
  for step in range(3):
    shards = sorted(ast.literal_eval(shard) for host in lines for shard in host[step].split(";"))
    assert shards == [(2 * i, *expected[step, i]) for i in range(4)]


def test_batches_have_the_promised_types(record_set):
  batch = next(_batches(record_set, batch_size=4, image_size=4))
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


@pytest.mark.parametrize("damage", ["bytes", "image"])
def test_damaged_records_are_named(damage, tmp_path):
  """Record 9 of 21 in three shards is the third of the second one."""
  records = _write(tmp_path, pictures={9: b"no PNG"} if damage == "image" else {})
  shard = tmp_path / "tiny-train.array_record-00001-of-00003"
  if damage == "bytes":
    content = shard.read_bytes()
    assert content.count(b"text 9") == 1
    shard.write_bytes(content.replace(b"text 9", b"text 8"))
  words = {"bytes": "cannot be read", "image": "has an image that cannot be decoded"}[damage]
  with pytest.raises(InputError, match=f"{shard}: record 2 {words}"):
    next(_batches(records, batch_size=_COUNT))


def test_absent_split_names_those_there_are(record_set):
  with pytest.raises(InputError, match="did you mean 'train'"):
    record_set.split("trian")


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "1"])
@pytest.mark.parametrize("size", [None, 5])
def test_decode_image_equals_pillow(mode, size):
  noise = np.random.default_rng(0).integers(0, 256, [9, 9, 3], np.uint8)
  data = io.BytesIO()
  Image.fromarray(noise).convert(mode).save(data, "PNG")
  expected = Image.open(data).convert("RGB")
  expected = np.asarray(expected.resize((size, size), Image.Resampling.BICUBIC) if size else expected)
  np.testing.assert_array_equal(decode_image(data.getvalue(), size), expected)
  out = np.zeros_like(expected)
  assert decode_image(data.getvalue(), size, out) is out
  np.testing.assert_array_equal(out, expected)


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
  assert [age.representative(level) for level in range(5)] == [9, 29, 50, 70, 90]


@pytest.mark.parametrize(
  "edges", [(0, 0.3, 0.7, 1), (0.2, 0.4, 0.6), (0, 18, 40, 100), (-1.5, -1.2, 2.5), (0, 1, 2, 3), (0, 0.1, 12.6, 12.9)]
)
def test_representative_lies_in_its_bin(edges):
  dose = Attribute("dose", "continuous", low=edges[0], high=edges[-1], bins=edges[1:-1])
  for low, high in itertools.pairwise(edges):
    value = dose.representative(edges.index(low))
    assert low <= value < high and dose.levels([value])[0] == edges.index(low)


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
    ({"name": "a", "kind": "continuous", "low": 0, "high": 9, "bins": (4, 4 + 1e-9)}, "must rise"),  # one in float32
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
