"""Where a workdir lies: on a disk, in `gs://BUCKET/...` (gcsfs) or in `s3://BUCKET/...` (s3fs).

A path in a store is an `etils.epath.Path`, which does what the engine asks of `pathlib.Path` except
for what stores cannot do: they write an object whole or not at all, and append to none. Arrays of
checkpoints go there by tensorstore.
"""

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any, cast

import fsspec
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from launch.errors import ConfigurationError

# Scheme -> the package that reads and writes it, the extra that installs it, fsspec's name of it.
STORES = {"gs": ("gcsfs", "gcs", "gcs"), "s3": ("s3fs", "s3", "s3")}


def path(name: str | os.PathLike[str]) -> pathlib.Path:
  """A path on a disk or in a store.

  Raises:
    ConfigurationError: a package that the store needs is not installed, or there is no such bucket.
  """
  found = re.match(r"(\w+)://([^/]*)", os.fspath(name))
  if found is None:
    return pathlib.Path(name)
  scheme, bucket = found.groups()
  if scheme not in STORES:
    accepted = ", ".join(f"{known}://" for known in STORES)
    raise ConfigurationError(f"{name}; accepted: a path, or one that starts with {accepted}")
  package, extra, protocol = STORES[scheme]
  if importlib.util.find_spec(package) is None:
    raise ConfigurationError(f"{name} needs {package}: pip install 'roundup[{extra}]'")
  # fsspec must not remember as absent what tensorstore, or another process, has written since.
  fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
  if scheme == "s3":
    _teach_orbax_s3()
    if not epath.Path(f"s3://{bucket}").exists():  # else one would be made
      raise ConfigurationError(f"{name}: there is no bucket {bucket!r}, or it may not be listed")
  return cast(pathlib.Path, epath.Path(name))


def remote(where: Any) -> bool:
  """Whether a path lies in a store."""
  return "://" in os.fspath(where)


def absolute(where: pathlib.Path) -> pathlib.Path:
  return where if remote(where) else where.absolute()


def modified(where: pathlib.Path) -> float:
  """When a file was last written, in seconds since the epoch."""
  if not remote(where):
    return where.stat().st_mtime
  system, name = fsspec.core.url_to_fs(os.fspath(where))
  return system.modified(name).timestamp()


def write_text(where: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  if remote(where):
    where.write_text(text)
    return
  partial = where.with_name(where.name + ".partial")
  partial.write_text(text)
  partial.replace(where)


class Mirror:
  """A folder whose files may be appended to.

  On a disk it is the folder itself. For a folder in a store it is a local one, whose files are
  uploaded, whole, when they have changed.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    self.folder = self.local = folder
    self.uploaded: dict[pathlib.Path, tuple[int, int]] = {}
    if remote(folder):
      self.temporary = tempfile.TemporaryDirectory(prefix="roundup-", ignore_cleanup_errors=True)
      self.local = pathlib.Path(self.temporary.name)

  def fetch(self, name: str) -> None:
    """Brings a file here, as the store has it."""
    if remote(self.folder) and (self.folder / name).exists():
      (self.local / name).write_bytes((self.folder / name).read_bytes())

  def upload(self) -> None:
    """Raises `OSError` when the store does not take it; the next call tries again."""
    if not remote(self.folder):
      return
    for file in sorted(f for f in self.local.rglob("*") if f.is_file()):
      state = file.stat()
      version = (state.st_size, state.st_mtime_ns)
      if self.uploaded.get(file) == version:
        continue
      target = self.folder / file.relative_to(self.local).as_posix()
      try:
        with file.open("rb") as source, target.open("wb") as copy:
          shutil.copyfileobj(source, copy)
      except Exception as error:  # each store has its own
        raise OSError(f"{target} cannot be written: {error}") from error
      self.uploaded[file] = version


def checkpoint_options(directory: pathlib.Path) -> dict[str, Any]:
  """What orbax must be told: S3 renames nothing, so that a file marks a checkpoint as whole. It
  knows this of GCS."""
  if not os.fspath(directory).startswith("s3://"):
    return {}
  mode = ocp.options.AtomicityMode.COMMIT_FILE
  return {"atomicity_options": ocp.options.AtomicityOptions(mode=mode)}


@functools.cache
def _teach_orbax_s3() -> None:
  """Lets orbax write arrays to S3, which tensorstore can do and orbax does not ask it for.

  orbax names a tensorstore driver in one function, which knows local files and GCS. What it says of
  a GCS path holds for S3 with another driver. Without this orbax refuses s3:// as not absolute.
  """
  build = tensorstore_utils.build_kvstore_tspec

  def build_with_s3(directory: str, *arguments: Any, **named: Any) -> Any:
    found = re.match(r"s3:/+", directory)
    if found is None:
      return build(directory, *arguments, **named)
    return _on_s3(build(f"gs://{directory[found.end() :]}", *arguments, **named))

  tensorstore_utils.build_kvstore_tspec = build_with_s3


def _on_s3(spec: Any) -> Any:
  """A tensorstore specification with S3 in place of GCS, at the endpoint that boto would use."""
  if not isinstance(spec, dict):
    return spec
  if spec.get("driver") in ("gcs", "gcs_grpc"):
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    place = {"aws_region": region, "endpoint": endpoint}
    return spec | {"driver": "s3"} | {key: value for key, value in place.items() if value}
  return {key: _on_s3(value) for key, value in spec.items()}
