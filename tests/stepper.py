"""A stand-in for `compdiff train`: half a second to start, then a step every few milliseconds until SIGTERM; the same
command goes on."""

import argparse
import json
import os
import signal
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--workdir", type=Path)
parser.add_argument("--config.logging.log_every", type=int, dest="every")
args, _ = parser.parse_known_args()
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
args.workdir.mkdir(parents=True, exist_ok=True)
path = args.workdir / "metrics.jsonl"
step = json.loads(path.read_text().splitlines()[-1])["step"] if path.exists() else 0
Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).mkdir(exist_ok=True)
time.sleep(0.5)
while not stopped:
  step += 1
  if step % args.every == 0:
    row = {"step": step, "images_per_second": 10.0 * args.every, "data_wait_share": 0.01}
    path.open("a").write(json.dumps(row) + "\n")
  time.sleep(0.005)
