"""Trains a small CLIP-format vocabulary on a data set's own texts: `python -m data_prep.vocabulary --help`.

For demos and small models that train their own text encoder. It learns from the training split, the names and levels of
the attributes, and the digits; any other word is spelled in smaller pieces, at worst in bytes.
"""

import string
import sys
from collections.abc import Iterator

from compdiff_jax import cli
from compdiff_jax.data.records import RecordSet
from compdiff_jax.data.tokenizer import CONTEXT_LENGTH, train_tokenizer

# So often each attribute word counts, so that it becomes few tokens although the texts avoid it.
_ATTRIBUTE_WEIGHT = 10


def training_texts(records: RecordSet) -> Iterator[str]:
  """The texts of the training split, then the attribute words and digits."""
  source = records.split("train")
  for index in range(len(source)):
    yield source[index]["text"]
  for attribute in records.schema:
    words = " ".join([attribute.name, attribute.unit, *(attribute.values or attribute.level_names)])
    yield " ".join([words] * _ATTRIBUTE_WEIGHT)
  yield " ".join([*string.digits] * _ATTRIBUTE_WEIGHT)


def main(argv: list[str]) -> None:
  parser = cli.parser("python -m data_prep.vocabulary", "Trains a small vocabulary in CLIP format.")
  parser.add_argument("--data", required=True, help="data set directory")
  parser.add_argument("--out", required=True, help="tokenizer directory to make; new or empty")
  parser.add_argument("--size", type=int, default=1000, help="largest number of tokens")
  parser.add_argument("--length", type=int, default=CONTEXT_LENGTH, help="tokens a text is cut and padded to")
  args = parser.parse_args(argv)
  records = RecordSet(args.data)
  with cli.whole_directory(args.out) as directory:
    tokenizer = train_tokenizer(training_texts(records), directory, args.size, args.length)
  print(f"{args.out}: {tokenizer.vocab_size} tokens from {records.splits['train']} texts")


if __name__ == "__main__":
  sys.exit(cli.run(main, "python -m data_prep.vocabulary"))
