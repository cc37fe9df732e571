"""What `launch.pods` writes: checked as text, and run with stand-ins for the clouds' programs."""

import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import kubernetes_validate
import pytest
import yaml

from launch import runner
from launch.errors import ConfigurationError
from launch.interruption import GRACE_S
from launch.pods import settings
from launch.pods.__main__ import main, prepare

TPU = ["tpu-vm", "s5", "--scale=paper/pathx", "--bucket=gs://ours/runs", "--zone=us-x1-a"]
GKE = ["gke", "s5", "--scale=paper/pathx", "--bucket=gs://ours/runs", "--image=registry/roundup"]
SLURM = ["slurm", "s5", "--scale=paper/pathx", "--bucket=s3://ours", "--topology=cuda-16"]
# Name -> command line, hosts of all slices (0: the platform knows), chips of a host.
MATRIX = {
  "tpu": (TPU, 0, 0),
  "tpu mesh": ([*TPU, "--mesh=data=4,tensor=4"], 0, 0),
  "tpu spot": ([*TPU, "--spot", "--project=p", "--service_account=me@p"], 0, 0),
  "tpu slices": ([*TPU, "--topology=v5e-256x4", "--mesh=data=1024"], 0, 0),
  "tpu v5p": ([*TPU, "--topology=v5p-32", "--env=A=it's b", "--", "--config.width=256"], 0, 0),
  "tpu sgconv": (["tpu-vm", "sgconv", *TPU[2:], "--topology=v6e-8"], 0, 0),
  "gke": (GKE, 4, 4),
  "gke slices": ([*GKE, "--topology=v5e-256x4", "--spot", "--namespace=n"], 256, 4),
  "gke v5p": ([*GKE, "--topology=v5p-32", "--service_account=sa", "--env=A=it's b"], 4, 4),
  "gke v4": ([*GKE, "--topology=v4-8", "--context=c"], 1, 4),
  "gke one chip": ([*GKE, "--topology=v6e-1"], 1, 1),
  "gke eight": ([*GKE, "--topology=v6e-8", "--chips_per_node=8"], 1, 8),
  "gke sgconv": (["gke", "sgconv", *GKE[2:], "--topology=v5e-64"], 16, 4),
  "slurm": (SLURM, 2, 8),
  "slurm four": ([*SLURM, "--gpus_per_node=4", "--cpus=8", "--partition=p", "--account=a"], 4, 4),
  "slurm part": ([*SLURM, "--topology=cuda-2", "--env=A=it's b", "--code=/shared/co de"], 1, 2),
  "slurm image": ([*SLURM, "--image=registry#roundup"], 2, 8),
  "slurm shared": ([*SLURM, "--bucket=/shared/runs", "--image=registry#roundup"], 2, 8),
  "slurm sgconv": (["slurm", "sgconv", *SLURM[2:], "--mesh=data=8,tensor=2"], 2, 8),
}


def scale_of(words):
  """The command line, with a scale that its experiment has."""
  scales = runner.find(words[1]).SCALES
  mended = {f"--scale={scale}": f"--scale={scales[1]}" for scale in {"paper/pathx"} - {*scales}}
  return [mended.get(word, word) for word in words]


def sh(*command, **options):
  return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture(params=MATRIX)
def pod(request):
  words, hosts, chips = MATRIX[request.param]
  run, recipe, dry = prepare(scale_of(words))
  assert not dry
  return run, recipe, hosts, chips


def shell(recipe):
  """Every shell file, every command, and the shell in a Dockerfile."""
  found = {n: t for n, t in recipe.files.items() if n.endswith((".sh", ".sbatch"))}
  found["commands"] = "\n".join(["#!/bin/sh", *map(shlex.join, recipe.commands), ""])
  if "Dockerfile" in recipe.files:
    text = recipe.files["Dockerfile"].replace("\\\n", " ")
    found["image"] = "#!/bin/sh\n" + "\n".join(re.findall(r"^RUN (.*)$", text, re.M)) + "\n"
  return found


