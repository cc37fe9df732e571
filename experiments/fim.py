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
    python -m experiments.fim --study=free --seeds=5
    python -m experiments.fim --study=tuning                   # how the learning rate was chosen
    python -m launch.plan fim --scale=paper/6.9b
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import optax.contrib

from experiments.datasets import sources, text, tokenization
from launch import Claim, Evaluation, Study, Task, main, supervised
from models import decoding
from models.transformer import Transformer
from objectives import corruption, language, optimizers

# layers, width, heads, peak rate, batch: GPT-3's, see above.
PAPER = {"50m": (6, 384, 6, 6e-4, 256), "6.9b": (32, 4096, 32, 1.2e-4, 1024)}
SCALES = ("laptop", *(f"paper/{size}" for size in PAPER))
TOPOLOGIES = {"paper/50m": ("v5e-64", "data=64"), "paper/6.9b": ("v5e-256", "fsdp=256")}
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
      "layers": 2,
      "width": 64,
      "heads": 4,
      "head": "tied",
      "scan": False,
      "remat": False,
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
    values: dict[str, Any] = {"layers": layers, "width": width, "heads": heads, "batch_size": batch}
    values |= {"data": "paper", "tokenizer": "bpe", "vocab": 50_304, "length": 2048}
    values |= {"head": "untied", "scan": True, "remat": True, "dtype": "bfloat16"}
    values |= {
      "optimizer.name": "adamw",
      "optimizer.lr": rate,
      "optimizer.total_steps": steps,
      "steps_per_dispatch": 1,
    }
    values |= {"optimizer.warmup_steps": steps // 100, "checkpoint_every": 1000}
    config.update_from_flattened_dict(values)
  return config


@functools.cache
def tokenizer(name: str, vocab: int, data: str) -> tokenization.Tokenizer:
  if name == "bytes":
    return tokenization.bytes_tokenizer(markers=corruption.MARKERS)
  if data == "paper":
    raise sources.DatasetNotFound("data='paper': 100 B tokens of code and text are in no package")
  source = sources.load(f"text/{data}", "train")
  texts = (source[i]["text"] for i in range(len(source)))
  return tokenization.train_bpe(texts, vocab, markers=corruption.MARKERS)


def ids(made: tokenization.Tokenizer) -> dict[str, Any]:
  """What `corruption.fill_in_the_middle` has to know of a tokenizer."""
  return {"markers": [made.specials[m] for m in corruption.MARKERS], "end": made.specials["<eos>"]}


def by_characters(
  tokens_T: np.ndarray, made: tokenization.Tokenizer, *, length: int, rate: float, spm_rate: float
) -> np.ndarray:
  """`corruption.fill_in_the_middle` of a context (length,), cut between characters.

  Each document is decoded, and its pieces are encoded one by one: no token straddles a cut, and
  none tells where one was. Fragments of characters at the ends of the context are left out. A
  context's draws are its own, the same in every epoch.
  """
  (pre, suf, mid, eot), end = ids(made).values()
  random = np.random.default_rng(np.asarray(tokens_T, np.uint32))
  row: list[int] = []
  ends = np.flatnonzero(tokens_T == end)
  for document in np.split(tokens_T, ends + 1):
    string = made.decode(document).strip("\ufffd")
    (move, form), cuts = random.random(2), np.sort(random.integers(0, len(string) + 1, 2))
    pieces = (string[i:j] for i, j in itertools.pairwise([0, *cuts, len(string)]))
    if string and move < rate:
      prefix, middle, suffix = (made.encode(piece) for piece in pieces)
      if form < spm_rate:
        row += [pre, suf, *suffix, mid, *prefix, *middle, eot]
      else:
        row += [pre, *prefix, suf, *suffix, mid, *middle, eot]
    else:
      row += made.encode(string).tolist()
    row += [end] * int(end in document)
  return np.pad(np.array(row[:length], np.int32), (0, max(length - len(row), 0)))


@functools.lru_cache(maxsize=8)
def documents_first(data: str, length: int, rate: float, spm_rate: float) -> sources.InMemory:
  """Document level: whole documents with their middles moved, then cut into rows (length,)."""
  made = tokenizer("bytes", 0, data)
  markers, end = ids(made).values()

  @functools.partial(jax.jit, static_argnames="size")
  def move(key, tokens_T, count, size):
    fields = {"length": size + 4, "markers": markers, "rate": rate, "spm_rate": spm_rate}
    return corruption.fill_in_the_middle(key, tokens_T, count=count, **fields)[0]

  stream: list[Any] = []
  for index, document in enumerate(text.tokens(data, "train", made)):
    size = 1 << (len(document) - 1).bit_length()  # a dozen shapes to compile
    key = jax.random.fold_in(jax.random.key(0), index)
    row = move(key, np.pad(document[:-1], (0, size + 1 - len(document))), len(document) - 1, size)
    stream += [np.trim_zeros(np.asarray(row), "b"), [end]]
  joined = np.concatenate(stream).astype(np.int32)
  return sources.InMemory({"inputs": joined[: len(joined) // length * length].reshape(-1, length)})


def contexts(config, split: str, count: int | None = None) -> sources.InMemory:
  """Rows of text as it is, three short of the model's length: room for one document's markers.

  Of what is held out, `count` rows, or as many as are measured, from all over.
  """
  made = tokenizer(config.tokenizer, config.vocab, config.data)
  rows = text.windows(config.data, split, config.length - 3, made).fields["inputs"]
  if split != "train":
    count = min(count or config.measured, len(rows))
    rows = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
  return sources.InMemory({"inputs": rows})


def encoded_anew(config) -> sources.InMemory:
  """Contexts of tokens of several characters, for training."""
  made = tokenizer(config.tokenizer, config.vocab, config.data)
  fields = {"length": config.length + 1, "rate": config.fim_rate, "spm_rate": config.spm_rate}
  rows = contexts(config, "train")
  return rows.map(lambda example: {"inputs": by_characters(example["inputs"], made, **fields)})


def rows_of(tokens: jax.Array) -> dict[str, jax.Array]:
  """Every token counts, markers too, but for padding."""
  return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": 1.0 * (tokens[:, 1:] > 0)}


def optimizer(name: str, lr: float, total_steps: int, warmup_steps: int):
  """GPT-3's AdamW, or Muon on matrices, which learns from fewer tokens; warm-up and cosine."""
  rate = optimizers.warmup_cosine(lr, total_steps, warmup_steps)
  if name == "muon":
    groups = {"matrix": optax.contrib.muon(rate), "rest": optax.adam(lambda n: rate(n) / 4)}
    rules = [("kernel$", "matrix")]
    label = functools.partial(optimizers.by_path, rules=rules, default="rest")
    return optax.multi_transform(groups, label)
  adamw = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1)
  return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def stages(config) -> dict[str, Task]:
  for name, accepted in (("level", ("context", "document")), ("tokenizer", ("bytes", "bpe"))):
    if config[name] not in accepted:
      raise ValueError(f"{name}={config[name]!r}; accepted: {', '.join(accepted)}")
  in_bytes = config.tokenizer == "bytes"
  on_device = in_bytes and config.level == "context"
  byte = tokenizer("bytes", 0, "")
  special = ids(byte)
  eot = special["markers"][-1]
  rates = {"rate": config.fim_rate, "spm_rate": config.spm_rate}
  fields: dict[str, Any] = {"position": "rotary", "norm": "rms", "use_bias": False}
  fields |= {"head": config.head, "scan": config.scan, "remat": config.remat}
  vocab = byte.vocab_size if in_bytes else config.vocab
  sizes = (config.width, config.layers, config.heads)
  model = Transformer(vocab, *sizes, dtype=jnp.dtype(config.dtype), **fields)
  size = config.length - 3 if on_device else config.length + 1
  example = {"inputs": jax.ShapeDtypeStruct((size,), np.int32)}
  init, plain = supervised(model, language.next_token, example)

  def moved(key, tokens_BT, length, **order):
    """Rows (B, length) of contexts, and the pieces that their tokens are of."""

    def one(key, tokens_T):
      return corruption.fill_in_the_middle(key, tokens_T, length=length, **special | order)

    return jax.vmap(one)(jax.random.split(key, len(tokens_BT)), tokens_BT)

  def in_order(params, variables, batch, key, *, train):
    rows = rows_of(batch["inputs"]) | {"mask": batch["mask"]}
    return plain(params, variables, rows, key, train=train)

  def loss(params, variables, batch, key, *, train):
    if on_device:
      rows, _ = moved(key, batch["inputs"], config.length + 1, **rates)
      batch = batch | {"inputs": rows}
    return in_order(params, variables, batch, key, train=train)

  def measure(params, variables, batch, key, *, train):
    """Bits a byte of text in order, and of the same middles after both sides or the prefix.

    After the prefix alone the first byte of a context is not asked for, if it is of the middle.
    """
    length = config.length + 1 + ROOM

    def ordered(rate, spm_rate):
      return moved(key, batch["inputs"], length, rate=rate, spm_rate=spm_rate)

    rows, pieces = jax.vmap(ordered)(jnp.array([0, 1, 1]), jnp.array([0, 0, 1]))  # (3, B, length)
    examples = jax.vmap(rows_of)(rows)
    logits: Any = model.apply({"params": params}, examples["inputs"].reshape(-1, length - 1))
    logits = logits.reshape(*examples["inputs"].shape, -1)
    middle = (pieces[..., 1:] == corruption.MIDDLE).astype(jnp.float32)

    def bits(order, weights):
      asked = {"targets": examples["targets"][order], "weights": weights, "mask": batch["mask"]}
      return language.next_token(logits[order], asked)[1]["bits"]

    metrics = {"bits": bits(0, examples["weights"][0]), "prefix_alone": bits(0, middle[0])}
    metrics |= {"psm": bits(1, middle[1]), "spm": bits(2, middle[2])}
    return metrics["bits"][0], (metrics, variables)

  def infill(params, variables, batch, key, *, train):
    """How many of the middles written greedily after both sides end by themselves."""
    whole = {"end": None, "rate": 1.0, "spm_rate": 1.0}
    rows, pieces = moved(key, batch["inputs"], config.length + 1, **whole)
    lengths = config.length - (pieces == corruption.MIDDLE).sum(1)  # all but middle and <eot>
    prompts = jnp.where(jnp.arange(config.length) < lengths[:, None], rows[:, :-1], 0)
    written, _ = decoding.generate(
      model, {"params": params}, prompts, lengths, key, steps=48, eos=eot, temperature=0.0
    )
    mask = batch["mask"]
    ended = ((written == eot).any(1) * mask).sum()
    return ended, ({"ended": (ended, mask.sum())}, variables)

  data = functools.partial(contexts, config, "train")
  if config.level == "document":
    data = functools.partial(documents_first, config.data, size, **rates)
  elif not in_bytes:
    data = functools.partial(encoded_anew, config)
  # Tokens of several characters are measured on text in order alone.
  of_text = {"inputs": jax.ShapeDtypeStruct((config.length - 3,), np.int32)}
  held_out = {s: functools.partial(contexts, config, s) for s in ("validation", "test")}
  by = measure if in_bytes else in_order
  evaluate = {split: Evaluation(source, by, of_text) for split, source in held_out.items()}
  if in_bytes:
    few = functools.partial(contexts, config, "test", 64)
    evaluate["infill"] = Evaluation(few, infill, of_text)
  return {
    "train": Task(
      init=init,
      loss=loss,
      optimizer=optimizer(**config.optimizer),
      example=example,
      data=data,
      batch_size=config.batch_size,
      steps=config.optimizer.total_steps,
      evaluate=evaluate,
      steps_per_dispatch=config.steps_per_dispatch,
      checkpoint_every=config.checkpoint_every,
    )
  }


ARMS: dict[str, dict[str, Any]] = {
  "rate 0": {"fim_rate": 0.0},
  "rate 0.5": {},
  "rate 0.9": {"fim_rate": 0.9},
  "document level": {"level": "document"},
}
RATES = (2e-2, 4e-2, 8e-2)
free = functools.partial(Claim, metric="test/bits", against="rate 0", ratio=True)
half = functools.partial(
  free, name="a rate of 0.5 costs nothing", of="rate 0.5", at_most=1.01, refuted_above=1.02
)
most = functools.partial(free, name="neither does 0.9", of="rate 0.9", at_most=1.03)
infills = functools.partial(Claim, metric="test/spm", of="rate 0.5", ratio=True)
ALONE: dict[str, Any] = {"against_metric": "test/prefix_alone"}

STUDIES = [
  Study(
    "free",
    arms=ARMS,
    claims=[
      half(),
      most(),
      infills("the suffix helps", against="rate 0.5", at_most=0.97, refuted_above=1.0, **ALONE),
      infills("to less than a rate of 0 takes", against="rate 0", at_most=1.0, **ALONE),
      infills("context level beats document level", against="document level", at_most=1.0),
      infills("SPM beats PSM", against="rate 0.5", against_metric="test/psm", at_most=1.0),
    ],
    plot=["test/bits", "test/prefix_alone", "test/psm", "test/spm", "infill/ended"],
  ),
  Study(
    "size",
    config={"width": 32},
    arms={arm: ARMS[arm] for arm in ("rate 0", "rate 0.5")},
    claims=[half(name="a rate of 0.5 costs a smaller model nothing")],
  ),
  Study(
    "paper",
    scales=("paper/*",),
    arms={arm: ARMS[arm] for arm in ("rate 0.5", "rate 0", "rate 0.9")},
    claims=[half(), most()],
    seeds=1,
  ),
  Study(  # the rate of get_config was best here for both, on validation bits of text in order
    "tuning",
    arms={
      f"{arm} lr={rate:g}": ARMS[arm] | {"optimizer.lr": rate}
      for arm in ("rate 0", "rate 0.5")
      for rate in RATES
    },
    seeds=(100, 101),
    plot=["validation/bits"],
    optional=True,
  ),
]

if __name__ == "__main__":
  main(__name__)
