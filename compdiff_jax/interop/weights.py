"""Component directories of diffusers and transformers (unet, vae, text_encoder): config.json and safetensors files.

Needs NumPy and safetensors only, in both directions; pickles are read only where they are asked for.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from compdiff_jax import sharding
from compdiff_jax.cli import InputError, whole_directory, writing
from compdiff_jax.interop import keys, safetensors_file
from compdiff_jax.interop.pickles import read_pickle
from compdiff_jax.models.functional import Functional

_CONFIG = "config.json"
_DIFFUSERS_STEM = "diffusion_pytorch_model"
_TRANSFORMERS_STEM = "model"
_TRANSFORMERS_CLASSES = {"CLIPTextModel": "clip_text_model"}  # and their field model_type
_VARIANTS = ("fp16", "bf16")
_READ_DTYPES = ("F32", "F16", "BF16", "F64")


class WeightFiles(NamedTuple):
  """Files that hold one state dict, and the one that names them: a single file twice, or an index and its shards."""

  source: Path
  files: tuple[Path, ...]


def read_config(directory: str | Path, class_name: str) -> dict[str, Any]:
  """The config.json of a component directory, which must describe a `class_name` of diffusers or transformers."""
  directory = Path(directory)
  if not directory.is_dir():
    raise InputError(f"{directory} is not a directory; give one with a {class_name}")
  config = read_json(directory / _CONFIG)
  described = config.get("_class_name") or (config.get("architectures") or [class_name])[0]
  if described != class_name:
    raise InputError(f"{directory / _CONFIG} describes a {described}; give a directory with a {class_name}")
  return config


def load_component(directory: str | Path, functional: Functional) -> dict[str, jax.Array]:
  """The parameters of `functional` from the safetensors files of a component directory: `find_weights` and `load`."""
  return load(find_weights(Path(directory)), functional)


def load(weights: WeightFiles, functional: Functional) -> dict[str, jax.Array]:
  """Reads parameters straight into float32 arrays that are split over this process's devices by `sharding`'s rules.

  Accepts float32, float16 and bfloat16 values and the keys of older releases. Each device's shard is a slice of the
  file: beyond the result, memory holds one tensor, and no device ever holds more than its share.

  Raises:
    InputError: a broken file, or keys and shapes that differ from the model's.
  """
  mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.local_devices())
  tensors = _tensors(weights)
  matched = _match(weights, tensors, functional)
  placed = sharding.tree_shardings(dict(functional.shapes), (), mesh)

  def array(key: str, name: str, shape: tuple[int, ...]) -> jax.Array:
    spec = functional.shapes[key]
    with tensors[name].opened() as tensor:
      return jax.make_array_from_callback(
        spec.shape,
        placed[key],
        lambda index: keys.slice_from_torch(key, tensor, shape, index).astype(spec.dtype, copy=False),
      )

  return {key: array(key, name, shape) for key, (name, shape) in matched.items()}


def check(weights: WeightFiles, functional: Functional) -> None:
  """Raises the `InputError` that `load` would for keys and shapes that differ, without reading a tensor."""
  _match(weights, _tensors(weights), functional)


def stored_shapes(weights: WeightFiles) -> dict[str, tuple[int, ...]]:
  """{key of the state dict: shape}, without reading a tensor."""
  return {name: tensor.shape for name, tensor in _tensors(weights).items()}


def save_component(
  directory: str | Path,
  config: Mapping[str, Any],
  params: Mapping[str, Any],
  class_name: str,
  dtype: str = "float32",
  max_bytes: int | None = None,
) -> None:
  """Writes a component directory that `class_name.from_pretrained(directory)` loads.

  Args:
    directory: new or empty. It is filled under another name and renamed, so that it is whole or not there.
    config: the `to_dict()` of the model's config.
    params: flat JAX parameters.
    class_name: the class of diffusers or transformers, for example "UNet2DConditionModel".
    dtype: the stored type: "float32", "float16" or "bfloat16".
    max_bytes: the most data in one file; None for a single file.
  """
  with whole_directory(directory) as partial, writing(directory):
    write_component(partial, config, params, class_name, dtype, max_bytes)


def write_component(
  directory: Path,
  config: Mapping[str, Any],
  params: Mapping[str, Any],
  class_name: str,
  dtype: str = "float32",
  max_bytes: int | None = None,
) -> None:
  """`save_component` into a directory that exists and is part of something that appears as a whole."""
  write_config(directory, config, class_name, dtype)
  stem = _TRANSFORMERS_STEM if class_name in _TRANSFORMERS_CLASSES else _DIFFUSERS_STEM
  save_weights(directory, stem, params, dtype, max_bytes)


def write_config(directory: Path, config: Mapping[str, Any], class_name: str, dtype: str = "float32") -> None:
  """Writes the config.json of a component."""
  if class_name in _TRANSFORMERS_CLASSES:
    model_type = _TRANSFORMERS_CLASSES[class_name]
    config = {"architectures": [class_name], "dtype": dtype, "model_type": model_type, **config}
  else:
    config = {"_class_name": class_name, **config}
  (directory / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_weights(
  directory: Path, stem: str, params: Mapping[str, Any], dtype: str = "float32", max_bytes: int | None = None
) -> None:
  """Writes the torch state dict of flat JAX parameters as `<stem>.safetensors`, or in shards."""
  shapes = keys.torch_shapes(params)
  names = dict(zip(shapes, params))

  def read(name: str) -> np.ndarray:
    key = names[name]
    with np.errstate(over="ignore"):  # refused in the next line
      value = np.asarray(params[key]).astype(jnp.dtype(dtype), copy=False)
    if not np.isfinite(value).all():
      remedy = "; store them as float32 or bfloat16" if dtype == "float16" else ""
      raise InputError(f"{name} of {directory.name} has values that are not finite in {dtype}{remedy}")
    return keys.leaf_to_torch(key, value)

  safetensors_file.write_shards(directory, stem, shapes, dtype, read, max_bytes)


def find_weights(
  directory: Path, allow_pickle: bool = False, stems: Sequence[str] = (_DIFFUSERS_STEM, _TRANSFORMERS_STEM)
) -> WeightFiles:
  """The weight files of a directory: one file or shards with an index, full precision before half, in any of `stems`.

  Args:
    directory: a component directory.
    allow_pickle: also accept `.bin` files, where there is nothing better.
    stems: names that the files may have. transformers calls a pickle `pytorch_model`, which counts as `model`.
  """
  if not directory.is_dir():
    raise InputError(f"{directory} is not a directory; give a diffusers component directory")
  names = [*_file_names(stems, "safetensors")]
  if allow_pickle:
    pickled = [stem if stem.startswith(_DIFFUSERS_STEM) else f"pytorch_{stem}" for stem in stems]
    names += _file_names(pickled, "bin")
  source = next((directory / name for name in names if (directory / name).is_file()), None)
  if source is None:
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    remedy = "give a diffusers component directory"
    if pickles and not allow_pickle:
      remedy = f"convert {pickles[0]} to safetensors, or import it with compdiff import --allow_pickle"
    raise InputError(f"{directory} has no {' or '.join(f'{stem}.safetensors' for stem in stems)}; {remedy}")
  if source.suffix != ".json":
    return WeightFiles(source, (source,))

  weight_map = read_json(source).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
    raise InputError(f"{source} has no weight_map of file names; copy it again")
  shards = tuple(directory / Path(name).name for name in sorted(set(weight_map.values())))
  for shard in shards:
    if not shard.is_file():
      raise InputError(f"{shard} is missing, though {source.name} names it; copy it again")
  return WeightFiles(source, shards)


def _file_names(stems: Sequence[str], suffix: str) -> Iterator[str]:
  """Names of weight files in order of preference: full precision before half, one file before shards."""
  for stem in stems:
    yield f"{stem}.{suffix}"
    yield f"{stem}.{suffix}.index.json"
  for variant in _VARIANTS:
    for stem in stems:
      yield f"{stem}.{variant}.{suffix}"
      yield f"{stem}.{suffix}.index.{variant}.json"


class _Stored(NamedTuple):
  """A tensor in a file."""

  shape: tuple[int, ...]
  opened: Callable[[], contextlib.AbstractContextManager[Any]]  # -> what `tensor[slices]` reads a part of


@contextlib.contextmanager
def _stored(path: Path, name: str) -> Iterator[Any]:
  # Opened anew for each tensor: a file that stays mapped keeps all that was read of it in the process's memory.
  with _safe_open(path) as file:
    yield file.get_slice(name)


def _safe_open(path: Path) -> Any:
  try:
    return safe_open(path, framework="numpy")
  except (SafetensorError, OSError) as error:
    raise InputError(f"{path} is not a whole safetensors file ({error}); copy it again") from None


def _tensors(weights: WeightFiles) -> dict[str, _Stored]:
  """The tensors of all files by name, not yet read."""
  tensors = {}
  for path in weights.files:
    if path.suffix == ".bin":
      found = {
        name: _Stored(array.shape, functools.partial(contextlib.nullcontext, array))
        for name, array in read_pickle(path).items()
      }
    else:
      with _safe_open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (the file is not iterable)
        types = {name: tensor.get_dtype() for name, tensor in slices.items()}
        found = {
          name: _Stored(tuple(tensor.get_shape()), functools.partial(_stored, path, name))
          for name, tensor in slices.items()
        }
      wrong = [name for name in found if types[name] not in _READ_DTYPES and not keys.is_constant(name)]
      if wrong:
        raise InputError(
          f"{path} stores {wrong[0]} as {types[wrong[0]]}; weights must be {', '.join(_READ_DTYPES)}: give those before"
          " quantisation"
        )
    twice = tensors.keys() & found.keys()
    if twice:
      raise InputError(f"{path} holds {min(twice)}, which another file of {weights.source} holds too; copy them again")
    tensors |= found
  return tensors


def _match(weights: WeightFiles, tensors: Mapping[str, _Stored], functional: Functional) -> dict[str, keys.Source]:
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  return keys.match(shapes, functional.shapes, str(weights.source))


def read_json(path: Path) -> dict[str, Any]:
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