def test_shell(pod, tmp_path):
  files = shell(pod[1])
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")  # a wheel's program
  for command in (["bash", "-n"], [str(shellcheck), "--severity=style"]):
    for name in files:
      done = sh(*command, name, cwd=tmp_path)
      assert not done.returncode, done.stdout + done.stderr


def test_one_commit_and_one_command(pod):
  run, recipe, _, _ = pod
  head = sh("git", "rev-parse", "HEAD").stdout.strip()
  assert run.commit == head
  everything = "\n".join([*recipe.files, *recipe.files.values(), *map(shlex.join, recipe.commands)])
  assert set(re.findall(r"\b[0-9a-f]{40}\b", everything)) == {head}
  assert run.command[:3] == ("python", "-m", f"experiments.{run.experiment}")
  assert "--distributed" in run.command
  assert f"--workdir={run.bucket}/{run.experiment}/{run.scale}" in run.command
  holders = [t for n, t in recipe.files.items() if n.startswith(("worker", "job"))]
  words = yaml.safe_load(holders[0]) if "jobset.yaml" in recipe.files else None
  if words:
    assert job_of(words)["template"]["spec"]["containers"][0]["command"] == list(run.command)
  else:
    assert sum(shlex.join(run.command) in text for text in holders) == 1


def job_of(manifest):
  return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_hosts_times_chips(pod):
  run, recipe, hosts, chips = pod
  topology = run.topology
  if "jobset.yaml" in recipe.files:
    manifest = yaml.safe_load(recipe.files["jobset.yaml"])
    job, slices = job_of(manifest), manifest["spec"]["replicatedJobs"][0]["replicas"]
    resources = job["template"]["spec"]["containers"][0]["resources"]
    assert job["completions"] == job["parallelism"]
    assert resources["requests"] == resources["limits"] == {"google.com/tpu": chips}
    assert slices * job["parallelism"] == hosts
    shape = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, shape.split("x"))) * slices == topology.chips == hosts * chips
  elif "job.sbatch" in recipe.files:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", recipe.files["job.sbatch"], re.M))
    assert (int(options["nodes"]), int(options["gpus-per-node"])) == (hosts, chips)
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # one task a GPU
    assert hosts * chips == topology.chips
    assert "gpus-per-task" not in recipe.files["job.sbatch"]
  else:
    kind, size = re.search(r"--accelerator-type=(\w+)-(\d+)", recipe.files["pod.sh"]).groups()
    cores = 2 if kind in ("v4", "v5p") else 1
    assert int(size) * topology.slices == topology.chips * cores
    slices = re.search(r"^slices=\((.*)\)$", recipe.files["pod.sh"], re.M)[1].split()
    assert len(slices) == topology.slices
    assert ("--node-count=4" in recipe.files["pod.sh"]) == (topology.slices == 4)


def test_grace(pod):
  """Every platform that lets us say waits for SIGKILL until the run has left by itself."""
  run, recipe, _, _ = pod
  (grace,) = [word for word in run.command if word.startswith("--grace=")]
  assert GRACE_S <= float(grace.partition("=")[2]) < settings.GRACE_S - 10
  text = "\n".join(recipe.files.values())
  found = re.findall(r"(?:TimeoutStopSec=|GracePeriodSeconds: |signal=B:TERM@)(\d+)", text)
  assert found == [str(settings.GRACE_S)]


