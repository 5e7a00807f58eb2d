"""A run's directory: config and schema as files, so that sampling and export need nothing but the directory.

config.json      the resolved config        schema.json   the attributes
frozen.json      content hashes of the frozen networks
data.json        what the training data are, wherever they lie
metrics.jsonl    one row a report           checkpoints/<step>/
heartbeat/       one small file a process: step, state, time
nonfinite.json   the batch whose loss was not finite
profile/         traces of the steps of --profile; with several processes one directory each

An imported model (`compdiff import`) has no metrics but its frozen networks and tokenizer in directories of their own,
and source.json, which says where it came from.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from compdiff_jax import default_config, sharding
from compdiff_jax.checkpoint import Checkpoints, has_checkpoint
from compdiff_jax.cli import InputError, write_whole, writing
from compdiff_jax.conditioning.family import CONFIGS
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.config import differences, to_plain
from compdiff_jax.data.tokenizer import Tokenizer, load_tokenizer
from compdiff_jax.latent_diffusion import LatentDiffusion

# Stands for the run's own directory in the paths of `config.weights`, so that an imported model can be moved.
WORKDIR = "{workdir}"
SOURCE_FILE = "source.json"

# Sections without which a config.json is not that of a run.
_SECTIONS = ("data", "weights", "scheduler", "conditioner", "sample")

# These keys say how a run reads and reports, where its inputs lie (which are known by their content), what hardware it
# runs on and how its autoencoder was trained, not what it computes; they may change when it is resumed.
_FREE = (
  *("logging.", "sample.", "data.path", "data.threads", "data.workers", "weights.", "vae_training."),
  *("mesh.", "sharding_rules", "remat", "attention", "train.accumulation"),
)


def content_hash(params: Mapping[str, Any]) -> str:
  """SHA-256 over names, dtypes, shapes and bytes of a flat parameter dict."""
  digest = hashlib.sha256()
  for name in sorted(params):
    array = np.asarray(params[name])
    digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def claim(
  workdir: Path,
  config: ml_collections.ConfigDict,
  schema: Schema,
  frozen_hashes: Mapping[str, str],
  data: Any,
  *,
  accept_changes: bool = False,
  write: bool = True,
) -> None:
  """Makes `workdir` this run's, or checks that it already is.

  Args:
    workdir: the run's directory, new or to be resumed.
    config, schema, frozen_hashes, data: what must be the same when the run is resumed; the difference is named.
    accept_changes: report differences instead of refusing them.
    write: False only checks, after another process has written.
  """
  wanted = description(config, schema, frozen_hashes) | {"data": data}
  if (workdir / SOURCE_FILE).exists():
    raise InputError(
      f"{workdir} holds an imported model, which has no training to resume; train in a new --workdir with"
      f" --config.init={workdir}"
    )
  if (workdir / "config.json").exists():
    found = {name: _read_json(workdir / f"{name}.json") for name in wanted}
    found["config"] = _completed(found["config"], workdir)
    changed = [
      difference
      for difference in differences(_without_mixed_paths(found), _without_mixed_paths(wanted))
      if not difference.startswith(tuple(f"config.{key}" for key in _FREE))
    ]
    summary = f"{'; '.join(changed[:4])}{' …' if len(changed) > 4 else ''}"
    if changed and not accept_changes:
      raise InputError(
        f"{workdir} belongs to another run ({summary}); use another --workdir, the values it was started with, or"
        " --accept_changes to go on with these"
      )
    if changed and write:
      print(f"accepted changes of {workdir}: {summary}", file=sys.stderr)
  elif not write:
    raise InputError(f"{workdir} is not shared: process 0 has begun the run there, but this host does not see it")
  elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise InputError(f"{workdir} is not an empty directory and holds no run (no config.json); use another --workdir")
  if not write:
    return
  with writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir, {"data": data, **description(config, schema, frozen_hashes)})


def _without_mixed_paths(files: Mapping[str, Any]) -> dict[str, Any]:
  """`config.data.mix` as weights alone: like `data.path` its data sets are known by their content."""
  config = files["config"]
  mix = [weight for _, weight in config["data"]["mix"]]
  return {**files, "config": {**config, "data": {**config["data"], "mix": mix}}}


def description(config: ml_collections.ConfigDict, schema: Schema, frozen_hashes: Mapping[str, str]) -> dict[str, Any]:
  """What a run's directory says about it: {file name without .json: plain data}, in the order of writing."""
  # config last: it marks the directory as complete.
  return {
    "schema": json.loads(json.dumps(schema.to_json())),
    "frozen": dict(frozen_hashes),
    "config": to_plain(config),
  }


