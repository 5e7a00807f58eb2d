"""Component directories of diffusers and transformers (unet, vae, text_encoder): config.json and safetensors files.

Needs NumPy and safetensors only, in both directions.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from compdiff_jax.cli import InputError, whole_directory, writing
from compdiff_jax.interop import keys
from compdiff_jax.models.functional import Functional

_CONFIG = "config.json"
_DIFFUSERS_STEM = "diffusion_pytorch_model"
_TRANSFORMERS_STEM = "model"
_TRANSFORMERS_CLASSES = frozenset({"CLIPTextModel"})


def read_config(directory: str | Path, class_name: str) -> dict[str, Any]:
  """The config.json of a component directory, which must describe a `class_name` of diffusers or transformers."""
  directory = Path(directory)
  if not directory.is_dir():
    raise InputError(f"{directory} is not a directory; give one with a {class_name}")
  config = _read_json(directory / _CONFIG)
  described = config.get("_class_name") or (config.get("architectures") or [class_name])[0]
  if described != class_name:
    raise InputError(f"{directory / _CONFIG} describes a {described}; give a directory with a {class_name}")
  return config


def load_component(directory: str | Path, functional: Functional) -> dict[str, jax.Array]:
  """The parameters of `functional` from the safetensors files of a component directory, as float32.

  Accepts one file or shards with an index, float32, float16 or bfloat16 values, and the keys of older releases.
  Tensors are read one at a time: beyond the result, memory holds one of them.

  Raises:
    InputError: nothing to read, a broken file, or keys and shapes that differ from the model's.
  """
  source, files = _weight_files(Path(directory))
  with contextlib.ExitStack() as stack:
    tensors = {}
    for path in files:
      tensors |= _open_safetensors(path, stack)
    matched = keys.match({name: tensor.get_shape() for name, tensor in tensors.items()}, functional.shapes, str(source))
    params = {}
    for key, (name, shape) in matched.items():
      value = keys.leaf_from_torch(key, tensors[name][...].reshape(shape))
      params[key] = jnp.asarray(value, functional.shapes[key].dtype)
  return params


def save_component(
  directory: str | Path, config: Mapping[str, Any], params: Mapping[str, Any], class_name: str, dtype: Any = np.float32
) -> None:
  """Writes a component directory that `class_name.from_pretrained(directory)` loads.

  Args:
    directory: new or empty. It is filled under another name and renamed, so that it is whole or not there.
    config: the `to_dict()` of the model's config.
    params: flat JAX parameters.
    class_name: the class of diffusers or transformers, for example "UNet2DConditionModel".
    dtype: the stored type: float32, float16 or bfloat16.
  """
  if class_name in _TRANSFORMERS_CLASSES:
    stem, config = _TRANSFORMERS_STEM, {"architectures": [class_name], "dtype": jnp.dtype(dtype).name, **config}
  else:
    stem, config = _DIFFUSERS_STEM, {"_class_name": class_name, **config}
  with whole_directory(directory) as partial, writing(directory):
    tensors = keys.to_torch({key: np.asarray(value).astype(dtype, copy=False) for key, value in params.items()})
    # Transformers refuses a file whose metadata does not name a framework.
    save_file(tensors, partial / f"{stem}.safetensors", metadata={"format": "pt"})
    (partial / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _weight_files(directory: Path) -> tuple[Path, list[Path]]:
  """(the file that names the weights, the files that hold them): one file twice, or an index and its shards."""
  if not directory.is_dir():
    raise InputError(f"{directory} is not a directory; give a diffusers component directory")
  source = next((directory / name for name in _file_names() if (directory / name).is_file()), None)
  if source is None:
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    remedy = f"convert {pickles[0]} to safetensors" if pickles else "give a diffusers component directory"
    raise InputError(f"{directory} has no {_DIFFUSERS_STEM}.safetensors or {_TRANSFORMERS_STEM}.safetensors; {remedy}")
  if source.suffix == ".safetensors":
    return source, [source]

  weight_map = _read_json(source).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
    raise InputError(f"{source} has no weight_map of file names; copy it again")
  shards = [directory / Path(name).name for name in sorted(set(weight_map.values()))]
  for shard in shards:
    if not shard.is_file():
      raise InputError(f"{shard} is missing, though {source.name} names it; copy it again")
  return source, shards


def _file_names() -> Iterator[str]:
  """Names of weight files in order of preference: full precision before the fp16 variant, one file before shards."""
  stems = (_DIFFUSERS_STEM, _TRANSFORMERS_STEM)
  for stem in stems:
    yield f"{stem}.safetensors"
    yield f"{stem}.safetensors.index.json"
  for stem in stems:
    yield f"{stem}.fp16.safetensors"
    yield f"{stem}.safetensors.index.fp16.json"


def _open_safetensors(path: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
  """The tensors of a file by name, not yet read; the file stays open as long as `stack`."""
  try:
    file = stack.enter_context(safe_open(path, framework="numpy"))
  except (SafetensorError, OSError) as error:
    raise InputError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
  return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (the file is not iterable)


def _read_json(path: Path) -> dict[str, Any]:
  """The JSON object in a file."""
  try:
    value = json.loads(path.read_text())
  except OSError as error:
    raise InputError(f"cannot read {path}: {error.strerror}; give a diffusers component directory") from None
  except ValueError as error:
    raise InputError(f"{path} is not JSON ({error}); copy it again") from None
  if not isinstance(value, dict):
    raise InputError(f"{path} holds a JSON {type(value).__name__} instead of an object; copy it again")
  return value
