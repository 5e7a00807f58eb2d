"""Objective, optimizer and EMA options against diffusers and closed forms; networks are stand-ins that compile fast."""

import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conditioner_parity import CHEST, SEX, build, race, wide_params
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from stand_in import StandIn, batch_of, rows_of, stand_in

from compdiff_jax import sharding
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.additive import AdditiveConfig
from compdiff_jax.conditioning.flat import FlatConfig
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.none import NoConditionerConfig
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.conditioning.typed import TypedConfig
from compdiff_jax.default_config import base
from compdiff_jax.diffusion import objective
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.training import coind
from compdiff_jax.training.fairness import make_fairness
from compdiff_jax.training.optimizer import frozen_parameters, learning_rate_schedule, make_optimizer
from compdiff_jax.training.state import TrainState, check_ema, ema_decay
from compdiff_jax.training.step import make_loss, make_train_step

SMALL = {"d_node": 6, "d_ctx": 8, "aux_hidden_dim": 0}
PAIR = Schema((SEX, race(4)))
_ADDITIVE = AdditiveConfig(**SMALL)
# Batches of four and eight without unknowns.
KNOWN = {n: batch_of(PAIR, n) | {"attributes": {"sex": np.arange(n) % 2, "race": np.arange(n) % 4}} for n in (4, 8)}


def options(**changes):
  config = base().train
  config.update(changes)
  return config


# ---- The objective


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(prediction_type, gamma):
  schedule = NoiseSchedule(prediction_type=prediction_type)
  scheduler = diffusers.DDPMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
  )
  timesteps = np.arange(0, 1000, 37)
  snr = compute_snr(scheduler, torch.tensor(timesteps)).double().numpy()
  expected = np.minimum(snr, gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
  np.testing.assert_allclose(objective.min_snr_weight(schedule, timesteps, gamma), expected, rtol=2e-4)


def test_min_snr_weighs_the_same_error_of_the_image_alike():
  """One network seen as predicting eps, v or x_0 has one weighted loss."""
  rng = np.random.default_rng(0)
  x, eps, guess = (rng.normal(size=[4, 2, 2, 1]).astype(np.float32) for _ in range(3))
  timesteps = np.asarray([3, 200, 500, 900])
  losses = []
  for prediction_type in ("epsilon", "v_prediction", "sample"):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    wanted = objective.target(schedule, x, eps, timesteps)
    noisy = objective.add_noise(schedule, x, eps, timesteps)
    alpha = np.sqrt(schedule.alphas_cumprod[timesteps])[:, None, None, None]
    sigma = np.sqrt(1 - alpha**2)
    implied = (noisy - alpha * guess) / sigma  # the noise that the guessed image implies
    said = {"epsilon": implied, "v_prediction": alpha * implied - sigma * guess, "sample": guess}[prediction_type]
    error = objective.denoising_loss(said, wanted)
    losses.append(np.asarray(error * objective.min_snr_weight(schedule, timesteps, 5.0)))
  np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)
  np.testing.assert_allclose(losses[2], losses[0], rtol=2e-3)


def test_at_zero_terminal_snr_the_weight_is_finite():
  schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
  assert objective.min_snr_weight(schedule, np.asarray([999]), 5.0)[0] == 0


def terms(model, rows, taken=0, fairness=None, **loss):
  """(total, metrics) of the loss with these options, CoInD's of `taken` rows; the conditioner's parameters are 0.3."""
  config = base()
  config.loss.update(loss)
  own = {name: jnp.full(leaf.shape, 0.3) for name, leaf in model.conditioner.shapes.items()}
  params = {"unet": {}, "conditioner": own}
  share, total_weights = make_loss(model, config, fairness)
  evaluate = jax.jit(lambda rows: share(params, {}, rows, jnp.int32(3), total_weights(params, {}, rows)))
  own = {"coind_weights": (np.arange(len(rows["images"])) < taken).astype(np.float32)}
  return evaluate({**{name: value for name, value in rows.items() if name != "full_attributes" or taken}, **own})


