"""`python -m benchmarks.tpu_step`: the SD 2.1 UNet's training step, compiled for TPUs that are not here, beside a peer.

bfloat16 compute, float32 parameters, AdamW, nothing recomputed, pure data parallel, 512 px latents, 77 context tokens.
The peer is the Flax UNet of diffusers 0.34, the last release that has one. Everything is per device and the compiler's
word; nothing is measured on hardware. Pieces of the network show where bytes and memory go, gradients included.

  pip install --no-deps --target build/libtpu libtpu==0.0.42
  pip install --no-deps --target build/peer diffusers==0.34.0
  PYTHONPATH=build/libtpu:build/peer python -m benchmarks.tpu_step --parts step,peer

What is inside kernels is added to the compiler's figures as in `compdiff compile`. Our step takes 6 minutes of two
cores and 5 GB of memory.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from compdiff_jax import sharding
from compdiff_jax.ahead_of_time.chips import chip, compiler_options
from compdiff_jax.ahead_of_time.hlo import Program as Compiled
from compdiff_jax.ahead_of_time.program import Program
from compdiff_jax.ahead_of_time.report import memory, work
from compdiff_jax.ahead_of_time.topologies import topology_devices
from compdiff_jax.models import Functional, UNet2DCondition, UNetConfig
from compdiff_jax.models.attention import FeedForward, Transformer2D, attention
from compdiff_jax.models.attention_backends import BACKENDS
from compdiff_jax.models.layers import GroupNorm
from compdiff_jax.models.unet_blocks import ResnetBlock2D

SD21 = UNetConfig(
  sample_size=64,
  block_out_channels=(320, 640, 1280, 1280),
  attention_head_dim=(5, 10, 20, 20),
  cross_attention_dim=1024,
  use_linear_projection=True,
)
_CONTEXT = (77, 1024)

# A function and its abstract arguments.
Traceable = tuple[Callable[..., Any], tuple[Any, ...]]


class _Shapes:
  """Abstract arrays on a mesh: rows of a batch, or the same on every device."""

  def __init__(self, mesh: jax.sharding.Mesh, rows: int):
    self._whole, self._split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    self._rows = rows * mesh.size

  def rows(self, *shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((self._rows, *shape), dtype, sharding=self._split)

  def whole(self, tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._whole), tree)


def step(shapes: _Shapes, backend: str) -> Traceable:
  """Our whole step; it donates its first argument."""
  unet = Functional(lambda rngs: UNet2DCondition(SD21, jnp.bfloat16, attention=backend, rngs=rngs))
  return _training(shapes, unet, unet.shapes, (64, 64, 4))


def peer(shapes: _Shapes) -> Traceable:
  """The same with the UNet of diffusers, which takes channels first."""
  from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel

  unet = FlaxUNet2DConditionModel(
    sample_size=SD21.sample_size,
    block_out_channels=SD21.block_out_channels,
    attention_head_dim=SD21.attention_head_dim,
    cross_attention_dim=SD21.cross_attention_dim,
    use_linear_projection=SD21.use_linear_projection,
    dtype=jnp.bfloat16,
  )
  params = jax.eval_shape(unet.init_weights, jax.random.key(0))
  predict = lambda params, *inputs: unet.apply({"params": params}, *inputs).sample  # noqa: E731
  return _training(shapes, predict, params, (4, 64, 64))


def _training(shapes: _Shapes, unet: Callable[..., jax.Array], params: Any, latent_shape: tuple[int, ...]) -> Traceable:
  optimizer = optax.adamw(1e-5)

  def loss(params, latents, timesteps, context, noise):
    prediction = unet(params, latents, timesteps, context).astype(jnp.float32)
    return jnp.mean(jnp.square(prediction - noise))

  def train(state, *batch):
    params, moments = state
    value, grads = jax.value_and_grad(loss)(params, *batch)
    updates, moments = optimizer.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  state = shapes.whole((params, jax.eval_shape(optimizer.init, params)))
  latents = shapes.rows(*latent_shape, dtype=jnp.float32)
  batch = latents, shapes.rows(dtype=jnp.int32), shapes.rows(*_CONTEXT), latents
  return train, (state, *batch)


def _module(build: Callable[..., Any], shapes: _Shapes, inputs: tuple[Any, ...], after=lambda x: x) -> Traceable:
  """A module and its gradients by parameters and inputs."""
  network = Functional(build)
  call = lambda params, *inputs: after(network(params, *inputs))  # noqa: E731

  def both(params, inputs, cotangent):
    out, gradient = jax.vjp(call, params, *inputs)
    return out, gradient(cotangent)

  out = jax.eval_shape(call, network.shapes, *inputs)
  return both, (shapes.whole(network.shapes), inputs, shapes.rows(*out.shape[1:]))


def pieces(shapes: _Shapes, backend: str) -> dict[str, Callable[[], Traceable]]:
  """The parts of the highest resolution, 64x64 and 320 channels, where most bytes are."""
  typed = {"dtype": jnp.bfloat16}
  pixels, context = shapes.rows(64, 64, 320), shapes.rows(*_CONTEXT)
  norm = functools.partial(GroupNorm, 32, 320, eps=1e-5)

  def self_attention() -> Traceable:
    heads = shapes.rows(64**2, 5, 64)
    both = lambda q, k, v, cotangent: jax.vjp(functools.partial(attention, backend=backend), q, k, v)[1](cotangent)  # noqa: E731
    return both, (heads,) * 4

  def resnet() -> Traceable:
    build = lambda rngs: ResnetBlock2D(  # noqa: E731
      320, 320, groups=32, eps=1e-5, activation=jax.nn.silu, time_channels=1280, rngs=rngs, **typed
    )
    return _module(build, shapes, (pixels, shapes.rows(1280)))

  def transformer() -> Traceable:
    build = lambda rngs: Transformer2D(  # noqa: E731
      320,
      heads=5,
      context_channels=_CONTEXT[1],
      num_layers=1,
      groups=32,
      linear_projection=True,
      attention=backend,
      rngs=rngs,
      **typed,
    )
    return _module(build, shapes, (pixels, context))

  return {
    "step": lambda: step(shapes, backend),
    "peer": lambda: peer(shapes),
    "resnet": resnet,
    "transformer": transformer,
    "self-attention": self_attention,
    "feed-forward": lambda: _module(
      lambda rngs: FeedForward(320, rngs=rngs, **typed), shapes, (shapes.rows(64**2, 320),)
    ),
    "norm": lambda: _module(lambda rngs: norm(**typed), shapes, (pixels,)),
    "norm and SiLU": lambda: _module(lambda rngs: norm(**typed), shapes, (pixels,), after=jax.nn.silu),
  }


def figures(
  part: Traceable, mesh: jax.sharding.Mesh, rows: int, donate: bool, options: dict[str, str]
) -> dict[str, float]:
  """What is known of a part that is compiled with these options."""
  function, arguments = part
  traced = jax.jit(function, donate_argnums=0 if donate else (), compiler_options=options).trace(*arguments)
  started = time.monotonic()
  compiled = traced.lower().compile()
  seconds = round(time.monotonic() - started, 1)
  program = Program(traced, mesh, rows * mesh.size, 0, 0)
  text = Compiled(compiled.as_text())
  found = work(compiled.cost_analysis(), text, program, "tpu", chip(mesh.devices.flat[0]))
  return {**found, **memory(compiled), "compile_seconds": seconds}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--parts", default="step", help="step, peer, or pieces: resnet,transformer,…")
  parser.add_argument("--topology", default="v5p:2x2x1")
  parser.add_argument("--rows", type=int, default=8, help="images a device")
  parser.add_argument("--attention", choices=BACKENDS, default="auto")
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  devices = topology_devices(args.topology, 1)
  mesh = sharding.make_mesh(sharding.DATA_PARALLEL, devices)
  known = pieces(_Shapes(mesh, args.rows), args.attention)
  for part in args.parts.split(","):
    if part not in known:
      parser.error(f"--parts {part!r}; known: {', '.join(known)}")
    # Ours as a run compiles it, the peer as its own training script would.
    options = {} if part == "peer" else compiler_options(devices[0])
    found = figures(known[part](), mesh, args.rows, part in ("step", "peer"), options)
    line = {"part": part, "topology": args.topology, "rows": args.rows, "attention": args.attention}
    line |= {"compiler_options": options, **found}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
  main()
