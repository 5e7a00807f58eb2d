"""data_prep.shards: the same bytes whoever makes them and however often the run is killed."""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from test_dataset import SCHEMA, examples, png, read_csv, records, write

from compdiff_jax.cli import InputError, resumable_directory
from compdiff_jax.data.records import RecordSet
from data_prep import dataset, shards
from data_prep.images import FolderImages, ImageOptions
from data_prep.phantom import __main__ as phantom
from data_prep.rows import RowError

# Several shards a split: the train split holds about 8 records of 100 bytes each in a shard.
SMALL = {"shard_mib": 0.0008}


def content(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def draw(index):
  """An `encode` of ours: every seventh image is unreadable."""
  if index % 7 == 3:
    raise RowError(f"unreadable image: {index}")
  return png(index)


def drawn(count):
  return ({**item, "image": i} for i, item in enumerate(examples(count)))


def test_rows_become_shards_of_the_asked_size(tmp_path):
  write(tmp_path / "one", drawn(100), encode=draw, max_rejected=0.2)
  write(tmp_path / "many", drawn(100), encode=draw, max_rejected=0.2, **SMALL)
  sizes = [path.stat().st_size for path in (tmp_path / "many").glob("*.array_record-*")]
  assert len(sizes) > 8 and len(list((tmp_path / "one").glob("*.array_record-*"))) == 3
  assert RecordSet(tmp_path / "many").splits == RecordSet(tmp_path / "one").splits
  assert records(tmp_path / "many") == records(tmp_path / "one")


def test_rejected_images_are_listed_in_the_order_of_the_rows(tmp_path, capsys):
  items = [{**item, "file": f"{item['key']}.png"} for item in drawn(50)]
  items[5] = {"file": "bad.png", "row": 6, "reason": "no patient id: column patient is empty"}
  write(tmp_path / "set", items, encode=draw, max_rejected=0.2, fractions=(1, 0, 0), **SMALL)
  found = [(row["file"], row["row"], row["reason"]) for row in read_csv(tmp_path / "set" / "rejected.csv")]
  unreadable = [(f"k{i}.png", str(i + 1), f"unreadable image: {i}") for i in range(3, 50, 7)]
  assert found == [unreadable[0], ("bad.png", "6", "no patient id: column patient is empty"), *unreadable[1:]]
  assert "50 rows in = 42 written + 8 rejected" in capsys.readouterr().out


def test_too_many_rejected_images_keep_what_is_done(tmp_path):
  made = []

  def counted(index):
    made.append(index)
    return draw(index)

  with pytest.raises(InputError, match="14 of 100 rows rejected"):
    write(tmp_path / "set", drawn(100), encode=counted)
  assert not (tmp_path / "set").exists() and len(read_csv(tmp_path / "set.rejected.csv")) == 14
  made.clear()
  write(tmp_path / "set", drawn(100), encode=counted, max_rejected=0.2)
  assert len(made) <= 32  # the images that the shard size is estimated from; no shard was made again
  write(tmp_path / "plain", drawn(100), encode=counted, max_rejected=0.2)
  assert content(tmp_path / "set") == content(tmp_path / "plain")


def test_stopped_before_or_after_any_rename_it_continues_to_the_same_bytes(tmp_path, monkeypatch):
  """Nothing is visible under its final name before a rename, so these are all the moments that can differ."""
  write(tmp_path / "plain", drawn(40), encode=draw, max_rejected=0.2, **SMALL)
  replace, moments = Path.replace, 0
  for stop in range(1, 1000):
    calls = 0

    def interrupted(self, target, stop=stop):
      nonlocal calls
      calls += 1
      if calls == stop:
        if stop % 2:
          replace(self, target)
        raise KeyboardInterrupt
      return replace(self, target)

    out = tmp_path / f"set{stop}"
    monkeypatch.setattr(Path, "replace", interrupted)
    try:
      write(out, drawn(40), encode=draw, max_rejected=0.2, **SMALL)
      break
    except KeyboardInterrupt:
      moments += 1
    monkeypatch.setattr(Path, "replace", replace)
    if not (out / "dataset_info.json").exists():
      assert not out.exists()
      write(out, drawn(40), encode=draw, max_rejected=0.2, **SMALL)
    assert content(out) == content(tmp_path / "plain")
  shards_made = len(list((tmp_path / "plain").glob("*.array_record-*")))
  assert moments == 2 * shards_made + 1 > 10  # shard, note; the directory


def test_killed_while_the_description_is_written(tmp_path, monkeypatch):
  write(tmp_path / "plain", drawn(40), encode=draw, max_rejected=0.2, **SMALL)

  def killed(directory):
    (directory / "README.md").write_text("half a card")
    (directory / "holdout.json").write_text("of other options")
    raise KeyboardInterrupt

  monkeypatch.setattr(dataset.checksums, "write", killed)
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / "set", drawn(40), encode=draw, max_rejected=0.2, **SMALL)
  assert not (tmp_path / "set").exists()
  monkeypatch.undo()
  write(tmp_path / "set", drawn(40), encode=draw, max_rejected=0.2, **SMALL)
  assert content(tmp_path / "set") == content(tmp_path / "plain")


