"""The page, the tables and the plots of runs: finished, unfinished, hostile, and on file."""

import copy
import html
import html.parser
import json
import pathlib
import re
import shutil
import types

import numpy as np
import pytest

from launch import run, runner
from launch.report import page, plots, text, workdirs
from launch.report.__main__ import committed, main
from launch.study import Claim, Study

HOSTILE = "<script>alert('a')</script> | $x_$ & \"b\""
VOID = {"meta", "img"}


@pytest.fixture(scope="module")
def finished(toy, one_device, tmp_path_factory):
  """A toy run of two arms, one of which has a name that has to be escaped everywhere."""
  module = types.ModuleType("toy")
  vars(module).update({k: v for k, v in vars(toy).items() if not k.startswith("__")})
  module.STUDIES = [
    Study(
      "learning",
      arms={"adam": {}, HOSTILE: {"optimizer.name": "sgd", "optimizer.lr": 1e-5}},
      claims=[
        Claim(f"adam > {HOSTILE}", "test/accuracy", "adam", HOSTILE, at_least=0.1),
        Claim("no loss", "test/loss", "adam", at_least=-1.0, at_most=0.0),
      ],
    )
  ]
  workdir = tmp_path_factory.mktemp("finished")
  results = run(module, workdir=workdir, mesh=one_device, overrides={"steps": 40}, command="again")
  return workdir, results


@pytest.fixture
def unfinished(finished, tmp_path):
  """The same, killed in its second arm."""
  workdir = tmp_path / "unfinished"
  shutil.copytree(
    finished[0], workdir, ignore=shutil.ignore_patterns("checkpoints", "verdict.json")
  )
  (workdir / "learning" / runner.slug(HOSTILE) / "result.json").unlink()
  return workdir


class Checker(html.parser.HTMLParser):
  """Fails on tags that do not match; keeps text, identifiers, links and all attributes."""

  def __init__(self, source: str) -> None:
    super().__init__()
    self.open: list[str] = []
    self.tags: list[str] = []
    self.text: list[str] = []
    self.attributes: list[tuple[str, str]] = []
    self.feed(source)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)

  @property
  def words(self) -> str:
    return " ".join(" ".join(self.text).split())


def checked(source: str) -> Checker:
  """What every page must be: well-formed, whole, without scripts and without anything to load."""
  found = Checker(source)
  assert source.startswith("<!doctype html>")
  assert not {"script", "link", "iframe", "object", "base"} & set(found.tags)
  identifiers = [v for k, v in found.attributes if k == "id"]
  assert len(identifiers) == len(set(identifiers))
  for name, value in found.attributes:
    assert not name.startswith("on")
    if name in ("href", "src"):
      assert value.startswith("data:image/png;base64,") or value.removeprefix("#") in identifiers
  for target in re.findall(r"url\(([^)]*)\)", source):
    assert target.removeprefix("#") in identifiers
  assert "http" not in source
  assert "@import" not in source
  return found


def test_the_page_has_everything(finished):
  workdir, results = finished
  source = page.page([workdirs.read(workdir)])
  found = checked(source)
  for claim in results["claims"]:
    assert " ".join(claim["name"].split()) in found.words
    assert claim["statement"] in found.words
    assert text.found(claim) in found.words
    assert f"{text.SYMBOLS[claim['verdict']]} {claim['verdict']}" in re.sub(" +", " ", found.words)
    assert f'class="badge {claim["verdict"]}"' in source
  for label, arm in results["arms"].items():
    assert label.partition("/")[2] in found.words
    for values in arm["metrics"].values():
      assert text.spread(values) in found.words
    assert f"{arm['params']:,}" in found.words
  for fact in ("again", results["commit"], results["device"], f"jax {results['versions']['jax']}"):
    assert fact in found.words
  assert re.findall("<h2>(.*)</h2>", source) == ["Claims", "learning", "How to repeat"]
  assert "prefers-color-scheme: dark" in source
  assert "@media print" in source
  assert 'name="viewport"' in source


def test_names_are_escaped(finished):
  source = page.page([workdirs.read(finished[0])])
  assert "<script" not in source
  assert html.escape("<script>", quote=False) in source
  assert HOSTILE in checked(source).words


def test_curves_are_drawn_in_the_colours_of_the_page(finished):
  run_ = workdirs.read(finished[0])
  (study,) = run_.studies
  rows = plots.panels(study, run_.results, run_.directory(study))
  assert [len(row) for row in rows] == [2, 2]  # a curve and the final values, of two metrics
  drawings = [plots.svg(panel) for row in rows for panel in row]
  for drawing in drawings:
    assert "currentColor" in drawing
    assert plots.THEMED not in drawing
    assert plots.PALETTE[0] in drawing
    assert plots.PALETTE[1] in drawing
    assert 'role="img"' in drawing
  assert "update" in Checker(drawings[0]).words
  assert "test/accuracy" in Checker(drawings[0]).words
  assert (run_.directory(study) / "plot.png").stat().st_size > 10_000


