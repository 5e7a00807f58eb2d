"""How a study runs: every method and seed with one budget, on the same records in the same order.

A study is a directory: `data` (with held-out cells), `reference` (real images to compare with, where they are not the
test split of `data`), and what all methods share: `tokenizer`, `plan.csv`, `vae`, and `moments-N`, the data encoded
once with N attributes in the prompt. Then come `runs/METHOD-SEED`.
"""

import argparse
import dataclasses
import itertools
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import study_loss, study_measure, study_report
from compdiff_jax import cli, methods, plan, sample, train, train_vae
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.data.tokenizer import CONTEXT_LENGTH
from data_prep import encode_latents, vocabulary
from launch.chain import _XLA_FLAGS

# The networks of every study, beside configs/phantom_*.py: attention is at the lower of two resolutions.
WIDTHS = (32, 64)
_GPU_WORKERS = 4
# What one method alone has; docs/study.md says why, and what else was tried.
_OWN = {
  "compdiff": {
    "conditioner.film_channels": (32, 64, 64, 64, 64, 64, 32, 32),
    "conditioner.film_hidden": 64,
    "conditioner.use_uncertainty": False,
    "loss.auxiliary": 0.2,
    "loss.composition": 2.0,
  },
  "coind": {"dropout.attribute": 0.1, "dropout.all_attributes": 0.1},  # its loss compares with the learned nulls
}


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a run may cost; the same for all methods.

  Attributes:
    vae_steps, vae_batch_size: of the shared autoencoder.
    steps, batch_size, learning_rate: of every run.
    seeds: training seeds; 42 was that of tuning.
    sample_steps, guidance: of DDPM sampling.
    min_n: as for `compdiff evaluate`.
  """

  vae_steps: int
  vae_batch_size: int
  steps: int
  batch_size: int
  learning_rate: float
  seeds: tuple[int, ...] = (43, 44, 45)
  sample_steps: int = 25
  guidance: float = 1.0
  min_n: int = 20


@dataclasses.dataclass(frozen=True)
class Study:
  """One study.

  Attributes:
    out: its directory.
    attributes: of the data, the one first that HCN v1 leaves in the prompt.
    networks: config keys of the networks that differ from configs/phantom_*.py, for all methods.
    budget: of every run.
    text_length: tokens of a prompt, enough for the longest.
  """

  out: Path
  attributes: tuple[str, ...]
  networks: Mapping[str, Any]
  budget: Budget
  text_length: int = CONTEXT_LENGTH

  @property
  def reference(self) -> Path:
    """The data set whose test split is compared with."""
    own = self.out / "reference"
    return own if own.exists() else self.out / "data"


# ---- The command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--out", type=Path, required=True, help="directory of the study; the same command goes on in it")
  parser.add_argument("--methods", default=",".join(methods.CONDITIONERS), help="which methods")
  parser.add_argument("--seeds", type=_numbers, help="training seeds, e.g. 42,43")
  parser.add_argument("--steps", type=_positive, help="training steps of every run")
  parser.add_argument("--workers", type=_positive, help="runs at a time; default: one a core on a CPU, four on a GPU")
  parser.add_argument("--job", help=argparse.SUPPRESS)  # METHOD:SEED, in a process of its own
  parser.add_argument("--core", type=int, help=argparse.SUPPRESS)  # the one core of that process


def _numbers(text: str) -> tuple[int, ...]:
  parts = text.split(",")
  if not all(part.isdecimal() for part in parts):
    raise argparse.ArgumentTypeError(f"{text!r} is not numbers as 42,43")
  return tuple(map(int, parts))


def _positive(text: str) -> int:
  if not (text.isdecimal() and int(text)):
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
  return int(text)


def chosen_methods(args: argparse.Namespace) -> list[str]:
  """The methods of --methods."""
  names = [name.strip() for name in args.methods.split(",")]
  for name in names:
    if name not in methods.CONDITIONERS:
      raise cli.InputError(f"--methods: there is no {name!r}{cli.nearest(name, methods.CONDITIONERS)}")
  return names


def chosen_budget(args: argparse.Namespace, budget: Budget) -> Budget:
  """`budget` with what --steps and --seeds change."""
  if args.steps:
    budget = dataclasses.replace(budget, steps=args.steps)
  if args.seeds:
    budget = dataclasses.replace(budget, seeds=args.seeds)
  return budget


def run(study: Study, module: str, argv: Sequence[str], args: argparse.Namespace, *, on_cpu: bool, title: str) -> None:
  """Everything after the data: what the methods share, all runs, measures, tables and pictures.

  Args:
    study: its `data`, and `reference` where it has one, exist.
    module, argv: the command that each run is a process of.
    args: of `add_arguments`.
    on_cpu: runs have a core each.
    title: heading of the tables.
  """
  start = time.monotonic()
  names = chosen_methods(args)
  workers = args.workers or (len(os.sched_getaffinity(0)) if on_cpu else _GPU_WORKERS)
  if not on_cpu:  # each process takes a share of the device's memory when it starts, this one too
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / (workers + 1):.2f}"
  _check_same_study(study)
  _prepare(study, names)
  _run_jobs(study, module, argv, names, workers, on_cpu)
  results = study_measure.measure_all(study.out, study.reference, names, study.budget.seeds, study.budget.min_n)
  study_report.write(study.out, results, names, study.budget, title, time.monotonic() - start)
  print((study.out / "tables.md").read_text())


def _check_same_study(study: Study) -> None:
  """Raises an `InputError` where --out has runs of another budget: they would be reported under this one."""
  own = dataclasses.asdict(study.budget) | {"networks": study.networks, "text_length": study.text_length}
  del own["seeds"]  # there may be more of them later
  own = json.loads(json.dumps(own))
  path = study.out / "study.json"
  if not path.exists():
    cli.write_whole(path, json.dumps(own, indent=1))
  found = json.loads(path.read_text())
  for name, value in own.items():
    if found.get(name) != value:
      raise cli.InputError(f"{path} has {name} {found.get(name)} and not {value}; go on with that or take a new --out")


def _prepare(study: Study, names: Sequence[str]) -> None:
  """Vocabulary, plan, autoencoder and moments, each once. An empty directory is what a kill leaves."""
  out = study.out
  if not (out / "tokenizer" / "vocab.json").exists():
    options = ["--out", str(out / "tokenizer"), "--length", str(study.text_length)]
    vocabulary.main(["--data", str(out / "data"), *options])
  if not (out / "plan.csv").exists():
    plan.main([f"--data={study.reference}", "--like=test", f"--out={out / 'plan.csv'}"])
  if not (out / "vae" / "config.json").exists():
    budget = study.budget
    settings = {"vae_training.steps": budget.vae_steps, "vae_training.batch_size": budget.vae_batch_size}
    train_vae.main([*config_arguments(study, "baseline", settings, images=True), f"--out={out / 'vae'}"])
  for prompt in sorted({methods.method(name, study.attributes).prompt_attributes for name in names}):
    moments = _moments(study, prompt)
    if not (moments / "dataset_info.json").exists():
      options = [f"--prompt_attributes={','.join(prompt)}", "--batch_size=64"]
      encode_latents.main([f"--data={out / 'data'}", f"--weights={out}", f"--out={moments}", *options])


def _moments(study: Study, prompt: Sequence[str]) -> Path:
  return study.out / f"moments-{len(prompt)}"


# ---- One method and seed


def run_job(study: Study, args: argparse.Namespace) -> None:
  """Trains and samples the method and seed of --job, both from where they stopped, and takes the losses."""
  if args.core is not None:
    os.sched_setaffinity(0, {args.core})  # before JAX starts its threads
  method, seed = args.job.split(":")
  directory = study.out / "runs" / f"{method}-{seed}"
  if not _trained(directory / "run", study.budget.steps):
    settings = run_settings(int(seed), study.budget)
    train.main([*config_arguments(study, method, settings), f"--workdir={directory / 'run'}"])
    if not _trained(directory / "run", study.budget.steps):
      raise cli.RunError(f"{args.job}: training was stopped; the same command goes on")
  plan_file = study.out / "plan.csv"
  sample.main([f"--workdir={directory / 'run'}", f"--plan={plan_file}", f"--out={directory / 'samples'}"])
  np.save(directory / study_measure.LOSSES, study_loss.losses(directory / "run", plan_file, study.reference))


def run_settings(seed: int, budget: Budget) -> dict[str, Any]:
  """What the study sets in the config of every method."""
  return {
    "seed": seed,
    "train.steps": budget.steps,
    "train.batch_size": budget.batch_size,
    "train.learning_rate": budget.learning_rate,
    "train.warmup_steps": budget.steps // 10,
    "train.ema_decay": 0.995,
    "logging.log_every": 100,
    "logging.checkpoint_every": 400,
    "logging.keep_checkpoints": 1,
    "logging.sample_every": budget.steps * 2,
    "sample.num_steps": budget.sample_steps,
    "sample.guidance": budget.guidance,
    "sample.batch_size": 64,
  }


def _trained(workdir: Path, steps: int) -> bool:
  if not (workdir / "checkpoints").is_dir():
    return False
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    return steps in checkpoints.steps


def config_arguments(study: Study, method: str, settings: Mapping[str, Any], *, images: bool = False) -> list[str]:
  """The arguments of a command: the method's config, and what the study sets; `images`: not the moments."""
  out, like = study.out, methods.method(method, study.attributes)
  roles = {"prompt_attributes": like.prompt_attributes}
  if like.conditioner.kind != "none":
    roles["conditioner.attributes"] = like.conditioner.attributes
  data = out / "data" if images else _moments(study, like.prompt_attributes)
  paths = {"data.path": data, "weights.vae": out / "vae", "weights.tokenizer": out / "tokenizer"}
  # Samples are drawn without guidance, so no method needs an unconditional branch, and none is trained with dropout.
  dropout = dict.fromkeys(("dropout.text", "dropout.attribute", "dropout.all_attributes"), 0.0)
  if "dropout" in like.conditioner:
    dropout["conditioner.dropout"] = 0.0
  text = {"text_encoder.num_hidden_layers": 1, "text_encoder.max_position_embeddings": study.text_length}
  networks = {"unet.block_out_channels": WIDTHS, **text, **study.networks}
  overrides = {**networks, **roles, **paths, **dropout, **settings, **_OWN.get(method, {})}
  return [f"--config=configs/phantom_{method}.py", *(f"--config.{key}={value}" for key, value in overrides.items())]


