"""Corruptions of token sequences for denoisers: spans, prefixes, mixtures of them.

    fields = {"denoisers": UL2, "inputs": 512, "targets": 512, "sentinels": sentinels_K, "end": 2}
    examples = denoised(key, tokens_BT, decoder=True, **fields)
    placed, named = arguments(examples)
    logits = Transformer(..., mask="prefix").apply(variables, *placed, **named)

Pure functions of a key and one row of tokens, with fixed shapes: they run inside `jit` and `vmap`,
on the device, with fresh draws at every step. Padding is 0.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Example = dict[str, jax.Array]


class Denoiser(NamedTuple):
  """SpanCorrupt of arXiv:2205.05131, section 3.1.

  Attributes:
    rate: r, the share of tokens that is corrupted.
    span: mu, the mean length of a span; None for one span at the end (prefix language modelling),
      whose length is uniform around its mean of r times the sequence: rate 0.5 takes any split
      alike, rate 1 leaves no prefix (a causal language model).
    mode: name of the paradigm, "R", "S" or "X".
  """

  rate: float
  span: float | None = None
  mode: str = "R"


# arXiv:2205.05131, table 1. The length of S's span is a quarter on average.
UL2 = (
  Denoiser(0.15, 3, "R"),
  Denoiser(0.15, 8, "R"),
  Denoiser(0.25, None, "S"),
  Denoiser(0.5, 3, "X"),
  Denoiser(0.5, 8, "X"),
  Denoiser(0.15, 64, "X"),
  Denoiser(0.5, 64, "X"),
)


def counts(denoiser: Denoiser, length: int) -> tuple[int, int]:
  """(noise tokens, spans) of a sequence of `length` tokens, the tokens on average for a span at
  the end. T5's random_spans_noise_mask: round(r T), of 1 to T - 1, in round(noise / mu), at least
  one, and no more than there are noise or clean tokens."""
  noise = int(np.round(denoiser.rate * length))
  if denoiser.span is None:
    return max(noise, 1), 1
  noise = min(max(noise, 1), length - 1)
  return noise, min(max(int(np.round(noise / denoiser.span)), 1), noise, length - noise)


def _bounds(denoiser: Denoiser, length: int) -> tuple[int, int]:
  """The fewest and most noise tokens that may be drawn."""
  noise = counts(denoiser, length)[0]
  low = max(1, 2 * noise - length) if denoiser.span is None else noise
  return low, 2 * noise - low


@functools.cache
def chunk(denoiser: Denoiser, inputs: int, targets: int) -> int:
  """The longest sequence whose corrupted input and target have `inputs` and `targets` tokens.

  These include sentinels, end tokens and a mode token, whether or not there is one: what is read
  does not depend on that.

  Raises: ValueError for a rate or span out of range, and where no sequence of two tokens fits.
  """
  if not 0 < denoiser.rate <= 1 or (denoiser.span is not None and denoiser.span < 1):
    raise ValueError(f"{denoiser}; accepted: a rate above 0, up to 1, and spans of 1 or more")

  def fits(length: int) -> bool:
    (low, high), spans = _bounds(denoiser, length), counts(denoiser, length)[1]
    return length - low + spans + 2 <= inputs and high + spans + 1 <= targets

  fitting = [length for length in range(2, inputs + targets) if fits(length)]
  if not fitting:
    raise ValueError(f"inputs={inputs}, targets={targets}; accepted: more, for {denoiser}")
  return fitting[-1]


def random_starts(key: jax.Array, total: jax.Array, parts: jax.Array, size: int) -> jax.Array:
  """(size,) bool: where the parts of a random partition of `total` things begin.

  All partitions into `parts` non-empty runs are equally likely: `parts` - 1 of the `total` - 1 gaps
  are chosen. `total` and `parts` are int scalars and may be traced; False from `total` on.
  """
  index = jnp.arange(size)
  inner = (index > 0) & (index < total)
  draws = jnp.where(inner, jax.random.uniform(key, (size,)), 2.0)
  rank = jnp.zeros(size, jnp.int32).at[jnp.argsort(draws)].set(index)
  return (index == 0) | (inner & (rank < parts - 1))


def noise_mask(
  key: jax.Array, length: jax.Array, noise: jax.Array, spans: jax.Array, size: int
) -> jax.Array:
  """(size,) bool, True at the tokens to be corrupted (T5's random_spans_noise_mask).

  `noise` tokens and `length - noise` clean ones are each cut into `spans` random parts, which take
  turns: a sequence begins clean and ends in noise. The numbers may be traced.
  """
  keys = jax.random.split(key)

  def lengths(key: jax.Array, total: jax.Array) -> jax.Array:
    part = jnp.cumsum(random_starts(key, total, spans, size)) - 1
    return jnp.zeros(size, jnp.int32).at[part].add(jnp.arange(size) < total)

  clean_K, noise_K = lengths(keys[0], length - noise), lengths(keys[1], noise)
  turns = jnp.cumsum(jnp.stack([clean_K, noise_K], axis=1).reshape(-1))  # where each run ends
  index = jnp.arange(size)
  return (jnp.searchsorted(turns, index, side="right") % 2 == 1) & (index < length)


def corrupt(
  tokens_T: jax.Array,
  noise_T: jax.Array,
  length: jax.Array,
  *,
  sentinels: jax.Array,
  end: int,
  inputs: int,
  targets: int,
  mode: jax.Array | None = None,
) -> Example:
  """The input and target of a masked sequence (T5's noise_span_to_unique_sentinel).

  Input: the mode token, if there is one, the tokens with a sentinel for each span of noise, the end
  token. Target: each span's sentinel and tokens, the end token. What does not fit is dropped.

  Args:
    tokens_T: (T,) int.
    noise_T: (T,) bool.
    length: true length of the tokens.
    sentinels: (K,) int ids, in the order of use.
    end, mode: ids.
    inputs, targets: lengths of the results.

  Returns: "inputs" (inputs,) int32 and "lengths" () int32, their true number; "targets" (targets,)
    int32 and "weights" (targets,) float32, 1 where a target counts.
  """
  valid_T = jnp.arange(tokens_T.shape[0]) < length
  noise_T = noise_T & valid_T
  first_T = noise_T & ~jnp.pad(noise_T[:-1], (1, 0))
  span_T = jnp.cumsum(first_T) - 1
  sentinel_T = jnp.asarray(sentinels, jnp.int32)[span_T]

  def place(size: int, *parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """Values at places, where they belong."""
    row = jnp.zeros(size, jnp.int32)
    for keep, at, value in parts:
      row = row.at[jnp.where(keep, at, size)].set(value, mode="drop")
    return row

  kept_T = valid_T & (first_T | ~noise_T)
  offset = 0 if mode is None else 1
  at_T = offset + jnp.cumsum(kept_T) - 1
  shown = offset + kept_T.sum()
  asked_T = jnp.cumsum(noise_T) + span_T
  asked = noise_T.sum() + first_T.sum()
  always = jnp.ones((), bool)
  items: list[tuple[jax.Array, jax.Array, jax.Array]] = [
    (kept_T, at_T, jnp.where(first_T, sentinel_T, tokens_T)), (always, shown, jnp.int32(end))
  ]  # fmt: skip
  if mode is not None:
    items.append((always, jnp.int32(0), mode))
  target = place(
    targets,
    (noise_T, asked_T, tokens_T),
    (first_T, asked_T - 1, sentinel_T),
    (always, asked, jnp.int32(end)),
  )
  return {
    "inputs": place(inputs, *items),
    "lengths": jnp.minimum(shown + 1, inputs).astype(jnp.int32),
    "targets": target,
    "weights": (jnp.arange(targets) <= asked).astype(jnp.float32),
  }


def denoise(
  key: jax.Array,
  tokens_T: jax.Array,
  *,
  denoisers: Sequence[Denoiser],
  inputs: int,
  targets: int,
  sentinels: Sequence[int] | np.ndarray,
  end: int,
  modes: Sequence[int] | None = None,
  shares: Sequence[float] | jax.Array | None = None,
) -> Example:
  """One of several denoisers, drawn, on as many of the tokens as fill its input (`chunk`).

  Args:
    key: draws the denoiser and the mask.
    tokens_T: (T,) int; those beyond the denoiser's chunk are not used.
    denoisers: D of them.
    inputs, targets, end: as of `corrupt`.
    sentinels: (K,) ids.
    modes: D ids, each denoiser's mode token; None for none.
    shares: D probabilities, which may be traced; alike by default.

  Returns: the example of `corrupt` and "denoiser" () int32, which it was.

  Raises: ValueError where the spans are more than the sentinels; see `chunk`.
  """
  size = tokens_T.shape[0]
  lengths = [min(chunk(d, inputs, targets), size) for d in denoisers]
  spans = [counts(d, n)[1] for d, n in zip(denoisers, lengths, strict=True)]
  if max(spans) > len(sentinels):
    raise ValueError(f"sentinels: {len(sentinels)}; accepted: {max(spans)} or more")
  bounds = [_bounds(d, n) for d, n in zip(denoisers, lengths, strict=True)]
  which_key, count_key, mask_key = jax.random.split(key, 3)
  p = jnp.ones(len(denoisers)) if shares is None else jnp.asarray(shares, jnp.float32)
  which = jax.random.categorical(which_key, jnp.log(p))
  length = jnp.asarray(lengths)[which]
  low, high = jnp.asarray(bounds)[which]
  noise = jax.random.randint(count_key, (), low, high + 1)
  mask_T = noise_mask(mask_key, length, noise, jnp.asarray(spans)[which], size)
  example = corrupt(
    tokens_T,
    mask_T,
    length,
    sentinels=jnp.asarray(sentinels),
    end=end,
    inputs=inputs,
    targets=targets,
    mode=None if modes is None else jnp.asarray(modes, jnp.int32)[which],
  )
  return example | {"denoiser": which.astype(jnp.int32)}


def denoised(key: jax.Array, tokens_BT: jax.Array, *, decoder: bool, **fields: Any) -> Example:
  """`denoise` of each row by a key of its own, for a model of one kind.

  Args:
    key: is split for the rows.
    tokens_BT: (B, T) int.
    decoder: for a decoder alone (`joined`), or for an encoder and a decoder: then with "shifted"
      (B, targets) int32, what the decoder reads, each target one place later behind a 0.
    fields: as of `denoise`.
  """

  def one(key: jax.Array, tokens_T: jax.Array) -> Example:
    example = denoise(key, tokens_T, **fields)
    if decoder:
      return joined(example)
    return example | {"shifted": jnp.pad(example["targets"][:-1], (1, 0))}

  return jax.vmap(one)(jax.random.split(key, len(tokens_BT)), tokens_BT)


def arguments(examples: Example) -> tuple[list[jax.Array], dict[str, jax.Array]]:
  """What `T5`, or `Transformer(mask="prefix")`, reads of `denoised`, by position and by name."""
  placed = ["inputs"] if "prefix" in examples else ["inputs", "shifted"]
  named = ["lengths", "prefix"] if "prefix" in examples else ["lengths"]
  return [examples[k] for k in placed], {k: examples[k] for k in named}


def joined(example: Example) -> Example:
  """An example of `corrupt` for a decoder alone: its input, then its target, in one row.

  Returns: "inputs" and "targets" (I + T - 1,) int32, the latter the next token of each; "weights",
    1 at the targets of the denoiser; "prefix" () int32, the length of its input, which is to be
    seen in both directions; "lengths" () int32, of the row.
  """
  shown, asked = example["inputs"], example["targets"]
  prefix, count = example["lengths"], example["weights"].sum().astype(jnp.int32)
  index = jnp.arange(len(shown) + len(asked))
  target = asked[jnp.clip(index - prefix, 0, len(asked) - 1)]
  row = jnp.where(index < prefix, shown[jnp.minimum(index, len(shown) - 1)], target)
  asks = (index >= prefix) & (index < prefix + count)
  row = jnp.where((index < prefix) | asks, row, 0)
  return {
    "inputs": row[:-1],
    "targets": row[1:],
    "weights": asks[1:].astype(jnp.float32),
    "prefix": prefix,
    "lengths": prefix + count,
  }
