"""A side of a benchmark that sleeps, in a module that loads fast in its process."""

import argparse
import time

from benchmarks.turns import Calls


def sleeper(options: argparse.Namespace, factor: float) -> Calls:
  return {"sleep": lambda: time.sleep(factor * options.seconds)}