def test_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
  write_shard, calls = shards.write_shard, []

  def full(path, *rest):
    calls.append(path)
    if len(calls) == 3:
      raise OSError(errno.ENOSPC, "No space left on device")
    return write_shard(path, *rest)

  monkeypatch.setattr(shards, "write_shard", full)
  with pytest.raises(InputError, match="No space left on device"):
    write(tmp_path / "set", drawn(100), encode=draw, max_rejected=0.2, **SMALL)
  total = len(calls)
  write(tmp_path / "set", drawn(100), encode=draw, max_rejected=0.2, **SMALL)
  assert not {path.name for path in calls[total:]} & {path.name for path in calls[:2]}
  write(tmp_path / "plain", drawn(100), encode=draw, max_rejected=0.2, **SMALL)
  assert content(tmp_path / "set") == content(tmp_path / "plain")


def test_other_rows_start_over(tmp_path, monkeypatch):
  def run(items):
    write(tmp_path / "set", items, encode=draw, max_rejected=0.2, **SMALL)

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(dataset, "_check_splits", killed)
  with pytest.raises(KeyboardInterrupt):
    run(drawn(100))
  monkeypatch.undo()
  run({**item, "text": "changed"} for item in drawn(100))
  assert {r["text"] for split in records(tmp_path / "set").values() for r in split} == {"changed"}


