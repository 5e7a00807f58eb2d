"""What a builder gives to `write_dataset`: cheap rows, and one pure function that turns a row's image into bytes.

A builder yields its rows one after the other, always in the same order, without opening an image. A row is a dict:

  image        what `encode` needs to make the image: a path, an index, ...; small and picklable
  patient      original patient id; only its salted hash is stored
  text         findings only, no demographics
  attributes   encoded values {name: index or number}
  findings     {finding: "positive" | "negative" | "uncertain"}
  factors      whatever a phantom drew; {} for real images
  file, row    where it came from, for rejected.csv: a path relative to the source, and a line number
  key          optional: public name of the record. Without it the name is a salted hash of `file`
  splits       optional: the splits that the row may go to, such as ("train",) or ("train", "val"); default all
  attribution  optional: columns of attribution.csv

A row that cannot be used is {"file", "row", "reason"} with reason "<kind>: <detail>".

`encode(row["image"])` returns the encoded image or raises `RowError`. It must be picklable and a function of its
argument alone: it runs in other processes, in any order. Its `repr` must name its options (a frozen dataclass does), so
that a killed run can be told from another one. Where it reads files, its method `files(row["image"])` gives their
possible paths, of which the first that exists counts: the run that goes on makes anew what was replaced or mended.
"""


class RowError(Exception):
  """Why one row cannot be used: "<kind>: <detail>"; the card counts the kinds."""
