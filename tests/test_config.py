"""Configs and the command line: overrides, typos, verbs."""

import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from compdiff_jax import __main__, cli
from compdiff_jax.cli import InputError
from compdiff_jax.config import differences, load_config, to_plain
from compdiff_jax.diffusion.schedule import NoiseSchedule
from compdiff_jax.models.unet import UNetConfig
from compdiff_jax.models.vae import VAEConfig

_CONFIGS = sorted(
  path.name for path in (REPOSITORY / "configs").glob("*.py") if path.stem not in ("__init__", "common")
)


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "c.py"
  path.write_text(
    "import ml_collections\n"
    "def get_config():\n"
    "  return ml_collections.ConfigDict({'train': {'rate': 0.1, 'sizes': (1, 2)}, 'steps': 3, 'name': 'x'})\n"
  )
  return str(path)


def test_overrides_keep_types_and_the_last_one_counts(config_file):
  overrides = ["--config.steps=4", "--config.train.sizes=(5,)", "--config.train.sizes=(6,7)", "--config.name="]
  config = load_config(config_file, overrides)
  assert to_plain(config) == {"train": {"rate": 0.1, "sizes": [6, 7]}, "steps": 4, "name": ""}


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("--config.train.rat=1", "did you mean 'train.rate'"),
    ("--config.steps=1.5", "--config.steps=1.5"),
    ("--config.steps=x", "--config.steps=x"),
    ("--steps=3", "unknown argument '--steps=3'"),
    ("extra", "unknown argument 'extra'"),
  ],
)
def test_bad_overrides_name_what_is_wrong(config_file, override, words):
  with pytest.raises(InputError, match=words.replace(".", r"\.")):
    load_config(config_file, [override])


def test_config_file_that_fails_is_named(tmp_path):
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  with pytest.raises(InputError, match=r"broken\.py"):
    load_config(str(tmp_path / "broken.py"))
  with pytest.raises(InputError, match="does not exist"):
    load_config(str(tmp_path / "absent.py"))


def test_differences_are_dotted_keys():
  assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 -> 3"]


@pytest.mark.parametrize("name", _CONFIGS)
def test_every_config_describes_networks_that_exist(name):
  config = load_config(str(REPOSITORY / "configs" / name))
  unet, vae = UNetConfig.from_dict(config.unet.to_dict()), VAEConfig.from_dict(config.vae.to_dict())
  assert unet.in_channels == vae.latent_channels
  NoiseSchedule.from_dict(config.scheduler.to_dict())


@pytest.mark.parametrize("verb", __main__.VERBS)
def test_every_verb_has_help(verb, capsys):
  with pytest.raises(SystemExit) as stop:
    __main__.main([verb, "--help"])
  assert stop.value.code == 0 and "usage: compdiff" in capsys.readouterr().out


def test_unknown_verb_and_argument_are_one_line(fails):
  assert "did you mean 'sample'" in fails(__main__.main, "sampel")
  assert "--workdir" in fails(__main__.main, "export")


def test_exit_statuses(capsys):
  def failing(_):
    raise cli.RunError("the loss became nan")

  assert cli.run(failing, "compdiff train", []) == 1
  assert capsys.readouterr().err == "compdiff train: failed: the loss became nan\n"
  assert cli.run(lambda _: None, "x", []) == 0


def test_whole_directory_is_whole_or_absent(tmp_path):
  out = tmp_path / "out"
  with pytest.raises(RuntimeError), cli.whole_directory(out) as directory:
    (directory / "half").touch()
    raise RuntimeError
  assert not list(tmp_path.iterdir())
  with cli.whole_directory(out) as directory:
    (directory / "all").touch()
    assert not any(out.iterdir())
  assert [path.name for path in tmp_path.rglob("*")] == ["out", "all"]
  with pytest.raises(InputError, match="not empty"), cli.whole_directory(out):
    pass


_DIRECTORIES = {
  "whole": cli.whole_directory,
  "resumable": lambda path: cli.resumable_directory(path, {}),
}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("kind", _DIRECTORIES)
def test_a_link_is_followed_to_the_directory_that_is_made(tmp_path, kind, exists):
  target, link = tmp_path / "disk" / "target", tmp_path / "home" / "link"
  link.parent.mkdir()
  link.symlink_to(target)
  if exists:
    target.mkdir(parents=True)
  with _DIRECTORIES[kind](link) as made:
    directory = made if kind == "whole" else made[0]
    assert directory.is_relative_to(target.parent)  # on the disk where it will stay
    (directory / "all").touch()
  assert link.is_symlink() and [path.name for path in link.iterdir()] == ["all"]
  assert [path.name for path in target.parent.iterdir()] == ["target"] and list(link.parent.iterdir()) == [link]


@pytest.mark.parametrize("kind", _DIRECTORIES)
def test_directories_that_cannot_be_replaced_are_refused_at_once(tmp_path, monkeypatch, kind):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "disk").mkdir()
  monkeypatch.setattr(cli.os.path, "ismount", lambda path: path == tmp_path / "disk")
  with pytest.raises(InputError, match="disk is a mount point, which cannot be replaced; give"):
    _DIRECTORIES[kind]("disk").__enter__()
  (tmp_path / "disk").rmdir()
  for path in (".", tmp_path):
    with pytest.raises(InputError, match="is the current directory, which cannot be replaced; give"):
      _DIRECTORIES[kind](path).__enter__()
  assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed_by_the_next_one_of_this_machine(tmp_path):
  out = tmp_path / "out"
  program = (
    "import os, signal, sys; from compdiff_jax import cli\n"
    "with cli.whole_directory(sys.argv[1]) as directory:\n"
    "  (directory / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)"
  )
  assert subprocess.run([sys.executable, "-c", program, out], cwd=REPOSITORY).returncode == -signal.SIGKILL
  (killed,) = tmp_path.glob(".out.partial-*")
  assert (killed / "half").exists()
  others = [tmp_path / name for name in (".out.partial-elsewhere-abcdefgh", killed.name.replace("out", "outer"))]
  for other in others:
    other.mkdir()
  with cli.whole_directory(out) as directory:
    assert not killed.exists()
    with pytest.raises(RuntimeError), cli.whole_directory(out):  # both are alive
      raise RuntimeError
    (directory / "all").touch()
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(other.name for other in others), "out"])
  assert [path.name for path in out.iterdir()] == ["all"]
