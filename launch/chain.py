"""Runs documented commands one after the other, showing each and its wall time; the first failure stops."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

# XLA hands CPU convolutions to a library whose training steps are 1.4 to 1.7 times slower than XLA's own (2 cores, jax
# 0.10.2); naming only reductions leaves it those. An XLA_FLAGS of the user's replaces this one.
_XLA_FLAGS = "--xla_cpu_experimental_ynn_fusion_type=reduce"


def step(name: str, command: Sequence[str]) -> float:
  """Runs `command` ("compdiff …" or "python -m …") with this interpreter; returns seconds. Exits on failure."""
  words = [str(word) for word in command]
  print(f"\n== {name}\n$ {' '.join(words)}", flush=True)
  if words[0] == "compdiff":
    words = [sys.executable, "-m", "compdiff_jax", *words[1:]]
  elif words[0] == "python":
    words[0] = sys.executable
  start = time.monotonic()
  status = subprocess.run(words, env={"XLA_FLAGS": _XLA_FLAGS, **os.environ}, check=False).returncode
  seconds = time.monotonic() - start
  if status:
    print(f"stopped: {name} ended with status {status}", file=sys.stderr)
    sys.exit(status)
  print(f"-- {name}: {seconds:.0f} s", flush=True)
  return seconds
