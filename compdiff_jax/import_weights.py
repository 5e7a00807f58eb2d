"""`compdiff import`: a diffusers directory, a checkpoint or release of the reference, or our own export as a run.

The result needs nothing but itself: the UNet and the conditioner are in its checkpoint, the frozen networks and the
tokenizer are copied. `compdiff sample` and `compdiff export` take it as their --workdir; training starts from it with
`--config.init=WORKDIR`.
"""

import contextlib
import logging
import math
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from compdiff_jax import cli, default_config
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.data.tokenizer import load_tokenizer
from compdiff_jax.diffusion.samplers import Sampler
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.interop import weights
from compdiff_jax.interop.schedulers import from_diffusers
from compdiff_jax.interop.sources import Source, open_source
from compdiff_jax.latent_diffusion import LatentDiffusion
from compdiff_jax.models.functional import Functional
from compdiff_jax.sampling.sampler import sampler_to_config
from compdiff_jax.workdir import SOURCE_FILE, WORKDIR, content_hash, description, located, write_json

# The networks that are copied as they are. Whether training changes the text encoder is for its config to say.
_FROZEN = {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}

_SECONDS_TO_REMOVE = 10.0

# The sections of a config that say how to train, which an imported model cannot tell.
_TRAINING = (
  *("seed", "init", "loss", "fairness", "dropout", "train", "vae_training"),
  *("mesh", "sharding_rules", "logging"),
)


def main(argv: list[str]) -> None:
  parser = cli.parser("compdiff import", __doc__.splitlines()[0])
  parser.add_argument("--source", type=Path, required=True, help="directory of the model")
  parser.add_argument("--workdir", type=Path, required=True, help="new directory for the run")
  parser.add_argument("--base", type=Path, help="diffusers directory that a training checkpoint was trained from")
  parser.add_argument("--schema", type=Path, help="schema.json of the attributes, where the model does not say them")
  parser.add_argument("--allow_pickle", action="store_true", help="also read .bin files, as tensors only; needs torch")
  args = parser.parse_args(argv)

  # ---- Everything that can be wrong is found before a tensor is read
  source = open_source(
    args.source,
    base=args.base,
    schema=Schema.load(args.schema) if args.schema else None,
    allow_pickle=args.allow_pickle,
  )
  schedule, sampler = from_diffusers(source.scheduler, str(source.scheduler_file))
  tokenizer = load_tokenizer(source.tokenizer)
  if tokenizer.vocab_size > source.text_config.vocab_size:
    raise InputError(
      f"{source.tokenizer} has {tokenizer.vocab_size} tokens and the text encoder {source.text_config.vocab_size}; give"
      " the tokenizer of this model"
    )
  config = _config(source, schedule, sampler)
  with cli.whole_directory(args.workdir) as directory, cli.writing(args.workdir):
    network_configs = {"vae": source.vae_config.to_dict(), "text_encoder": source.text_config.to_dict()}
    for name, class_name in _FROZEN.items():
      (directory / name).mkdir()
      weights.write_config(directory / name, network_configs[name], class_name)
    model = LatentDiffusion.from_config(located(config, directory), source.schema)
    for name, files in source.weights.items():
      weights.check(files, model.component(name))
    cli.check_space(args.workdir, sum(4 * _size(model.component(name)) for name in source.weights))

    # ---- One network after the other; only those in the checkpoint stay in memory
    hashes = {}
    for name, class_name in _FROZEN.items():
      params = _load(source, name, model.component(name))
      weights.write_component(directory / name, network_configs[name], params, class_name)
      hashes[name] = content_hash(params)
      del params
    shutil.copytree(source.tokenizer, directory / "tokenizer")
    params = {name: _load(source, name, model.component(name)) for name in model.trained}
    _save(directory / "checkpoints", source.step, params, args.workdir)
    write_json(directory, {Path(SOURCE_FILE).stem: _provenance(source, args.source)})
    write_json(directory, description(config, source.schema, hashes))
  step = f" of step {source.step}" if source.step else ""
  if source.left_out:
    print(f"not imported: {', '.join(source.left_out)}", file=sys.stderr)
  print(f"{source.kind}{step} in {args.workdir}; conditioner: {source.conditioner_config.kind}")


def _config(source: Source, schedule: NoiseSchedule, sampler: Sampler) -> ml_collections.ConfigDict:
  """The config of the run: the sections that sampling, export and a later training read."""
  side = source.unet_config.sample_size
  if not isinstance(side, int):
    raise InputError(
      f"{source.weights['unet'].source.parent}: field sample_size of the UNet's config.json is {side!r}; set it to the"
      " side of its latents, such as 64"
    )
  config = default_config.base(source.conditioner_config.kind)
  config = ml_collections.ConfigDict({name: config[name] for name in config if name not in _TRAINING})
  config.data.image_size = side * source.vae_config.downsampling
  config.prompt_attributes = source.prompt_attributes
  config.weights.update({name: f"{WORKDIR}/{name}" for name in (*_FROZEN, "tokenizer")})
  config.unet = ml_collections.ConfigDict(source.unet_config.to_dict())
  config.scheduler = ml_collections.ConfigDict(schedule.to_dict())
  config.sample.update(sampler_to_config(sampler))
  config.conditioner = ml_collections.ConfigDict(source.conditioner_config.to_dict())
  return config


def _size(network: Functional) -> int:
  return sum(math.prod(leaf.shape) for leaf in network.shapes.values())


def _load(source: Source, name: str, network: Functional) -> dict[str, jax.Array]:
  print(f"  {name:<14}{_size(network):>13,} parameters  {source.weights[name].source.name}", file=sys.stderr)
  return weights.load(source.weights[name], network)


def _save(directory: Path, step: int, params: Mapping[str, Any], workdir: Path) -> None:
  with _silent_if_it_fails():
    try:
      with Checkpoints(directory) as checkpoints:
        checkpoints.save(step, {"params": params})
    except Exception as error:  # a full disk reaches us as whatever the storage library makes of it
      _remove(directory)
      reason = " ".join(str(error).split())[:300]
      raise InputError(f"cannot write the checkpoint of {workdir} ({type(error).__name__}: {reason})") from None


def _remove(directory: Path) -> None:
  """Deletes until it stays away: threads of the storage library may go on writing after its error reached us."""
  away, deadline = 0, time.monotonic() + _SECONDS_TO_REMOVE
  while away < 3 and time.monotonic() < deadline:
    shutil.rmtree(directory, ignore_errors=True)
    away = 0 if directory.exists() else away + 1
    time.sleep(0.1)


@contextlib.contextmanager
def _silent_if_it_fails():
  """Keeps the storage library from printing a traceback for each array, when the error that it raises says it all.

  After a failure, which ends the command, it stays so: threads and tasks complain until the process is gone.
  """
  hooks, loggers = (threading.excepthook, sys.unraisablehook), [logging.getLogger(name) for name in ("asyncio", "absl")]
  threading.excepthook = sys.unraisablehook = lambda _: None
  for logger in loggers:
    logger.disabled = True
  yield
  threading.excepthook, sys.unraisablehook = hooks
  for logger in loggers:
    logger.disabled = False


def _provenance(source: Source, given: Path) -> dict[str, Any]:
  """Where the model came from, for the model card of an export and for whoever finds the directory."""
  return {
    "kind": source.kind,
    "name": given.absolute().name,
    "step": source.step,
    "files": {name: [path.name for path in files.files] for name, files in source.weights.items()},
  }
