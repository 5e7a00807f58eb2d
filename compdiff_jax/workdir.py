"""A run's directory: config and schema as files, so that sampling and export need nothing but the directory.

config.json      the resolved config        schema.json   the attributes
frozen.json      content hashes of the frozen networks
metrics.jsonl    one row a report           checkpoints/<step>/
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from compdiff_jax import sharding
from compdiff_jax.checkpoint import Checkpoints, has_checkpoint
from compdiff_jax.cli import InputError, writing
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.config import differences, to_plain
from compdiff_jax.data.tokenizer import Tokenizer, load_tokenizer
from compdiff_jax.latent_diffusion import LatentDiffusion

# These keys say how a run reports, not what it computes; they may change when it is resumed.
_REPORTING = ("logging.", "sample.")


def content_hash(params: Mapping[str, Any]) -> str:
  """SHA-256 over names, dtypes, shapes and bytes of a flat parameter dict."""
  digest = hashlib.sha256()
  for name in sorted(params):
    array = np.asarray(params[name])
    digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def claim(workdir: Path, config: ml_collections.ConfigDict, schema: Schema, frozen_hashes: Mapping[str, str]) -> None:
  """Makes `workdir` this run's, or checks that it already is: another config, schema or frozen network is refused."""
  wanted = {
    "config": to_plain(config),
    "schema": json.loads(json.dumps(schema.to_json())),
    "frozen": dict(frozen_hashes),
  }
  if (workdir / "config.json").exists():
    found = {name: _read_json(workdir / f"{name}.json") for name in wanted}
    changed = [
      difference
      for difference in differences(found, wanted)
      if not difference.startswith(tuple(f"config.{key}" for key in _REPORTING))
    ]
    if changed:
      raise InputError(
        f"{workdir} belongs to another run ({'; '.join(changed[:4])}{' …' if len(changed) > 4 else ''}); use another"
        " --workdir or the values it was started with"
      )
  elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise InputError(f"{workdir} is not an empty directory and holds no run (no config.json); use another --workdir")
  with writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    for name in ("schema", "frozen", "config"):  # config last: it marks the directory as complete
      temporary = workdir / f".{name}.json"
      temporary.write_text(json.dumps(wanted[name], indent=2) + "\n")
      temporary.replace(workdir / f"{name}.json")


def _read_json(path: Path) -> Any:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise InputError(f"{path} is missing; is {path.parent} the --workdir of a training run?") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise InputError(f"{path} is damaged ({error}); restore it or train in a new --workdir") from None


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained run, opened for sampling or export."""

  workdir: Path
  config: ml_collections.ConfigDict
  model: LatentDiffusion
  tokenizer: Tokenizer

  def load_params(self, weights: str, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """(step, all parameters), the trained ones from the checkpoint: `weights` is "ema" or "raw"."""
    frozen = self.model.load_frozen(self.config.weights)
    hashes = {name: content_hash(params) for name, params in frozen.items()}
    for name, expected in _read_json(self.workdir / "frozen.json").items():
      if hashes.get(name) != expected:
        raise InputError(
          f"{self.config.weights[name]} is not the {name} that {self.workdir} was trained with (content hash differs)"
        )
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)),
      {name: self.model.component(name).shapes for name in self.model.trained},
    )
    part = {"ema": "ema", "raw": "params"}[weights]
    with Checkpoints(self.workdir / "checkpoints") as checkpoints:
      step, parts = checkpoints.restore({part: abstract}, step)
    return step, {**jax.device_put(frozen, sharding.replicated(mesh)), **parts[part]}


def open_run(workdir: str | Path) -> Run:
  """Opens a directory that `compdiff train` wrote."""
  workdir = Path(workdir)
  config = ml_collections.ConfigDict(_read_json(workdir / "config.json"))
  schema = Schema.load(workdir / "schema.json")
  if not has_checkpoint(workdir / "checkpoints"):
    raise InputError(f"{workdir} holds no complete checkpoint yet; run compdiff train first")
  return Run(workdir, config, LatentDiffusion.from_config(config, schema), load_tokenizer(config.weights.tokenizer))
