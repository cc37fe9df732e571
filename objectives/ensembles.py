"""Ensembles of language models, each an expert in a domain, under a Bayesian domain posterior.

Li, Gururangan, Dettmers, Lewis, Althoff, Smith and Zettlemoyer, arXiv:2208.03306, section 2.4;
Gururangan et al., arXiv:2108.05036, section 4.

    log_probs_KBL = ...                      # log p(x_t | x_<t, D=k) of the tokens that came
    for batch in development:                # from a uniform prior
      prior_K = update_prior(prior_K, log_posterior(log_probs_KBL, prior_K))
    log_probs_BL = ensemble(log_probs_KBL, prior_K)

Probabilities are mixed, neither logits nor log-probabilities. Everything is in float32.
"""

import jax
import jax.numpy as jnp

FORMS = ("cumulative", "token")


def log_posterior(
  log_probs_KBL: jax.Array, prior_K: jax.Array, form: str = "cumulative"
) -> jax.Array:
  """log p(D=k | x_<t), the weights of the experts at each position: (K, B, L).

  Args:
    log_probs_KBL: log p(x_t | x_<t, D=k), what each expert gave each token.
    prior_K: p(D=k), sums to 1; an expert of prior 0 keeps weight 0.
    form: "cumulative": p(x_<t | D=k) p(D=k) / sum_i p(x_<t | D=i) p(D=i), so that the first
      position has the prior; "token": p(x_{t-1} | x_<t-1, D=k) p(D=k), normalised, and uniform at
      the first position, as in the code released with arXiv:2108.05036 (a prior of 0 is ignored
      there too).

  Raises: ValueError for another form.
  """
  if form not in FORMS:
    raise ValueError(f"form={form!r}; accepted: {', '.join(FORMS)}")
  log_probs_KBL = log_probs_KBL.astype(jnp.float32)
  seen_KBL = jnp.pad(log_probs_KBL[..., :-1], ((0, 0), (0, 0), (1, 0)))
  if form == "cumulative":
    seen_KBL = seen_KBL.cumsum(-1)
  scores_KBL = seen_KBL + jnp.log(prior_K.astype(jnp.float32))[:, None, None]
  if form == "token":
    scores_KBL = scores_KBL.at[..., 0].set(0.0)
  return jax.nn.log_softmax(scores_KBL, axis=0)


def mixture(log_probs_KBL: jax.Array, log_weights_KBL: jax.Array) -> jax.Array:
  """log sum_k exp(log_weights) p(x_t | x_<t, D=k): (B, L) float32."""
  return jax.nn.logsumexp(log_probs_KBL.astype(jnp.float32) + log_weights_KBL, axis=0)


def ensemble(log_probs_KBL: jax.Array, prior_K: jax.Array, form: str = "cumulative") -> jax.Array:
  """`mixture` under `log_posterior`: log p(x_t | x_<t) of the ensemble, (B, L) float32."""
  return mixture(log_probs_KBL, log_posterior(log_probs_KBL, prior_K, form))


def update_prior(
  prior_K: jax.Array,
  log_posterior_KBL: jax.Array,
  mask_B: jax.Array | None = None,
  factor: float = 0.3,
) -> jax.Array:
  """factor x the mean over rows of the posterior at the last position + (1 - factor) x the prior.

  Args:
    prior_K: what the posterior was taken under.
    log_posterior_KBL: of a batch of development data of the domain to be evaluated.
    mask_B: 0 leaves a row out; a batch with no row leaves the prior as it is.
    factor: of the moving average.
  """
  last_KB = jnp.exp(log_posterior_KBL[..., -1])
  mask_B = jnp.ones(last_KB.shape[1]) if mask_B is None else mask_B.astype(jnp.float32)
  count = mask_B.sum()
  mean_K = (last_KB * mask_B).sum(1) / jnp.maximum(count, 1)
  return jnp.where(count > 0, factor * mean_K + (1 - factor) * prior_K, prior_K)


def top_k(prior_K: jax.Array, k: int) -> jax.Array:
  """The k largest entries, normalised; the others are 0 and their experts need not be run.

  Of equal entries the first are kept.

  Raises: ValueError unless 1 <= k <= K.
  """
  if not 1 <= k <= len(prior_K):
    raise ValueError(f"k={k}; accepted: 1 to {len(prior_K)}")
  values_k, index_k = jax.lax.top_k(prior_K, k)
  return jnp.zeros_like(prior_K).at[index_k].set(values_k / values_k.sum())
