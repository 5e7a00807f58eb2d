"""The optimizer: AdamW, decay on kernels only, global-norm clipping, freezing, and schedules in optimizer steps."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from compdiff_jax.cli import InputError, nearest

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Linear warm-up from 0 to `learning_rate`; from there by `schedule` to 0 at `steps`, and 0 after that.

  "cosine" falls by half a cosine, "linear" by a line, "constant" not at all. With `reference_processes` N > 0 it is
  the cosine of the reference on N processes instead, which advances N times in each optimizer step and does not stop
  at its end but comes up again.
  """
  peak, warmup, steps = config.learning_rate, config.warmup_steps, config.steps
  if config.schedule not in SCHEDULES:
    raise InputError(f"train.schedule is {config.schedule!r}{nearest(config.schedule, SCHEDULES)}")
  if warmup >= steps:
    raise InputError(f"train.warmup_steps {warmup} must be smaller than train.steps {steps}")
  if config.reference_processes:
    if config.schedule != "cosine":
      raise InputError("train.reference_processes goes with train.schedule 'cosine' alone")
    return _reference_schedule(peak, warmup, steps, config.reference_processes)
  if config.schedule == "cosine":
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay_steps=steps)
  rise = optax.linear_schedule(0.0, peak, warmup)
  end = 0.0 if config.schedule == "linear" else peak
  return optax.join_schedules([rise, optax.linear_schedule(peak, end, steps - warmup)], [warmup])


def _reference_schedule(peak: float, warmup: int, steps: int, processes: int) -> optax.Schedule:
  """diffusers' cosine with k = N times the optimizer step: k / W, then max(0, (1 + cos(pi (k - W) / (T - W))) / 2)."""

  def schedule(count):
    k = count * processes
    cosine = jnp.maximum(0.0, 0.5 * (1 + jnp.cos(jnp.pi * (k - warmup) / (steps - warmup))))
    return peak * jnp.where(k < warmup, k / max(warmup, 1), cosine)

  return schedule


def frozen_parameters(params: Any, patterns: Sequence[str]) -> Any:
  """{component: {name: whether a pattern matches "component.name" as a whole}}; no match at all is refused."""
  names = {f"{part}.{name}" for part, leaves in params.items() for name in leaves}
  frozen = set()
  for pattern in patterns:
    try:
      matching = {name for name in names if re.fullmatch(pattern, name)}
    except re.error as error:
      raise InputError(f"train.freeze: {pattern!r} is not a regular expression ({error})") from None
    if not matching:
      raise InputError(f"train.freeze: {pattern!r} matches no trained parameter such as {min(names)}")
    frozen |= matching
  if frozen == names:
    raise InputError("train.freeze matches every parameter; nothing would be trained")
  return {part: {name: f"{part}.{name}" in frozen for name in leaves} for part, leaves in params.items()}


def trained_only(tree: Any, patterns: Sequence[str]) -> Any:
  """{component: {name: leaf}} without the frozen leaves."""
  frozen = frozen_parameters(tree, patterns)
  return {part: {name: x for name, x in own.items() if not frozen[part][name]} for part, own in tree.items()}


def _decays(params):
  """Weight decay touches kernels only: biases, norms, embeddings and learned vectors are left alone."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.endswith("kernel"), params)


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """AdamW as configured by `config.train`. Parameters that `freeze` names keep their values and have no moments."""
  adamw = optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate_schedule(config),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=_decays,
    ),
  )
  patterns = tuple(config.freeze)
  if not patterns:
    return adamw

  def labels(params):
    return jax.tree.map(lambda frozen: "frozen" if frozen else "trained", frozen_parameters(params, patterns))

  return optax.multi_transform({"trained": adamw, "frozen": optax.set_to_zero()}, labels)