def test_noise_offset_and_input_perturbation():
  """The offset is in input and target, one number a channel; the perturbation in the input alone."""
  model = stand_in(lambda params, noisy, *_: noisy, _ADDITIVE, PAIR)
  rows = rows_of(KNOWN[4], 7, 3)
  x = np.asarray(rows["images"]) / 127.5 - 1.0
  draw = lambda purpose, *shape: np.stack(  # noqa: E731
    [np.asarray(jax.random.normal(key, shape)) for key in rows["keys"][purpose]]
  )
  noise = draw("noise", 2, 2, 3)
  timesteps = np.asarray([jax.random.randint(key, [], 0, 1000) for key in rows["keys"]["timestep"]])
  alpha = np.sqrt(model.schedule.alphas_cumprod[timesteps])[:, None, None, None]
  offset, perturbation = 0.1 * draw("noise_offset", 1, 1, 3), 0.2 * draw("input_perturbation", 2, 2, 3)
  for loss, in_both, in_input in (
    ({}, 0, 0),
    ({"noise_offset": 0.1}, offset, 0),
    ({"input_perturbation": 0.2}, 0, perturbation),
    ({"noise_offset": 0.1, "input_perturbation": 0.2}, offset, perturbation),
  ):
    noisy = alpha * x + np.sqrt(1 - alpha**2) * (noise + in_both + in_input)
    expected = float(np.mean((noisy - (noise + in_both)) ** 2))
    assert float(terms(model, rows, **loss)[1]["diffusion"]) == pytest.approx(expected, rel=1e-4), loss


def test_min_snr_in_the_loss():
  model = stand_in(lambda params, noisy, *_: noisy, _ADDITIVE, PAIR)
  rows = rows_of(KNOWN[4], 7, 3)
  plain, weighted = terms(model, rows)[1], terms(model, rows, min_snr_gamma=5.0)[1]
  assert "diffusion_unweighted" not in plain
  assert float(weighted["diffusion_unweighted"]) == pytest.approx(float(plain["diffusion"]))
  timesteps = jnp.asarray([jax.random.randint(key, [], 0, 1000) for key in rows["keys"]["timestep"]])
  x = rows["images"] / 127.5 - 1.0
  noise = jax.vmap(lambda key: jax.random.normal(key, [2, 2, 3]))(rows["keys"]["noise"])
  errors = objective.denoising_loss(objective.add_noise(model.schedule, x, noise, timesteps), noise)
  expected = jnp.mean(errors * objective.min_snr_weight(model.schedule, timesteps, 5.0))
  assert float(weighted["diffusion"]) == pytest.approx(float(expected), rel=1e-4)
  # The unweighted error is a metric: it is not in the total.
  assert float(weighted["loss"] - plain["loss"]) == pytest.approx(
    float(weighted["diffusion"] - plain["diffusion"]), rel=1e-3
  )


def test_min_snr_does_not_weigh_the_losses_of_groups():
  """FairDiffusion compares what the groups lose, and weighs what is trained on."""
  model = stand_in(lambda params, noisy, *_: noisy, _ADDITIVE, PAIR)
  config = base()
  config.fairness.variant = "compdiff"
  fairness = make_fairness(config, PAIR)
  rows = rows_of(KNOWN[4], 7, 3)
  rows |= {"groups": fairness.groups(rows["attributes"]), "fair_weights": jnp.asarray([2.0, 1.0, 1.0, 0.0])}
  plain, weighted = (terms(model, rows, fairness=fairness, min_snr_gamma=gamma)[1] for gamma in (0.0, 5.0))
  for name in fairness.group_names:
    assert float(weighted[name]) == pytest.approx(float(plain[name])), name
  assert float(weighted["diffusion"]) != pytest.approx(float(plain["diffusion"]), rel=0.01)


# ---- Dropout


class _Reading(StandIn):
  """Text tokens say the ids of the prompt."""

  def encode_text(self, params, input_ids):
    return jnp.broadcast_to(0.1 * input_ids[:, :2, None].astype(jnp.float32), (len(input_ids), 2, 8))


