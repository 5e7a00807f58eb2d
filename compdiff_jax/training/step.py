"""The training step: one pure function of (state, frozen parameters, batch), jitted once; and the state it takes.

Losses are means over the *global* batch, whatever the number of devices and micro-batches; every random draw is a
pure function of (seed, step, position in the global batch).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from compdiff_jax import sharding
from compdiff_jax.ahead_of_time.chips import compiler_options
from compdiff_jax.conditioning.dropout import drop_attributes
from compdiff_jax.conditioning.losses import loss_terms
from compdiff_jax.diffusion import objective
from compdiff_jax.latent_diffusion import LatentDiffusion
from compdiff_jax.training import coind
from compdiff_jax.training.fairness import FairDiffusion, make_fairness
from compdiff_jax.training.optimizer import make_optimizer, trained_only
from compdiff_jax.training.state import Params, TrainState, check_ema, ema_decay, update_ema

# What each sample's key is split into. Appending a purpose leaves the other draws as they were.
_PURPOSES = (
  "posterior",
  "noise",
  "timestep",
  "text_dropout",
  "attribute_dropout",
  "conditioner",
  "fairness",
  "noise_offset",
  "input_perturbation",
  "coind",
)


def sample_keys(seed: int | jax.Array, step: jax.Array, batch_size: int) -> dict[str, jax.Array]:
  """One typed key per purpose and sample, {purpose: [B]}; row i depends on (seed, step, i) alone."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), len(_PURPOSES)))(jnp.arange(batch_size))
  return {purpose: keys[:, i] for i, purpose in enumerate(_PURPOSES)}


def _normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _micro_batches(tree: Any, count: int) -> Any:
  """[B, …] -> [count, B / count, …]; rows are dealt out in turn, so that a sharded batch stays on its devices."""
  return jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), tree)


def loss_coefficients(
  config: ml_collections.ConfigDict, own: Mapping[str, float], step: jax.Array, names: Sequence[str]
) -> dict[str, jax.Array | float]:
  """The weight of each term in the total loss; metrics have none.

  Args:
    config: `config.loss`.
    own: the conditioner's `loss_weights`. Auxiliary heads ("aux_<name>") share `auxiliary` in this proportion.
    step: optimizer steps taken; the KL term is annealed from 0.
    names: the terms there are.
  """
  annealing = jnp.minimum(1.0, step / max(config.kl_anneal_steps, 1))
  weights = {
    "diffusion": 1.0,
    "coind": config.coind,
    "kl": config.kl * annealing,
    "composition": config.composition,
    **own,
  }
  heads = {name: own.get(name, 1.0) for name in names if name.startswith("aux_")}
  weights |= {name: config.auxiliary * share / sum(heads.values()) for name, share in heads.items()}
  return {name: weights[name] for name in names if name in weights}


