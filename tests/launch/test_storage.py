"""Workdirs in object stores, against servers on this machine that speak their protocols."""

import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from launch import load, metrics, run, storage
from launch.errors import ConfigurationError
from launch.interruption import Stopped
from launch.report import __main__ as report

TOY = pathlib.Path(__file__).parent / "toy.py"
SERVERS = {
  "s3": """
from moto.server import main
main(["-H", "127.0.0.1", "-p", "{port}"])
""",
  # One request at a time: its threads see each other's half-written objects. With the generation
  # of what is read, as the service says it: tensorstore cannot rewrite an object without.
  "gs": """
import threading
from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects
download = objects.download
def with_generation(request, response, storage, *_, **__):
  download(request, response, storage)
  if response.status < 300:
    found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
    response["x-goog-generation"] = found["generation"]
objects.download = with_generation
handle, lock = server.Router.handle, threading.Lock()
def alone(*arguments):
  with lock:
    return handle(*arguments)
server.Router.handle = alone
server.create_server("127.0.0.1", {port}, in_memory=True, default_bucket="ours").run()
""",
}
# What every library on the way is told by: boto and orbax' tensorstore; gcsfs, tensorstore, and
# google-cloud-storage, by which orbax removes old checkpoints.
VARIABLES = {
  "s3": {
    "AWS_ENDPOINT_URL": "{url}",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
  },
  "gs": {
    "STORAGE_EMULATOR_HOST": "{url}",
    "TENSORSTORE_GCS_HTTP_URL": "{url}",
    "FSSPEC_GCS_TOKEN": "anon",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "NO_GCE_CHECK": "true",
    "GOOGLE_CLOUD_PROJECT": "ours",
  },
}


@pytest.fixture(scope="module", params=SERVERS)
def bucket(request, tmp_path_factory):
  """The name of an empty bucket, reachable from here and from child processes."""
  scheme, folder = request.param, tmp_path_factory.mktemp("store")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  with (folder / "log").open("w") as log:
    code = SERVERS[scheme].format(port=port)
    server = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
  with pytest.MonkeyPatch.context() as patch:
    for name, value in VARIABLES[scheme].items():
      patch.setenv(name, value.format(url=f"http://127.0.0.1:{port}"))
    deadline = time.monotonic() + 60
    while True:
      with socket.socket() as client:
        if not client.connect_ex(("127.0.0.1", port)):
          break
      assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
      time.sleep(0.1)
    if scheme == "s3":
      import boto3

      boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="ours")
    else:
      import fsspec

      fsspec.config.set_conf_env(fsspec.config.conf)  # what is in the environment by now
    yield f"{scheme}://ours"
  server.terminate()
  server.wait()


SHORT = {"pause": 0.01, "steps": 30}  # seconds a batch, so that a test can interrupt


def files(where):
  """Paths below a folder of a store, two levels deep at most under `checkpoints`."""
  found = []
  for child in where.iterdir():
    found += [child.name] if not child.is_dir() else [f"{child.name}/{f}" for f in files(child)]
  return sorted(found)


def test_files(bucket, tmp_path):
  root = storage.path(f"{bucket}/files")
  assert storage.remote(root) and not storage.remote(tmp_path)
  assert storage.absolute(root) == root and str(root) == f"{bucket}/files"
  metrics.write_json(root / "a" / "config.json", {"x": float("nan")})
  assert json.loads((root / "a" / "config.json").read_text()) == {"x": None}
  assert files(root) == ["a/config.json"]  # no partial file
  (root / "b.bin").write_bytes(b"0")
  metrics.write_json(root / "a" / "config.json", {"x": 1})  # again, in place
  assert json.loads((root / "a" / "config.json").read_text()) == {"x": 1}
  now = time.time()
  assert abs(storage.modified(root / "a" / "config.json") - now) < 60
  (tmp_path / "c").write_text("")
  assert abs(storage.modified(tmp_path / "c") - now) < 60


def test_mirror(bucket, tmp_path):
  (folder := storage.path(f"{bucket}/mirror")).joinpath("log").write_text("1\n")
  mirror = storage.Mirror(folder)
  mirror.fetch("log")
  mirror.fetch("absent")
  with (mirror.local / "log").open("a") as file:
    file.write("2\n")
  (mirror.local / "deep").mkdir()
  (mirror.local / "deep" / "er").write_bytes(b"x" * 100_000)
  mirror.upload()
  assert (folder / "log").read_text() == "1\n2\n"
  assert (folder / "deep" / "er").read_bytes() == b"x" * 100_000
  (folder / "deep" / "er").unlink()
  mirror.upload()  # what has not changed is not sent again
  assert not (folder / "deep" / "er").exists()
  on_disk = storage.Mirror(tmp_path)
  assert on_disk.local == tmp_path
  on_disk.upload()