def test_the_step_drops_text_and_attributes():
  """With rate 1 its loss is that of the empty prompt, or of nulls for all attributes; with 0 that of what is given."""

  def unet(params, noisy, timesteps, context, *_):
    return noisy + jnp.mean(context[:, :, :3], axis=1)[:, None, None]

  model = stand_in(unet, _ADDITIVE, PAIR, _Reading)
  params = {"unet": {}, "conditioner": wide_params(model.conditioner)}
  empty = jnp.full([77], 5)
  share, total_weights = make_loss(model, base())

  @jax.jit
  def loss(input_ids, attributes):
    rows = {**rows_of(KNOWN[4], 7, 0), "input_ids": input_ids, "attributes": attributes}
    del rows["full_attributes"]
    return share(params, {}, rows, jnp.int32(0), total_weights(params, {}, rows))[1]["diffusion"]

  given, unknown = KNOWN[4]["attributes"], PAIR.unknown(4)
  prompts, prompt = jnp.asarray(KNOWN[4]["input_ids"]), jnp.tile(empty, (4, 1))
  expected = [
    ({}, loss(prompts, given)),
    ({"text": 1.0}, loss(prompt, given)),
    ({"attribute": 1.0}, loss(prompts, unknown)),
    ({"all_attributes": 1.0}, loss(prompts, unknown)),
    ({"text": 1.0, "all_attributes": 1.0}, loss(prompt, unknown)),
  ]
  assert len({float(value) for _, value in expected}) == 4
  for rates, value in expected:
    config = base()
    config.train.warmup_steps = 0
    config.dropout.update({"text": 0.0, "attribute": 0.0, "all_attributes": 0.0, **rates})
    optimizer = make_optimizer(config.train)
    step = jax.jit(make_train_step(model, config, optimizer, empty))
    _, metrics = step(TrainState.create(params, optimizer), {}, KNOWN[4], 7)
    assert float(metrics["diffusion"]) == pytest.approx(float(value), rel=1e-6), rates


# ---- CoInD


def from_tokens(params, noisy, timesteps, context, *_):
  """A UNet whose output is linear in the demographic token, so that additive tokens are independent attributes."""
  return noisy * 0 + jnp.broadcast_to(context[:, -1, :3][:, None, None], noisy.shape)


def test_coind_measures_the_interaction_alone():
  model = stand_in(from_tokens, _ADDITIVE, PAIR)
  rows = rows_of(KNOWN[8], 7, 3)
  _, metrics = terms(model, rows, 8, coind=0.5, coind_share=1.0)
  # All parameters are 0.3: the interaction of sex and race is 0.3 in each of 6 nodes, through a kernel of 0.3.
  assert float(metrics["coind"]) == pytest.approx((6 * 0.3 * 0.3) ** 2, rel=1e-4)
  without = terms(model, rows)[1]
  assert "coind" not in without
  assert float(metrics["loss"] - without["loss"]) == pytest.approx(0.5 * float(metrics["coind"]), rel=1e-3)
  zero = {name: jnp.full(leaf.shape, 0.3) for name, leaf in model.conditioner.shapes.items()}
  zero["interaction_sex_race.embedding"] *= 0
  text = jnp.zeros([8, 2, 8])
  params = {"unet": {}, "conditioner": zero}
  noisy, timesteps = jnp.zeros([8, 2, 2, 3]), jnp.arange(8)
  where = sharding.batch_sharding(sharding.make_mesh(sharding.DATA_PARALLEL))
  inputs = jax.device_put((noisy, timesteps, text, rows["attributes"], rows["keys"]), where)
  measure = jax.jit(lambda *args: coind.independence_gap(model, params, *args, 8), out_shardings=where)
  gap = measure(*inputs)
  np.testing.assert_allclose(gap, np.zeros(8), atol=1e-10)
  moves = r"all-gather|all-to-all|collective-permute|all-reduce"
  assert not re.findall(moves, measure.lower(*inputs).compile().as_text()), "a row leaves its device"


def test_coind_takes_the_first_rows_and_skips_what_is_unknown():
  seen = []

  def unet(params, noisy, *rest):
    seen.append(len(noisy))
    return from_tokens(params, noisy, *rest)

  counting = stand_in(unet, _ADDITIVE, PAIR)
  rows = rows_of(KNOWN[8], 7, 3)
  rows["full_attributes"] = {**rows["attributes"], "sex": np.asarray([-1] * 2 + [0] * 6)}
  share = terms(counting, rows, 4, coind=1.0, coind_share=0.5)[1]
  assert 4 * 4 in seen and 8 in seen
  # With sex unknown both sides have the same two predictions: of four rows two have no gap.
  assert float(share["coind"]) == pytest.approx(0.5 * (6 * 0.3 * 0.3) ** 2, rel=1e-4)


