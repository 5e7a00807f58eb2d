"""The tokenizer against transformers and a brute-force CLIP encoder; training a vocabulary; its command."""

import io
import itertools
import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPTokenizer

from compdiff_jax import cli
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.data.tokenizer import END, START, load_tokenizer, train_tokenizer
from data_prep import dataset, vocabulary

TEXTS = [
  "Large left pleural effusion. The heart is enlarged.",
  "Small right pleural effusion, no pneumothorax; pacemaker in place.",
  "No acute finding. Heart size is normal.",
] * 20
PROBES = [
  *TEXTS[:3],
  "",
  "   White \t space\n",
  "Unseen words: xylophone 1234 -- it's (fine)!?",
  "é日本語 😀 \x00 ü",
  "effusion " * 200,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer"), 700)


def brute_force(directory, text: str, pad: int) -> list[int]:
  """CLIP's encoder written out: greedy lowest-rank merges of the bytes of each word."""
  vocab = json.loads((directory / "vocab.json").read_text())
  merges = [tuple(line.split()) for line in (directory / "merges.txt").read_text().splitlines()[1:]]
  rank = {pair: i for i, pair in enumerate(merges)}
  stand_in = dict(zip(range(256), [None] * 256))
  spare = iter(range(256, 512))
  for byte in range(256):
    plain = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
    stand_in[byte] = chr(byte) if plain else chr(next(spare))
  ids = [vocab[START]]
  # ASCII only: \w and \d of `re` would differ from \p{L} and \p{N}.
  for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()):
    symbols = [stand_in[byte] for byte in word.encode()]
    symbols[-1] += "</w>"
    while len(symbols) > 1:
      pairs = list(itertools.pairwise(symbols))
      best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
      if best not in rank:
        break
      joined, i = [], 0
      while i < len(symbols):
        step = 2 if tuple(symbols[i : i + 2]) == best else 1
        joined.append("".join(symbols[i : i + step]))
        i += step
      symbols = joined
    ids += [vocab[symbol] for symbol in symbols]
  ids = [*ids[:76], vocab[END]]
  return ids + [pad] * (77 - len(ids))


def test_ids_equal_a_brute_force_encoder(trained):
  probes = [text for text in PROBES if text.isascii() and "\x00" not in text]
  assert trained(probes).tolist() == [brute_force(trained.directory, text, trained.pad_id) for text in probes]


def test_ids_equal_transformers_as_diffusers_loads_it(trained, tmp_path):
  reference = CLIPTokenizer.from_pretrained(trained.directory)
  # A diffusers pipeline loads its tokenizer from a subfolder of the model directory.
  in_pipeline = CLIPTokenizer.from_pretrained(trained.directory.parent, subfolder=trained.directory.name)
  automatic = AutoTokenizer.from_pretrained(trained.directory)
  reference.save_pretrained(tmp_path / "saved")  # transformers' own files: tokenizer.json
  saved = load_tokenizer(tmp_path / "saved")
  ids = trained(PROBES)
  for tokenizer in (reference, in_pipeline, automatic):
    theirs = tokenizer(PROBES, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(ids, theirs)
  np.testing.assert_array_equal(ids, saved(PROBES))
  assert ids.dtype == np.int32 and ids.shape == (len(PROBES), 77)


def test_vocabulary_is_in_clip_order(trained):
  vocab = json.loads((trained.directory / "vocab.json").read_text())
  by_id = sorted(vocab, key=vocab.get)
  assert sorted(vocab.values()) == list(range(len(vocab))) and trained.vocab_size == len(vocab) <= 700
  assert by_id[0] == "!" and by_id[256] == "!</w>" and by_id[-2:] == [START, END]
  assert "effusion</w>" in vocab and "pleural</w>" in vocab
  merges = (trained.directory / "merges.txt").read_text().splitlines()
  assert merges[0].startswith("#version") and all("".join(m.split()) in vocab for m in merges[1:])


def test_decode_restores_seen_and_unseen_text(trained):
  for text in ("large left pleural effusion", "xylophone", "é日本語 😀"):
    assert trained.decode(trained([text])[0]) == text


def test_no_byte_is_unknown(trained):
  text = " ".join(chr(code) for code in range(1, 0x500) if chr(code).strip())
  for start in range(0, len(text), 20):
    ids = trained([text[start : start + 20]])[0].tolist()
    first_end = ids.index(trained.vocab_size - 1)  # the unknown token is the end token: only padding may follow
    assert set(ids[first_end:]) == {trained.vocab_size - 1}


def test_empty_ids_and_empty_batch(trained):
  end = trained.vocab_size - 1
  assert trained.empty_ids.tolist() == [end - 1, end] + [trained.pad_id] * 75
  assert trained([]).shape == (0, 77)


def test_training_does_not_depend_on_the_order_of_texts(trained, tmp_path):
  again = train_tokenizer(reversed(TEXTS), tmp_path, 700)
  for name in ("vocab.json", "merges.txt"):
    assert (again.directory / name).read_bytes() == (trained.directory / name).read_bytes()


def test_small_size_and_pickle(trained, tmp_path):
  with pytest.raises(InputError, match="at least 514"):
    train_tokenizer(TEXTS, tmp_path, 513)
  assert train_tokenizer(TEXTS, tmp_path, 514).vocab_size == 514
  copy = pickle.loads(pickle.dumps(trained))
  np.testing.assert_array_equal(copy(PROBES), trained(PROBES))


def with_pad(trained, out, place: str, pad: str):
  """The trained files, with the padding token stated as Stable Diffusion releases do: in one of two files."""
  out.mkdir()
  for name in ("vocab.json", "merges.txt"):
    (out / name).write_bytes((trained.directory / name).read_bytes())
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    content = json.loads((trained.directory / name).read_text())
    if place == name:
      content["pad_token"] = pad
    elif place == "tokenizer_config.json":
      continue  # newer releases have no special_tokens_map.json
    (out / name).write_text(json.dumps(content))
  return load_tokenizer(out)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "special_tokens_map.json"])
