"""Simplified State Space Layers for Sequence Modeling (S5).

Smith, Warrington and Linderman, ICLR 2023, arXiv:2208.04933.

S4 runs a bank of single-input state spaces, one a feature. S5 runs one multi-input, multi-output
state space with a smaller shared state, whose transition is diagonal: a step is an elementwise
multiply and a sequence is a scan.

Claim (round-up of 2022-08-14): about the accuracy of S4; the writer could not tell how the running
times compare. The paper adds irregular sampling (each gap discretised by itself) and transfer to
another sampling rate without training (the timescales rescaled).

Laptop scale: digits read pixel by pixel, each repeated 4 times (length 256), 2 layers of width 32,
one direction, the last state classified, so that memory matters; a simulated pendulum seen at
irregular times; and the running time of a layer. Paper scale: the rows of the released run scripts;
`paper/...` configurations have their parameter counts, optimizer groups and schedules.

Found at laptop scale (3 seeds, `results/s5.json`): S5 is as accurate as S4D and far above a GRU of
equal size; whether HiPPO-N starts better than a random spectrum stays open, as length 256 is short
for it to matter. Unscaled timescales fail at half the rate and rescaled ones lose nothing, but each
pixel is still seen twice there, so no information is lost either. Gaps lower the pendulum's error
by a fifth, with an interval that three seeds leave too wide to decide. A block takes 0.2 to 0.6 of
the time of S4D's on a CPU, whose kernel here is materialised and convolved by FFT.

The sMNIST, psMNIST and sCIFAR rows of the paper are not here: neither their initialisation of C nor
their parameter groups are known.

    python -m experiments.s5                                   # all laptop studies, 7 min, 2 cores
    python -m experiments.s5 --study=accuracy --seeds=5
    python -m experiments.s5 --study=tuning                    # how the learning rates were chosen
    python -m experiments.s5 --scale=paper/listops --mesh=data=5
    python -m launch.plan s5 --scale=paper/pathx               # what a step takes on v5e-16
"""

import functools
from typing import Any

import ml_collections
import numpy as np

from experiments.datasets import long_range, views
from launch import Claim, Evaluation, Study, Task, main, supervised
from models import recurrent, sequence, ssm
from models.kernels import timing
from objectives import classification, optimizers, regression

# Rows of the released run scripts: layers, width H, state P, blocks J, dropout, ssm_lr, lr, batch,
# epochs, weight decay, C, parameter groups; then the data, then what else differs.
PAPER: dict[str, tuple[tuple[Any, ...], str, dict[str, Any]]] = {
  "listops": (
    (8, 128, 16, 8, 0.0, 1e-3, 3e-3, 50, 40, 0.04, "lecun_normal", "BfastandCdecay"),
    "listops",
    {"block.activation": "half_glu2"},
  ),
  "text": (
    (6, 256, 192, 12, 0.1, 1e-3, 4e-3, 50, 35, 0.07, "lecun_normal", "standard"),
    "imdb_reviews",
    # There is no validation split: the best epoch is the best on the test set, as published.
    {"block.activation": "half_glu2", "optimizer.dt_global": True, "optimizer.warmup_steps": 0}
    | {"select": "test/accuracy"},
  ),
  "retrieval": (
    (6, 128, 256, 16, 0.0, 1e-3, 2e-3, 32, 20, 0.05, "trunc_standard_normal", "standard"),
    "aan",
    {"optimizer.dt_global": True},
  ),
  "image": (
    (6, 512, 384, 3, 0.1, 1e-3, 4.5e-3, 50, 250, 0.07, "lecun_normal", "BfastandCdecay"),
    "cifar10",
    {"ssm.clip_eigs": True},
  ),
  "pathfinder": (
    (6, 192, 256, 8, 0.05, 9e-4, 4.5e-3, 64, 200, 0.03, "trunc_standard_normal", "standard"),
    "pathfinder32",
    {"block.momentum": 0.9},
  ),
  "pathx": (
    (6, 128, 256, 16, 0.0, 6e-4, 1.8e-3, 32, 75, 0.06, "complex_normal", "BandCdecay"),
    "pathfinder128",
    {"ssm.dt_min": 1e-4, "block.momentum": 0.9},
  ),
  "speech": (
    (6, 96, 128, 16, 0.1, 2e-3, 8e-3, 16, 40, 0.04, "lecun_normal", "noBCdecay"),
    "speech_commands_35",
    {},
  ),
  "pendulum": (
    (4, 30, 16, 8, 0.0, 3e-3, 1.2e-2, 32, 100, 0.0, "trunc_standard_normal", "standard"),
    "pendulum",
    {"block.norm": "layer", "block.prenorm": False, "select": ""}
    | {"block.activation": "half_glu2", "ssm.bidirectional": False, "ssm.dt_min": 1e-2},
  ),
}
PAPER_KEYS = (
  *("layers", "width", "ssm.state", "ssm.blocks", "block.dropout", "optimizer.ssm_lr"),
  *("optimizer.lr", "batch_size", "epochs", "optimizer.weight_decay", "ssm.c_init"),
  "optimizer.option",
)
SCALES = ("laptop", *(f"paper/{row}" for row in PAPER))
# What each scale is planned for: a batch of 50 divides among two.
TOPOLOGIES = {f"paper/{row}": ("v5e-4", "data=2,tensor=2") for row in ("listops", "text", "image")}
TOPOLOGIES["paper/*"] = ("v5e-16", "data=16")


