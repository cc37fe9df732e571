"""UL2: Unifying Language Learning Paradigms.

Tay, Dehghani, Tran, Garcia, Wei, Wang, Chung, Bahri, Schuster, Zheng, Zhou, Houlsby and Metzler,
ICLR 2023, arXiv:2205.05131.

Language modelling, prefix language modelling and span corruption are one function, which differs in
how much it corrupts and in what spans. UL2 draws each example from seven such denoisers, regular
(R), sequential (S) and extreme (X), and tells the model which by a paradigm token in front of the
input, so that the mode can be chosen afterwards too.

Claim (round-up of 2022-10-23): encoder-decoders always gain over span corruption, decoders gain
with one example, and the mode chosen at test time matters.

Laptop scale: bytes of Python's documentation and library; every denoiser's input is cut to the same
length. The mixture against span corruption alone, prefix language modelling alone, and half span
corruption, half causal language modelling, at equal steps and input lengths (not equal numbers of
targets: X has three times R's). Held-out nats a target of five denoisers, one of which nobody
trained on; the score is their geometric mean, so that a ratio of two arms weighs them alike. The
baselines have no paradigm token, in training or in measuring. Once with an encoder and a decoder
and once with a decoder alone, which sees its input in both directions. Fine-tuning and prompting on
SuperGLUE, XSum, ToTTo and the like are not here.

Found at laptop scale (3 seeds, `results/ul2.json`): the mixture is the best single model. Its score
is 11 % below that of prefix language modelling and of the half-and-half mixture, and within 3 to
4 % of each specialist at home, while the specialists lose 30 to 50 % away. Against span corruption
the interval is wide (20 % below on average), since one of its seeds fails on dense spans: they need
sentinels that (3, 0.15) never uses at this length, which is a part of what is measured. A decoder
gains most, a third, with half the parameters and a lower score than the encoder-decoder. A wrong
paradigm token costs dense X 5 % and S half a percent, not beyond noise for X and below the margin
for S, whose input shows by itself what it is; the decoder heeds the token more.

Paper scale: the ablation's base models (recalled: 500 thousand steps of 128 rows of C4, 512 tokens
in and 512 out, Adafactor; the shapes are ours, near the stated 335 M and 167 M parameters) and the
model of 20 B.

    python -m experiments.ul2                                  # all laptop studies
    python -m experiments.ul2 --study=tuning                   # learning rates, by validation score
    python -m launch.plan ul2 --scale=paper/base
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.datasets import corpora, sources, tokenization
from launch import Claim, Evaluation, Study, Task, main
from models import t5
from models.transformer import Transformer
from objectives import corruption, language, recipes
from objectives.corruption import UL2, Denoiser

CAUSAL, PREFIX = Denoiser(1.0, None, "S"), Denoiser(0.5, None, "S")
MIXTURES = {
  "ul2": UL2,
  "span corruption": (UL2[0],),
  "prefix lm": (PREFIX,),
  "span corruption + lm": (UL2[0], CAUSAL),
  "causal lm": (CAUSAL,),
  "unilm": (CAUSAL, PREFIX, Denoiser(0.15, 1)),
}
# What is measured, and the five of the score; what a wrong paradigm token costs.
MEASURED = {
  "R": UL2[0],
  "S": UL2[2],
  "X dense": UL2[4],
  "X long": Denoiser(0.15, 32, "X"),
  "new": Denoiser(0.3, 12, "X"),
}
UNTOLD = {"S told R": UL2[2]._replace(mode="R"), "X dense told R": UL2[4]._replace(mode="R")}
PARADIGMS = {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}  # as in the released checkpoints

SIZES = ("layers", "features", "heads", "head_dim", "mlp")  # of the encoder, and of the decoder
PAPER = {  # sizes, batch, steps
  "base": (12, 768, 12, 64, 3072, 128, 500_000),
  "20b": (32, 4096, 16, 256, 16_384, 1024, 2_000_000),
}
SCALES = ("laptop", *(f"paper/{size}" for size in PAPER))
TOPOLOGIES = {"paper/base": ("v5e-64", "data=64"), "paper/20b": ("v5p-1024", "fsdp=64,tensor=8")}


def get_config(scale: str = "laptop") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    {
      "data": ("reference", "docstrings", "library"),
      "mixture": "ul2",  # of MIXTURES
      "paradigms": True,
      "architecture": "encoder-decoder",  # | decoder
      "inputs": 64,
      "targets": 64,
      "vocab": None,  # bytes
      "model": {"layers": 2, "features": 64, "heads": 4, "head_dim": 16, "mlp": 256}
      | {"activation": "relu"},
      "tied": True,
      "dtype": "float32",
      "optimizer": {"name": "muon", "lr": 2e-2, "total_steps": 500, "warmup_steps": 50},
      "batch_size": 8,
      "measured": 256,  # rows of an evaluation
      "steps_per_dispatch": 50,
      "checkpoint_every": 0,
    }
  )
  if scale != "laptop":
    *sizes, batch, steps = PAPER[scale.removeprefix("paper/")]
    config.update({"data": ("c4",), "vocab": 32_128, "inputs": 512, "targets": 512})
    config.model.update(dict(zip(SIZES, sizes, strict=True)) | {"activation": "swiglu"})
    config.update({"tied": False, "dtype": "bfloat16"})
    config.update({"batch_size": batch, "steps_per_dispatch": 1, "checkpoint_every": 5_000})
    schedule = {"lr": 1.0, "total_steps": steps, "warmup_steps": 10_000}
    config.optimizer.update({"name": "adafactor"} | schedule)
  return config


def special(config) -> tuple[int, dict[str, Any], dict[str, int]]:
  """The vocabulary, what `corruption.denoise` must know of it, and the paradigms' ids."""
  count = config.inputs // 4  # spans of (3, 0.5), the most there are
  vocab = config.vocab or tokenization.bytes_tokenizer(count, tuple(PARADIGMS.values())).vocab_size
  first = vocab - count  # the sentinels are the last ids, and the paradigms those before them
  modes = {mode: first - len(PARADIGMS) + i for i, mode in enumerate(PARADIGMS)}
  sizes = {"inputs": config.inputs, "targets": config.targets}
  end = tokenization.SPECIALS.index("<eos>")
  return vocab, sizes | {"end": end, "sentinels": first + np.arange(count)}, modes


