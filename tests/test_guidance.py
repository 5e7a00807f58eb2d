"""Weights for text, demographics and single attributes, against their formula with a UNet that is not additive."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conditioner_parity import BATCH, CHEST, wide_params
from stand_in import StandIn, stand_in

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.hcn import HCNConfig
from compdiff_jax.conditioning.none import NoConditionerConfig
from compdiff_jax.conditioning.typed import TypedConfig
from compdiff_jax.diffusion.guidance import composed_guidance
from compdiff_jax.sampling.guidance import Guidance, guided, parse_guidance

CONFIG = TypedConfig(d_node=8, d_ctx=8, aux_hidden_dim=0, freq_dim=6, flat_hidden=8)
IDS, EMPTY = jnp.full([7, 77], 5), jnp.zeros([7, 77], int)


class _WithText(StandIn):
  """The text tokens say which prompt it is."""

  def encode_text(self, params, input_ids):
    return jnp.broadcast_to(input_ids[:, :1, None].astype(jnp.float32), [len(input_ids), 2, 8])


def unet(params, noisy, timesteps, context, *_):
  """Not additive: the conditions meet in a tanh."""
  return noisy * 0.1 + jnp.tanh(jnp.mean(context, axis=1)[:, None, None, :3] + 0.01 * timesteps[:, None, None, None])


def model_of(config=CONFIG, network=unet):
  model = stand_in(network, config, CHEST)
  return _WithText(**{name: getattr(model, name) for name in model.__dataclass_fields__})


MODEL = model_of()
PARAMS = {"unet": {}, "conditioner": wide_params(MODEL.conditioner)}
NOISY, TIMES = jnp.ones([7, 2, 2, 3]), jnp.arange(7) * 100


def out(ids, *names):
  """The plain prediction with only the named attributes known."""
  values = {**CHEST.unknown(7), **{name: BATCH[name] for name in names}}
  return unet({}, NOISY, TIMES, *MODEL.context(PARAMS, ids, values)[0])


@pytest.fixture(scope="module")
def outputs():
  return jax.jit(lambda: {
    "nothing": out(EMPTY), "t": out(IDS), "td": out(IDS, "age", "sex", "race"), "age": out(IDS, "age"),
    "race": out(IDS, "race"),
  })()  # fmt: skip


def predict(guidance):
  run = lambda guidance: guided(MODEL, PARAMS, IDS, EMPTY, BATCH, guidance)(NOISY, TIMES)  # noqa: E731
  return np.asarray(jax.jit(run)(guidance))


@pytest.mark.parametrize("demographics", [None, 2.0, 0.0])
def test_weights_of_the_formula(demographics, outputs):
  o = outputs
  whole = 3.0 if demographics is None else demographics
  expected = o["nothing"] + 3.0 * (o["t"] - o["nothing"]) + whole * (o["td"] - o["t"])
  if demographics is not None:
    np.testing.assert_allclose(predict(Guidance(3.0, demographics)), expected, atol=1e-5)
  parts = expected + (5.0 - whole) * (o["age"] - o["t"]) + (-1.0 - whole) * (o["race"] - o["t"])
  np.testing.assert_allclose(predict(Guidance(3.0, demographics, {"age": 5.0, "race": -1.0})), parts, atol=1e-5)
  if demographics == 0.0:  # Liu et al.: a sum over attributes alone
    liu = o["nothing"] + 3.0 * (o["t"] - o["nothing"]) + 5.0 * (o["age"] - o["t"]) - (o["race"] - o["t"])
    np.testing.assert_allclose(parts, liu, atol=1e-5)


def test_equal_weights_are_classifier_free_guidance(outputs):
  o = outputs
  ordinary = o["nothing"] + 4.0 * (o["td"] - o["nothing"])
  plain = predict(Guidance(4.0))
  np.testing.assert_allclose(plain, ordinary, atol=1e-5)
  for guidance in (Guidance(4.0, 4.0), Guidance(4.0, None, {"age": 4.0}), Guidance(4.0, 4.0, {"age": 4.0, "sex": 4.0})):
    np.testing.assert_allclose(predict(guidance), plain, atol=1e-5)
  contexts = [MODEL.context(PARAMS, ids, values)[0] for ids, values in ((EMPTY, CHEST.unknown(7)), (IDS, BATCH))]
  wrapped = lambda sample, timesteps, context: unet({}, sample, timesteps, *context)  # noqa: E731
  direct = composed_guidance(wrapped, contexts, [(1, 0, 4.0)])(NOISY, TIMES)
  np.testing.assert_allclose(plain, direct, atol=1e-5)
  assert np.abs(plain - predict(Guidance(4.0, 1.0))).max() > 0.05


def test_zero_null_in_place_of_the_learned_one():
  """Zero tokens behind the text, a zero time vector and no modulation, wherever nothing is known."""
  config = dataclasses.replace(CONFIG, d_time_emb=3, film_channels=(3,), film_hidden=4)

  def network(params, noisy, timesteps, context, time_vector, film):
    (gamma, beta) = (part[:, None, None] for part in film[0])
    return jnp.tanh(jnp.mean(context, axis=1)[:, None, None, :3] + time_vector[:, None, None] + gamma * noisy + beta)

  def guided_by(config, guidance):
    model = model_of(config, network)
    params = {"unet": {}, "conditioner": wide_params(model.conditioner)}
    return jax.jit(lambda: guided(model, params, IDS, EMPTY, BATCH, guidance)(NOISY, TIMES))()

  model = model_of(config, network)
  params = {"unet": {}, "conditioner": wide_params(model.conditioner)}
  known = lambda *names: {**CHEST.unknown(7), **{name: BATCH[name] for name in names}}  # noqa: E731
  plain = lambda *names: network({}, NOISY, TIMES, *model.context(params, IDS, known(*names))[0])  # noqa: E731
  all_known, age = jax.jit(lambda: (plain("age", "sex", "race"), plain("age")))()

  def text_alone(ids):
    text = jnp.broadcast_to(ids[:, :1, None], [7, 2, 8])
    tokens = jnp.concatenate([text, jnp.zeros([7, 4, 8])], axis=1)
    return network({}, NOISY, TIMES, tokens, jnp.zeros([7, 3]), [(jnp.ones([7, 3]), jnp.zeros([7, 3]))])

  nothing, t = text_alone(EMPTY), text_alone(IDS)
  zeros = guided_by(config, Guidance(3.0, null="zeros"))
  np.testing.assert_allclose(zeros, nothing + 3.0 * (all_known - nothing), atol=1e-5)
  assert np.abs(zeros - guided_by(config, Guidance(3.0))).max() > 0.05
  expected = nothing + 3.0 * (t - nothing) + 2.0 * (all_known - t) + (5.0 - 2.0) * (age - t)
  np.testing.assert_allclose(guided_by(config, Guidance(3.0, 2.0, {"age": 5.0}, "zeros")), expected, atol=1e-5)
  without_nulls = dataclasses.replace(config, unconditional="zeros")
  same = [guided_by(without_nulls, Guidance(3.0, 2.0, null=null)) for null in ("learned", "zeros")]
  np.testing.assert_allclose(*same, atol=1e-6)


def test_only_what_differs_is_computed():
  rows = []

  def counting(params, noisy, timesteps, context, *rest):
    rows.append(len(noisy) // 7)
    return unet(params, noisy, timesteps, context, *rest)

  model = model_of(network=counting)
  for guidance in (Guidance(4.0), Guidance(4.0, 2.0), Guidance(4.0, 2.0, {"age": 1.0, "sex": 3.0})):
    jax.eval_shape(lambda guidance=guidance: guided(model, PARAMS, IDS, EMPTY, BATCH, guidance)(NOISY, TIMES))
  assert rows == [2, 3, 5]


def test_partial_conditioning_and_ages_between(outputs):
  """Unknown values are nulls in the guided branch too; neighbouring ages give neighbouring pictures."""
  values = {**BATCH, "sex": jnp.full([7], -1)}
  run = jax.jit(lambda values: guided(MODEL, PARAMS, IDS, EMPTY, values, Guidance(1.0))(NOISY, TIMES))
  some = np.asarray(run(values))
  np.testing.assert_allclose(some, jax.jit(lambda: out(IDS, "age", "race"))(), atol=1e-5)
  ages = [run({**BATCH, "age": jnp.full([7], age)}) for age in (50.0, 50.25, 50.5, 51.0, 90.0)]
  distances = [float(jnp.abs(ages[i] - ages[0]).max()) for i in range(5)]
  assert 0 < distances[1] < distances[2] and distances[1] < 0.5 * distances[4]


def test_weights_are_read():
  assert parse_guidance(7.5, "", "learned", MODEL) == Guidance(7.5, None, {})
  parts = "demographics=4, age=-1.5"
  assert parse_guidance(7.5, parts, "zeros", MODEL) == Guidance(7.5, 4.0, {"age": -1.5}, "zeros")
  with pytest.raises(InputError, match="unknown null 'zero'; did you mean 'zeros'"):
    parse_guidance(7.5, "", "zero", MODEL)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_is_finite(scale):
  with pytest.raises(InputError, match=f"guidance {scale} must be a finite number"):
    parse_guidance(scale, "", "learned", MODEL)


@pytest.mark.parametrize(
  ("parts", "config", "words"),
  [
    ("ages=2", CONFIG, "did you mean 'age'"),
    ("age", CONFIG, "write name=number"),
    ("age=nan", CONFIG, "write name=number"),
    ("age=1,age=2", CONFIG, "names age twice"),
    ("age=1", NoConditionerConfig(d_ctx=8), "its demographics are words of the prompt"),
    ("age=1", HCNConfig(d_node=8, d_ctx=8, aux_hidden_dim=0, learned_nulls=False), "no learned nulls"),
    ("age=1", TypedConfig(d_node=8, d_ctx=8, aux_hidden_dim=0, unconditional="zeros"), "no learned nulls"),
  ],
)
def test_weights_that_are_refused(parts, config, words):
  with pytest.raises(InputError, match=f"guidance_parts.*{words}"):
    parse_guidance(7.5, parts, "learned", model_of(config))