def get_config(scale: str = "laptop") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    {
      "data": {"name": "digits", "repeat": 4},  # any of long_range.SETS
      "layers": 2,
      "width": 32,
      "mixer": "s5",  # | s4d | gru
      "ssm": {
        "state": 32,  # P, before conjugate symmetry halves it
        "blocks": 4,  # J
        "spectrum": "hippo",
        "c_init": "trunc_standard_normal",
        "bidirectional": False,
        "clip_eigs": False,
        "dt_min": 1e-3,
        "dt_max": 1e-1,
      },
      "block": {
        "activation": "half_glu1",
        "norm": "batch",
        "momentum": 0.95,
        "prenorm": True,
        "dropout": 0.0,
      },
      "pooling": "last",
      "conv": True,  # frames of the pendulum through the paper's CNN; else pixels, densely
      "gaps": "ssm",  # | append | ignore: what irregular sampling is told
      "optimizer": {
        "option": "standard",
        "ssm_lr": 4e-3,
        "lr": 1.6e-2,
        "weight_decay": 0.01,
        "dt_global": False,
        "total_steps": 1200,
        "warmup_steps": 120,
        "released_schedule": False,
      },
      "batch_size": 32,
      "evaluate_every": 150,
      "checkpoint_every": 600,
      "steps_per_dispatch": 25,
      "select": "",
    }
  )
  if scale != "laptop":
    config.update_from_flattened_dict(paper(scale.removeprefix("paper/")))
  return config


def paper(row: str) -> dict[str, Any]:
  """A row of the released run scripts as dotted keys of the configuration."""
  settings, name, extras = PAPER[row]
  values = dict(zip(PAPER_KEYS, settings, strict=True))
  epochs = values.pop("epochs")
  epoch = long_range.describe(name).train // values["batch_size"]
  values |= {"data.name": name, "data.repeat": 1, "pooling": "mean", "ssm.bidirectional": True}
  values |= {"optimizer.total_steps": epochs * epoch, "optimizer.warmup_steps": epoch}
  values |= {"evaluate_every": epoch, "checkpoint_every": epoch, "steps_per_dispatch": 1}
  values |= {"optimizer.released_schedule": True, "select": "validation/accuracy"}
  return values | extras


MIXERS: dict[str, Any] = {
  "s5": lambda config: functools.partial(ssm.S5, **config),
  "s4d": lambda config: functools.partial(
    ssm.S4D, state=config.state, bidirectional=config.bidirectional
  ),
  "gru": lambda config: functools.partial(recurrent.GRU, bidirectional=config.bidirectional),
}


def encoder(config, vocab: int | None = None) -> sequence.Encoder:
  """Residual blocks around the mixer under study."""
  block = functools.partial(sequence.Block, mixer=MIXERS[config.mixer](config.ssm), **config.block)
  return sequence.Encoder(block, features=config.width, layers=config.layers, vocab=vocab)


def stages(config) -> dict[str, Task]:
  data = long_range.describe(**config.data)
  load = functools.partial(long_range.load, **config.data)
  stack = encoder(config, data.vocab)
  model: Any
  objective: Any = classification.cross_entropy
  match data.kind:
    case "classify":
      model = sequence.Classifier(stack, data.outputs, config.pooling)
    case "match":
      model = sequence.Retrieval(stack, data.outputs)
    case "regress":  # sine and cosine of the pendulum's angle at every irregularly timed frame
      model = sequence.FrameRegressor(stack, data.outputs, config.gaps, convolutional=config.conv)
      objective = regression.gaussian_nll
  init, loss = supervised(model, objective, data.example, data.inputs)
  evaluate = {s: Evaluation(functools.partial(load, split=s)) for s in data.splits}
  if data.kind == "classify" and not data.vocab:
    # Every second sample, with the timescales told of it and not.
    for name, rescale in (("half_rate", 2.0), ("half_rate_untold", 1.0)):
      evaluate[name] = Evaluation(
        lambda: load(split="test").map(views.subsample(2)),
        functools.partial(loss, step_rescale=rescale),
        data.at_half_rate().example,
      )
  return {
    "train": Task(
      init=init,
      loss=loss,
      optimizer=optimizers.s5_optimizer(**config.optimizer),
      example=data.example,
      data=functools.partial(load, split="train"),
      batch_size=config.batch_size,
      steps=config.optimizer.total_steps,
      evaluate=evaluate,
      evaluate_every=config.evaluate_every,
      select=config.select or None,
      axes=data.axes,
      steps_per_dispatch=config.steps_per_dispatch,
      checkpoint_every=config.checkpoint_every,
    )
  }