def length(config) -> int:
  """Tokens enough for the input of every denoiser."""
  return max(corruption.chunk(d, config.inputs, config.targets) for d in UL2)


def rows(config, split: str) -> sources.InMemory:
  count = None if split == "train" else config.measured
  return corpora.rows(config.data, split, length(config), count=count)


def network(config, vocab: int) -> Any:
  fields: dict[str, Any] = {**config.model, "dtype": jnp.dtype(config.dtype)}
  match config.architecture:
    case "encoder-decoder":
      return t5.T5(vocab, **fields, tied=config.tied, scaled=config.tied)
    case "decoder":
      fields |= {"mask": "prefix", "position": "rotary", "norm": "rms", "use_bias": False}
      return Transformer(vocab, **fields, head="tied" if config.tied else "untied")
  raise ValueError(f"architecture={config.architecture!r}; accepted: encoder-decoder, decoder")


def stages(config) -> dict[str, Task]:
  vocab, ids, modes = special(config)
  model, decoder = network(config, vocab), config.architecture == "decoder"

  def corrupted(key, tokens_BT, denoisers, shares=None):
    told = [modes[d.mode] for d in denoisers] if config.paradigms else None
    fields = {"denoisers": denoisers, "shares": shares, "modes": told}
    return corruption.denoised(key, tokens_BT, decoder=decoder, **fields, **ids)

  def init(key):
    examples = corrupted(key, jnp.zeros((1, length(config)), jnp.int32), UL2)
    placed, named = corruption.arguments(examples)
    return model.init(key, *placed, **named)

  def loss(params, variables, batch, key, *, train):
    examples = corrupted(key, batch["inputs"], MIXTURES[config.mixture])
    placed, named = corruption.arguments(examples)
    logits = model.apply({"params": params}, *placed, **named, train=train)
    value, metrics = language.next_token(logits, examples | {"mask": batch["mask"]})
    return value, (metrics, variables)

  def measure(params, variables, batch, key, *, train):
    """Nats a target of each denoiser by itself, of the same text with the same draws."""
    kinds = MEASURED | (UNTOLD if config.paradigms else {})

    def of(shares):
      return corrupted(key, batch["inputs"], tuple(kinds.values()), shares)

    each = jax.vmap(of)(jnp.eye(len(kinds)))  # (kinds, B, ...)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each)
    placed, named = corruption.arguments(flat)
    logits = jnp.split(model.apply({"params": params}, *placed, **named), len(kinds))
    metrics = {}
    for i, name in enumerate(kinds):
      asked = {k: each[k][i] for k in ("targets", "weights")} | {"mask": batch["mask"]}
      metrics[name] = language.next_token(logits[i], asked)[1]["loss"]
    return metrics["R"][0], (metrics, variables)

  return {
    "train": Task(
      init=init,
      loss=loss,
      optimizer=recipes.language_model(**config.optimizer),
      example={"inputs": jax.ShapeDtypeStruct((length(config),), np.int32)},
      data=functools.partial(rows, config, "train"),
      batch_size=config.batch_size,
      steps=config.optimizer.total_steps,
      evaluate={
        split: Evaluation(functools.partial(rows, config, split), measure)
        for split in ("validation", "test")
      },
      steps_per_dispatch=config.steps_per_dispatch,
      checkpoint_every=config.checkpoint_every,
    )
  }


