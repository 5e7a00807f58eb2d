"""Several processes on this machine, as several hosts would run: for trying things out, and one process for each GPU.

python -m launch.local --num_processes=2 -- compdiff train --config=configs/demo.py --workdir=build/run

Each process shows its lines on stderr and stdout with its number in front. SIGTERM and Ctrl-C reach all of them, and a
training run then writes a checkpoint; when one fails, the others end. The same command resumes.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import IO

_GRACE_SECONDS = 60  # for processes whose peer failed to notice it and say so


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--num_processes", type=int, required=True, help="how many")
  parser.add_argument(
    "--gpus", action="store_true", help="process i sees the i-th GPU alone; else all see every device"
  )
  parser.add_argument("command", nargs="+", help="compdiff VERB …, after a --")
  args = parser.parse_args()
  if args.num_processes < 1 or args.command[0] != "compdiff":
    parser.error("give --num_processes of at least 1 and a command that begins with compdiff")

  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  gpus = visible.split(",") if visible else [str(index) for index in range(args.num_processes)]
  if args.gpus and len(gpus) < args.num_processes:
    parser.error(f"--num_processes {args.num_processes} is more than CUDA_VISIBLE_DEVICES={visible} names")

  with socket.socket() as probe:  # a free port for the coordinator
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  processes = []
  for index in range(args.num_processes):
    gpu = {"CUDA_VISIBLE_DEVICES": gpus[index]} if args.gpus else {}
    places = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={args.num_processes}", f"--process_id={index}"]
    processes.append(
      subprocess.Popen(
        [sys.executable, "-u", "-m", "compdiff_jax", *args.command[1:], *places],
        env={**os.environ, **gpu},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C is passed on below, once
      )
    )
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: [process.terminate() for process in processes])
  pumps = [
    threading.Thread(target=_show, args=(index, source, target))
    for index, process in enumerate(processes)
    for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
  ]
  for pump in pumps:
    pump.start()
  status = _wait(processes)
  for pump in pumps:
    pump.join()
  return status


def _wait(processes: list[subprocess.Popen]) -> int:
  """The first failure's status, or 0. After a failure the rest get a while to end by themselves."""
  status, waiting = 0, list(processes)
  while waiting:
    for process in list(waiting):
      with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(timeout=_GRACE_SECONDS if status else 0.1)
        waiting.remove(process)
        status = status or (128 - code if code < 0 else code)
        continue
      if status:
        process.kill()
  return status


def _show(index: int, source: IO[str], target: IO[str]) -> None:
  for line in source:
    target.write(f"[{index}] {line}")
    target.flush()


if __name__ == "__main__":
  sys.exit(main())
