"""The CLIP tokenizer: transformers' CLIPTokenizer on local files, and training of a small vocabulary in its format."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from compdiff_jax.cli import InputError, writing

CONTEXT_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
# CLIP's word pattern: contractions, runs of letters, single digits, runs of anything else.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_NUM_BYTES = 256
SMALLEST_VOCABULARY = 2 * _NUM_BYTES + 2


class Tokenizer:
  """Texts to token ids, as diffusers' Stable Diffusion pipelines do it.

  Attributes:
    directory: where the files came from.
    length: tokens per text, at most 77.
    vocab_size: number of tokens, which is the number of rows of the text encoder's embedding.
    pad_id: token after the end; "!" (0) in SD 2.x files, the end token in SD 1.x files. The text encoder does not mask
      padding, so the id matters.
    empty_ids: int32 [length], the tokens of the empty text.
  """

  def __init__(self, backend, directory: Path):
    self._backend = backend
    self.directory = directory
    # Files without a limit give transformers' "no limit", 1e30.
    self.length = min(int(backend.model_max_length), CONTEXT_LENGTH)
    self.vocab_size = len(backend)
    self.pad_id = int(backend.pad_token_id)
    self.empty_ids = self([""])[0]

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """int32 [N, length]: start, text (cut where needed), end, padding."""
    if not len(texts):
      return np.zeros([0, self.length], np.int32)
    batch = self._backend(list(texts), padding="max_length", truncation=True, max_length=self.length)
    return np.asarray(batch["input_ids"], np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    """The lower-case text of one row of ids, without start, end and padding."""
    ids = [int(i) for i in ids]
    end = self._backend.eos_token_id
    return self._backend.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)

  def content_hash(self) -> str:
    """SHA-256 of what decides the ids: vocabulary, merges, normalisation, special tokens, padding and length."""
    rules = {**json.loads(self._backend.backend_tokenizer.to_str()), "padding": self.pad_id, "truncation": self.length}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

  def __reduce__(self):
    return load_tokenizer, (self.directory,)


def load_tokenizer(directory: str | Path) -> Tokenizer:
  """Reads `vocab.json` and `merges.txt`, or `tokenizer.json`, with their special tokens; never uses the network."""
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would ask for torch, which nothing here uses
  from transformers import CLIPTokenizer  # takes seconds to import

  directory = Path(directory)
  if not (directory / "tokenizer.json").is_file():
    for name in ("vocab.json", "merges.txt"):
      if not (directory / name).is_file():
        raise InputError(f"{directory} is not a CLIP tokenizer: {name} is missing")
  try:
    return Tokenizer(CLIPTokenizer.from_pretrained(str(directory), local_files_only=True), directory)
  except Exception as error:  # the Rust library raises plain Exceptions for malformed files
    raise InputError(f"{directory} is not a CLIP tokenizer: {' '.join(str(error).split())}") from None


def train_tokenizer(texts: Iterable[str], out: str | Path, vocab_size: int, length: int = CONTEXT_LENGTH) -> Tokenizer:
  """Trains byte-level BPE on `texts` and writes it to `out` in CLIP's format.

  Token order is CLIP's: 256 bytes, 256 bytes that end a word, merges, start, end. So every text can be encoded, and
  the end token has the largest id. The vocabulary is smaller than `vocab_size` when the texts have too few repetitions.
  A text is cut and padded to `length` tokens, start and end among them; fewer cost less.
  """
  if vocab_size < SMALLEST_VOCABULARY:
    raise InputError(
      f"vocabulary size {vocab_size}: at least {SMALLEST_VOCABULARY} (every byte and two special tokens)"
    )
  if not 3 <= length <= CONTEXT_LENGTH:
    raise InputError(f"text length {length}: 3 to {CONTEXT_LENGTH} tokens, start and end among them")
  alphabet = _byte_alphabet()
  base = [*alphabet, *(byte + _END_OF_WORD for byte in alphabet)]
  merges = _train_merges(texts, base, vocab_size)
  vocab = {token: index for index, token in enumerate(base)}
  kept = []
  for left, right in merges:
    if len(vocab) == vocab_size - 2:
      break
    kept.append(f"{left} {right}")
    vocab.setdefault(left + right, len(vocab))
  for token in (START, END):
    vocab[token] = len(vocab)
  special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
  config = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": length,
    "do_lower_case": True,
    "add_prefix_space": False,
    "errors": "replace",
    **special,
  }
  out = Path(out)
  with writing(out):
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *kept]) + "\n", encoding="utf-8")
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
  return load_tokenizer(out)


def _train_merges(texts: Iterable[str], base: Sequence[str], vocab_size: int) -> Iterator[tuple[str, str]]:
  """The merges in the order in which they were learned."""
  from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    # Given as special tokens, the base symbols have fixed ids. Ids decide between pairs of equal count, and would
    # otherwise follow the random order of a hash table.
    special_tokens=list(base),
    end_of_word_suffix=_END_OF_WORD,
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return (tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"])


def _byte_alphabet() -> list[str]:
  """The printable stand-in of each byte, in CLIP's vocabulary order: printable Latin-1 first, then the others."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = _NUM_BYTES - len(printable)
  return [chr(code) for code in printable] + [chr(_NUM_BYTES + i) for i in range(others)]