def run(config, lab) -> dict[str, list[float]]:
  """Trains, and adds each split's score: the geometric mean of the five."""
  metrics = lab.fit("train", stages(config)["train"]).metrics
  for split in ("validation", "test"):
    five = np.array([metrics[f"{split}/{name}"] for name in MEASURED])
    metrics[f"{split}/score"] = np.exp(np.log(five).mean(axis=0)).tolist()
  return metrics


ARMS: dict[str, dict[str, Any]] = {
  name: {"mixture": name, "paradigms": name == "ul2"} for name in MIXTURES
}
LAPTOP = {n: ARMS[n] for n in ("ul2", "span corruption", "prefix lm", "span corruption + lm")}
BOTH = {n: ARMS[n] for n in ("ul2", "span corruption")}
DECODER = {"architecture": "decoder"}
PLOT = ["test/score", *(f"test/{name}" for name in MEASURED)]

ratio = functools.partial(Claim, of="ul2", ratio=True)
best = functools.partial(ratio, metric="test/score", at_most=1.0)
home = functools.partial(ratio, at_most=1.05)
away = functools.partial(Claim, against="ul2", ratio=True, at_least=1.1, refuted_below=1.0)
told = functools.partial(ratio, against="ul2", at_most=0.98, refuted_above=1.0)
AGAINST_ALL = [best(f"against {arm}", against=arm) for arm in ARMS if arm != "ul2"]

STUDIES = [
  Study(
    "encoder-decoder",
    arms=LAPTOP,
    claims=[
      *(best(f"the best single model: against {n}", against=n) for n in LAPTOP if n != "ul2"),
      home("close to span corruption at home", "test/R", against="span corruption"),
      home("close to prefix lm at home", "test/S", against="prefix lm"),
      away("span corruption loses away", "test/S", "span corruption"),
      away("prefix lm loses away", "test/R", "prefix lm"),
      *(
        told(f"the paradigm matters to {n}", f"test/{n}", against_metric=f"test/{n} told R")
        for n in ("S", "X dense")
      ),
    ],
    plot=PLOT,
  ),
  Study(
    "decoder",
    config=DECODER,
    arms=BOTH,
    claims=[best("a decoder gains over span corruption", against="span corruption")],
    plot=PLOT,
  ),
  Study("paper", scales=("paper/*",), arms=ARMS, claims=AGAINST_ALL),
  Study("paper decoder", scales=("paper/base",), config=DECODER, arms=ARMS, claims=AGAINST_ALL),
  Study(  # get_config's rate: best of four for ul2 and span corruption in 300 steps of one seed
    "tuning",
    arms={
      f"{arm} lr={rate:g}": LAPTOP[arm] | {"optimizer.lr": rate}
      for arm in LAPTOP
      for rate in (1e-2, 2e-2, 4e-2)
    },
    seeds=(100, 101),
    plot=["validation/score"],
    optional=True,
  ),
]

if __name__ == "__main__":
  main(__name__)