# The JobSet API, jobset.x-k8s.io/v1alpha2, as far as it is used here; its jobs are Kubernetes' own.
JOBSET = {
  "type": "object",
  "additionalProperties": False,
  "required": ["apiVersion", "kind", "metadata", "spec"],
  "properties": {
    "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
    "kind": {"const": "JobSet"},
    "metadata": {
      "type": "object",
      "required": ["name"],
      "properties": {"name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}},
    },
    "spec": {
      "type": "object",
      "additionalProperties": False,
      "required": ["replicatedJobs"],
      "properties": {
        "suspend": {"type": "boolean"},
        "network": {
          "type": "object",
          "additionalProperties": False,
          "properties": {
            "enableDNSHostnames": {"type": "boolean"},
            "publishNotReadyAddresses": {"type": "boolean"},
            "subdomain": {"type": "string"},
          },
        },
        "failurePolicy": {
          "type": "object",
          "additionalProperties": False,
          "properties": {
            "maxRestarts": {"type": "integer", "minimum": 0},
            "rules": {
              "type": "array",
              "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "action"],
                "properties": {
                  "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                  "action": {
                    "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                  },
                  "onJobFailureReasons": {"type": "array", "items": {"type": "string"}},
                  "targetReplicatedJobs": {"type": "array", "items": {"type": "string"}},
                },
              },
            },
          },
        },
        "replicatedJobs": {
          "type": "array",
          "minItems": 1,
          "items": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name", "template"],
            "properties": {
              "name": {"type": "string"},
              "replicas": {"type": "integer", "minimum": 1},
              "template": {"type": "object", "required": ["spec"]},
            },
          },
        },
      },
    },
  },
}


@pytest.mark.parametrize("case", [name for name in MATRIX if name.startswith("gke")])
def test_manifest(case):
  run, recipe, _ = prepare(scale_of(MATRIX[case][0]))
  manifest = yaml.safe_load(recipe.files["jobset.yaml"])
  jsonschema.validate(manifest, JOBSET)
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}} | {
    "spec": job_of(manifest)
  }
  kubernetes_validate.validate(job, "1.31", strict=True)
  # A pod's host name must fit: JobSet's name, the job's, two indices.
  assert len(f"{run.name}-slice-{run.topology.slices}-{run.topology.chips}") <= 63
  # A mistake ends the set, which is the job's reason "PodFailurePolicy"; all else starts it again.
  (rule,) = job_of(manifest)["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [settings.MISTAKE]
  assert rule["onExitCodes"]["containerName"] == "run"
  spec = job_of(manifest)["template"]["spec"]
  assert spec["restartPolicy"] == "Never"  # which a podFailurePolicy requires
  assert spec.get("hostNetwork", False) == (run.topology.slices > 1)


def test_dry_run_shows_all_and_touches_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("launch.pods.recipe.subprocess", None)  # nothing is run
  for words, _, _ in MATRIX.values():
    split = words.index("--") if "--" in words else len(words)
    asked = scale_of([*words[:split], "--dry-run", *words[split:]])
    assert main(asked) == 0
    shown = capsys.readouterr().out
    run, recipe, dry = prepare(asked)
    assert dry
    for name, text in recipe.files.items():
      assert f"# {run.folder / name}\n{text.rstrip()}\n" in shown
    for command in recipe.commands:
      assert f"\n{shlex.join(command)}\n" in shown
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["tpu-vm", "s6", *TPU[2:]], "unknown experiment 's6'"),
    ([*TPU, "--scale=paper/pathy"], "did you mean 'paper/pathx'"),
    ([*TPU, "--study=lra,nothing"], "--study=nothing: not at scale"),
    ([*TPU, "--bucket=ours"], "accepted: gs://BUCKET or s3://BUCKET"),
    ([*TPU, "--bucket=/shared"], "accepted: gs://BUCKET"),
    ([*SLURM, "--bucket=shared"], "a folder that all nodes share"),
    ([*TPU, "--topology=v9-1"], "--topology=v9-1; accepted: v5e-N"),
    ([*TPU, "--topology=cuda-8"], "accepted here: v5e, v6e, v4, v5p"),
    ([*TPU, "--topology=v5e-2"], "v5e-N of 1, 4, 8"),
    ([*TPU, "--topology=v5p-4"], "v5p-N of 8, 16, 32"),
    ([*SLURM, "--topology=v5e-4"], "accepted here: cuda"),
    (SLURM[:-1], "names no topology for scale 'paper/pathx' here; give --topology=cuda-N"),
    (["tpu-vm", "s5", "--scale=laptop", *TPU[3:]], "give --topology=v5e-N"),
    ([*TPU, "--mesh=data=8"], "--mesh=data=8 takes 8 chips; v5e-16 has 16"),
    ([*TPU, "--mesh=tensor=3"], "takes 3 chips"),
    ([*TPU, "--mesh=dta=16"], "unknown axis 'dta'"),
    ([*TPU, "--name=Run_1"], "--name=Run_1; accepted"),
    ([*TPU, "--env=PATH"], "--env=PATH; accepted: NAME=VALUE"),
    ([*TPU, "--", "--config.widht=3"], "did you mean 'width'"),
    ([*TPU, "--", "--mesh=data=4"], "say it before the --"),
    ([*TPU, "--", "seeds"], "accepted: --FLAG=VALUE"),
    ([*GKE, "--topology=v5e-16", "--chips_per_node=8"], "--chips_per_node=8; accepted"),
    ([*GKE, "--topology=v5e-4x2"], "several slices need two hosts each"),
    ([*SLURM, "--gpus_per_node=5"], "does not fill whole nodes"),
  ],
)
def test_mistakes(words, message, capsys):
  assert main(words) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
  assert message in error


