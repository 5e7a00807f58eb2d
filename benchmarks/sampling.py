"""`python -m benchmarks.sampling`: images/s of the sampler of `compdiff sample` against diffusers' pipeline.

DDIM with classifier-free guidance, from prompts to images, encoding and decoding included; random weights, same shapes
and steps. `--compiled` is torch.compile of UNet, text encoder and decoder in channels-last layout. One JSON line.

  python -m benchmarks.sampling --steps 10                                                           CPU
  python -m benchmarks.sampling --size sd21 --dtype bfloat16 --batch 16 --compiled --rounds 1        one GPU
"""

import argparse
import json

import numpy as np

from benchmarks.networks import SIZES, TOKENS, our_model, run_config, torch_device, torch_networks
from benchmarks.turns import Calls, summary, take_turns

GUIDANCE = 7.5


def _prompts(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
  """Token ids of the prompts and of the negative prompts, [B, 77] each."""
  shape = options.batch, TOKENS
  ids = np.random.default_rng(0).integers(0, SIZES[options.size].text_encoder["vocab_size"], shape)
  return ids, np.zeros_like(ids)


def ours(options: argparse.Namespace) -> Calls:
  import jax

  from compdiff_jax.diffusion.samplers import Sampler, make_table
  from compdiff_jax.sampling.guidance import Guidance
  from compdiff_jax.sampling.sampler import make_sampler

  size = SIZES[options.size]
  model = our_model(run_config(size, options.batch, options.dtype), size)
  params = {name: model.component(name).init(jax.random.key(0)) for name in ("unet", "vae", "text_encoder")}
  sampler = make_sampler(model, make_table(Sampler("ddim"), model.schedule, options.steps), 0.0)
  ids = jax.device_put([array.astype(np.int32) for array in _prompts(options)])
  seeds = np.arange(options.batch, dtype=np.uint32)
  return {"sample": lambda: np.asarray(sampler(params, *ids, {}, seeds, Guidance(GUIDANCE)))}


def theirs(options: argparse.Namespace) -> Calls:
  import torch
  from diffusers import DDIMScheduler, StableDiffusionPipeline

  size, device = SIZES[options.size], torch_device()
  dtype = getattr(torch, options.dtype)
  models = {name: model.to(dtype) for name, model in torch_networks(size, channels_last=True).items()}
  scheduler = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
  )
  # The pipeline asks compiled modules for their config, so the parts that compute are compiled in place.
  if options.compiled:
    for module in (models["unet"], models["text_encoder"], models["vae"].decoder):
      module.compile()
  others = {"tokenizer": None, "safety_checker": None, "feature_extractor": None}
  pipeline = StableDiffusionPipeline(**models, scheduler=scheduler, **others, requires_safety_checker=False)
  pipeline.set_progress_bar_config(disable=True)
  prompts = [torch.from_numpy(ids).to(device) for ids in _prompts(options)]

  @torch.no_grad()
  def sample() -> np.ndarray:
    embeds, negative = (models["text_encoder"](ids).last_hidden_state for ids in prompts)
    return pipeline(
      prompt_embeds=embeds,
      negative_prompt_embeds=negative,
      guidance_scale=GUIDANCE,
      num_inference_steps=options.steps,
      height=size.image_size,
      width=size.image_size,
      output_type="np",
    ).images

  return {"sample": sample}


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=SIZES, default="small")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--compiled", action="store_true", help="the peer is compiled")
  parser.add_argument("--rounds", type=int, default=3, help="1: one after the other, each with the device for itself")
  parser.add_argument("--repeats", type=int, default=1, help="calls of a round, which are timed together")
  options = parser.parse_args(argv)
  sides = {"jax": ours, "torch": theirs}
  times, peaks = take_turns(sides, options, ["sample"], options.rounds, options.repeats)
  print(json.dumps(summary("sample", options, times["sample"], peaks)))


if __name__ == "__main__":
  main()
