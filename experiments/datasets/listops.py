"""ListOps (Nangia and Bowman, 2018) by the generating rule of the Long Range Arena.

A node at depth d < max_depth (the root has depth 1) is an operator with probability 1/4, otherwise
a digit; at max_depth it is a digit. An operator is MIN, MAX, MED (the median, rounded down) or SM
(the sum modulo 10), each with probability 1/4, of 2..max_args nodes, uniformly many. An expression
is kept if min_length < length < max_length, counting digits, operators and closing brackets, and
if it has not occurred before. The Arena's set: lengths 500..2000, depth 10, 10 arguments, 96,000 /
2,000 / 2,000 expressions (arXiv:2011.04006; rule checked against its published generator, written
anew). Prefix notation without parentheses, the closing bracket renamed X, an end token appended,
as S5 and S4 read it.

Example: {"tokens": (n,) uint8 ids into `VOCABULARY`, n <= max_length, "label": the value, 0..9}.

The generator is a function of the parameters alone: the only randomness is `random.Random(int)
.random()`, whose sequence Python promises to keep. The test split comes first, validation avoids
what is in test, train avoids both; so a larger training set extends a smaller one and leaves the
other two as they are. Each set of parameters is a configuration of its own on disk.
"""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds

VOCABULARY = (
  *("<pad>", "<unk>", "<eos>"),
  *map(str, range(10)),
  *("[MIN", "[MAX", "[MED", "[SM", "X"),
)
WIDTH = 20  # one-hot width of the recipe: 18 tokens and two that never occur
PAD, UNK, EOS = range(3)
DIGIT = VOCABULARY.index("0")
OPERATOR = VOCABULARY.index("[MIN")
CLOSE = VOCABULARY.index("X")
OPERATOR_PROBABILITY = 0.25
SPLITS = ("test", "validation", "train")  # the order of generation
PATIENCE = 200_000


@dataclasses.dataclass
class ListopsConfig(tfds.core.BuilderConfig):
  """Parameters of one generated set; lengths are exclusive bounds and leave out the end token."""

  min_length: int = 500
  max_length: int = 2_000
  max_depth: int = 10
  max_args: int = 10
  train: int = 96_000
  validation: int = 2_000
  test: int = 2_000
  seed: int = 0


def _median(values: list[int]) -> int:
  values = sorted(values)
  return (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2


_APPLY: tuple[Callable[[list[int]], int], ...] = (min, max, _median, lambda v: sum(v) % 10)


class _TooLong(Exception):
  pass


def _grow(draw: Callable[[], float], tokens: list[int], depth: int, config: ListopsConfig) -> int:
  """Appends a random node to `tokens`; returns its value."""
  if depth >= config.max_depth or draw() > OPERATOR_PROBABILITY:
    value = int(draw() * 10)
    tokens.append(DIGIT + value)
    return value
  if len(tokens) >= config.max_length:
    raise _TooLong  # growing on would be rejected anyway
  operator = int(draw() * 4)
  tokens.append(OPERATOR + operator)
  arguments = 2 + int(draw() * (config.max_args - 1))
  values = [_grow(draw, tokens, depth + 1, config) for _ in range(arguments)]
  tokens.append(CLOSE)
  return _APPLY[operator](values)


def expressions(config: ListopsConfig, split: str) -> Iterator[tuple[bytes, int]]:
  """The expressions of a split in order: token ids with the end token, and the value.

  Raises:
    ValueError: the parameters allow no, or too few, distinct expressions.
  """
  before = SPLITS[: SPLITS.index(split)]
  seen = {_digest(tokens) for other in before for tokens, _ in expressions(config, other)}
  draw = random.Random(config.seed * len(SPLITS) + SPLITS.index(split)).random
  wanted, rejected = getattr(config, split), 0
  while wanted:
    tokens: list[int] = []
    try:
      value = _grow(draw, tokens, 1, config)
    except _TooLong:
      tokens.clear()
    if config.min_length < len(tokens) < config.max_length:
      text = bytes([*tokens, EOS])
      if (digest := _digest(text)) not in seen:
        seen.add(digest)
        wanted, rejected = wanted - 1, 0
        yield text, value
        continue
    rejected += 1
    if rejected == PATIENCE:
      raise ValueError(
        f"listops: {PATIENCE:,} draws in a row gave no new expression of length between"
        f" {config.min_length} and {config.max_length} at max_depth {config.max_depth} and"
        f" max_args {config.max_args}; {wanted:,} of {split} are missing: ask for fewer, or"
        " widen the lengths"
      )


def _digest(tokens: bytes) -> bytes:
  return hashlib.blake2b(tokens, digest_size=16).digest()


class Listops(tfds.core.GeneratorBasedBuilder):
  """Generated ListOps; see the module."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      disable_shuffling=True,  # generated in random order already
      supervised_keys=("tokens", "label"),
      features=tfds.features.FeaturesDict(
        {
          "tokens": tfds.features.Tensor(
            shape=(None,), dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB
          ),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in reversed(SPLITS)}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    for i, (tokens, value) in enumerate(expressions(self.builder_config, split)):
      yield i, {"tokens": np.frombuffer(tokens, np.uint8), "label": value}


def config(**parameters: int) -> ListopsConfig:
  """The configuration of these parameters, checked and named after them.

  Raises:
    TypeError: an unknown parameter, or one that is not an integer.
    ValueError: a parameter out of its range.
  """
  inherited = {f.name for f in dataclasses.fields(tfds.core.BuilderConfig)}
  names = [f.name for f in dataclasses.fields(ListopsConfig) if f.name not in inherited]
  for key in parameters:
    if key not in names:
      raise TypeError(f"listops has no parameter {key!r}; it takes {', '.join(names)}")
  made = ListopsConfig(name="", **parameters)
  for key in names:
    if type(getattr(made, key)) is not int:
      raise TypeError(f"listops: {key} must be an int, got {getattr(made, key)!r}")
  for key, least in (
    *(("train", 1), ("validation", 1), ("test", 1), ("min_length", 0), ("seed", 0)),
    *(("max_depth", 1), ("max_args", 2), ("max_length", made.min_length + 2)),
  ):
    if getattr(made, key) < least:
      raise ValueError(f"listops: {key} must be at least {least}, got {getattr(made, key)}")
  made.name = (
    f"length{made.min_length}-{made.max_length}_depth{made.max_depth}_args{made.max_args}"
    f"_size{made.train}-{made.validation}-{made.test}_seed{made.seed}"
  )
  return made


def builder(data_dir: str, **parameters: int) -> tfds.core.DatasetBuilder:
  """The builder for these parameters (`ListopsConfig`), array_record under `data_dir`."""
  return Listops(config=config(**parameters), data_dir=data_dir, file_format="array_record")
