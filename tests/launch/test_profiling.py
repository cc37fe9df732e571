"""What a run says about its own cost."""

import gzip
import json
import re
import types

import pytest

from launch import ConfigurationError, metrics, profiling, run


@pytest.fixture(scope="module")
def traced(toy, one_device, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("traced")
  run(
    toy, study="alone", workdir=workdir, mesh=one_device, profile=(20, 10), overrides={"steps": 40}
  )
  return workdir


def test_a_trace_can_be_opened(traced):
  files = list(traced.rglob("perfetto_trace.json.gz"))
  assert [f.relative_to(traced).parts[:4] for f in files] == [("alone", "adam", "profile", "train")]
  events = json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"]
  steps = {e["args"]["step_num"] for e in events if e.get("name") == "train"}
  assert {int(s) for s in steps} == {20, 25}


def test_the_metrics_of_a_run_tell_its_speed(traced):
  records = metrics.read(traced / "alone/adam/metrics.jsonl")
  found = [r for r in records if "perf/step_s" in r]
  assert len(found) >= 3
  for record in found:
    assert 0 < record["perf/step_s"][0] < 60
    assert 0 <= record["perf/waiting"][0] <= 1
    assert "perf/mfu" not in record  # a CPU has no data sheet here


def test_speed_is_held_against_the_roofline(toy, one_device, tmp_path, monkeypatch):
  """The least time of a step and its FLOPs at peak come from the compiled program."""
  monkeypatch.setattr(profiling, "_least", lambda compiled, updates, kind: (1e-5, 5e-6))
  run(toy, study="alone", workdir=tmp_path, mesh=one_device, overrides={"steps": 20})
  for record in metrics.read(tmp_path / "alone/adam/metrics.jsonl"):
    if "perf/step_s" in record:
      assert record["perf/roofline"][0] == pytest.approx(1e-5 / record["perf/step_s"][0])
      assert record["perf/mfu"][0] == pytest.approx(5e-6 / record["perf/step_s"][0])


def test_waiting_for_data_is_warned_about_once(toy, one_device, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(profiling, "WARN_S", 0.3)
  run(
    toy,
    study="alone",
    workdir=tmp_path,
    mesh=one_device,
    overrides={"pause": 0.004, "steps": 30},
  )
  warnings = re.findall(r"the device waits for data (\d+)% of the time", capsys.readouterr().out)
  assert len(warnings) == 1
  assert int(warnings[0]) > 20


@pytest.mark.parametrize(("ready", "data_s", "said"), [(1, 2.0, 1), (0, 2.0, 0), (1, 0.1, 0)])
def test_only_a_device_with_nothing_to_do_waits(ready, data_s, said, monkeypatch):
  """Ten calls of 5 updates and 4 s each, after a first that is slower and does not count."""
  now = [0.0]
  monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])
  lines: list[str] = []
  clock = profiling.Clock("arm", lines.append)
  compiler = profiling.Compiler(None, "arm", lines.append)
  compiler.least = (0.2, 0.1)
  newest = types.SimpleNamespace(is_ready=lambda: ready)
  for call in range(11):
    clock.start()
    now[0] += data_s
    clock.waited(newest if call else None)
    now[0] += 4.0 - data_s if call else 100.0
    clock.stop(5)
  found = clock.metrics(compiler, 55)
  assert found["perf/step_s"] == [pytest.approx(0.8)]
  assert found["perf/waiting"] == [pytest.approx(data_s / 4 if ready else 0.0)]
  assert found["perf/roofline"] == [pytest.approx(0.25)]
  assert found["perf/mfu"] == [pytest.approx(0.125)]
  assert len(lines) == said
  assert not clock.metrics(compiler, 55)  # nothing since


def test_compilation_is_told(toy, one_device, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(profiling.CACHE, "hits", 0)
  run(toy, study="alone", workdir=tmp_path, mesh=one_device, overrides={"steps": 20})
  output = capsys.readouterr().out
  cached = ", from the cache" if profiling.CACHE["hits"] else ""
  assert re.search(rf"alone/adam train, seed 0: compiled in \d+\.\d s{cached}\n", output)


@pytest.mark.parametrize("text", ["10", "10:0", "a:5", "1:2:3", ":5", "-1:4"])
def test_a_profile_that_cannot_be_read(text):
  with pytest.raises(ConfigurationError, match="STEP:COUNT such as 100:5 is accepted"):
    profiling.parse_trace(text)
