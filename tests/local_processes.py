"""Processes of this machine that train or compute together, each with one CPU device, joined by Gloo."""

import contextlib
import json
import os
import socket
import time

from conftest import FAST_COMPILE, PATIENCE, REPOSITORY

# Processes that lost one end within a minute (launch/README.md); the rest is for a slow machine.
LOSS_SECONDS = 60 + 120


def environment(devices=1):
  flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}"
  return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}


def end(process, seconds=PATIENCE):
  out, _ = process.communicate(timeout=seconds)
  return process.returncode, out


def wait(condition, processes, seconds=PATIENCE):
  deadline = time.monotonic() + seconds
  while not condition():
    for process in processes:
      assert process.poll() is None, process.stdout.read()
    assert time.monotonic() < deadline
    time.sleep(0.01)


def heartbeat(workdir, process):
  with contextlib.suppress(FileNotFoundError):
    return json.loads((workdir / "heartbeat" / f"{process}.json").read_text())


def places(count):
  """The options of each of `count` processes that find each other."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  return [[f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"] for i in range(count)]
