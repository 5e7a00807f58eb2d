"""`python -m benchmarks.train_step`: the training step of `compdiff train` and the UNet's forward pass against PyTorch.

The peer is diffusers' UNet in a step that does the same: sample the latents from moments (or encode images), encode the
prompts with the frozen text encoder, add noise, mean squared error, clip the gradient, AdamW, EMA. Same shapes, same
precision; with bfloat16 the peer runs under autocast. On a CPU it is eager, in both memory layouts, of which the faster
counts; `--compiled` is torch.compile in channels-last layout. One JSON line for each measured call.

  python -m benchmarks.train_step                                                                    CPU
  python -m benchmarks.train_step --size sd21 --dtype bfloat16 --batch 64 --compiled --rounds 1      one GPU
  the same with --inputs images                                                                      the VAE in the step
"""

import argparse
import functools
import json

import numpy as np

from benchmarks.networks import SIZES, TOKENS, our_model, run_config, torch_device, torch_networks
from benchmarks.turns import Calls, summary, take_turns

NAMES = ("forward", "train step")


def _batch(options: argparse.Namespace) -> dict[str, np.ndarray]:
  """One batch in NHWC, used for every step."""
  size, rows = SIZES[options.size], options.batch
  generator = np.random.default_rng(0)
  normal = lambda *shape: generator.standard_normal(shape, np.float32)  # noqa: E731
  side = size.latent_side
  return {
    "latents": normal(rows, side, side, 4),
    "timesteps": generator.integers(0, 1000, rows),
    "context": normal(rows, TOKENS, size.unet["cross_attention_dim"]),
    "input_ids": generator.integers(0, size.text_encoder["vocab_size"], (rows, TOKENS)),
    "images": generator.integers(0, 256, (rows, size.image_size, size.image_size, 3)).astype(np.uint8),
    "moments": normal(rows, side, side, 8),
  }


def ours(options: argparse.Namespace) -> Calls:
  import jax
  import jax.numpy as jnp

  from compdiff_jax.training.optimizer import make_optimizer
  from compdiff_jax.training.state import TrainState
  from compdiff_jax.training.step import make_train_step

  size = SIZES[options.size]
  config = run_config(size, options.batch, options.dtype)
  model = our_model(config, size)
  optimizer = make_optimizer(config.train)
  batch = _batch(options)
  key = jax.random.key(0)
  frozen = {name: model.component(name).init(key) for name in model.frozen}
  create = jax.jit(lambda params: TrainState.create(params, optimizer))
  state = create({"unet": model.unet.init(key)})
  empty_ids = jnp.zeros(TOKENS, jnp.int32)
  step = jax.jit(make_train_step(model, config, optimizer, empty_ids), donate_argnums=0)
  dtypes = {"input_ids": jnp.int32, "moments": jnp.bfloat16, "images": jnp.uint8}
  fed = {name: jnp.asarray(batch[name], dtypes[name]) for name in ("input_ids", options.inputs)}
  fed["attributes"] = {}

  def train() -> float:
    nonlocal state
    state, metrics = step(state, frozen, fed, 0)
    return float(metrics["loss"])

  unet = jax.jit(model.unet.__call__)
  inputs = jax.device_put([batch[name] for name in ("latents", "timesteps", "context")])
  return {"forward": lambda: jax.block_until_ready(unet(state.params["unet"], *inputs)), "train step": train}


def theirs(options: argparse.Namespace, channels_last: bool) -> Calls:
  import torch

  size, device = SIZES[options.size], torch_device()
  torch.manual_seed(0)
  models = torch_networks(size, channels_last)
  trained = list(models["unet"].parameters())
  ema = [parameter.detach().clone() for parameter in trained]
  optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-2, fused=device.type == "cuda")
  layout = torch.channels_last if channels_last else torch.contiguous_format

  def put(name: str) -> torch.Tensor:
    tensor = torch.from_numpy(batch[name]).to(device)
    return tensor.permute(0, 3, 1, 2).contiguous(memory_format=layout) if tensor.ndim == 4 else tensor

  batch = _batch(options)
  batch = {name: put(name) for name in batch}
  betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2
  alphas_cumprod = torch.cumprod(1 - betas, 0)
  autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16")

  def wait() -> None:
    if device.type == "cuda":
      torch.cuda.synchronize()

  def loss() -> torch.Tensor:
    with torch.no_grad(), autocast():
      context = models["text_encoder"](batch["input_ids"]).last_hidden_state
      if options.inputs == "images":
        posterior = models["vae"].encode(batch["images"].float() / 127.5 - 1).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
      else:
        mean, log_variance = batch["moments"].chunk(2, 1)
      latents = (mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)) * 0.18215
      noise = torch.randn_like(latents)
      timesteps = torch.randint(1000, (len(latents),), device=device)
      kept = alphas_cumprod[timesteps, None, None, None]
      noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    with autocast():
      prediction = models["unet"](noisy, timesteps, context).sample
    return torch.nn.functional.mse_loss(prediction.float(), noise)

  if options.compiled:
    models["vae"].encoder = torch.compile(models["vae"].encoder)
    models |= {name: torch.compile(models[name]) for name in ("unet", "text_encoder")}

  def train() -> float:
    value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch._foreach_lerp_(ema, [parameter.detach() for parameter in trained], 1e-4)
    wait()
    return float(value.detach())

  def forward() -> torch.Tensor:
    with torch.no_grad(), autocast():
      output = models["unet"](batch["latents"], batch["timesteps"], batch["context"]).sample
    wait()
    return output

  return {"forward": forward, "train step": train}


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=SIZES, default="small")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--inputs", choices=("moments", "images"), default="moments")
  parser.add_argument("--compiled", action="store_true", help="the peer is compiled, in channels-last layout")
  parser.add_argument("--only", choices=NAMES, help="measure this alone")
  parser.add_argument("--rounds", type=int, default=7, help="1: one after the other, each with the device for itself")
  parser.add_argument("--repeats", type=int, default=1, help="calls of a round, which are timed together")
  options = parser.parse_args(argv)
  peers = {"torch, channels last": functools.partial(theirs, channels_last=True)}
  if not options.compiled:
    peers["torch"] = functools.partial(theirs, channels_last=False)
  names = (options.only,) if options.only else NAMES
  times, peaks = take_turns({"jax": ours, **peers}, options, names, options.rounds, options.repeats)
  for name in names:
    print(json.dumps(summary(name, options, times[name], peaks)))


if __name__ == "__main__":
  main()