def test_colours_are_legible_in_both_themes():
  def luminance(colour: str) -> float:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])

  def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)

  style = (pathlib.Path(page.__file__).parent / "page.css").read_text()
  light, dark = (
    dict(re.findall(r"--(\w+): (#\w+);", block))
    for block in style.partition("@media print")[0].split("@media (prefers-color-scheme: dark)")
  )
  for theme in (light, dark):
    for name in ("text", "soft", "held", "refuted", "undecided", "unfinished"):
      assert contrast(theme[name], theme["ground"]) > 4.5, name
    for colour in plots.PALETTE:
      assert contrast(colour, theme["ground"]) > 2


def test_an_unfinished_run_is_reported_as_such(unfinished):
  run_ = workdirs.read(unfinished)
  assert run_.unfinished == 1
  (study,) = run_.studies
  assert run_.notes(study) == {HOSTILE: "unfinished at update 40"}
  found = checked(page.page([run_]))
  assert "1 unfinished arm" in found.words
  assert f"{HOSTILE} (unfinished at update 40)" in found.words
  assert "None is judged" in found.words
  curves = plots.panels(study, run_.results, run_.directory(study))[0]
  assert "over training" in curves[0][0]


def test_arms_that_were_not_run_are_said_to_be_missing(tmp_path):
  """An experiment that is installed says which arms there should be."""
  directory = tmp_path / "accuracy" / "s4d"
  directory.mkdir(parents=True)
  record = {"experiment": "s5", "scale": "laptop", "study": "accuracy", "arm": "s4d"}
  (directory / "config.json").write_text(json.dumps(record | {"seeds": [0], "config": {"a": 1}}))
  run_ = workdirs.read(tmp_path)
  assert [s.name for s in run_.studies] == ["accuracy"]
  missing = "not run"
  notes = {"s5": missing, "s4d": "unfinished", "gru": missing, "random spectrum": missing}
  assert run_.notes(run_.studies[0]) == notes
  assert "gru (not run)" in checked(page.page([run_])).words


def test_a_file_of_results(finished):
  for path in committed():
    run_ = workdirs.read(path)
    source = page.page([run_])
    found = checked(source)
    judged = [c for c in run_.results["claims"] if c["estimate"] is not None]
    assert source.count('<svg class="gauge') == len(judged)
    assert source.count('<rect class="allowed"') == len(judged)  # the experiment still claims it
    assert all(c["name"] in found.words for c in run_.results["claims"])
    assert "a file of results" in found.words


def test_a_gauge_shows_the_verdict():
  claim = Claim("c", "m", "a", at_least=0.5)
  study = Study("s", {"a": {}}, [claim])
  record = {"statement": claim.statement, "margin": claim.margin, "estimate": 0.8}
  gauge = page._gauge(record | {"interval": [0.7, 0.9]}, study)
  (margin, words), (low, high) = gauge["margins"][0], gauge["interval"]
  assert words == "0.5"
  assert 0 < margin == gauge["allowed"][0] < low < gauge["estimate"] < high < page.GAUGE
  assert gauge["allowed"][1] == page.GAUGE
  unbounded = page._gauge(record | {"interval": [None, None]}, Study("s", {"a": {}}))
  assert unbounded["interval"] == [0, page.GAUGE]
  assert unbounded["allowed"] is None  # the record alone does not say on which side
  assert page._gauge(record | {"estimate": None, "interval": [None, None]}, study) is None


def test_many_runs_have_an_index(finished, unfinished):
  runs = [workdirs.read(path) for path in (finished[0], unfinished, *committed())]
  found = checked(page.page(runs))
  assert found.words.startswith(f"{len(runs)} runs")
  index = found.words[: found.words.index("Claims")]
  assert all(str(run_.path) in index for run_ in runs)
  assert [v for k, v in found.attributes if k == "href"][: len(runs)] == [
    f"#run-{i}" for i in range(len(runs))
  ]


def test_the_configuration_is_given_once(finished):
  run_ = workdirs.read(finished[0])
  config = page._config(run_, run_.studies[0])
  assert config["arms"] == [
    ["arm", "optimizer.lr", "optimizer.name"],
    ["adam", "0.01", "adam"],
    [HOSTILE, "1e-05", "sgd"],
  ]
  assert config["shared"]["width"] == "16"
  assert config["shared"]["seeds"] == "0, 1, 2"
  assert not {"optimizer.lr", "optimizer.name"} & set(config["shared"])


def test_what_the_arms_plotted_is_shown(finished, tmp_path):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  shutil.copy(tmp_path / "learning/plot.png", tmp_path / "learning/adam/samples.png")
  found = checked(page.page([workdirs.read(tmp_path)]))
  assert found.tags.count("img") == 1
  assert "adam: samples" in found.words


def columns(line: str) -> int:
  return len(re.findall(r"(?<!\\)\|", line)) - 1


