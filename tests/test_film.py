"""Modulation of the UNet's residual blocks against torch hooks on diffusers' UNet, and its network against torch.nn."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_parity
from conditioner_parity import (
  BATCHES,
  CHEST,
  build,
  check_gradients_reach_everything,
  linear,
  norm,
  torch_state,
  wide_params,
)
from network_configs import SD21_BASE, TINY_MEMORY

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.typed import TypedConfig
from compdiff_jax.interop.torch_files import conditioner as torch_conditioners
from compdiff_jax.interop.torch_files.pipeline import CompDiffPipeline
from compdiff_jax.models.unet import UNetConfig
from tests import torch_states

SMALL = {"d_node": 16, "d_ctx": 24, "aux_hidden_dim": 12, "freq_dim": 10}
SD21_CHANNELS = (320,) * 2 + (640,) * 2 + (1280,) * 4 + (1280,) * 2 + (1280,) * 6 + (640,) * 3 + (320,) * 3


def test_residual_blocks_of_stable_diffusion():
  assert UNetConfig.from_dict(SD21_BASE["unet"]).resnet_channels == SD21_CHANNELS and len(SD21_CHANNELS) == 22


def test_parameters_at_full_size():
  """The adapter of the reference: a shared encoder and, for each of 22 blocks, two heads."""
  plain, model = (build(TypedConfig(film_channels=channels)).shapes for channels in ((), SD21_CHANNELS))
  own = {name.removeprefix("film."): leaf.shape for name, leaf in model.items() if name not in plain}
  assert all(name.startswith("film.") for name in set(model) - set(plain))
  heads = [f"{kind}_heads.{i}.{leaf}" for kind in ("gamma", "beta") for i in range(22) for leaf in ("kernel", "bias")]
  shared = [f"shared_encoder.{i}.{leaf}" for i in (1, 3) for leaf in ("kernel", "bias")]
  assert set(own) == {*heads, *shared, "shared_encoder.0.scale", "shared_encoder.0.bias"}
  expected = 2 * 256 + 256 * 512 + 512 + 512 * 512 + 512 + 2 * 513 * sum(SD21_CHANNELS)
  assert sum(math.prod(shape) for shape in own.values()) == expected


def test_network_equals_torch_and_unknown_is_the_identity():
  config = TypedConfig(**SMALL, film_channels=(4, 6), film_hidden=12, unconditional="zeros")
  model = build(config)
  params, batch = wide_params(model), BATCHES["partly unknown"][0]
  output = jax.jit(model)(params, batch)
  state = torch_state(params)
  node = torch.tensor(np.asarray(output.mu))
  hidden = torch.nn.functional.silu(linear(state, "film.shared_encoder.1", norm(state, "film.shared_encoder.0", node)))
  hidden = torch.nn.functional.silu(linear(state, "film.shared_encoder.3", hidden))
  known = np.asarray([True, True, True, False, True, True, False])
  for i, (gamma, beta) in enumerate(output.film):
    for kind, ours, identity in (("gamma", gamma, 1), ("beta", beta, 0)):
      expected = np.where(known[:, None], linear(state, f"film.{kind}_heads.{i}", hidden), identity)
      np.testing.assert_allclose(ours, expected, atol=1e-3, rtol=1e-4)
  # The torch file of the export.
  fields = {name: value for name, value in config.to_dict().items() if name != "kind"}
  theirs = torch_conditioners.TypedConditioner(schema=CHEST.to_json(), **fields).eval()
  theirs.load_state_dict(
    {name: torch.tensor(value) for name, value in torch_states.to_torch(params).items()}, strict=True
  )
  encoded = {name: np.asarray(values).tolist() for name, values in batch.items()}
  with torch.no_grad():
    pairs = theirs.modulation(encoded)
  for ours, expected in zip(output.film, pairs):
    for a, b in zip(ours, expected):
      np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4)


def test_training_starts_from_the_unmodulated_unet():
  model = build(TypedConfig(**SMALL, film_channels=(4, 6)))
  for gamma, beta in jax.jit(model)(model.init(jax.random.key(0)), BATCHES["known"][0]).film:
    assert np.all(np.asarray(gamma) == 1) and not np.any(beta)


def test_every_parameter_gets_a_gradient():
  config = TypedConfig(**SMALL, film_channels=(4, 6), film_hidden=12, tokens=False)
  inner = build(config)

  class WithFilm:
    """Sums the modulation into the tokens, which the check reads."""

    shapes = inner.shapes

    def __call__(self, params, batch, keys):
      output = inner(params, batch, keys=keys)
      assert output.tokens.shape == (14, 0, 24)
      return output._replace(tokens=jnp.concatenate([part for pair in output.film for part in pair], axis=-1)[:, None])

  # Without tokens the token projections still feed the auxiliary heads.
  check_gradients_reach_everything(WithFilm())


def test_the_unet_equals_torch_with_hooks():
  """gamma h + beta after every residual block, as the hooks of the exported pipeline do it; guided, two images each."""
  fields = TINY_MEMORY["unet"]
  model = torch_parity.randomize(torch_parity.build_torch("unet", fields))
  functional = torch_parity.build_jax("unet", fields)
  inputs = torch_parity.unet_inputs(fields, 8, 8, 5)
  inputs = tuple(np.concatenate([array, array]) for array in inputs)  # an unconditional and a conditional half
  rng = np.random.default_rng(0)
  channels = UNetConfig.from_dict(fields).resnet_channels
  draw = lambda width: (  # noqa: E731
    rng.normal(1, 0.5, [1, width]).astype(np.float32),
    rng.normal(0, 0.5, [1, width]).astype(np.float32),
  )
  halves = [[draw(width) for width in channels] for _ in range(2)]
  film = [
    tuple(np.concatenate([np.repeat(half[i][part], 2, 0) for half in halves]) for part in (0, 1))
    for i in range(len(channels))
  ]
  run = jax.jit(functional)
  params = torch_parity.params_of(model, functional)
  ours = run(params, *inputs, None, film)
  host = types.SimpleNamespace(unet=model)
  torch_halves = [[tuple(map(torch.from_numpy, pair)) for pair in half] for half in halves]
  with torch.no_grad():
    before = torch_parity.call_torch_unet(model, *inputs)
    with CompDiffPipeline._modulated(host, torch_halves, 2):
      theirs = torch_parity.call_torch_unet(model, *inputs)
    with CompDiffPipeline._modulated(host, [None, None], 2):
      after = torch_parity.call_torch_unet(model, *inputs)
  np.testing.assert_allclose(ours, torch_parity.nhwc(theirs), atol=2e-4 * float(theirs.abs().max()))
  assert float((theirs - before).abs().max()) > 0.1 and torch.equal(before, after)
  identity = [(np.ones([4, width], np.float32), np.zeros([4, width], np.float32)) for width in channels]
  np.testing.assert_allclose(run(params, *inputs, None, identity), torch_parity.nhwc(before), atol=1e-4)


@pytest.mark.parametrize(
  ("config", "words"),
  [
    ({"tokens": False}, "nothing would reach the UNet"),
    ({"tokens": False, "d_time_emb": 8, "num_registers": 1}, "registers need tokens=True"),
    ({"film_channels": [4, 0]}, "film_channels is .*; it must be positive"),
  ],
)
def test_routes_that_exclude_each_other(config, words):
  with pytest.raises(InputError, match=f"conditioner: .*{words}"):
    TypedConfig.from_dict(config)
