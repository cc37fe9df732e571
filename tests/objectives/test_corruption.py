"""Corruptions: T5's statistics, a plain oracle, and that nothing is lost."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import corruption
from objectives.corruption import UL2, Denoiser

SENTINELS, END, MODES = np.arange(900, 1000), 2, (800, 801, 802)
TOKENS = np.arange(100, 164, dtype=np.int32)
LM, PREFIX_LM = Denoiser(1.0, None), Denoiser(0.5, None)


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


@functools.partial(jax.jit, static_argnames=("size", "count"))
def masks(length, noise, spans, *, size, count):
  one = functools.partial(corruption.noise_mask, size=size)
  return jax.vmap(one, (0, None, None, None))(keys(count), length, noise, spans)


def runs(mask):
  """(value, length) of each run of equals."""
  return [(bool(v), len(list(g))) for v, g in itertools.groupby(np.asarray(mask))]


@pytest.mark.parametrize(
  ("rate", "span", "length"),
  [(0.15, 3, 100), (0.5, 3, 64), (0.15, 64, 50), (0.5, 8, 17), (0.3, 1, 9)],
)
def test_spans_have_the_statistics_of_t5(rate, span, length):
  """Exact numbers of noise tokens and spans; clean first, noise last, nothing behind the end."""
  noise, spans = corruption.counts(Denoiser(rate, span), length)
  assert noise == np.clip(np.round(rate * length), 1, length - 1)
  assert spans == max(np.round(noise / span), 1)
  for mask in np.asarray(masks(length, noise, spans, size=110, count=200)):
    assert mask.sum() == noise and not mask[length:].any()
    made = runs(mask[:length])
    assert [value for value, _ in made] == [False, True] * spans


def test_all_partitions_are_equally_likely():
  """7 noise and 6 clean tokens in 3 spans: C(6, 2) C(5, 2) = 150 masks, each as likely."""
  drawn = np.asarray(masks(13, 7, 3, size=16, count=30_000))
  seen = collections.Counter(map(bytes, drawn))
  assert len(seen) == 150
  expected = 200
  chi2 = sum((n - expected) ** 2 / expected for n in seen.values())
  assert abs(chi2 - 149) < 4 * np.sqrt(2 * 149)
  lengths = [n for mask in drawn for value, n in runs(mask[:13]) if value]
  assert np.mean(lengths) == pytest.approx(7 / 3)
  assert set(lengths) == {1, 2, 3, 4, 5}  # spans are not of the mean length each


def oracle(tokens, mask, mode):
  """Input and target by a walk over the sequence."""
  shown, asked, k = [] if mode is None else [mode], [], 0
  for i, token in enumerate(tokens):
    if not mask[i]:
      shown.append(token)
      continue
    if i == 0 or not mask[i - 1]:
      shown.append(SENTINELS[k])
      asked.append(SENTINELS[k])
      k += 1
    asked.append(token)
  return [*shown, END], [*asked, END]


def padded(row, size):
  return np.pad(row, (0, size - len(row)))


@pytest.mark.parametrize("mode", [None, 801])
@pytest.mark.parametrize("length", [1, 9, 20])
def test_corrupt_against_a_walk(length, mode):
  random, tokens = np.random.RandomState(length), TOKENS[:20]
  sizes = {"sentinels": SENTINELS, "end": END, "inputs": 24, "targets": 36}
  one = functools.partial(corruption.corrupt, tokens, length=length, mode=mode, **sizes)
  one = jax.jit(one)
  for rate in (0.0, 0.3, 0.6, 1.0):
    mask = random.rand(20) < rate  # any mask, also one that begins with noise
    shown, asked = oracle(tokens[:length], mask, mode)
    got = one(mask)
    np.testing.assert_array_equal(got["inputs"], padded(shown, 24))
    np.testing.assert_array_equal(got["targets"], padded(asked, 36))
    np.testing.assert_array_equal(got["weights"], np.arange(36) < len(asked))
    assert got["lengths"] == len(shown)


def restored(shown, asked):
  """The sequence that an example was made of: each sentinel of the input filled in."""
  spans, current = {}, None
  assert asked[-1] == END and shown[-1] == END
  for token in asked[:-1]:
    if token in SENTINELS:
      current = spans.setdefault(token, [])
    else:
      current.append(token)
  whole = [[t] if t not in SENTINELS else spans.pop(t) for t in shown[:-1]]
  assert not spans
  return list(itertools.chain(*whole))


def drawn(denoisers, count, *, inputs=48, targets=48, seed=0, modes=None, **more):
  fields = {"inputs": inputs, "targets": targets, "sentinels": SENTINELS, "end": END}
  one = functools.partial(
    corruption.denoise, tokens_T=TOKENS, denoisers=denoisers, modes=modes, **fields, **more
  )
  return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(keys(count, seed)))


def test_no_token_is_lost():
  denoisers = [*UL2, Denoiser(0.3, 12), PREFIX_LM, LM]
  made = drawn(denoisers, 300, modes=[MODES[1]] * 10)
  lengths = [min(corruption.chunk(d, 48, 48), len(TOKENS)) for d in denoisers]
  assert set(made["denoiser"]) == set(range(10))
  for i in range(300):
    shown = made["inputs"][i][: made["lengths"][i]]
    asked = made["targets"][i][made["weights"][i] > 0]
    assert shown[0] == MODES[1]
    assert restored(shown[1:], asked) == TOKENS[: lengths[made["denoiser"][i]]].tolist()
    assert not made["inputs"][i][made["lengths"][i] :].any()


@pytest.mark.parametrize("denoiser", [*UL2, PREFIX_LM, LM])
@pytest.mark.parametrize("sizes", [(512, 512), (40, 24)])
def test_the_chunk_is_the_longest_that_fits(denoiser, sizes):
  length = corruption.chunk(denoiser, *sizes)
  for n, expected in ((length, True), (length + 1, False)):
    low, high = corruption._bounds(denoiser, n)
    spans = corruption.counts(denoiser, n)[1]
    fits = n - low + spans + 2 <= sizes[0] and high + spans + 1 <= sizes[1]
    assert fits == expected
  assert corruption.counts(denoiser, length)[1] <= sizes[0] // 4  # sentinels needed


def test_the_released_lengths():
  """512 tokens of input under (3, 0.15) are 568 of text and 114 of target (t5, span_corruption)."""
  assert corruption.chunk(UL2[0], 513, 512) == 568  # T5 has no mode token
  assert sum(corruption.counts(UL2[0], 568)) + 1 == 114


def test_a_span_at_the_end():
  """S continues: a suffix, a quarter of the actual length on average; prefix LM at any split."""
  made = drawn([UL2[2], PREFIX_LM, LM], 12_000, inputs=100, targets=100)
  asked = made["weights"].sum(1).astype(int) - 2  # the sentinel and the end
  for which, (low, high) in enumerate([(1, 31), (1, 63), (64, 64)]):
    some = asked[made["denoiser"] == which]
    assert (some.min(), some.max()) == (low, high)
    assert some.mean() == pytest.approx((low + high) / 2, rel=0.03)
  for i, n in enumerate(asked[:60]):
    np.testing.assert_array_equal(made["targets"][i][1 : n + 1], TOKENS[64 - n :])
    np.testing.assert_array_equal(made["inputs"][i][: 64 - n], TOKENS[: 64 - n])


def test_the_mixture_draws_each_with_its_mode():
  modes = [MODES["RSX".index(d.mode)] for d in UL2]
  made = drawn(UL2, 7_000, modes=modes)
  share = np.bincount(made["denoiser"]) / 7_000
  np.testing.assert_allclose(share, 1 / 7, atol=0.02)
  np.testing.assert_array_equal(made["inputs"][:, 0], np.asarray(modes)[made["denoiser"]])
  assert not np.isin(made["targets"], MODES).any()  # the mode is told to the input alone
  uneven = drawn(UL2[:2], 4_000, shares=[0.8, 0.2])
  assert uneven["denoiser"].mean() == pytest.approx(0.2, abs=0.03)


def test_joined():
  """Input and target in one row; what predicts the first target is the last of the input."""
  made = drawn(UL2, 30)
  rows = jax.tree.map(np.asarray, jax.vmap(corruption.joined)(made))
  for i in range(30):
    shown = made["inputs"][i][: made["lengths"][i]].tolist()
    asked = made["targets"][i][made["weights"][i] > 0].tolist()
    whole = padded(shown + asked, 96)
    np.testing.assert_array_equal(rows["inputs"][i], whole[:-1])
    np.testing.assert_array_equal(rows["targets"][i], whole[1:])
    assert rows["prefix"][i] == len(shown) and rows["lengths"][i] == len(shown + asked)
    assert rows["targets"][i][rows["weights"][i] > 0].tolist() == asked
    assert np.flatnonzero(rows["weights"][i])[0] == len(shown) - 1


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"sentinels": range(3)}, "sentinels: 3; accepted: 13 or more"),
    ({"denoisers": [Denoiser(0.0, 3)]}, "accepted: a rate above 0, up to 1, and spans of 1"),
    ({"denoisers": [Denoiser(0.5, 0.5)]}, "spans of 1 or more"),
    ({"inputs": 2}, "inputs=2, targets=100; accepted: more"),
  ],
)
def test_mistakes(fields, match):
  sizes = {"inputs": 100, "targets": 100, "end": END, "sentinels": SENTINELS}
  with pytest.raises(ValueError, match=match):
    corruption.denoise(
      jax.random.key(0), jnp.arange(80), **{"denoisers": [Denoiser(0.5, 3)]} | sizes | fields
    )


@pytest.mark.parametrize("decoder", [False, True])
def test_a_batch_is_each_row_with_its_own_key_and_what_a_model_reads_of_it(decoder):
  tokens = np.stack([TOKENS, TOKENS[::-1], TOKENS + 1])
  fields = {"denoisers": UL2, "inputs": 48, "targets": 48, "sentinels": SENTINELS, "end": END}
  found = corruption.denoised(jax.random.key(5), tokens, decoder=decoder, **fields)
  for i, key in enumerate(keys(3, 5)):
    plain = corruption.denoise(key, tokens[i], **fields)
    wanted = corruption.joined(plain) if decoder else plain
    for name, value in wanted.items():
      np.testing.assert_array_equal(found[name][i], value)
  placed, named = corruption.arguments(found)
  if decoder:
    assert len(placed) == 1 and set(named) == {"lengths", "prefix"}
  else:
    assert list(named) == ["lengths"]
    np.testing.assert_array_equal(placed[1][:, 1:], found["targets"][:, :-1])
    assert not placed[1][:, 0].any()
  np.testing.assert_array_equal(placed[0], found["inputs"])