def test_no_repository(monkeypatch, tmp_path):
  monkeypatch.setattr(settings, "repository", lambda: tmp_path)
  with pytest.raises(ConfigurationError, match="no git repository"):
    settings.git("rev-parse", "HEAD")


# The scripts, run against stand-ins that record their calls

GCLOUD = """
set -e
echo "$*" >>"$FAKE/calls"
for word; do
  case $word in
    --command=*) command=${word#--command=} ;;
    --worker=*) worker=${word#--worker=} ;;
    --output-directory=*) output=${word#--output-directory=} ;;
  esac
done
case "$3 $4" in
  'queued-resources describe')
    [ -e "$FAKE/state" ] || { echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1; }
    cat "$FAKE/state" ;;
  'queued-resources create') cat "$FAKE/next" >"$FAKE/state" ;;
  'queued-resources delete') rm -r "$FAKE/state" "$FAKE"/vm-* 2>/dev/null || true ;;
  'tpu-vm scp') for i in 0 1; do mkdir -p "$FAKE/vm-$i/units"; cp "$5" "$6" "$FAKE/vm-$i/"; done ;;
  'tpu-vm ssh')
    [ "$worker" = all ] && worker='0 1'
    for i in $worker; do
      export HOME=$FAKE/vm-$i UNITS=$FAKE/vm-$i/units
      cd "$HOME"
      if [ -n "$output" ]; then bash -c "$command" >"$OLDPWD/$output/$i.log"; cd "$OLDPWD"
      else bash -c "$command"; fi
    done ;;
esac
"""
SYSTEMCTL = """
echo "systemctl $*" >>"$HOME/calls"
case "$1 $2" in
  'show --property=ActiveState') cat "$HOME/active" 2>/dev/null || echo inactive ;;
  'show --property=ExecMainStatus') echo 2 ;;
  start*) echo active >"$HOME/active"; echo 'step 7' >"$HOME/roundup/s5-paper-pathx.log" ;;
  disable*) rm -f "$HOME/active" ;;
  cat*) cat "$UNITS/$2.service" ;;
esac
"""
# Stands for `python3 -m pip` and `python3 -m uv`; makes a virtual environment whose python records.
PYTHON = """
if [ "$2 $3" = 'uv venv' ]; then
  mkdir -p "${!#}/bin"
  printf '#!/bin/bash\\nprintf "%%s\\\\n" python "$@" >"$HOME/ran"; echo "$A" >>"$HOME/ran"\\n' \
    >"${!#}/bin/python"
  chmod +x "${!#}/bin/python"
fi
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """Puts stand-ins on PATH: `fake(name=body, ...)` returns where they record."""
  binaries, records = tmp_path / "bin", tmp_path / "fake"
  binaries.mkdir()
  records.mkdir()
  (records / "next").write_text("ACTIVE\n")
  monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
  monkeypatch.setenv("FAKE", str(records))
  monkeypatch.setenv("POLL_S", "0")
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
  monkeypatch.setenv("GIT_CONFIG_KEY_0", "safe.directory")
  monkeypatch.setenv("GIT_CONFIG_VALUE_0", "*")
  monkeypatch.chdir(tmp_path)

  def put(**bodies):
    for name, body in bodies.items():
      path = binaries / name
      path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
      path.chmod(0o755)
    return records

  return put


def say(word, name="s5-paper-pathx"):
  script = pathlib.Path("runs", "pods", name, "pod.sh")
  return sh("bash", script, word)


def calls(records, pattern):
  lines = (records / "calls").read_text().splitlines() if (records / "calls").exists() else []
  return [line for line in lines if re.search(pattern, line)]


def test_tpu_vm_starts_once(fake):
  records = fake(gcloud=GCLOUD, systemctl=SYSTEMCTL, python3=PYTHON, sudo='exec "$@"')
  words = [*TPU, "--env=A=it's b", "--", "--config.width=256"]
  run = prepare(words)[0]
  assert main(words) == 0
  for _ in range(2):
    again = say("start")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("runs already") == 2
  assert len(calls(records, "queued-resources create")) == 1
  for i in range(2):
    home = records / f"vm-{i}"
    starts = [line for line in (home / "calls").read_text().splitlines() if "start" in line]
    assert starts == ["systemctl start roundup-s5-paper-pathx"]
    unit = (home / "units" / "roundup-s5-paper-pathx.service").read_text()
    assert f"RestartPreventExitStatus={settings.MISTAKE}\n" in unit
    assert "Restart=on-failure\n" in unit
    # What the unit executes is the run's own command, at the commit, with its variables.
    execute = re.search(r"^ExecStart=(.*)$", unit, re.M)[1]
    environment = os.environ | {"HOME": str(home)}
    assert not sh(*shlex.split(execute), env=environment).returncode
    assert (home / "ran").read_text().splitlines() == [*run.command, "it's b"]
    head = sh("git", "-C", home / "roundup" / run.commit, "rev-parse", "HEAD")
    assert head.stdout.strip() == run.commit
  assert say("status").stdout.count("runs: step 7") == 2
  assert say("logs").returncode == 0
  logs = pathlib.Path("runs/pods/s5-paper-pathx/logs/s5-paper-pathx")
  assert [(logs / f"{i}.log").read_text() for i in range(2)] == ["step 7\n"] * 2
  # Stopped and deleted, twice.
  for word, told in (("stop", ""), ("stop", ""), ("delete", "gone"), ("delete", "gone")):
    done = say(word)
    assert done.returncode == 0 and told in done.stdout, done.stderr
  assert len(calls(records, "queued-resources delete")) == 1
  assert say("status").stdout == "s5-paper-pathx: ABSENT\n"


def test_tpu_vm_refuses_another_commit(fake):
  records = fake(gcloud=GCLOUD, systemctl=SYSTEMCTL, python3=PYTHON, sudo='exec "$@"')
  assert main(TPU) == 0
  for i in range(2):
    unit = records / f"vm-{i}" / "units" / "roundup-s5-paper-pathx.service"
    unit.write_text(re.sub(r"[0-9a-f]{40}", "0" * 40, unit.read_text()))
  refused = say("start")
  assert refused.returncode and "runs another commit: stop it first" in refused.stderr


def test_tpu_vm_after_a_pre_emption(fake):
  records = fake(gcloud=GCLOUD, systemctl=SYSTEMCTL, python3=PYTHON, sudo='exec "$@"')
  assert main([*TPU, "--spot"]) == 0
  (records / "state").write_text("SUSPENDED\n")
  again = say("start")
  assert again.returncode == 0, again.stderr
  assert "SUSPENDED" in again.stdout and "runs already" not in again.stdout
  made = calls(records, "queued-resources (create|delete)")
  assert [line.split()[3] for line in made] == ["create", "delete", "create"]
  assert all("--spot" in line for line in calls(records, "create"))
  # A request that failed is shown, not repeated; nor is anything made when asking fails.
  (records / "state").write_text("FAILED\n")
  assert say("start").returncode == 1
  fake(gcloud='echo "ERROR: permission denied" >&2; exit 1')
  refused = say("start")
  assert refused.returncode == 1 and "permission denied" in refused.stderr
  assert len(calls(records, "create")) == 2


def test_tpu_vm_keeps_going_until_the_run_ends(fake):
  # The third question finds the slice gone, the sixth the run finished.
  gone = """
  if [[ $* == *'--worker=0'* ]]; then
    echo asked >>"$FAKE/asked"
    case $(wc -l <"$FAKE/asked") in
      3) echo SUSPENDED >"$FAKE/state"; exit 255 ;;
      6) echo inactive >"$FAKE/vm-0/active" ;;
    esac
  fi"""
  records = fake(gcloud=gone + GCLOUD, systemctl=SYSTEMCTL, python3=PYTHON, sudo='exec "$@"')
  assert main([*TPU, "--spot"]) == 0
  kept = say("keep")
  assert kept.returncode == 0, kept.stderr
  assert kept.stdout.rstrip().endswith("ended well")
  assert len(calls(records, "queued-resources create")) == 2
  for i in range(2):
    (records / f"vm-{i}" / "active").write_text("failed\n")
  # A unit that failed is started again by hand only; then `keep` says when it fails for good.
  fake(systemctl=SYSTEMCTL.replace("echo active >", "echo failed >"))
  failed = say("keep")
  assert failed.returncode == 1 and "failed, exit code 2" in failed.stderr


KUBECTL = """
echo "kubectl $*" >>"$FAKE/calls"
case $* in
  *'get jobset'*jsonpath*) cat "$FAKE/terminal" 2>/dev/null ;;
  *'get pods'*name*) printf 'pod/a-0\\npod/a-1\\n' ;;
  *'logs pod/'*) echo "log of ${!#}" ;;
  *'delete jobset'*) rm -f "$FAKE/terminal" ;;