def test_padding_token_comes_from_the_files(trained, tmp_path, place):
  assert trained.pad_id == trained.vocab_size - 1  # as SD 1.x
  second = with_pad(trained, tmp_path / "sd2", place, "!")  # as SD 2.x
  assert second.pad_id == 0
  assert second.empty_ids.tolist() == [*trained.empty_ids[:2].tolist(), *[0] * 75]
  assert second(PROBES[:2]).tolist() == [brute_force(trained.directory, text, 0) for text in PROBES[:2]]


def test_bad_directories(trained, tmp_path):
  with pytest.raises(InputError, match=r"vocab\.json is missing"):
    load_tokenizer(tmp_path)
  (tmp_path / "vocab.json").write_text('{"a": ')
  with pytest.raises(InputError, match=r"merges\.txt is missing"):
    load_tokenizer(tmp_path)
  (tmp_path / "merges.txt").write_text("#version: 0.2\n")
  with pytest.raises(InputError, match="not a CLIP tokenizer"):
    load_tokenizer(tmp_path)


def test_short_texts(tmp_path, trained):
  """A vocabulary of another length differs in nothing else: the same tokens, cut and padded to it, to diffusers too."""
  short = train_tokenizer(TEXTS, tmp_path, 700, length=8)
  long, end = trained(PROBES), trained.vocab_size - 1
  ids = short(PROBES)
  assert ids.shape == (len(PROBES), 8)
  for row, full in zip(ids, long):
    whole = full[: list(full).index(end) + 1]
    expected = whole if len(whole) <= 8 else [*whole[:7], end]
    assert row.tolist() == [*expected, *[short.pad_id] * (8 - len(expected))]
  assert CLIPTokenizer.from_pretrained(str(tmp_path)).model_max_length == 8
  assert short.content_hash() != trained.content_hash()


def test_vocabulary_verb(tmp_path, capsys):
  schema = Schema((
    Attribute("age", "continuous", low=0, high=100, bins=(40,), unit="year"),
    Attribute("sex", "categorical", values=("male", "female")),
  ))  # fmt: skip
  picture = io.BytesIO()
  Image.new("L", (8, 8)).save(picture, "PNG")
  items = (
    {"key": f"k{i}", "patient": f"p{i}", "image": picture.getvalue(), "text": TEXTS[i % 3],
     "attributes": {"age": 50.0, "sex": i % 2}, "findings": {}, "factors": {}} for i in range(100)
  )  # fmt: skip
  data = tmp_path / "set"
  dataset.write_dataset(data, name="tiny", schema=schema, examples=items, description="Tiny.", size=8, command="test")
  argv = ["--data", str(data), "--out", str(tmp_path / "tokenizer"), "--size", "800"]
  assert cli.run(vocabulary.main, "vocabulary", argv) == 0
  tokenizer = load_tokenizer(tmp_path / "tokenizer")
  ids = tokenizer(["age 71 year, sex female, pleural effusion"])[0]
  # start, age, 7, 1, year, comma, sex, female, comma, pleural, effusion, end: attribute words are whole tokens
  assert ids.tolist().index(tokenizer.vocab_size - 1) == 11
  capsys.readouterr()
  assert cli.run(vocabulary.main, "vocabulary", argv) == 2
  assert re.fullmatch(r"vocabulary: error: .*not empty.*\n", capsys.readouterr().err)
  assert cli.run(vocabulary.main, "vocabulary", [*argv[:3], str(tmp_path / "new"), "--size", "9"]) == 2
  for length in ("2", "78"):
    assert cli.run(vocabulary.main, "vocabulary", [*argv[:3], str(tmp_path / "new"), "--length", length]) == 2
    assert f"text length {length}: 3 to 77" in capsys.readouterr().err
  assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*partial*"))
