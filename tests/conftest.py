"""Shared fixtures: a tiny data set, vocabulary and autoencoder made once, and programs compiled fast.

The test process has eight fake devices, so that sharded code runs sharded. Compiled programs are cached for the
session: the tests that start the command line in new processes, and other workers, compile the same step again.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Compiling is most of what the tests do, and tiny programs gain nothing from optimisation.
FAST_COMPILE = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
  FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # later releases end the process over a flag they do not know
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {FAST_COMPILE}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit that of the process that started them
  _COMPILE_CACHE = tempfile.TemporaryDirectory(prefix="compdiff_compile_cache_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILE_CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

REPOSITORY = Path(__file__).parents[1]

# Seconds after which a test gives up waiting for another process. No test is passed or failed by its speed: this is
# for a machine on which thirty other programs compute.
PATIENCE = 3600

# Overrides of hcn_config.py that make a training step take milliseconds.
TINY = (
  "--config.data.image_size=32",
  "--config.vae.block_out_channels=(8,8,8)",
  "--config.vae.norm_num_groups=4",
  "--config.unet.block_out_channels=(16,)",
  "--config.unet.down_block_types=('CrossAttnDownBlock2D',)",
  "--config.unet.up_block_types=('CrossAttnUpBlock2D',)",
  "--config.unet.norm_num_groups=8",
  "--config.unet.cross_attention_dim=16",
  "--config.unet.attention_head_dim=2",
  "--config.text_encoder.hidden_size=16",
  "--config.text_encoder.intermediate_size=16",
  "--config.text_encoder.num_hidden_layers=1",
  "--config.text_encoder.num_attention_heads=2",
  "--config.conditioner.d_node=8",
  "--config.conditioner.d_ctx=16",
  "--config.conditioner.aux_hidden_dim=8",
  "--config.vae_training.steps=4",
  "--config.vae_training.batch_size=8",
  "--config.train.batch_size=8",
  "--config.train.warmup_steps=2",
  "--config.sample.num_steps=2",
  "--config.sample.batch_size=8",
  "--config.logging.log_every=2",
  "--config.logging.checkpoint_every=4",
  "--config.logging.sample_every=1000",
)


# The files that take longest. They are dealt out first, so that two workers come to their ends at the same time.
_LONGEST = (
  *("test_processes.py", "test_train.py", "test_meshes.py", "test_import.py", "test_compile.py", "test_step.py"),
  *("test_health.py", "test_fairness.py", "test_speed.py"),
)


def pytest_collection_modifyitems(items):
  place = {name: i for i, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def command():
  """Starts `python -m MODULE ARGS…` in a new process with one device; returns the Popen object."""

  def start(module: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
      [sys.executable, "-m", module, *map(str, args)],
      cwd=REPOSITORY,
      env={**os.environ, "XLA_FLAGS": FAST_COMPILE},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


@pytest.fixture
def start():
  """Starts a command as local_processes.py says, with more environment variables; the test's end kills what is left."""
  from local_processes import environment

  started = []

  def call(command, **variables):
    process = subprocess.Popen(
      [*map(str, command)],
      cwd=REPOSITORY,
      env={**environment(), **variables},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    started.append(process)
    return process

  yield call
  for process in started:
    if process.poll() is None:
      process.kill()
    process.wait()


@pytest.fixture(scope="session")
def disc_sets(tmp_path_factory) -> tuple[Path, Path]:
  """The data set and the samples of discs.py."""
  import discs

  root = tmp_path_factory.mktemp("discs")
  return discs.write_real(root / "real"), discs.write_synthetic(root / "synthetic")


@pytest.fixture
def synthetic(disc_sets, tmp_path) -> Path:
  """A copy of the samples of discs.py that a test may damage."""
  return shutil.copytree(disc_sets[1], tmp_path / "synthetic")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
  """A directory with `data` (phantoms, 32 px), `tokenizer` and `vae`, as the commands write them."""
  from compdiff_jax import train_vae
  from data_prep import vocabulary
  from data_prep.phantom import __main__ as phantom

  directory = tmp_path_factory.mktemp("workspace")
  phantom.main(["--out", str(directory / "data"), "--num", "160", "--size", "32"])
  vocabulary.main(["--data", str(directory / "data"), "--out", str(directory / "tokenizer"), "--length", "40"])
  train_vae.main(["--out", str(directory / "vae"), *config_arguments(directory)])
  return directory


def config_arguments(workspace: Path) -> list[str]:
  return [
    f"--config={REPOSITORY / 'tests' / 'hcn_config.py'}",
    f"--config.data.path={workspace / 'data'}",
    f"--config.weights.vae={workspace / 'vae'}",
    f"--config.weights.tokenizer={workspace / 'tokenizer'}",
    *TINY,
  ]


@pytest.fixture(scope="session")
def trained(workspace) -> Path:
  """The workdir of a run of eight steps."""
  from compdiff_jax import train

  train.main([*config_arguments(workspace), "--config.train.steps=8", f"--workdir={workspace / 'run'}"])
  return workspace / "run"


@pytest.fixture
def fails(capsys):
  """Calls a main function that must end with status 2 and one line on stderr; returns that line."""
  from compdiff_jax import cli

  def call(main, *args: object) -> str:
    capsys.readouterr()
    assert cli.run(main, "test", [str(arg) for arg in args]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("test: error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0]
    return errors[0]

  return call
