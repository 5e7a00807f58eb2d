"""Which records a step reads: a pure function of (seed, step), whatever the number of hosts.

Several groups of records, each endlessly repeated and shuffled anew every epoch, are interleaved in fixed proportions.
A group is a data set, or one cell of a data set that is sampled in balance.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from compdiff_jax.conditioning.schema import Schema

# Slots in which groups take turns; the weight of a group is exact to one slot.
_CYCLE = 100_000


class Group(NamedTuple):
  """Record numbers, and how often one of them is drawn relative to the other groups."""

  numbers: np.ndarray
  weight: float


def balanced_groups(columns: Mapping[str, np.ndarray], schema: Schema, names: Sequence[str], tau: float) -> list[Group]:
  """One group for each cell of the named attributes; the weight of a record in a cell of n records is n^-tau.

  So a cell is drawn in proportion to n^(1 - tau): 0 leaves the data as they are, 1 draws all cells equally often.
  Unknown is a level of its own. The weights add up to 1.
  """
  levels = np.stack([schema[name].levels(columns[name]) for name in names], axis=1)
  _, cell, counts = np.unique(levels, axis=0, return_inverse=True, return_counts=True)
  share = counts ** (1.0 - tau)
  share /= share.sum()
  return [Group(np.flatnonzero(cell.ravel() == i), float(weight)) for i, weight in enumerate(share)]


class RecordOrder:
  """An endless sequence of record numbers, by position; each group has its share in every stretch of it.

  Epoch e of a group is a permutation drawn from (seed, group, e) alone. (Grain's own shuffle finds a permuted index
  without a table; in a cell of a few records that takes it milliseconds.)
  """

  def __init__(self, groups: Sequence[Group], seed: int):
    self._seed = seed
    self._numbers = [group.numbers for group in groups]
    weights = np.array([group.weight for group in groups], np.float64)
    # A cycle of slots is dealt out evenly in proportion to the weights; one group needs no more than one slot.
    counts = np.maximum(1, np.round(weights / weights.sum() * (_CYCLE if len(groups) > 1 else 1))).astype(np.int64)
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    slots = np.argsort(times, kind="stable")
    self._slot_group = np.repeat(np.arange(len(groups)), counts)[slots]
    self._slot_turn = np.concatenate([np.arange(count) for count in counts])[slots]
    self._counts = counts
    self._permutations: list[dict[int, np.ndarray]] = [{} for _ in groups]

  def __call__(self, positions: np.ndarray) -> np.ndarray:
    """The record numbers at some positions, int64 [N] -> int64 [N]."""
    cycle, slot = np.divmod(positions, len(self._slot_group))
    group = self._slot_group[slot]
    turn = cycle * self._counts[group] + self._slot_turn[slot]
    numbers = np.empty(len(positions), np.int64)
    for index in np.unique(group):
      own = self._numbers[index]
      epoch, place = np.divmod(turn[group == index], len(own))
      permuted = np.empty(len(place), np.int64)
      for e in np.unique(epoch):
        permuted[epoch == e] = self._permutation(int(index), int(e))[place[epoch == e]]
      numbers[group == index] = own[permuted]
    return numbers

  def _permutation(self, group: int, epoch: int) -> np.ndarray:
    kept = self._permutations[group]
    if epoch not in kept:
      if len(kept) == 2:  # a batch spans two epochs, unless the group is tiny
        del kept[min(kept)]
      kept[epoch] = np.random.default_rng([self._seed, group, epoch]).permutation(len(self._numbers[group]))
    return kept[epoch]


class BatchNumbers:
  """A Grain source whose element k names the records that this host reads for step `first_step + k`.

  Row i of the global batch of step s is the record at position s * batch_size + i. So a run continues at any step by
  arithmetic, and on another number of hosts, which then read other rows of the same batches.
  """

  def __init__(self, order: RecordOrder, batch_size: int, rows: Sequence[int], first_step: int):
    self._order = order
    self._batch_size = batch_size
    self._rows = np.asarray(rows, np.int64)
    self._first_step = first_step

  def __len__(self) -> int:
    return np.iinfo(np.int64).max // self._batch_size - self._first_step - 1

  def __getitem__(self, index: int) -> np.ndarray:
    return self._order((self._first_step + int(index)) * self._batch_size + self._rows)
