"""Guidance with weights of its own for the text, the demographics and single attributes.

With t the text, d all attributes, d_a attribute a alone and "nothing" the negative prompt with everything unknown,

  out(nothing) + w_t (out(t) - out(nothing)) + w_d (out(t, d) - out(t)) + sum_a (w_a - w_d) (out(t, d_a) - out(t))

Where all weights are equal this is classifier-free guidance. An attribute that is not named has w_d. With w_d = 0 it is
the composition of attributes that are independent given the picture (Liu et al. 2022), in which a combination that
training lacks is made of parts that it has; a negative weight pushes away from a value.

In out(nothing) and out(t) all demographics are unknown: the learned nulls or, with the null "zeros", zero tokens as in
the reference.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.diffusion.guidance import Predict, composed_guidance
from compdiff_jax.latent_diffusion import Context, LatentDiffusion, Params

NULLS = ("learned", "zeros")
_DEMOGRAPHICS = "demographics"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guidance:
  """The weights. What is None or left out is not computed: two rows a sample in the plainest case.

  Attributes:
    text: w_t, and where nothing else is given the scale of classifier-free guidance.
    demographics: w_d, or None for w_t.
    attributes: {name: w_a}.
    null: one of `NULLS`. A conditioner without learned nulls has zeros either way.
  """

  text: float | jax.Array
  demographics: float | jax.Array | None = None
  attributes: Mapping[str, float | jax.Array] = dataclasses.field(default_factory=dict)
  null: str = dataclasses.field(default="learned", metadata={"static": True})


def parse_guidance(scale: float, parts: str, null: str, model: LatentDiffusion) -> Guidance:
  """Reads a scale, "demographics=4,age=2" (the weights that differ from it) and one of `NULLS`.

  Raises:
    InputError: a weight is no finite number, or of something that this model cannot guide by; another null.
  """
  if null not in NULLS:
    raise InputError(f"unknown null {null!r}{nearest(null, NULLS)}")
  if not math.isfinite(scale):
    raise InputError(f"guidance {scale:g} must be a finite number")
  config = model.conditioner_config
  names = config.select(model.schema).names
  weights = {}
  for part in parts.split(",") if parts.strip() else []:
    name, _, text = (piece.strip() for piece in part.partition("="))
    try:
      weight = float(text)
    except ValueError:
      weight = math.nan
    if not math.isfinite(weight):
      raise InputError(f"guidance_parts {part.strip()!r}: write name=number, for example age=2")
    if not names:
      raise InputError("guidance_parts: this model has no conditioner; its demographics are words of the prompt")
    if name not in (_DEMOGRAPHICS, *names):
      raise InputError(f"guidance_parts: {name!r} is no part of the condition{nearest(name, (_DEMOGRAPHICS, *names))}")
    if name in weights:
      raise InputError(f"guidance_parts names {name} twice")
    weights[name] = weight
  demographics = weights.pop(_DEMOGRAPHICS, None)
  if weights and not config.represents_unknown:
    raise InputError("guidance_parts leaves single attributes out, and this model has no learned nulls for that")
  return Guidance(scale, demographics, weights, null)


def guided(
  model: LatentDiffusion,
  params: Params,
  input_ids: jax.Array,
  negative_ids: jax.Array,
  attributes: Mapping[str, jax.Array],
  guidance: Guidance,
  rescale: float = 0.0,
) -> Predict:
  """The prediction function of a batch of prompts int32 [B, 77] and attributes {name: [B, …]}."""
  unknown = {name: jnp.asarray(values) for name, values in model.schema.unknown(len(input_ids)).items()}

  def context(ids: jax.Array, values: Mapping[str, jax.Array]) -> Context:
    return model.context(params, ids, values)[0]

  def text_alone(ids: jax.Array) -> Context:
    learned, output = model.context(params, ids, unknown)
    return learned if guidance.null == "learned" else _zero_null(learned, output.tokens.shape[1])

  contexts = [text_alone(negative_ids), context(input_ids, attributes)]
  terms = [(1, 0, guidance.text)]
  if guidance.demographics is not None or guidance.attributes:
    whole = guidance.text if guidance.demographics is None else guidance.demographics
    contexts.append(text_alone(input_ids))
    terms = [(2, 0, guidance.text), (1, 2, whole)]
    for name, weight in guidance.attributes.items():
      terms.append((len(contexts), 2, weight - whole))
      contexts.append(context(input_ids, {**unknown, name: attributes[name]}))

  def unet(sample: jax.Array, timesteps: jax.Array, joined: Context) -> jax.Array:
    return model.unet(params["unet"], sample, timesteps, *joined)

  return composed_guidance(unet, contexts, terms, rescale)


def _zero_null(context: Context, num_tokens: int) -> Context:
  """The text of a context without demographics: its last `num_tokens` tokens and time vector zero, no modulation."""
  states, time_vector, film = context
  return Context(
    states.at[:, states.shape[1] - num_tokens :].set(0),
    None if time_vector is None else jnp.zeros_like(time_vector),
    None if film is None else tuple((jnp.ones_like(gamma), jnp.zeros_like(beta)) for gamma, beta in film),
  )