# ---- All of them


def _run_jobs(study: Study, module: str, argv: Sequence[str], names: Sequence[str], workers: int, on_cpu: bool) -> None:
  """Every method and seed in a process of its own, some at a time.

  Small networks gain little from a second core, so on a CPU each run has one core and several run at once. On a GPU
  they take turns: one computes while others start and compile.
  """
  own_cores = sorted(os.sched_getaffinity(0))
  cores: queue.Queue[int] = queue.Queue()
  for core in itertools.islice(itertools.cycle(own_cores), workers):
    cores.put(core)
  runs = study.out / "runs"
  runs.mkdir(exist_ok=True)
  settings = {"XLA_FLAGS": _XLA_FLAGS, "JAX_COMPILATION_CACHE_DIR": str(study.out / "compile_cache")}
  settings |= {"JAX_PLATFORMS": "cpu"} if on_cpu else {}

  def run_one(job: str) -> tuple[str, int, float]:
    start, core = time.monotonic(), cores.get()
    command = [sys.executable, "-m", module, *argv, f"--job={job}"]
    if on_cpu and workers > 1:
      command.append(f"--core={core}")
    with (runs / f"{job.replace(':', '-')}.log").open("a") as file:
      status = subprocess.run(command, env=settings | os.environ, stdout=file, stderr=file, check=False).returncode
    cores.put(core)
    return job, status, time.monotonic() - start

  # A seed at a time, so that a study that is stopped early has every method.
  jobs = [f"{name}:{seed}" for seed in study.budget.seeds for name in names]
  jobs = [job for job in jobs if not study_measure.finished(runs / job.replace(":", "-"))]
  failed = []
  with ThreadPoolExecutor(workers) as pool:
    for number, (job, status, seconds) in enumerate(pool.map(run_one, jobs), start=1):
      print(
        f"run {number}/{len(jobs)} {job}: {'ok' if not status else f'status {status}'}, {seconds:.0f} s", flush=True
      )
      failed += [job] * bool(status)
  if failed:
    log = runs / f"{failed[0].replace(':', '-')}.log"
    raise cli.RunError(f"{len(failed)} runs failed ({', '.join(failed)}); see {log}")
