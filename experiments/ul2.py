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
    python -m experiments.ul2 --study=encoder-decoder --seeds=5
    python -m experiments.ul2 --study=tuning                   # learning rates, by validation score
    python -m launch.plan ul2 --scale=paper/base
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import optax.contrib

from experiments.datasets import sources, text, tokenization
from launch import Claim, Evaluation, Study, Task, main
from models import t5
from models.transformer import Transformer
from objectives import corruption, language, optimizers
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
END = "<eos>"

# layers of the encoder (and decoder), width, heads, their width, hidden, batch, steps, mesh
PAPER = {
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
      "layers": 2,
      "width": 64,
      "heads": 4,
      "head_dim": 16,
      "hidden": 256,
      "activation": "relu",
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
    settings = PAPER[scale.removeprefix("paper/")]
    keys = ("layers", "width", "heads", "head_dim", "hidden", "batch_size")
    values: dict[str, Any] = dict(zip((*keys, "optimizer.total_steps"), settings, strict=True))
    values |= {"data": ("c4",), "vocab": 32_128, "inputs": 512, "targets": 512}
    values |= {"activation": "swiglu", "tied": False, "dtype": "bfloat16"}
    values |= {"optimizer.name": "adafactor", "optimizer.lr": 1.0, "optimizer.warmup_steps": 10_000}
    values |= {"steps_per_dispatch": 1, "checkpoint_every": 5_000}
    config.update_from_flattened_dict(values)
  return config


def special(config) -> tuple[int, dict[str, Any], dict[str, int]]:
  """The vocabulary, what `corruption.denoise` must know of it, and the paradigms' ids."""
  count = config.inputs // 4  # spans of (3, 0.5), the most there are
  made = tokenization.bytes_tokenizer(count, tuple(PARADIGMS.values()))
  names = made.specials
  if config.vocab is None:
    first, vocab = names["<extra_0>"], made.vocab_size
    modes = {mode: names[name] for mode, name in PARADIGMS.items()}
  else:  # the last ids, the paradigms before the sentinels
    vocab, first = config.vocab, config.vocab - count
    modes = {mode: first - 3 + i for i, mode in enumerate(PARADIGMS)}
  sizes = {"inputs": config.inputs, "targets": config.targets}
  return vocab, sizes | {"end": names[END], "sentinels": np.arange(first, first + count)}, modes


def rows(config, split: str) -> sources.InMemory:
  """Windows long enough for every denoiser; of what is held out some from all over."""
  if "c4" in config.data:
    raise sources.DatasetNotFound("data='c4': tokens of c4/en by a 32k vocabulary; in no package")
  found = [text.windows(d, split, length(config)).fields["inputs"] for d in config.data]
  joined = np.concatenate(found)
  if split != "train":
    joined = joined[np.linspace(0, len(joined) - 1, config.measured).astype(int)]
  return sources.InMemory({"inputs": joined})


def length(config) -> int:
  return max(corruption.chunk(d, config.inputs, config.targets) for d in UL2)


def optimizer(name: str, lr: float, total_steps: int, warmup_steps: int):
  """Muon on matrices, with warm-up and cosine, or Adafactor: lr / sqrt(max(step, warm-up))."""
  if name == "adafactor":
    return optax.adafactor(lambda count: lr / jnp.sqrt(jnp.maximum(count, warmup_steps)))
  rate = optimizers.warmup_cosine(lr, total_steps, warmup_steps)
  groups = {"matrix": optax.contrib.muon(rate), "rest": optax.adam(lambda n: rate(n) / 4)}
  rules = [("kernel$", "matrix")]
  return optax.multi_transform(
    groups, functools.partial(optimizers.by_path, rules=rules, default="rest")
  )


def stages(config) -> dict[str, Task]:
  vocab, ids, modes = special(config)
  sizes: dict[str, Any] = {"features": config.width, "layers": config.layers, "heads": config.heads}
  sizes |= {"head_dim": config.head_dim, "mlp": config.hidden, "activation": config.activation}
  sizes |= {"dtype": jnp.dtype(config.dtype)}
  model: Any
  if config.architecture == "encoder-decoder":
    model = t5.T5(vocab, **sizes, tied=config.tied, scaled=config.tied)
  elif config.architecture == "decoder":
    plain: dict[str, Any] = {"mask": "prefix", "position": "rotary", "norm": "rms"}
    plain |= {"use_bias": False, "head": "tied" if config.tied else "untied"}
    model = Transformer(vocab, **sizes, **plain)
  else:
    accepted = "encoder-decoder, decoder"
    raise ValueError(f"architecture={config.architecture!r}; accepted: {accepted}")

  def corrupted(key, tokens_BT, denoisers, shares=None):
    """Examples of a batch."""
    told = [modes[d.mode] for d in denoisers] if config.paradigms else None

    def one(key, tokens_T):
      fields = {"denoisers": denoisers, "shares": shares, "modes": told}
      return corruption.denoise(key, tokens_T, **fields, **ids)

    examples = jax.vmap(one)(jax.random.split(key, len(tokens_BT)), tokens_BT)
    if config.architecture == "decoder":
      return jax.vmap(corruption.joined)(examples)
    shifted = jnp.pad(examples["targets"][:, :-1], ((0, 0), (1, 0)))
    return examples | {"shifted": shifted}

  def given(examples):
    others = ("shifted",) if config.architecture == "encoder-decoder" else ()
    named = ("lengths",) if others else ("lengths", "prefix")
    return [examples[k] for k in ("inputs", *others)], {k: examples[k] for k in named}

  def init(key):
    inputs, fields = given(corrupted(key, jnp.zeros((1, length(config)), jnp.int32), UL2))
    return model.init(key, *inputs, **fields)

  def loss(params, variables, batch, key, *, train):
    examples = corrupted(key, batch["inputs"], MIXTURES[config.mixture])
    inputs, fields = given(examples)
    logits = model.apply({"params": params}, *inputs, **fields, train=train)
    value, metrics = language.next_token(logits, examples | {"mask": batch["mask"]})
    return value, (metrics, variables)

  def measure(params, variables, batch, key, *, train):
    """Nats a target of each denoiser by itself, of the same text with the same draws."""
    kinds = MEASURED | (UNTOLD if config.paradigms else {})

    def of(shares):
      return corrupted(key, batch["inputs"], tuple(kinds.values()), shares)

    each = jax.vmap(of)(jnp.eye(len(kinds)))  # (kinds, B, ...)
    inputs, fields = given(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each))
    logits = jnp.split(model.apply({"params": params}, *inputs, **fields), len(kinds))
    metrics = {}
    for i, name in enumerate(kinds):
      asked = {k: each[k][i] for k in ("targets", "weights")} | {"mask": batch["mask"]}
      metrics[name] = language.next_token(logits[i], asked)[1]["loss"]
    return metrics["R"][0], (metrics, variables)

  return {
    "train": Task(
      init=init,
      loss=loss,
      optimizer=optimizer(**config.optimizer),
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
LAPTOP = ("ul2", "span corruption", "prefix lm", "span corruption + lm")
BASELINES = LAPTOP[1:]
RATES = (1e-2, 2e-2, 4e-2)
DECODER = {"architecture": "decoder"}

ratio = functools.partial(Claim, of="ul2", ratio=True)
best = functools.partial(ratio, metric="test/score", at_most=1.0)
home = functools.partial(ratio, at_most=1.05)
away = functools.partial(Claim, against="ul2", ratio=True, at_least=1.1, refuted_below=1.0)
told = functools.partial(ratio, against="ul2", at_most=0.98, refuted_above=1.0)

STUDIES = [
  Study(
    "encoder-decoder",
    arms={arm: ARMS[arm] for arm in LAPTOP},
    claims=[
      *(best(f"the best single model: against {arm}", against=arm) for arm in BASELINES),
      home("close to span corruption at home", "test/R", against="span corruption"),
      home("close to prefix lm at home", "test/S", against="prefix lm"),
      away("span corruption loses away", "test/S", "span corruption"),
      away("prefix lm loses away", "test/R", "prefix lm"),
      *(
        told(f"the paradigm matters to {n}", f"test/{n}", against_metric=f"test/{n} told R")
        for n in ("S", "X dense")
      ),
    ],
    plot=["test/score", *(f"test/{name}" for name in MEASURED)],
  ),
  Study(
    "decoder",
    config=DECODER,
    arms={arm: ARMS[arm] for arm in LAPTOP[:2]},
    claims=[best("a decoder gains over span corruption", against="span corruption")],
    plot=["test/score", *(f"test/{name}" for name in MEASURED)],
  ),
  Study(
    "paper",
    scales=("paper/*",),
    arms=ARMS,
    claims=[best(f"against {arm}", against=arm) for arm in list(MIXTURES)[1:]],
  ),
  Study(
    "paper decoder",
    scales=("paper/base",),
    config=DECODER,
    arms=ARMS,
    claims=[best(f"against {arm}", against=arm) for arm in list(MIXTURES)[1:]],
  ),
  Study(  # get_config's rate: best of four for ul2 and span corruption in 300 steps of one seed
    "tuning",
    arms={
      f"{arm} lr={rate:g}": ARMS[arm] | {"optimizer.lr": rate} for arm in LAPTOP for rate in RATES
    },
    seeds=(100, 101),
    plot=["validation/score"],
    optional=True,
  ),
]

if __name__ == "__main__":
  main(__name__)
