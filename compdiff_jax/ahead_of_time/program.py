"""A run's own training step, lowered from shapes alone and compiled for any devices; and what the compiler says."""

import collections
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from compdiff_jax import sharding
from compdiff_jax.ahead_of_time.chips import chip
from compdiff_jax.ahead_of_time.hlo import collectives
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.latent_diffusion import LatentDiffusion
from compdiff_jax.training.fairness import make_fairness
from compdiff_jax.training.optimizer import make_optimizer
from compdiff_jax.training.state import TrainState
from compdiff_jax.training.step import make_train_step


def _batch(model: LatentDiffusion, size: int, inputs: str) -> dict[str, Any]:
  """Shapes of a global batch; `inputs` is "images" or "moments"."""
  side, _, channels = model.latent_shape
  shapes = {
    "images": jax.ShapeDtypeStruct((size, model.image_size, model.image_size, 3), jnp.uint8),
    "moments": jax.ShapeDtypeStruct((size, side, side, 2 * channels), jnp.bfloat16),
  }
  unknown = model.schema.unknown(size)
  return {
    inputs: shapes[inputs],
    "input_ids": jax.ShapeDtypeStruct((size, model.text_config.max_position_embeddings), jnp.int32),
    "attributes": {name: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype) for name, a in unknown.items()},
  }


def lower_train_step(config: ml_collections.ConfigDict, schema: Schema, devices: Sequence[Any] | None, inputs: str):
  """The jitted step of `compdiff train` on shapes.

  Args:
    config: the run's config; shapes of pretrained networks come from the config.json of their directories.
    schema: attributes of the data.
    devices: where to put it, by `config.mesh`; None: one device of this machine, without any sharding.
    inputs: whether batches hold "images" or "moments".

  Returns:
    (mesh or None, `jax.stages.Traced`).
  """
  model = LatentDiffusion.from_config(config, schema)
  optimizer = make_optimizer(config.train)
  fairness = make_fairness(config, schema)
  shapes = {name: model.component(name).shapes for name in model.trained}
  state = jax.eval_shape(lambda params: TrainState.create(params, optimizer, fairness and fairness.create()), shapes)
  frozen = {name: model.component(name).shapes for name in ("vae", "text_encoder") if name not in model.trained}
  batch = _batch(model, config.train.batch_size, inputs)
  empty_ids = np.zeros(model.text_config.max_position_embeddings, np.int32)
  step = make_train_step(model, config, optimizer, empty_ids, fairness)
  if devices is None:
    return None, jax.jit(step, donate_argnums=0).trace(state, frozen, batch)

  mesh = sharding.make_mesh(config.mesh, devices)
  sharding.check_batch(config.train.batch_size, config.train.accumulation, mesh)
  shardings = sharding.tree_shardings(state, config.sharding_rules, mesh)
  whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  placed = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
  arguments = (
    jax.tree.map(placed, state, shardings),
    jax.tree.map(lambda leaf: placed(leaf, whole), frozen),
    jax.tree.map(lambda leaf: placed(leaf, rows), batch),
  )
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))
  return mesh, jitted.trace(*arguments)


def model_flops(config: ml_collections.ConfigDict, schema: Schema, inputs: str) -> float:
  """Operations of one step of the whole batch, counted in the plain program: nothing recomputed, no kernel, no loop."""
  plain = config.copy_and_resolve_references()
  plain.remat = "none"
  plain.train.accumulation = 1
  _, traced = lower_train_step(plain, schema, None, inputs)
  return float(traced.lower(lowering_platforms=("cpu",)).cost_analysis()["flops"])


def report(config: ml_collections.ConfigDict, schema: Schema, devices: Sequence[Any], inputs: str) -> dict[str, Any]:
  """Compiles the step and returns what is known about it, ready for JSON.

  `fits` is False, and what follows from a compiled program is missing, where the compiler ran out of device memory.
  """
  mesh, traced = lower_train_step(config, schema, devices, inputs)
  facts: dict[str, Any] = {
    "program": "train",
    "inputs": inputs,
    "devices": mesh.size,
    "device_kind": devices[0].device_kind,
    "slices": len({getattr(device, "slice_index", 0) for device in devices}),
    "mesh": dict(mesh.shape),
    "batch_size": config.train.batch_size,
    "accumulation": config.train.accumulation,
    "remat": config.remat,
    "compute_dtype": config.compute_dtype,
    "model_flops": model_flops(config, schema, inputs),
  }
  figures = chip(devices[0])
  started = time.monotonic()
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in text:
      raise
    return {**facts, "fits": False, "compiler": text.removeprefix("RESOURCE_EXHAUSTED: ")[:200]}
  facts["compile_seconds"] = round(time.monotonic() - started, 1)
  facts["memory"] = _memory(compiled)
  facts["fits"] = figures is None or facts["memory"]["peak"] <= figures.hbm_bytes
  if figures is not None:
    facts["memory"]["hbm"] = figures.hbm_bytes
  costs = compiled.cost_analysis()
  # The compiler counts the body of a loop once, so with accumulation its figures are no sums.
  if config.train.accumulation == 1:
    facts["flops"], facts["bytes_accessed"] = float(costs["flops"]), float(costs["bytes accessed"])
    facts |= _speed(facts, costs.get("optimal_seconds"), figures)
  facts["collectives"] = _collectives(compiled.as_text())
  return facts


def _memory(compiled: Any) -> dict[str, int]:
  """Bytes of one device. Donated arguments and the results that take their place are counted once."""
  stats = compiled.memory_analysis()
  sizes = {
    "arguments": stats.argument_size_in_bytes,
    "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "code": stats.generated_code_size_in_bytes,
  }
  return {**sizes, "peak": sum(sizes.values())}


def _speed(facts: dict[str, Any], optimal_seconds: float | None, figures: Any) -> dict[str, float]:
  """Estimates, not measurements: the compiler's, and the two bounds that vendor figures give."""
  speed = {}
  if figures is not None:
    speed["compute_bound_seconds"] = facts["model_flops"] / facts["devices"] / figures.flops
    speed["memory_bound_seconds"] = facts["bytes_accessed"] / figures.hbm_bandwidth
  if optimal_seconds is not None and optimal_seconds > 0:
    speed["estimated_seconds"] = float(optimal_seconds)
    speed["estimated_images_per_second_a_chip"] = facts["batch_size"] / facts["devices"] / optimal_seconds
    if figures is not None:
      speed["estimated_mfu"] = facts["model_flops"] / facts["devices"] / optimal_seconds / figures.flops
  return speed


def _collectives(text: str) -> list[dict[str, Any]]:
  """Operations and bytes of one device and step by kind and network, the largest first."""
  totals = collections.defaultdict(lambda: [0, 0])
  for one in collectives(text):
    total = totals[one.kind, "between slices" if one.between_slices else "within a slice"]
    total[0] += one.times
    total[1] += one.times * one.size
  ranked = sorted(totals.items(), key=lambda item: -item[1][1])
  return [{"kind": kind, "network": network, "count": n, "bytes": size} for (kind, network), (n, size) in ranked]