def test_writer_resumes(bucket):
  """As on a disk: what was written after the checkpoint is dropped, what was before is kept."""
  folder = storage.path(f"{bucket}/writer")
  first = metrics.Writer(folder, (0,))
  first.begin("train", 0)
  first.write(5, {"loss": [1.0]})
  first.sync()
  first.write(10, {"loss": [2.0]})  # a kill comes before this is uploaded
  assert [r["step"] for r in metrics.read(folder / "metrics.jsonl")] == [5]
  first.close()
  second = metrics.Writer(folder, (0,))
  second.begin("train", 5)
  second.write(10, {"loss": [3.0]})
  second.close()
  found = metrics.read(folder / "metrics.jsonl")
  assert [(r["step"], r["loss"]) for r in found] == [(5, [1.0]), (10, [3.0])]
  assert len(list((folder / "tensorboard" / "train-seed0").iterdir())) >= 1


@pytest.mark.slow
def test_killed_resumed_reported(bucket, tmp_path, toy, one_device, capsys):
  root = storage.path(f"{bucket}/runs/toy")
  arm = root / "alone" / "adam"
  checkpoints = arm / "checkpoints" / "train"
  flags = [f"--config.{key}={value}" for key, value in SHORT.items()]
  command = [sys.executable, TOY, f"--workdir={root}", "--study=alone", "--seeds=2", *flags]
  here = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(TOY.parents[2])}
  with subprocess.Popen(command, env=os.environ | here, stdout=subprocess.DEVNULL) as child:
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*/commit_success.txt")):
      assert child.poll() is None and time.monotonic() < deadline
      time.sleep(0.1)
    child.kill()
  assert not (arm / "result.json").exists()
  # An upload that a kill leaves half done does not count as a checkpoint.
  (checkpoints / "29" / "state" / "_METADATA").write_text("{}")
  assert report.main([str(root), "--markdown"]) == 0
  assert "unfinished at update" in capsys.readouterr().out
  again = {"study": "alone", "seeds": 2, "overrides": SHORT, "mesh": one_device}
  run(toy, workdir=str(root), **again)
  assert {*files(arm)} >= {"config.json", "metrics.jsonl", "result.json"}
  assert (root / "verdict.json").exists() and (root / "alone" / "plot.png").exists()
  steps = [r["step"] for r in metrics.read(arm / "metrics.jsonl") if "train/loss" in r]
  assert steps == sorted({*steps}) and steps[-1] == 30
  # The same bits as on a disk, undisturbed; and nothing is trained again.
  run(toy, workdir=tmp_path, **again)
  ours, theirs = (load(where, "alone/adam").variables for where in (root, tmp_path))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  capsys.readouterr()
  run(toy, workdir=str(root), **again)
  assert "finished earlier" in capsys.readouterr().out
  # The report lies beside what it reports on.
  assert report.main([str(root)]) == 0
  assert "<svg" in (root / "report.html").read_text()


def test_stopped(bucket, toy, one_device):
  """After SIGTERM the state is in the store when the run ends."""
  root = storage.path(f"{bucket}/stopped")
  checkpoints = root / "alone" / "adam" / "checkpoints" / "train"
  before = signal.signal(signal.SIGTERM, lambda *_: None)  # should it come too late

  def stop():
    while not list(checkpoints.glob("*/commit_success.txt")):
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=stop)
  thread.start()
  slow = {"pause": 0.03}
  with pytest.raises(Stopped) as stopped:
    run(toy, study="alone", seeds=1, overrides=slow, mesh=one_device, workdir=root)
  thread.join()
  signal.signal(signal.SIGTERM, before)
  assert 10 <= stopped.value.step < 60
  assert (checkpoints / str(stopped.value.step) / "commit_success.txt").exists()
  steps = [r["step"] for r in metrics.read(checkpoints.parents[1] / "metrics.jsonl")]
  assert max(steps) == stopped.value.step


def test_from_python(bucket, toy, one_device):
  """In this process, with a trace and another arm's plot; mesh given."""
  verdict = run(
    toy, study="alone", seeds=1, workdir=f"{bucket}/python", mesh=one_device, profile=(5, 5)
  )
  assert verdict["arms"]["alone/adam"]["steps"] == 60
  profile = storage.path(f"{bucket}/python/alone/adam/profile")
  assert any("perfetto" in name for name in files(profile))
  assert load(f"{bucket}/python", "alone/adam").seed(0)["params"]


def test_refused(monkeypatch):
  assert storage.path("runs/s5") == pathlib.Path("runs/s5")
  with pytest.raises(ConfigurationError, match=r"accepted: a path, or .* gs://, s3://"):
    storage.path("hdfs://ours/runs")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigurationError, match=r"needs gcsfs: pip install 'roundup\[gcs\]'"):
    storage.path("gs://ours/runs")


def test_no_bucket(bucket):
  if bucket.startswith("s3://"):
    with pytest.raises(ConfigurationError, match="there is no bucket 'theirs'"):
      storage.path("s3://theirs/runs")