esac
true
"""
DOCKER = """
echo "docker $*" >>"$FAKE/calls"
case $1 in
  manifest) [ -e "$FAKE/image" ] ;;
  push) touch "$FAKE/image" ;;
esac
"""


def test_gke_starts_once(fake):
  records = fake(kubectl=KUBECTL, docker=DOCKER)
  assert main([*GKE, "--namespace=n"]) == 0
  assert say("start").returncode == 0  # applying the same manifest changes nothing
  assert len(calls(records, "docker build")) == len(calls(records, "docker push")) == 1
  assert len(calls(records, "kubectl --namespace=n apply --filename=jobset.yaml")) == 2
  folder = pathlib.Path("runs/pods/s5-paper-pathx")
  image = job_of(yaml.safe_load((folder / "jobset.yaml").read_text()))["template"]["spec"]
  assert calls(records, "docker push")[0] == f"docker push {image['containers'][0]['image']}"
  (bundle,) = folder.glob("*.bundle")
  assert f"COPY {bundle.name} " in (folder / "Dockerfile").read_text()
  assert say("logs").returncode == 0
  assert (folder / "logs" / "a-1.log").read_text() == "log of pod/a-1\n"
  for word in ("status", "stop", "delete"):
    assert say(word).returncode == 0
  assert calls(records, "patch jobset s5-paper-pathx")
  # Finished: not again. Failed: from the newest checkpoint, as a new set.
  (records / "terminal").write_text("Completed")
  assert "finished" in say("start").stdout
  (records / "terminal").write_text("Failed")
  assert say("start").returncode == 0
  assert len(calls(records, "apply")) == 3
  assert len(calls(records, "delete jobset")) == 2


SLURM_FAKES = {
  "squeue": 'echo "squeue $*" >>"$FAKE/calls"; cat "$FAKE/queue" 2>/dev/null; true',
  "sbatch": 'echo "sbatch $*" >>"$FAKE/calls"; echo 41 >"$FAKE/queue"; echo 41',
  "scancel": 'echo "scancel $*" >>"$FAKE/calls"; rm -f "$FAKE/queue"',
  "scontrol": 'echo "scontrol $*" >>"$FAKE/calls"',
  "python3": PYTHON,
}


def test_slurm_starts_once(fake):
  records = fake(**SLURM_FAKES)
  assert main(SLURM) == 0
  assert "job 41 is there already" in say("start").stdout
  assert calls(records, "sbatch") == ["sbatch job.sbatch"]
  folder = pathlib.Path("runs/pods/s5-paper-pathx")
  assert (folder / "logs").is_dir()
  assert say("status").returncode == 0
  assert say("stop").returncode == 0
  assert calls(records, "scancel") == ["scancel --batch --signal=TERM 41"]
  assert (folder / "stopped").exists()
  assert say("start").returncode == 0  # goes on
  assert len(calls(records, "sbatch")) == 2
  assert not (folder / "stopped").exists()
  assert say("delete").returncode == 0 and say("delete").returncode == 0
  run = prepare(SLURM)[0]
  assert (pathlib.Path("roundup") / run.commit / ".venv/bin/python").exists()


@pytest.mark.parametrize(
  ("ends", "queue", "stopped", "again", "code"),
  [
    ("exit 0", "RUNNING", False, False, 0),
    ("exit 2", "RUNNING", False, False, 2),  # refused
    ("exit 1", "RUNNING", False, True, 1),
    ("exit 134", "RUNNING", False, True, 134),  # a peer was lost
    ("exit 1", "CANCELLED", False, False, 1),
    ("signal", "RUNNING", False, True, 143),  # the time is up, or a pre-emption
    ("signal", "RUNNING", True, False, 143),  # `pod.sh stop`
    ("signal", "COMPLETING", False, False, 143),
  ],
)
def test_slurm_job(fake, monkeypatch, ends, queue, stopped, again, code):
  body = """printf '%s\\n' "$@" >"$FAKE/srun.new"
  trap 'sleep 0.3; exit 143' TERM  # saves its state
  mv "$FAKE/srun.new" "$FAKE/srun"
  """
  body += "while true; do sleep 0.05; done" if ends == "signal" else ends
  records = fake(**SLURM_FAKES, srun=body)
  assert main([*SLURM, "--env=A=it's b"]) == 0
  (records / "queue").write_text(f"{queue}\n")
  (records / "calls").unlink()
  folder = pathlib.Path("runs/pods/s5-paper-pathx").absolute()
  if stopped:
    (folder / "stopped").touch()
  monkeypatch.setenv("SLURM_SUBMIT_DIR", str(folder))
  monkeypatch.setenv("SLURM_JOB_ID", "41")
  job = subprocess.Popen(["bash", "job.sbatch"], cwd=folder)
  if ends == "signal":
    deadline = time.monotonic() + 20
    while not (records / "srun").exists():
      assert time.monotonic() < deadline
      time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
  assert job.wait(20) == code
  assert calls(records, "scontrol") == ["scontrol requeue 41"] * again
  words = (records / "srun").read_text().splitlines()
  run = prepare(SLURM)[0]
  assert words[-len(run.command) :] == [".venv/bin/python", *run.command[1:]]
  assert f"--output={folder}/logs/%j-%t.log" in words


def test_slurm_gives_up(fake, monkeypatch):
  records = fake(**SLURM_FAKES, srun="exit 1")
  assert main(SLURM) == 0
  (records / "queue").write_text("RUNNING\n")
  folder = pathlib.Path("runs/pods/s5-paper-pathx").absolute()
  monkeypatch.setenv("SLURM_SUBMIT_DIR", str(folder))
  monkeypatch.setenv("SLURM_JOB_ID", "41")
  (folder / "failures").write_text("41: exit code 1\n" * (settings.RESTARTS - 1))
  for turns in (1, 1):
    assert sh("bash", "job.sbatch", cwd=folder).returncode == 1
    assert len(calls(records, "scontrol requeue")) == turns


def test_a_failing_command_ends_it(fake):
  fake(kubectl="exit 7", docker=DOCKER)
  assert main(GKE) == 7