@pytest.mark.parametrize("share", [0.25, 0.4])
def test_coind_is_the_mean_of_the_same_rows_with_any_accumulation(share):
  """2 and 3 of 8 rows; sex, without which there is no gap, is unknown in one of them."""
  batch = {**KNOWN[8], "attributes": {**KNOWN[8]["attributes"], "sex": np.asarray([0, -1, 1, 0, 1, 0, 1, 0])}}
  model = stand_in(from_tokens, _ADDITIVE, PAIR)
  own = {name: jnp.full(leaf.shape, 0.3) for name, leaf in model.conditioner.shapes.items()}
  taken = round(share * 8)
  for accumulation in (1, 2, 4, 8):
    config = base()
    config.loss.update(coind=1.0, coind_share=share)
    config.train.update(accumulation=accumulation, warmup_steps=0)
    optimizer = make_optimizer(config.train)
    step = jax.jit(make_train_step(model, config, optimizer, jnp.zeros(77, jnp.int32)))
    _, metrics = step(TrainState.create({"unet": {}, "conditioner": own}, optimizer), {}, batch, 0)
    assert float(metrics["coind"]) == pytest.approx((taken - 1) / taken * (6 * 0.3 * 0.3) ** 2, rel=1e-4), accumulation


def test_attributes_are_split_by_the_samples_own_draw():
  keys = jax.random.split(jax.random.key(0), 600)
  attributes = {"age": jnp.full([600], 50.0), "sex": jnp.ones([600], int), "race": jnp.full([600], 2)}
  only, others = coind.split_attributes(attributes, CHEST, keys)
  known = {n: np.asarray(CHEST[n].is_known(only[n])) for n in CHEST.names}
  assert (sum(mask.astype(int) for mask in known.values()) == 1).all()
  for name, mask in known.items():
    np.testing.assert_array_equal(mask, ~np.asarray(CHEST[name].is_known(others[name])))
    assert mask.mean() == pytest.approx(1 / 3, abs=0.06)
  moved = coind.split_attributes(attributes, CHEST, keys[::-1])[0]
  np.testing.assert_array_equal(moved["sex"], only["sex"][::-1])


@pytest.mark.parametrize(
  ("loss", "config", "words"),
  [
    ({"coind": 1.0}, NoConditionerConfig(d_ctx=8), "two attributes or more; conditioner.kind is 'none'"),
    ({"coind": 1.0}, AdditiveConfig(**SMALL, attributes=("sex",)), "two attributes or more"),
    ({"coind": 1.0}, HCNConfig(**SMALL, learned_nulls=False), "needs learned nulls"),
  ],
)
def test_refused_losses(loss, config, words):
  run = base()
  run.loss.update(loss)
  with pytest.raises(InputError, match=words):
    make_loss(stand_in(from_tokens, config, PAIR), run)


# ---- Schedules, freezing, weight decay


@pytest.mark.parametrize(
  ("schedule", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
def test_schedules_equal_diffusers(schedule, theirs):
  optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
  scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=7, num_training_steps=50)
  expected = []
  for _ in range(50):
    expected.append(scheduler.get_last_lr()[0])
    optimizer.step()
    scheduler.step()
  ours = learning_rate_schedule(options(schedule=schedule, steps=50, warmup_steps=7, learning_rate=1e-3))
  np.testing.assert_allclose([ours(k) for k in range(50)], expected, rtol=1e-4, atol=1e-9)
  assert float(ours(50)) == float(ours(500)) == pytest.approx(1e-3 if schedule == "constant" else 0, abs=1e-9)


@pytest.mark.parametrize("processes", [1, 4, 6])
def test_reference_schedule_advances_once_a_process(processes):
  optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
  scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=12, num_training_steps=120)
  expected = []
  for _ in range(60):
    expected.append(scheduler.get_last_lr()[0])
    optimizer.step()
    for _ in range(processes):
      scheduler.step()
  config = options(steps=120, warmup_steps=12, learning_rate=1.0, reference_processes=processes)
  schedule = learning_rate_schedule(config)
  np.testing.assert_allclose([schedule(k) for k in range(60)], expected, atol=1e-5)


def test_reference_schedule_at_the_published_steps():
  """Six processes: zero at 5,000, up again by 9,917, and 0.9993 at step 10,000, where the chest model was taken."""
  schedule = learning_rate_schedule(options(reference_processes=6, learning_rate=1.0))
  assert float(schedule(5000)) == pytest.approx(0, abs=1e-6)
  assert float(schedule(9917)) == pytest.approx(1, abs=1e-6)
  assert float(schedule(10_000)) == pytest.approx(0.9993, abs=5e-5)
  correct = learning_rate_schedule(options(learning_rate=1.0))
  assert float(correct(5000)) > 0.9 and float(correct(30_000)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ({"warmup_steps": 30_000}, "must be smaller than train.steps"),
    ({"schedule": "linear", "reference_processes": 4}, "schedule 'cosine'"),
  ],
)
def test_refused_schedules(changes, words):
  with pytest.raises(InputError, match=words):
    learning_rate_schedule(options(**changes))


