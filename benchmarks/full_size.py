"""`python -m benchmarks.full_size --out DIR`: what a run of true size needs, made here: phantoms and random weights.

Writes DIR/data (images), DIR/moments and DIR/networks, of Stable Diffusion 2.1's sizes and in diffusers format, and
prints the `compdiff train` command that uses them. Its speed is that of a real run; what it learns is nothing. A second
call goes on where the first stopped.
"""

import shlex
import sys
from pathlib import Path

import jax

from benchmarks.networks import SIZES, our_model, run_config
from compdiff_jax import cli
from compdiff_jax.interop.weights import save_component
from data_prep import encode_latents, vocabulary
from data_prep.phantom import __main__ as phantom
from data_prep.phantom.population import SCHEMA

_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


def main(argv: list[str]) -> None:
  parser = cli.parser("python -m benchmarks.full_size", __doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--num", type=int, default=400, help="phantoms")
  parser.add_argument("--size", choices=SIZES, default="sd21", help="of networks and images")
  args = parser.parse_args(argv)
  size, out = SIZES[args.size], args.out
  if not (out / "data" / "dataset_info.json").exists():
    options = {"--out": out / "data", "--num": args.num, "--size": size.image_size}
    phantom.main([str(word) for pair in options.items() for word in pair])
  networks = out / "networks"
  if not (networks / "tokenizer" / "vocab.json").exists():
    vocabulary.main([f"--data={out / 'data'}", f"--out={networks / 'tokenizer'}"])
  model = our_model(run_config(size, 1, "bfloat16"), size)
  for name, kind in _CLASSES.items():
    if not (networks / name).exists():
      params = model.component(name).init(jax.random.key(0))
      save_component(networks / name, getattr(size, name), params, kind)
  if not (out / "moments" / "dataset_info.json").exists():
    encode_latents.main([f"--data={out / 'data'}", f"--weights={networks}", f"--out={out / 'moments'}"])
  settings = {
    "data.path": out / "moments",
    "data.image_size": size.image_size,
    **{f"weights.{name}": networks / name for name in (*_CLASSES, "tokenizer")},
    "conditioner.attributes": SCHEMA.names,
    "conditioner.d_ctx": size.unet["cross_attention_dim"],
  }
  words = ["--config=configs/chest/compdiff.py", *(f"--config.{key}={value}" for key, value in settings.items())]
  print(shlex.join(["compdiff", "train", *words]))


if __name__ == "__main__":
  sys.exit(cli.run(main, "python -m benchmarks.full_size"))
