"""Decoding from a `transformer.Transformer`: sampling and beam search, with a cache, inside `jit`.

    tokens_BT, log_probs_BT = jax.jit(functools.partial(generate, model, steps=32, top_p=0.9))(
      variables, prompts_BL, lengths_B, key)

Prompts are padded on the right to one length; `lengths` are their true ones, traced, so that one
compiled program serves all. Under mask="prefix" the prompt is the prefix. All of it may run inside
`vmap` over seeds and inside a loss that is differentiated: nothing here passes a gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.transformer import Cache, Transformer, check_range, init_cache

Scalar = float | jax.Array


def restrict(
  logits_BV: jax.Array, *, top_k: int | jax.Array | None = None, top_p: Scalar | None = None
) -> jax.Array:
  """Logits with -inf at tokens that are not to be drawn.

  Args:
    logits_BV: (..., V) float.
    top_k: keeps the k largest; of equals, the first.
    top_p: of these keeps the fewest whose probabilities, that of all of these being one, add up to
      `top_p` at least (nucleus sampling, arXiv:1904.09751, section 3.1).

  Raises: ValueError for a `top_k` below 1 and a `top_p` outside of (0, 1], where they are known.
  """
  if isinstance(top_k, int) and top_k < 1:
    raise ValueError(f"top_k={top_k}; accepted: 1 or more")
  if isinstance(top_p, int | float) and not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p}; accepted: above 0, up to 1")
  if top_k is None and top_p is None:
    return logits_BV
  order_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
  sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
  keep_BV = jnp.ones(logits_BV.shape, bool)
  if top_k is not None:
    keep_BV &= jnp.arange(logits_BV.shape[-1]) < top_k
  if top_p is not None:
    p_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
    keep_BV &= jnp.cumsum(p_BV, axis=-1) - p_BV < top_p
  keep_BV = jnp.take_along_axis(keep_BV, jnp.argsort(order_BV, axis=-1), axis=-1)
  return jnp.where(keep_BV, logits_BV, -jnp.inf)


def sample(
  logits_BV: jax.Array,
  key: jax.Array,
  *,
  temperature: Scalar = 1.0,
  top_k: int | jax.Array | None = None,
  top_p: Scalar | None = None,
) -> jax.Array:
  """Tokens (B,) int32 drawn from softmax(logits / temperature), cut by top-k, then by the nucleus.

  At temperature 0 the likeliest. `temperature` is a number, or (B,) with one a row; it, `top_k` and
  `top_p` may be traced. See `restrict`.
  """
  greedy_B = jnp.argmax(logits_BV, axis=-1)
  if isinstance(temperature, int | float) and temperature == 0:
    return greedy_B
  t = jnp.asarray(temperature, jnp.float32)[..., None]
  warm_BV = restrict(logits_BV / jnp.where(t > 0, t, 1), top_k=top_k, top_p=top_p)
  drawn_B = jax.random.categorical(key, warm_BV, axis=-1)
  return jnp.where(t[..., 0] > 0, drawn_B, greedy_B)


def generate(
  model: Transformer,
  variables: Any,
  prompts: jax.Array,
  lengths: jax.Array,
  key: jax.Array,
  *,
  steps: int,
  eos: int | None = None,
  pad: int = 0,
  temperature: Scalar = 1.0,
  top_k: int | jax.Array | None = None,
  top_p: Scalar | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Continues each prompt by up to `steps` tokens.

  Args:
    model: a `Transformer` with a head.
    variables: its variables.
    prompts: (B, L) int tokens, or (B, L, H) embeddings; padded on the right.
    lengths: (B,) int, true lengths of the prompts, from 1 to L.
    key: for sampling.
    steps: T, the most tokens to add; stops earlier where all rows have ended.
    eos: the token that ends a row; None for none.
    pad: what follows it.
    temperature, top_k, top_p: see `sample`.

  Returns:
    tokens: (B, T) int32, with `eos`, then `pad`.
    log_probs: (B, T) float32, log softmax of the model's own logits (temperature 1, nothing cut) at
      those tokens; 0 at `pad` behind the end.

  Raises: ValueError where L + T exceeds the learned positions; see also `Transformer`.
  """
  step, logits_BV, cache = _prefill(model, variables, prompts, lengths, steps)
  batch = logits_BV.shape[0]

  def choose(t: jax.Array, logits_BV: jax.Array, state: Any) -> Any:
    tokens_BT, log_probs_BT, done_B = state
    drawn_B = sample(
      logits_BV, jax.random.fold_in(key, t), temperature=temperature, top_k=top_k, top_p=top_p
    )
    log_prob_BV = jax.nn.log_softmax(logits_BV)
    log_prob_B = jnp.take_along_axis(log_prob_BV, drawn_B[:, None], axis=-1)[:, 0]
    tokens_BT = tokens_BT.at[:, t].set(jnp.where(done_B, pad, drawn_B))
    log_probs_BT = log_probs_BT.at[:, t].set(jnp.where(done_B, 0, log_prob_B))
    return tokens_BT, log_probs_BT, done_B if eos is None else done_B | (drawn_B == eos)

  def advance(carry: Any) -> Any:
    t, cache, state = carry
    logits_BV, cache = step(state[0][:, t - 1], cache)
    return t + 1, cache, choose(t, logits_BV, state)

  state = (
    jnp.full((batch, steps), pad, jnp.int32),
    jnp.zeros((batch, steps), jnp.float32),
    jnp.zeros(batch, bool),
  )
  state = choose(jnp.int32(0), logits_BV, state)
  carry = (jnp.int32(1), cache, state)
  carry = jax.lax.while_loop(lambda c: (c[0] < steps) & ~c[2][2].all(), advance, carry)
  return carry[2][:2]