PARAMS = {
  "unet": {"conv_in.kernel": jnp.ones([2, 2]), "conv_in.bias": jnp.ones(2), "down.0.to_q.kernel": jnp.ones([2, 2])},
  "conditioner": {"emb_sex.embedding": jnp.ones([2, 2]), "mu_head.kernel": jnp.ones([2, 2])},
}


def test_frozen_parameters_stay_and_have_no_moments():
  config = options(freeze=(r"unet\.conv_in\..*", r".*\.emb_\w+\.embedding"), warmup_steps=0, clip_norm=1e-3)
  optimizer = make_optimizer(config)
  state = optimizer.init(PARAMS)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  grads["unet"]["conv_in.kernel"] *= 1e6  # must not use up the clipping norm of the others
  updates, _ = optimizer.update(grads, state, PARAMS)
  moved = {f"{part}.{name}" for part, own in updates.items() for name, x in own.items() if np.any(np.asarray(x) != 0)}
  assert moved == {"unet.down.0.to_q.kernel", "conditioner.mu_head.kernel"}
  assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * (4 + 4)
  alone = {"unet": {"down.0.to_q.kernel": jnp.ones([2, 2])}, "conditioner": {"mu_head.kernel": jnp.ones([2, 2])}}
  plain = make_optimizer(options(warmup_steps=0, clip_norm=1e-3))
  expected, _ = plain.update(jax.tree.map(jnp.ones_like, alone), plain.init(alone), alone)
  np.testing.assert_allclose(updates["unet"]["down.0.to_q.kernel"], expected["unet"]["down.0.to_q.kernel"])


@pytest.mark.parametrize(
  ("patterns", "words"),
  [(("unet.conv_on.*",), "matches no trained parameter"), ((".*",), "every parameter"), (("(",), "regular expression")],
)
def test_refused_freezing(patterns, words):
  with pytest.raises(InputError, match=f"train.freeze.*{words}"):
    frozen_parameters(PARAMS, patterns)


@pytest.mark.parametrize(
  "config",
  [
    HCNConfig(),
    FlatConfig(),
    FlatConfig(mode="separate", heads="deep"),
    AdditiveConfig(),
    *(TypedConfig(composer=c, num_registers=2, d_time_emb=8) for c in ("hierarchical", "flat", "transformer")),
  ],
)
def test_weight_decay_spares_biases_norms_embeddings_and_nulls(config):
  """With zero gradients AdamW moves exactly what it decays."""
  shapes = build(config).shapes
  params = {"conditioner": {name: jnp.ones([1] * len(leaf.shape)) for name, leaf in shapes.items()}}
  optimizer = make_optimizer(options(warmup_steps=0, weight_decay=0.5))
  updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
  decayed = {name for name, update in updates["conditioner"].items() if np.any(np.asarray(update) != 0)}
  spared = ("bias", "scale", "embedding", "cls_token", "type_emb", "register_tokens", "base")
  expected = {name for name in shapes if name.split(".")[-1] not in spared and not name.startswith("null_")}
  assert decayed == {name for name in expected if not name.endswith("_bias")} and len(decayed) > 3


# ---- The average


@pytest.mark.parametrize(
  ("schedule", "theirs"),
  [("ramp", {}), ("power", {"use_ema_warmup": True, "power": 0.75}), ("constant", {"min_decay": 0.9})],
)
def test_ema_equals_diffusers(schedule, theirs):
  config = options(ema_schedule=schedule, ema_power=0.75, ema_decay=0.9)
  parameter = torch.nn.Parameter(torch.zeros(1))
  average = EMAModel([parameter], decay=0.9, **theirs)
  ours = jnp.zeros(1)
  for step in range(200):
    with torch.no_grad():
      parameter += 1 + step % 3
    if schedule == "constant" and step == 0:
      average.shadow_params[0][:] = 0.1 * parameter.detach()  # diffusers copies the first time whatever it is told
      average.optimization_step = 1
    else:
      average.step([parameter])
    d = ema_decay(jnp.int32(step), config)
    ours = d * ours + (1 - d) * parameter.item()
    assert float(ours[0]) == pytest.approx(average.shadow_params[0].item(), rel=1e-4), step
  assert float(d) == pytest.approx(0.9)


def test_unknown_average_is_refused():
  with pytest.raises(InputError, match=r"train\.ema_schedule is 'ram'; did you mean 'ramp'"):
    check_ema(options(ema_schedule="ram"))