@pytest.fixture
def folder(tmp_path):
  """60 images, and the rows that name them: `write(out, rows, encode=encode)`."""
  (tmp_path / "images").mkdir()
  for i in range(60):
    (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
  rows = [{**item, "image": f"{i}.png"} for i, item in enumerate(examples(60))]
  return tmp_path / "images", rows, FolderImages(str(tmp_path / "images"), ImageOptions(8))


def test_images_that_were_put_back_are_read(folder, tmp_path):
  images, rows, encode = folder
  write(tmp_path / "plain", rows, encode=encode, **SMALL)
  for i in range(10, 60, 9):
    (images / f"{i}.png").rename(tmp_path / f"{i}.png")
  with pytest.raises(InputError, match="6 of 60 rows rejected"):
    write(tmp_path / "set", rows, encode=encode, **SMALL)
  for i in range(10, 60, 9):
    (tmp_path / f"{i}.png").rename(images / f"{i}.png")
  assert sum(write(tmp_path / "set", rows, encode=encode, **SMALL).values()) == 60
  assert content(tmp_path / "set") == content(tmp_path / "plain")


def test_only_shards_whose_images_changed_are_made_again(folder, tmp_path, monkeypatch):
  images, rows, encode = folder
  made, write_shard = [], shards.write_shard
  monkeypatch.setattr(shards, "write_shard", lambda path, *rest: made.append(path.name) or write_shard(path, *rest))

  def killed(directory):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(dataset.checksums, "write", killed)
    with pytest.raises(KeyboardInterrupt):
      write(tmp_path / "set", rows, encode=encode, **SMALL)
  total = len(made)
  (images / "21.png").write_bytes(png(200))
  os.utime(images / "21.png", ns=(0, 0))
  write(tmp_path / "set", rows, encode=encode, **SMALL)
  assert total > 5 and len(made) == total + 1
  write(tmp_path / "plain", rows, encode=encode, **SMALL)
  assert content(tmp_path / "set") == content(tmp_path / "plain")


def test_one_process_at_a_time(tmp_path):
  with resumable_directory(tmp_path / "set", {}), pytest.raises(InputError, match="another process is writing"):
    write(tmp_path / "set", examples(50))
  assert (tmp_path / "set").is_dir()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Phantoms as one process writes them, and the arguments that made them."""
  arguments = ["--num", "120", "--size", "48", "--shard_mib", "0.012"]
  out = tmp_path_factory.mktemp("undisturbed") / "set"
  phantom.main([*arguments, "--out", str(out)])
  return out, arguments


def same_but_for_the_path(out, other):
  ours, theirs = content(out), content(other)
  named = ("README.md", "card.html")  # they hold the command line
  for files, path in ((ours, out), (theirs, other)):
    for name in named:
      files[name] = files[name].replace(str(path).encode(), b"OUT")
    lines = files["SHA256SUMS"].decode().splitlines()
    files["SHA256SUMS"] = [line for line in lines if not line.endswith(named)]
  return ours == theirs


def test_killed_twice_by_sigkill_and_run_again(undisturbed, command, tmp_path):
  out = tmp_path / "set"
  plain, arguments = undisturbed
  total = len(list(plain.glob("*.array_record-*")))
  notes = tmp_path / ".set.unfinished" / "notes"
  finished = {}
  for least in (1, total // 2):
    process = command("data_prep.phantom", *arguments, "--out", out, "--workers", 2)
    deadline = time.monotonic() + 120
    while len(list(notes.glob("[!.]*-of-00*[0-9]"))) < max(least, len(finished) + 1):
      assert process.poll() is None and time.monotonic() < deadline, process.communicate()
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists() or not list(out.iterdir())
    for name, stamp in finished.items():
      assert (notes / name).stat().st_mtime_ns == stamp, "a finished shard was made again"
    finished = {path.name: path.stat().st_mtime_ns for path in notes.glob("[!.]*-of-00*[0-9]")}
  assert len(finished) < total, "killed too late to show anything"
  phantom.main([*arguments, "--out", str(out), "--workers", "0"])
  assert same_but_for_the_path(out, plain)
  assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_apache_beam_writes_the_same_bytes(undisturbed, tmp_path):
  """In an environment with Beam: its local runner, beside TFDS, TensorFlow and Orbax."""
  pytest.importorskip("apache_beam")
  import tensorflow_datasets as tfds
  from orbax.checkpoint import v1 as ocp

  plain, arguments = undisturbed
  out = tmp_path / "set"
  phantom.main([*arguments, "--out", str(out), "--runner", "DirectRunner", "--workers", "2"])
  assert same_but_for_the_path(out, plain)
  source = tfds.builder_from_directory(out).as_data_source("train")
  ocp.save(tmp_path / "checkpoint", {"count": len(source)})
  assert int(ocp.load(tmp_path / "checkpoint")["count"]) == RecordSet(out).splits["train"]
  tf = pytest.importorskip("tensorflow")
  (features,) = tf.data.Dataset.from_tensors(source[0]["attributes"]["age"]).as_numpy_iterator()
  assert features == source[0]["attributes"]["age"]


def test_many_rows_are_made_by_processes_unless_told_otherwise(undisturbed, tmp_path, monkeypatch):
  plain, arguments = undisturbed
  used = []
  start = shards._run_processes

  def spy(tasks, workers, meter):
    used.append(workers)
    start(tasks, workers, meter)

  monkeypatch.setattr(shards, "_run_processes", spy)
  monkeypatch.setattr(shards.os, "cpu_count", lambda: 2)
  phantom.main([*arguments, "--out", str(tmp_path / "few")])
  assert used == []
  monkeypatch.setattr(shards, "_MANY_ROWS", 10)
  phantom.main([*arguments, "--out", str(tmp_path / "many")])
  assert used == [2]
  assert same_but_for_the_path(tmp_path / "many", plain)
  phantom.main([*arguments, "--out", str(tmp_path / "here"), "--workers", "0"])
  assert used == [2]


def test_runner_without_beam_says_what_to_install(tmp_path, fails, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  message = fails(phantom.main, "--num", 100, "--out", tmp_path / "set", "--runner", "DirectRunner")
  assert "pip install 'compdiff-jax[beam]'" in message


@pytest.mark.parametrize(("option", "words"), [("--workers=-1", "--workers -1"), ("--shard_mib=0", "--shard_mib 0")])
def test_bad_options(tmp_path, fails, option, words):
  assert words in fails(phantom.main, "--num", 100, "--out", tmp_path / "set", option)


def test_card_does_not_say_where_the_work_was_done():
  where = ["--workers", "4", "--runner=FlinkRunner", "--runner_options=--a=b c"]
  line = dataset.command_line("python -m x", [*where, "--num=3"])
  assert line == "python -m x --num=3"


def test_note_says_what_became_of_a_task(tmp_path):
  rows = [{**item, "findings": "{}", "factors": "{}"} for item in drawn(5)]
  task = shards.Task(tmp_path / "shard", tmp_path / "note", SCHEMA, draw, rows)
  shards.run_task(task)
  note = shards.read_note(tmp_path / "note")
  assert note.shard.records == 4 and note.rejected == {3: "unreadable image: 3"}
  assert json.loads((tmp_path / "note").read_text())["shard"][0] == 4