def beam_search(
  model: Transformer,
  variables: Any,
  prompts: jax.Array,
  lengths: jax.Array,
  *,
  steps: int,
  beams: int,
  eos: int | None = None,
  pad: int = 0,
  length_penalty: Scalar = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """The likeliest continuations that a beam finds.

  Each step keeps the `beams` best among ended continuations and all extensions of the others, by
  score: log-probability / ((5 + n) / 6)^length_penalty, n being the tokens with `eos` (Wu et al.,
  arXiv:1609.08144, eq. 14, without its coverage term).

  Args:
    beams: K.
    length_penalty: 0 for plain log-probabilities; more favours long continuations.
    others: as for `generate`.

  Returns:
    tokens: (B, K, T) int32, best first; with `eos`, then `pad`.
    scores: (B, K) float32; -inf where there are fewer continuations than beams.
  """
  step, logits_BV, cache = _prefill(model, variables, prompts, lengths, steps)
  batch, vocab = logits_BV.shape
  cache = _over_batch(lambda x, axis: jnp.repeat(x, beams, axis), cache)

  def choose(t: jax.Array, logits_BKV: jax.Array, state: Any) -> tuple[Any, Callable[..., Any]]:
    tokens_BKT, total_BK, count_BK, done_BK = state
    # An ended beam has one extension, which costs nothing.
    same_V = jnp.where(jnp.arange(vocab) == 0, 0.0, -jnp.inf)
    added_BKV = jnp.where(done_BK[..., None], same_V, jax.nn.log_softmax(logits_BKV))
    total_BN = (total_BK[..., None] + added_BKV).reshape(batch, -1)
    count_BK = jnp.where(done_BK, count_BK, count_BK + 1)
    score_BN = total_BN / jnp.repeat(_penalty(count_BK, length_penalty), vocab, axis=-1)
    best_BK = jax.lax.top_k(score_BN, beams)[1]
    token_BK = best_BK % vocab

    def pick(x: jax.Array, axis: int = 0) -> jax.Array:
      """Of x (.., B, K, ..) with B at `axis`: the rows that the best go on from."""
      rows = jax.vmap(lambda x, i: jnp.take(x, i, axis), in_axes=(axis, 0), out_axes=axis)
      return rows(x, best_BK // vocab)

    done_BK = pick(done_BK)
    tokens_BKT = pick(tokens_BKT).at[:, :, t].set(jnp.where(done_BK, pad, token_BK))
    total_BK = jnp.take_along_axis(total_BN, best_BK, axis=-1)
    ended_BK = done_BK if eos is None else done_BK | (token_BK == eos)
    return (tokens_BKT, total_BK, pick(count_BK), ended_BK), pick

  def advance(carry: Any) -> Any:
    t, cache, state = carry
    logits_NV, cache = step(state[0][:, :, t - 1].reshape(-1), cache)
    state, pick = choose(t, logits_NV.reshape(batch, beams, vocab), state)

    def reorder(x: jax.Array, axis: int) -> jax.Array:
      beam = x.reshape(*x.shape[:axis], batch, beams, *x.shape[axis + 1 :])
      return pick(beam, axis).reshape(x.shape)

    return t + 1, _over_batch(reorder, cache), state

  state = (
    jnp.full((batch, beams, steps), pad, jnp.int32),
    jnp.where(jnp.arange(beams) == 0, jnp.zeros((batch, 1)), -jnp.inf),
    jnp.zeros((batch, beams), jnp.int32),
    jnp.zeros((batch, beams), bool),
  )
  state, _ = choose(jnp.int32(0), jnp.repeat(logits_BV[:, None], beams, axis=1), state)
  carry = (jnp.int32(1), cache, state)
  carry = jax.lax.while_loop(lambda c: (c[0] < steps) & ~c[2][3].all(), advance, carry)
  tokens_BKT, total_BK, count_BK, _ = carry[2]
  return tokens_BKT, total_BK / _penalty(count_BK, length_penalty)


def _penalty(count: jax.Array, length_penalty: Scalar) -> jax.Array:
  return ((5 + count) / 6) ** length_penalty


def _over_batch(function: Callable[[jax.Array, int], jax.Array], cache: Cache) -> Cache:
  """`function(leaf, axis of the batch)` on each leaf of a cache."""
  layers = jax.tree.map(lambda x: function(x, x.ndim - 4), cache.layers)
  return Cache(layers, function(cache.filled, 0))


def _prefill(
  model: Transformer, variables: Any, prompts: jax.Array, lengths: jax.Array, steps: int
) -> tuple[Callable[[jax.Array, Cache], tuple[jax.Array, Cache]], jax.Array, Cache]:
  """(step, logits (B, V) behind each prompt, cache); step(tokens_B, cache) -> (logits, cache)."""
  variables, prompts = jax.lax.stop_gradient((variables, jnp.asarray(prompts)))
  lengths = jnp.asarray(lengths)
  batch, length = prompts.shape[:2]
  check_range("lengths", lengths, 1, length)
  cache = init_cache(model, batch, length + steps - 1)  # the last token is not fed
  prefix = lengths if model.mask == "prefix" else None
  apply: Any = functools.partial(model.apply, variables)
  x_BLH, cache = apply(prompts, lengths=lengths, prefix=prefix, cache=cache, logits=False)
  last_BH = jnp.take_along_axis(x_BLH, (lengths - 1)[:, None, None], axis=1)[:, 0]

  def step(tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    logits_B1V, cache = apply(tokens_B[:, None], cache=cache)
    return logits_B1V[:, 0], cache

  return step, apply(last_BH, method="unembed"), cache
