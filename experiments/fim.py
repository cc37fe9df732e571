"""Efficient Training of Language Models to Fill in the Middle (FIM).

Bavarian, Jun, Tezak, Schulman, McLeavey, Tworek and Chen, 2022, arXiv:2207.14255.

A left-to-right model learns to infill from a change of its data alone: a share of the documents is
cut at two random characters and the middle moved to the end, behind the suffix or behind the
prefix, with markers in between. The loss stays that of every token, in order.

Claim (round-up of 2022-08-14): left-to-right quality does not suffer as long as some documents stay
in order, so that infilling comes for free. Cuts are of characters, and of documents as they lie in
a context (context level) rather than before they are packed (document level).

Laptop scale: a byte-level model of Python's standard library, 125 bytes a context, 2 layers of
width 64 and, in `size`, of width 32, since a tax on capacity should fall with size. Bytes are the
characters here, and the cuts are drawn on the device, anew at each step. Every arm reads the same
text; a document that stays in order is padded where others have markers. The middles of held-out
text are predicted after both sides (PSM and SPM), by the same model after the prefix alone, and by
the model that never infilled. Infilling is judged in SPM, the better mode according to the paper.
At the document level pieces seldom share a context here, since files are a hundred contexts long.
With `--config.tokenizer=bpe` tokens have several characters, and the host cuts and encodes anew.

Found at laptop scale (3 seeds, `results/fim.json`): infilling is not free here, and not yet of use.
A rate of 0.5 costs 1.4 % (the margin of 1 % is inside the interval), 0.9 costs 4.5 %, and a model
of half the width pays 2 %. The middle costs as many bits with the suffix as without, and 1.5 % more
than the model that never infilled takes with the prefix alone. Presumably, after 0.5 MB of text a
model predicts from the last few bytes, and a suffix is of use to one that copies from afar. SPM
beats PSM by 4 %, since there the prefix ends where the middle begins. Greedy middles come to an end
at a rate of 0.9 alone. What is refuted or open here is so of models that small; the larger of the
two pays less.

Paper scale: the smallest and the largest of eight models, 100 B tokens, contexts of 2,048. Shapes,
positions and schedules are not known here: those of GPT-3 (recalled), with rotary positions and an
output matrix of its own, have the stated numbers of parameters. Code and text for them are in no
package, and HumanEval's infilled programs are not executed.

    python -m experiments.fim                                  # all laptop studies
    python -m experiments.fim --study=tuning                   # how the learning rate was chosen
    python -m launch.plan fim --scale=paper/6.9b
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.datasets import corpora, sources, text, tokenization
from launch import Claim, Evaluation, Study, Task, main, supervised
from models import decoding
from models.transformer import Transformer
from objectives import infilling, language, recipes

# layers, width, heads, peak rate, batch: GPT-3's, see above.
PAPER = {"50m": (6, 384, 6, 6e-4, 256), "6.9b": (32, 4096, 32, 1.2e-4, 1024)}
SCALES = ("laptop", *(f"paper/{size}" for size in PAPER))
TOPOLOGIES = {"paper/50m": ("v5e-64", "data=64"), "paper/6.9b": ("v5e-256", "fsdp=256")}
ACCEPTED = {"level": ("context", "document"), "tokenizer": ("bytes", "bpe")}
BYTES = corpora.tokenizer("bytes", markers=infilling.MARKERS)
ROOM = 8  # for the markers of further documents in a context, where none may be cut off


def get_config(scale: str = "laptop") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    {
      "data": "library",
      "tokenizer": "bytes",  # | bpe
      "vocab": 1024,  # of bpe
      "length": 128,
      "fim_rate": 0.5,
      "spm_rate": 0.5,
      "level": "context",  # | document
      "model": {"layers": 2, "features": 64, "heads": 4, "head": "tied"},
      "remat": False,  # layers scanned and their activations made again, for large models
      "dtype": "float32",
      "optimizer": {"name": "muon", "lr": 4e-2, "total_steps": 500, "warmup_steps": 50},
      "batch_size": 8,
      "measured": 256,  # contexts of an evaluation
      "steps_per_dispatch": 50,
      "checkpoint_every": 0,
    }
  )
  if scale != "laptop":
    layers, width, heads, rate, batch = PAPER[scale.removeprefix("paper/")]
    steps = round(100e9 / (batch * 2048))
    config.update({"data": "paper", "tokenizer": "bpe", "vocab": 50_304, "length": 2048})
    config.update({"remat": True, "dtype": "bfloat16", "batch_size": batch})
    config.update({"steps_per_dispatch": 1, "checkpoint_every": 1000})
    config.model.update({"layers": layers, "features": width, "heads": heads, "head": "untied"})
    schedule = {"lr": rate, "total_steps": steps, "warmup_steps": steps // 100}
    config.optimizer.update({"name": "adamw"} | schedule)
  return config


def tokenizer(config) -> tokenization.Tokenizer:
  return corpora.tokenizer(config.tokenizer, config.data, config.vocab, markers=infilling.MARKERS)


def contexts(config, split: str, count: int | None = None) -> sources.InMemory:
  """Rows of text as it is, three short of the model's length: room for one document's markers."""
  return corpora.rows((config.data,), split, config.length - 3, tokenizer(config), count)


@functools.lru_cache(maxsize=4)
def documents_first(data: str, made: tokenization.Tokenizer, length: int, rate: float, spm: float):
  """Document level: whole documents with their middles moved, then cut into rows (length,)."""
  documents, ids = text.tokens(data, "train", made), infilling.ids(made.specials)
  stream = infilling.stream(documents, rate=rate, spm_rate=spm, **ids)
  return sources.InMemory({"inputs": stream[: len(stream) // length * length].reshape(-1, length)})


def training(config) -> Any:
  """What is trained on: contexts as they are where middles are moved on the device."""
  made, length, rates = tokenizer(config), config.length + 1, (config.fim_rate, config.spm_rate)
  if config.level == "document":
    return documents_first(config.data, made, length, *rates)
  if config.tokenizer == "bytes":
    return contexts(config, "train")
  fields = infilling.ids(made.specials) | dict(zip(("rate", "spm_rate"), rates, strict=True))
  fields |= {"encode": made.encode, "decode": made.decode, "length": length}
  anew: Any = functools.partial(infilling.by_characters, **fields)
  return contexts(config, "train").map(lambda example: {"inputs": anew(example["inputs"])})


def stages(config) -> dict[str, Task]:
  for name, accepted in ACCEPTED.items():
    if config[name] not in accepted:
      raise ValueError(f"{name}={config[name]!r}; accepted: {', '.join(accepted)}")
  in_bytes = config.tokenizer == "bytes"
  on_device = in_bytes and config.level == "context"
  ids = infilling.ids(BYTES.specials)
  eot = ids["markers"][-1]
  fields: dict[str, Any] = {"position": "rotary", "norm": "rms", "use_bias": False}
  fields |= {"scan": config.remat, "remat": config.remat, "dtype": jnp.dtype(config.dtype)}
  vocab = BYTES.vocab_size if in_bytes else config.vocab
  model = Transformer(vocab, **config.model, **fields)
  size = config.length - 3 if on_device else config.length + 1
  example = {"inputs": jax.ShapeDtypeStruct((size,), np.int32)}
  init, plain = supervised(model, language.next_token, example)

  def moved(key, tokens_BT, length, **rates):
    """Rows (B, length) of contexts, and the pieces that their tokens are of."""
    fim: Any = functools.partial(infilling.fill_in_the_middle, length=length, **ids | rates)
    return jax.vmap(fim)(jax.random.split(key, len(tokens_BT)), tokens_BT)

  def in_order(params, variables, batch, key, *, train):
    rows = language.shifted(batch["inputs"]) | {"mask": batch["mask"]}
    return plain(params, variables, rows, key, train=train)

  def loss(params, variables, batch, key, *, train):
    """Of every token in order, markers too."""
    if on_device:
      rates = {"rate": config.fim_rate, "spm_rate": config.spm_rate}
      batch = batch | {"inputs": moved(key, batch["inputs"], config.length + 1, **rates)[0]}
    return in_order(params, variables, batch, key, train=train)

  def measure(params, variables, batch, key, *, train):
    """Bits a byte of text in order, and of the same middles after both sides or the prefix.

    After the prefix alone the first byte of a context is not asked for, if it is of the middle.
    """
    length = config.length + 1 + ROOM

    def ordered(rate, spm_rate):
      return moved(key, batch["inputs"], length, rate=rate, spm_rate=spm_rate)

    rows, pieces = jax.vmap(ordered)(jnp.array([0, 1, 1]), jnp.array([0, 0, 1]))  # (3, B, length)
    examples = jax.vmap(language.shifted)(rows)
    logits: Any = model.apply({"params": params}, examples["inputs"].reshape(-1, length - 1))
    logits = logits.reshape(*examples["inputs"].shape, -1)
    middle = (pieces[..., 1:] == infilling.MIDDLE).astype(jnp.float32)
    asked = {"bits": (0, examples["weights"][0]), "prefix_alone": (0, middle[0])}
    asked |= {"psm": (1, middle[1]), "spm": (2, middle[2])}
    metrics = {}
    for name, (order, weights) in asked.items():
      fields = {"targets": examples["targets"][order], "weights": weights, "mask": batch["mask"]}
      metrics[name] = language.next_token(logits[order], fields)[1]["bits"]
    return metrics["bits"][0], (metrics, variables)

  def infill(params, variables, batch, key, *, train):
    """How many of the middles written greedily after both sides end by themselves."""
    spm = {"end": None, "rate": 1.0, "spm_rate": 1.0}
    rows, pieces = moved(key, batch["inputs"], config.length + 1, **spm)
    lengths = config.length - (pieces == infilling.MIDDLE).sum(1)  # all but middle and <eot>
    prompts = jnp.where(jnp.arange(config.length) < lengths[:, None], rows[:, :-1], 0)
    written, _ = decoding.generate(
      model, {"params": params}, prompts, lengths, key, steps=48, eos=eot, temperature=0.0
    )
    ended = ((written == eot).any(1) * batch["mask"]).sum()
    return ended, ({"ended": (ended, batch["mask"].sum())}, variables)

  def held_out(split, loss, count):
    context = {"inputs": jax.ShapeDtypeStruct((config.length - 3,), np.int32)}
    return Evaluation(functools.partial(contexts, config, split, count), loss, context)

  # Tokens of several characters are measured on text in order alone.
  by = measure if in_bytes else in_order
  evaluate = {split: held_out(split, by, config.measured) for split in ("validation", "test")}
  return {
    "train": Task(
      init=init,
      loss=loss,
      optimizer=recipes.language_model(**config.optimizer),
      example=example,
      data=functools.partial(training, config),
      batch_size=config.batch_size,
      steps=config.optimizer.total_steps,
      evaluate=evaluate | ({"infill": held_out("test", infill, 64)} if in_bytes else {}),
      steps_per_dispatch=config.steps_per_dispatch,
      checkpoint_every=config.checkpoint_every,
    )
  }


ARMS: dict[str, dict[str, Any]] = {f"rate {r:g}": {"fim_rate": r} for r in (0.5, 0.0, 0.9)}
PAIR = ("rate 0", "rate 0.5")
free = functools.partial(Claim, metric="test/bits", against="rate 0", ratio=True)
half = functools.partial(free, of="rate 0.5", at_most=1.01, refuted_above=1.02)
FREE = [
  half("a rate of 0.5 costs nothing"), free("neither does 0.9", of="rate 0.9", at_most=1.03)
]  # fmt: skip
infills = functools.partial(Claim, metric="test/spm", of="rate 0.5", ratio=True, at_most=1.0)
alone = functools.partial(infills, against_metric="test/prefix_alone")

STUDIES = [
  Study(
    "free",
    arms=ARMS | {"document level": {"level": "document"}},
    claims=[
      *FREE,
      alone("the suffix helps", against="rate 0.5", at_most=0.97, refuted_above=1.0),
      alone("to less than a rate of 0 takes", against="rate 0"),
      infills("context level beats document level", against="document level"),
      infills("SPM beats PSM", against="rate 0.5", against_metric="test/psm"),
    ],
    plot=["test/bits", "test/prefix_alone", "test/psm", "test/spm", "infill/ended"],
  ),
  Study(
    "size",
    config={"model.features": 32},
    arms={arm: ARMS[arm] for arm in PAIR},
    claims=[half("a rate of 0.5 costs a smaller model nothing")],
  ),
  Study("paper", scales=("paper/*",), arms=ARMS, claims=FREE, seeds=1),
  Study(  # the rate of get_config was best here for both, on validation bits of text in order
    "tuning",
    arms={
      f"{arm} lr={rate:g}": ARMS[arm] | {"optimizer.lr": rate}
      for arm in PAIR
      for rate in (2e-2, 4e-2, 8e-2)
    },
    seeds=(100, 101),
    plot=["validation/bits"],
    optional=True,
  ),
]

if __name__ == "__main__":
  main(__name__)