def make_loss(
  model: LatentDiffusion, config: ml_collections.ConfigDict, fairness: FairDiffusion | None = None
) -> tuple[Callable[..., tuple[jax.Array, Any]], Callable[..., dict[str, jax.Array]]]:
  """Two functions of some rows of the batch, whose results add up over the parts of a batch.

  loss(params, frozen, rows, step, weights) -> (share of the loss of the whole batch, shares of its terms and metrics),
  where `weights` are those of the whole batch; total_weights(params, frozen, rows) -> {term: sum of its weights}.
  An `InputError` says where `config.loss` asks for what the model cannot do.
  """
  options = config.loss
  accumulation = config.train.accumulation
  if options.coind:
    coind.check(model)

  def terms(params: Params, frozen: Params, rows: Mapping[str, Any]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Every loss and metric as (values [b], weight [b])."""
    everything = model.assemble({**frozen, **params})
    keys = rows["keys"]
    text = model.encode_text(everything, rows["input_ids"])
    context, output = model.join_context(everything, text, rows["attributes"], keys["conditioner"])
    moments = rows["moments"] if "moments" in rows else model.moments(everything, rows["images"])
    latents = model.latents(moments, _normal(keys["posterior"], model.latent_shape))
    noise = _normal(keys["noise"], model.latent_shape)
    if options.noise_offset:
      noise += options.noise_offset * _normal(keys["noise_offset"], (1, 1, model.latent_shape[-1]))
    timesteps = jax.vmap(lambda key: jax.random.randint(key, [], 0, model.schedule.num_train_timesteps))(
      keys["timestep"]
    )
    added = noise
    if options.input_perturbation:
      added = noise + options.input_perturbation * _normal(keys["input_perturbation"], model.latent_shape)
    noisy = objective.add_noise(model.schedule, latents, added, timesteps)
    prediction = model.unet(everything["unet"], noisy, timesteps, *context)
    error = objective.denoising_loss(prediction, objective.target(model.schedule, latents, noise, timesteps))
    found = loss_terms(output)
    weighted = error
    if options.min_snr_gamma:
      found["diffusion_unweighted"] = (error, jnp.ones_like(error))
      weighted = error * objective.min_snr_weight(model.schedule, timesteps, options.min_snr_gamma)
    if fairness is None:
      found["diffusion"] = (weighted, jnp.ones_like(error))
    else:
      found |= fairness.terms(weighted, error, rows["fair_weights"], rows["groups"])
    if options.coind:
      # The first rows of the batch are dealt out in turn, so they are the first of every micro-batch, too.
      count = -(-coind.num_rows(options.coind_share, len(noisy) * accumulation) // accumulation)
      gap = coind.independence_gap(model, everything, noisy, timesteps, text, rows["full_attributes"], keys, count)
      found["coind"] = (jnp.zeros_like(error).at[:count].set(gap), rows["coind_weights"])
    return found

  def loss(params, frozen, rows, step, weights):
    means = {
      name: jnp.sum(values * weight) / jnp.maximum(weights[name], 1e-12)
      for name, (values, weight) in terms(params, frozen, rows).items()
    }
    coefficients = loss_coefficients(config.loss, model.conditioner_config.loss_weights, step, list(means))
    total = sum(coefficient * means[name] for name, coefficient in coefficients.items())
    return total, {"loss": total, **means}

  def total_weights(params, frozen, rows):
    # Weights depend on the attributes alone, so the compiler drops everything else of this pass.
    return {name: jnp.sum(weight) for name, (_, weight) in terms(params, frozen, rows).items()}

  return loss, total_weights


def make_train_step(
  model: LatentDiffusion,
  config: ml_collections.ConfigDict,
  optimizer: optax.GradientTransformation,
  empty_ids: jax.Array,
  fairness: FairDiffusion | None = None,
) -> Callable[[TrainState, Params, Mapping[str, Any], int | jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
  """Returns step(state, frozen, batch, seed) -> (state, metrics); NaN is a metric of which the batch has no sample.

  Args:
    model: the networks.
    config: the run's config; `loss`, `dropout` and `train` are read here.
    optimizer: gradient transformation over the trained parameters.
    empty_ids: int32 [77], the empty prompt, which text dropout puts in.
    fairness: weights of the samples; None: all weigh the same.

  The batch is {"input_ids": int32 [B, 77], "attributes": {name: [B]}} with either "images", uint8 [B, S, S, 3], or the
  "moments" of their VAE posterior, [B, s, s, 2c]. The seed is an argument so that runs that differ in it alone share a
  compiled program.
  """
  loss, total_weights = make_loss(model, config, fairness)
  accumulation = config.train.accumulation
  check_ema(config.train)

  def step(state: TrainState, frozen: Params, batch: Mapping[str, Any], seed: int | jax.Array):
    batch_size = batch["input_ids"].shape[0]
    keys = sample_keys(seed, state.step, batch_size)
    drop_text = jax.vmap(jax.random.uniform)(keys["text_dropout"]) < config.dropout.text
    rows = {
      **{name: batch[name] for name in ("images", "moments") if name in batch},
      "input_ids": jnp.where(drop_text[:, None], empty_ids, batch["input_ids"]),
      "attributes": drop_attributes(
        batch["attributes"],
        model.schema,
        keys["attribute_dropout"],
        config.dropout.attribute,
        config.dropout.all_attributes,
      ),
      "keys": keys,
    }
    if fairness is not None:
      rows["groups"] = fairness.groups(batch["attributes"])  # of the data, whatever dropout hides from the conditioner
      rows["fair_weights"] = fairness.weights(state.fairness.sigma, rows["groups"], keys["fairness"])
    if config.loss.coind:
      rows["full_attributes"] = batch["attributes"]
      taken = coind.num_rows(config.loss.coind_share, batch_size)
      rows["coind_weights"] = (jnp.arange(batch_size) < taken).astype(jnp.float32)
    weights = total_weights(state.params, frozen, rows)
    gradient = jax.grad(loss, has_aux=True)
    if accumulation == 1:
      grads, metrics = gradient(state.params, frozen, rows, state.step, weights)
    else:

      def add(total, micro):
        return jax.tree.map(jnp.add, total, gradient(state.params, frozen, micro, state.step, weights)), None

      micro = _micro_batches(rows, accumulation)
      shapes = jax.eval_shape(gradient, state.params, frozen, jax.tree.map(lambda x: x[0], micro), state.step, weights)
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      grads, metrics = jax.lax.scan(add, zeros, micro)[0]

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema, params, ema_decay(state.step, config.train))
    metrics["grad_norm"] = optax.tree.norm(trained_only(grads, config.train.freeze))
    if "kl" in metrics:
      metrics["kl_weight"] = loss_coefficients(config.loss, {}, state.step, ["kl"])["kl"]
    fair_state = state.fairness
    if fairness is not None:
      means, counts = (jnp.stack([of[name] for name in fairness.group_names]) for of in (metrics, weights))
      fair_state, fair_metrics = fairness.advance(fair_state, means, counts, seed, state.step)
      metrics |= fair_metrics
    # Over no sample there is no mean: NaN, which reports leave out. In the loss it has counted as 0.
    metrics |= {name: jnp.where(weight > 0, metrics[name], jnp.nan) for name, weight in weights.items()}
    return TrainState(state.step + 1, params, ema, opt_state, fair_state), metrics

  return step


class TrainingStep:
  """The step of a config for any mesh, and the state it takes.

  Args:
    model: the networks.
    config: the run's config.
    empty_ids: int32 [77], the empty prompt.

  Attributes:
    fairness: weights of the samples, by `config.fairness`; None: all weigh the same.
    state_shapes: a `TrainState` of `jax.ShapeDtypeStruct`.
  """

  def __init__(self, model: LatentDiffusion, config: ml_collections.ConfigDict, empty_ids: jax.Array):
    self._rules = config.sharding_rules
    self._optimizer = make_optimizer(config.train)
    self.fairness = make_fairness(config, model.schema)
    self._step = make_train_step(model, config, self._optimizer, empty_ids, self.fairness)
    self.state_shapes = jax.eval_shape(self.create, {name: model.component(name).shapes for name in model.trained})

  def create(self, params: Params) -> TrainState:
    """The state before the first step."""
    return TrainState.create(params, self._optimizer, self.fairness and self.fairness.create())

  def shardings(self, mesh: Mesh) -> TrainState:
    """Where each leaf of the state lives, by `config.sharding_rules`."""
    return sharding.tree_shardings(self.state_shapes, self._rules, mesh)

  def jit(self, mesh: Mesh | None) -> Any:
    """The step, jitted: the state is donated and stays where `shardings` has it. Without a mesh: on one device."""
    if mesh is None:
      return jax.jit(self._step, donate_argnums=0)
    return jax.jit(
      self._step,
      donate_argnums=0,
      out_shardings=(self.shardings(mesh), sharding.replicated(mesh)),
      compiler_options=compiler_options(mesh.devices.flat[0]),
    )