def write_json(directory: Path, files: Mapping[str, Any]) -> None:
  """Writes each `<name>.json`, whole or not at all."""
  for name, value in files.items():
    write_whole(directory / f"{name}.json", json.dumps(value, indent=2) + "\n")


def _completed(values: Any, workdir: Path) -> dict[str, Any]:
  """The contents of config.json with a value for every key of today's configs.

  A key that was added to `default_config.base` since has its default there, which for this reason always means "as
  before". What an imported model leaves out, the sections about training, it gets, too.
  """
  missing = [name for name in _SECTIONS if not isinstance(values, dict) or not isinstance(values.get(name), dict)]
  if missing:
    raise InputError(f"{workdir / 'config.json'} has no section {missing[0]}; is {workdir} the --workdir of a run?")
  kind = values["conditioner"].get("kind")
  defaults = default_config.base(kind if kind in list(CONFIGS) else "none")

  def complete(own: dict[str, Any], base: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {**base, **own}
    for name in own:
      if isinstance(base.get(name), dict):
        if not isinstance(own[name], dict):
          raise InputError(f"{workdir / 'config.json'}: {prefix}{name} is {own[name]!r}, but it is a section of keys")
        result[name] = complete(own[name], base[name], f"{prefix}{name}.")
    return result

  return complete(values, to_plain(defaults))


def located(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
  """`config` with the paths of its weights in place of `WORKDIR`."""
  config = config.copy_and_resolve_references()
  config.weights.update({name: path.replace(WORKDIR, str(workdir)) for name, path in config.weights.items()})
  return config


def _read_json(path: Path) -> Any:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise InputError(f"{path} is missing; is {path.parent} the --workdir of a training run?") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise InputError(f"{path} is damaged ({error}); restore it or train in a new --workdir") from None


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained run or an imported model, opened for sampling, export or as a start.

  Attributes:
    source: the contents of source.json, which says where an imported model came from; empty for a trained run.
  """

  workdir: Path
  config: ml_collections.ConfigDict
  model: LatentDiffusion
  tokenizer: Tokenizer
  source: Mapping[str, Any]

  def load_params(self, weights: str, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """(step, all parameters), the trained ones from the checkpoint: `weights` is "ema" or "raw"."""
    mesh = sharding.make_mesh(sharding.DATA_PARALLEL)
    step, trained = self.load_trained(weights, mesh, step)
    return step, self.complete(trained, mesh)

  def complete(self, trained: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """All parameters: the frozen ones, which must be those of the training, beside the `trained` ones."""
    frozen = self.model.load_frozen(self.config.weights)
    hashes = {name: content_hash(params) for name, params in frozen.items()}
    hashes["tokenizer"] = self.tokenizer.content_hash()
    for name, expected in _read_json(self.workdir / "frozen.json").items():
      if name in hashes and hashes[name] != expected:
        raise InputError(
          f"{self.config.weights[name]} is not the {name} that {self.workdir} was trained with (content hash differs)"
        )
    return self.model.assemble({**sharding.place(frozen, sharding.replicated(mesh)), **trained})

  def identity(self, trained: Mapping[str, Any]) -> str:
    """SHA-256 of everything in the run that the image of a row depends on, whichever directory and step holds it.

    `trained` is what `load_trained` returns, whole on every host. Low-rank factors count as they are: the sums of a
    merge differ between kinds of hardware.
    """
    model, config = self.model, self.config
    networks = (model.unet_config, model.vae_config, model.text_config, model.conditioner_config, model.schedule)
    facts = {
      "trained": {name: content_hash(params) for name, params in trained.items()},
      "frozen": _read_json(self.workdir / "frozen.json"),
      "tokenizer": self.tokenizer.content_hash(),
      "networks": [network.to_dict() for network in networks],
      "schema": model.schema.to_json(),
      **{name: config[name] for name in ("prompt_attributes", "compute_dtype", "upcast")},
      "lora": config.lora.to_dict(),
      "image_size": model.image_size,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

  def load_trained(self, weights: str, mesh: Mesh, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """(step, the parameters in the checkpoint), split over the axis `fsdp` of the mesh.

    `weights` is "ema" or "raw"; an imported model has one set only.
    """
    shapes = {name: self.model.component(name).shapes for name in self.model.trained}
    placed = sharding.tree_shardings(shapes, (), mesh)
    abstract = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, placed)
    part = "params" if self.source else {"ema": "ema", "raw": "params"}[weights]
    with Checkpoints(self.workdir / "checkpoints") as checkpoints:
      step, parts = checkpoints.restore({part: abstract}, step)
    return step, parts[part]

  def start(self, config: ml_collections.ConfigDict, schema: Schema) -> ml_collections.ConfigDict:
    """The config of a new run that starts from this one: its networks, noise schedule, tokenizer and prompts.

    What this run has no conditioner for stays as `config` has it: plain Stable Diffusion gets a new conditioner.

    Raises:
      InputError: `config` names other weights, a LoRA, another kind of conditioner or a frozen text encoder where this
        run trained it, or the attributes that the conditioner uses differ from those of the data, `schema`.
    """
    for name, path in config.weights.items():
      if path:
        raise InputError(f"config.init={self.workdir} brings its own {name}; set config.weights.{name} to ''")
    if self.model.lora is not None or config.lora.rank:
      raise InputError(
        f"config.init={self.workdir} does not go together with a LoRA, its own or a new one; export the run, and start"
        " from an import of the export, or set config.weights to its directories"
      )
    if "text_encoder" in self.model.trained and not config.train_text_encoder:
      raise InputError(
        f"config.init={self.workdir} trained its text encoder; set config.train_text_encoder=True, or start from an"
        " import of its export, where the text encoder is frozen"
      )
    config = config.copy_and_resolve_references()
    model, own = self.model, self.model.conditioner_config
    with config.unlocked():
      config.weights.update({name: self.config.weights[name] for name in ("vae", "tokenizer")})
      config.unet = ml_collections.ConfigDict(model.unet_config.to_dict())
      if "text_encoder" in model.trained:
        config.text_encoder = ml_collections.ConfigDict(model.text_config.to_dict())
      else:
        config.weights.text_encoder = self.config.weights.text_encoder
      config.scheduler = ml_collections.ConfigDict(model.schedule.to_dict())
      if own.kind != "none":
        self._check_attributes(config.conditioner.kind, schema)
        names = list(own.select(model.schema).names)
        fields = {**own.to_dict(), "attributes": names}
        # Not a fact of the networks: whether unknown values have nulls, which the new run can train.
        fields |= {name: config.conditioner[name] for name in ("unconditional", "learned_nulls") if name in fields}
        config.conditioner = ml_collections.ConfigDict(fields)
        config.prompt_attributes = tuple(self.config.prompt_attributes)
    return config

  def _check_attributes(self, kind: str, schema: Schema) -> None:
    """The tables of the conditioner must mean the same in the new data."""
    own = self.model.conditioner_config
    if kind != own.kind:
      raise InputError(f"config.init={self.workdir} has a conditioner of kind {own.kind!r}, the config one of {kind!r}")
    for attribute in own.select(self.model.schema):
      if attribute not in tuple(schema):
        there = ", ".join(map(str, attribute.values or (attribute.low, *attribute.bins, attribute.high)))
        raise InputError(
          f"{self.workdir} was made for {attribute.name} of {there}, and the data have it otherwise or not at all;"
          " prepare them with these values, or import the model with --schema and the schema.json of the data"
        )


def open_run(workdir: str | Path) -> Run:
  """Opens a directory that `compdiff train` or `compdiff import` wrote."""
  workdir = Path(workdir)
  values = _completed(_read_json(workdir / "config.json"), workdir)
  config = located(ml_collections.ConfigDict(values), workdir)
  schema = Schema.load(workdir / "schema.json")
  if not has_checkpoint(workdir / "checkpoints"):
    raise InputError(f"{workdir} holds no complete checkpoint yet; run compdiff train first")
  source = _read_json(workdir / SOURCE_FILE) if (workdir / SOURCE_FILE).exists() else {}
  model = LatentDiffusion.from_config(config, schema)
  return Run(workdir, config, model, load_tokenizer(config.weights.tokenizer), source)