def test_markdown(finished, capsys, tmp_path):
  workdir, results = finished
  assert main([str(workdir), "--markdown"]) == 0
  output = capsys.readouterr().out
  assert not (workdir / "report.html").exists()
  blocks = [b.splitlines() for b in output.split("\n\n") if b.startswith("|")]
  assert [len(rows) for rows in blocks] == [2 + 2, 2 + 2]  # claims, arms
  for rows in blocks:
    assert len({columns(row) for row in rows}) == 1
  assert all(c["verdict"] in output for c in results["claims"])
  assert "<script" not in output
  assert main([str(workdir), "--markdown", f"--out={tmp_path / 'page.html'}"]) == 0
  checked((tmp_path / "page.html").read_text())


def test_the_page_lies_in_the_first_workdir(finished, unfinished, capsys):
  assert main([str(unfinished), str(finished[0])]) == 0
  checked((unfinished / "report.html").read_text())
  assert str(unfinished / "report.html") in capsys.readouterr().err


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("nothing", None, "does not exist: expected what a run wrote, such as runs/s5/laptop"),
    ("empty", {}, "is no workdir: expected what a run wrote"),
    ("runs", {"s5/laptop/verdict.json": "{}"}, "is no workdir: .*did you mean .*runs/s5/laptop"),
    ("text.json", "text", "is not JSON"),
    ("list.json", "[]", "is no file of results"),
    ("other.json", '{"experiment": "s5"}', "is no file of results"),
  ],
)
def test_what_is_no_run_is_named_in_one_line(name, content, message, tmp_path, capsys):
  path = tmp_path / name
  if isinstance(content, str):
    path.write_text(content)
  elif content is not None:
    path.mkdir()
    for file, words in content.items():
      (path / file).parent.mkdir(parents=True)
      (path / file).write_text(words)
  assert main([str(path)]) == 2
  error = capsys.readouterr().err
  assert re.fullmatch(f"error: {re.escape(str(path))} {message}.*\n", error)


def test_without_a_name_and_without_markers(tmp_path, capsys):
  assert main([]) == 2
  assert "no DIR is named" in capsys.readouterr().err
  (tmp_path / "README.md").write_text("nothing")
  assert main([f"--readme={tmp_path / 'README.md'}"]) == 2
  assert "expected the lines" in capsys.readouterr().err
  assert (tmp_path / "README.md").read_text() == "nothing"


def test_curves_of_stages_and_of_seeds_one_after_another():
  def records(stage, *values):
    return [{"stage": stage, "step": 10 * (i + 1), "m": list(v)} for i, v in enumerate(values)]

  mapped = records("a", (1, 2), (3, 4)) + records("b", (5, 6))
  steps, values = plots.curve([*mapped, {"stage": "b", "step": 20, "n": [0, 0]}], "m")
  assert steps.tolist() == [10, 20, 30]
  assert values.tolist() == [[1, 2], [3, 4], [5, 6]]
  looped = records("a-seed0", (1,), (3,)) + records("a-seed1", (2,))  # the second is under way
  steps, values = plots.curve(looped, "m")
  assert steps.tolist() == [10]
  assert values.tolist() == [[1, 2]]
  assert len(plots.curve(mapped, "absent")[0]) == 0


def test_metrics_by_size_share_a_panel(tmp_path):
  sizes = {f"time/{n}": [1.0, 2.0] for n in (256, 1024)}
  arm = {"params": 1, "steps": 0, "wall_s": 1.0, "metrics": sizes}
  study = Study("speed", {"a": {}, "b": {}}, plot=list(sizes))
  results = {"experiment": "e", "scale": "laptop", "claims": [], "arms": {"speed/a": arm}}
  rows = plots.panels(study, copy.deepcopy(results), tmp_path)
  assert [[p.label for p in row] for row in rows] == [["time by size: mean and range over seeds"]]
  words = Checker(plots.svg(rows[0][0])).words
  assert "256" in words
  assert "1024" in words


def test_groups_of_an_only_arm_share_a_panel(tmp_path):
  names = ["dense/known", "merged/known", "dense/new", "merged/new", "error", "lone/other"]
  values: dict = {name: [1.0 + i, 2.0 + i] for i, name in enumerate(names)}
  arm = {"params": 1, "steps": 0, "wall_s": 1.0, "metrics": values}
  results = {"experiment": "e", "scale": "laptop", "claims": []}

  def labels(arms):
    study = Study("one", {a: {} for a in arms}, plot=names)
    made = results | {"arms": {f"one/{a}": arm for a in arms}}
    rows = plots.panels(study, copy.deepcopy(made), tmp_path)
    return rows, [p.label.partition(" at the end")[0] for row in rows for p in row]

  rows, found = labels(["a"])
  assert found == ["known", "new", "error", "lone/other"]
  assert rows[0][0].lines == 2
  words = Checker(plots.svg(rows[0][0])).words
  assert "dense" in words and "merged" in words
  assert labels(["a", "b"])[1] == names

  # One with a curve has a row of its own, and takes none of the others with it.
  lines = [{"stage": "s", "step": n, "dense/known": [1.0, 2.0]} for n in (10, 20)]
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
  _, found = labels(["a"])
  assert found[1:] == ["dense/known", "merged/known", "new", "error", "lone/other"]