def runtime(config, lab) -> dict[str, list[float]]:
  """Time and temporary memory of one block over S4D's (by FFT), timed in turn in this process."""
  baseline = config.copy_and_resolve_references()
  baseline.update_from_flattened_dict({"mixer": "s4d", "ssm.state": 64})
  ours, theirs = (encoder(c).block() for c in (config, baseline))
  size = {"batch": config.batch_size, "features": config.width}
  metrics = timing.by_length(ours, theirs, LENGTHS, **size, repeats=len(lab.seeds))
  for kind in ("forward", "gradient"):
    ratios = np.array([metrics[f"{kind} time/{length}"] for length in LENGTHS])
    metrics[f"{kind} spread"] = (ratios.max(axis=0) / ratios.min(axis=0)).tolist()
  return metrics


LENGTHS = (256, 1024, 4096)
LRA = [f"paper/{row}" for row in ("listops", "text", "retrieval", "image", "pathfinder", "pathx")]
SHORT = {"optimizer.total_steps": 600, "optimizer.warmup_steps": 60, "evaluate_every": 60}
PENDULUM = paper("pendulum") | SHORT | {"layers": 2, "conv": False, "steps_per_dispatch": 5}
GAPS = {"gaps": {}, "append": {"gaps": "append"}, "ignore": {"gaps": "ignore"}}
gaps_help = functools.partial(Claim, metric="test/mse", of="gaps", against="ignore", ratio=True)(
  "the gaps, told to the state space, lower the error by a tenth", at_most=0.9, refuted_above=1.0
)
accurate = functools.partial(Claim, metric="test/accuracy")
half_rate = functools.partial(Claim, metric="half_rate/accuracy", of="s5", against="s5")

RATES = {
  rate: {"optimizer.lr": rate, "optimizer.ssm_lr": rate / 4}
  for rate in (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
}
ARMS: dict[str, dict[str, Any]] = {
  "s5": RATES[1.6e-2],  # 6,890 parameters
  "s4d": {"mixer": "s4d"} | RATES[3.2e-2],  # 6,858
  "gru": {"mixer": "gru", "width": 21} | RATES[1.6e-2],  # 6,730
  "random spectrum": {"ssm.spectrum": "gaussian"} | RATES[3.2e-2],
}

STUDIES = [
  Study(
    "accuracy",
    arms=ARMS,
    claims=[
      accurate("S5 is as accurate as S4D", of="s5", against="s4d", at_least=-0.02),
      accurate("S5 remembers what a GRU forgets", of="s5", against="gru", at_least=0.03),
      accurate("so does S4D", of="s4d", against="gru", at_least=0.03),
      accurate("HiPPO-N starts as well", of="s5", against="random spectrum", at_least=0.0),
    ],
  ),
  Study("irregular", config=PENDULUM, arms=GAPS, claims=[gaps_help]),
  Study("pendulum", scales=("paper/pendulum",), arms=GAPS, claims=[gaps_help]),
  Study(
    "rate",
    scales=("laptop", "paper/speech"),
    arms={"s5": {}},
    claims=[
      half_rate(
        "rescaled timescales read half the sampling rate, unscaled ones do not",
        against_metric="half_rate_untold/accuracy",
        at_least=0.05,
        refuted_below=0.0,
      ),
      half_rate("half the rate costs a few points", against_metric="test/accuracy", at_least=-0.05),
    ],
  ),
  Study(
    "runtime",
    config={"width": 64, "batch_size": 4, "ssm.blocks": 1, "block.activation": "full_glu"},
    arms={"P = H": {"ssm.state": 64}, "P free": {"ssm.state": 16}},
    claims=[
      Claim(f"{kind} time over S4D's varies little, {arm}", f"{kind} spread", arm, at_most=3.0)
      for kind in ("forward", "gradient")
      for arm in ("P = H", "P free")
    ],
    plot=[f"{kind} time/{length}" for kind in ("forward", "gradient") for length in LENGTHS],
    run=runtime,
  ),
  Study(
    "lra",
    scales=LRA,
    arms={"s5": {}, "s4d": {"mixer": "s4d", "ssm.state": 64, "block.activation": "full_glu"}},
    claims=[accurate("S5 is as accurate as S4D", of="s5", against="s4d", at_least=-0.015)],
  ),
  Study(  # the rates of ARMS were best here, on the validation set, with seeds of their own
    "tuning",
    arms={f"{arm} lr={rate:g}": ARMS[arm] | RATES[rate] for arm in ARMS for rate in RATES},
    seeds=(100, 101),
    plot=["validation/accuracy"],
    optional=True,
  ),
]

if __name__ == "__main__":
  main(__name__)
