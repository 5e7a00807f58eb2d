"""A run's own programs, the training step and the sampler, lowered from shapes alone for any devices."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.extend import core
from jax.sharding import Mesh

from compdiff_jax import sharding
from compdiff_jax.ahead_of_time.flops import count_jaxpr
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.diffusion.samplers import make_table
from compdiff_jax.latent_diffusion import LatentDiffusion
from compdiff_jax.sampling.guidance import parse_guidance
from compdiff_jax.sampling.sampler import make_sampler, padded_batch, sampler_from_config
from compdiff_jax.training.step import TrainingStep


class Program(NamedTuple):
  """A traced program and what goes into it.

  Attributes:
    traced: `jax.stages.Traced`.
    mesh: of the devices; None for one device of this machine.
    images: how many one call trains on or draws.
    state_bytes: of what lives on each device between calls: parameters and, in training, moments and average.
    gradient_bytes: of the gradients on each device, 0 for sampling.
    idle_bytes: of parameters that are on each device between calls though the program does not read them: of the
      autoencoder, in training on moments.
  """

  traced: Any
  mesh: Mesh | None
  images: int
  state_bytes: int
  gradient_bytes: int
  idle_bytes: int = 0


def _shape(leaf: Any, where: Any = None) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=where)


def _attributes(schema: Schema, size: int) -> dict[str, Any]:
  return {name: _shape(np.asarray(values)) for name, values in schema.unknown(size).items()}


def _batch(model: LatentDiffusion, size: int, inputs: str) -> dict[str, Any]:
  """Shapes of a global batch; `inputs` is "images" or "moments"."""
  side, _, channels = model.latent_shape
  shapes = {
    "images": jax.ShapeDtypeStruct((size, model.image_size, model.image_size, 3), jnp.uint8),
    "moments": jax.ShapeDtypeStruct((size, side, side, 2 * channels), jnp.bfloat16),
  }
  return {inputs: shapes[inputs], "input_ids": _ids(model, size), "attributes": _attributes(model.schema, size)}


def _ids(model: LatentDiffusion, size: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((size, model.text_config.max_position_embeddings), jnp.int32)


def _idle_bytes(traced: Any, params: Any, before: int) -> int:
  """Bytes of `params`, whole on every device, that follow the first `before` arguments and are not read."""
  jaxpr = traced.jaxpr.jaxpr
  operands = [value for equation in jaxpr.eqns for value in equation.invars] + jaxpr.outvars
  read = {value for value in operands if isinstance(value, core.Var)}
  leaves = jax.tree.leaves(params)
  return sum(_size(leaf) for leaf, value in zip(leaves, jaxpr.invars[before:]) if value not in read)


def _size(leaf: Any) -> int:
  return leaf.size * leaf.dtype.itemsize


class TrainingProgram:
  """The step of `compdiff train`. Its parts are made once and serve many meshes.

  Args:
    config: the run's config; shapes of pretrained networks come from the config.json of their directories.
    schema: attributes of the data.
    inputs: whether batches hold "images" or "moments".
  """

  def __init__(self, config: ml_collections.ConfigDict, schema: Schema, inputs: str):
    self._config, self._inputs = config, inputs
    self._model = model = LatentDiffusion.from_config(config, schema)
    self._step = TrainingStep(model, config, np.zeros(model.text_config.max_position_embeddings, np.int32))
    self._state = self._step.state_shapes
    self._frozen = {name: model.component(name).shapes for name in model.frozen}

  @property
  def trained_parameters(self) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(self._state.params))

  def metrics(self) -> list[str]:
    """The names of what the step reports."""
    return list(self.trace(None).traced.out_info[1])

  def trace(self, devices: Sequence[Any] | None) -> Program:
    """On these devices, by `config.mesh`; None: on one device of this machine, without any sharding."""
    config = self._config
    size = config.train.batch_size
    batch = _batch(self._model, size, self._inputs)
    if devices is None:
      traced = self._step.jit(None).trace(self._state, self._frozen, batch, config.seed)
      return Program(traced, None, size, 0, 0)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch(size, config.train.accumulation, mesh)
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    arguments = (
      jax.tree.map(_shape, self._state, self._step.shardings(mesh)),
      jax.tree.map(lambda leaf: _shape(leaf, whole), self._frozen),
      jax.tree.map(lambda leaf: _shape(leaf, rows), batch),
    )
    traced = self._step.jit(mesh).trace(*arguments, config.seed)
    idle = _idle_bytes(traced, self._frozen, len(jax.tree.leaves(self._state)))
    return Program(traced, mesh, size, *self.bytes_per_device(mesh), idle)

  def bytes_per_device(self, mesh: Mesh) -> tuple[int, int]:
    """(state and frozen networks, gradients) of one device."""
    shardings = self._step.shardings(mesh)
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), self._frozen)
    state = sharding.bytes_per_device(self._state, shardings) + sharding.bytes_per_device(self._frozen, whole)
    return state, sharding.bytes_per_device(self._state.params, shardings.params)


def trace_sampler(config: ml_collections.ConfigDict, schema: Schema, devices: Sequence[Any] | None) -> Program:
  """The sampler of `compdiff sample` by `config.sample`: text, every step and the decoder in one program.

  As there, every device holds all parameters and the batch is rounded up to whole rows a device.
  """
  options = config.sample
  model = LatentDiffusion.from_config(config, schema)
  table = make_table(sampler_from_config(options), model.schedule, options.num_steps)
  sampler = make_sampler(model, table, options.guidance_rescale)
  names = [name for name in ("unet", "vae", "text_encoder", "conditioner") if model.component(name).shapes]
  params = {name: model.component(name).shapes for name in names}
  guidance = parse_guidance(options.guidance, options.guidance_parts, options.null, model)
  mesh = None if devices is None else sharding.make_mesh(sharding.DATA_PARALLEL, devices)
  size = padded_batch(options.batch_size, mesh.size if mesh else 1)
  rows = (_ids(model, size), _ids(model, size), _attributes(schema, size), jax.ShapeDtypeStruct((size,), jnp.uint32))
  if mesh is not None:
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params, guidance = jax.tree.map(lambda leaf: _shape(leaf, whole), (params, guidance))
    rows = jax.tree.map(lambda leaf: _shape(leaf, split), rows)
  held = sum(map(_size, jax.tree.leaves(params)))
  traced = sampler.trace(params, *rows, guidance)
  return Program(traced, mesh, size, held, 0, _idle_bytes(traced, params, 0))


def trace(
  program: str, config: ml_collections.ConfigDict, schema: Schema, devices: Sequence[Any] | None, inputs: str
) -> Program:
  """`program` is "train" or "sample"; `inputs`, what the data set holds, matters to training alone."""
  if program == "sample":
    return trace_sampler(config, schema, devices)
  return TrainingProgram(config, schema, inputs).trace(devices)


def model_flops(
  config: ml_collections.ConfigDict, schema: Schema, inputs: str, program: str = "train", traced: Any = None
) -> int:
  """Operations of one call for all images, without any that are there to save memory (ahead_of_time/flops.py).

  `traced` is the config's own program, if there is one already: where it is plain, no other needs to be traced.
  """
  if traced is None or config.remat != "none" or config.train.accumulation > 1:
    plain = config.copy_and_resolve_references()
    plain.remat = "none"
    plain.train.accumulation = 1
    traced = trace(program, plain, schema, None, inputs).traced
  return count_jaxpr(traced.jaxpr.jaxpr)
