"""Ensembles against Bayes' rule in float64, token by token."""

import jax.numpy as jnp
import numpy as np
import pytest

from objectives import ensembles

K, B, L, V = 3, 4, 7, 5
RANDOM = np.random.RandomState(0)
LOGITS = 2 * RANDOM.randn(K, B, L, V)
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
CAME = RANDOM.randint(0, V, (B, L))
GAVE = np.take_along_axis(PROBS, np.broadcast_to(CAME, (K, B, L))[..., None], -1)[..., 0]
PRIOR = np.array([0.5, 0.2, 0.3])


def oracle(form="cumulative", prior=PRIOR):
  """Weights (K, B, L), by multiplying probabilities."""
  weights = np.empty((K, B, L))
  for b in range(B):
    for t in range(L):
      for k in range(K):
        if form == "cumulative":
          weights[k, b, t] = prior[k] * np.prod(GAVE[k, b, :t])
        else:
          weights[k, b, t] = prior[k] * GAVE[k, b, t - 1] if t else 1.0
  return weights / weights.sum(0)


def posterior(form="cumulative", prior=PRIOR):
  return ensembles.log_posterior(jnp.log(GAVE), jnp.array(prior), form)


@pytest.mark.parametrize("form", ensembles.FORMS)
def test_the_posterior(form):
  np.testing.assert_allclose(np.exp(posterior(form)), oracle(form), rtol=2e-5)
  first = PRIOR if form == "cumulative" else np.full(K, 1 / 3)
  np.testing.assert_allclose(np.exp(posterior(form)[:, 0, 0]), first, rtol=1e-5)


def test_a_token_has_no_say_in_its_own_weights():
  """Nor have those after it; the cumulative form remembers all before, the other only the last."""
  for form, changed in (("cumulative", [4, 5, 6]), ("token", [4])):
    other = np.log(GAVE)
    other[0, :, 3] -= 1.0
    got = ensembles.log_posterior(jnp.array(other), jnp.array(PRIOR), form)
    differs = np.abs(got - posterior(form)).max((0, 1)) > 1e-3
    np.testing.assert_array_equal(np.flatnonzero(differs), changed)


def test_probabilities_are_mixed():
  """The mixture over the whole vocabulary is a distribution: that of logits or of their logarithms
  is another one, or none."""
  weights = oracle()
  wanted = (weights[..., None] * PROBS).sum(0)
  every = [
    ensembles.mixture(jnp.log(PROBS[..., v]), posterior()) for v in range(V)
  ]  # each token of the vocabulary in turn
  np.testing.assert_allclose(np.exp(np.stack(every, -1)), wanted, rtol=2e-5)
  np.testing.assert_allclose(np.exp(every).sum(0), 1, rtol=1e-5)
  geometric = (weights[..., None] * np.log(PROBS)).sum(0)
  assert np.abs(np.exp(geometric) - wanted).max() > 0.05


def test_one_expert_is_itself_and_equal_ones_make_no_difference():
  alone = ensembles.mixture(jnp.log(GAVE[:1]), posterior(prior=[1, 0, 0])[:1])
  np.testing.assert_allclose(alone, np.log(GAVE[0]), rtol=1e-4, atol=1e-5)
  same = jnp.log(np.stack([GAVE[0]] * K))
  weights = ensembles.log_posterior(same, jnp.array(PRIOR))
  np.testing.assert_allclose(ensembles.mixture(same, weights), same[0], rtol=1e-4, atol=1e-5)


def test_long_rows_stay_finite():
  """Likelihoods that no float32 holds."""
  gave = jnp.stack([jnp.full((1, 4096), -8.0), jnp.full((1, 4096), -8.001)])
  weights = ensembles.log_posterior(gave, jnp.array([0.5, 0.5]))
  np.testing.assert_allclose(np.exp(weights[0, 0, -1]), 1 / (1 + np.exp(-4.095)), rtol=1e-3)


def test_the_cached_prior():
  prior, wanted = jnp.full(K, 1 / K), np.full(K, 1 / K)
  mask = np.array([1, 1, 0, 1], np.float32)
  for _ in range(3):
    last = oracle(prior=wanted)[:, :, -1]
    wanted = 0.3 * last[:, mask > 0].mean(1) + 0.7 * wanted
    weights = ensembles.log_posterior(jnp.log(GAVE), prior)
    prior = ensembles.update_prior(prior, weights, mask)
    np.testing.assert_allclose(prior, wanted, rtol=1e-4)
  np.testing.assert_allclose(prior.sum(), 1, rtol=1e-6)
  np.testing.assert_array_equal(ensembles.update_prior(prior, weights, np.zeros(B)), prior)


def test_top_k():
  np.testing.assert_allclose(ensembles.top_k(jnp.array(PRIOR), 1), [1, 0, 0])
  np.testing.assert_allclose(ensembles.top_k(jnp.array(PRIOR), 2), [0.625, 0, 0.375], rtol=1e-6)
  np.testing.assert_allclose(ensembles.top_k(jnp.array(PRIOR), 3), PRIOR, rtol=1e-6)
  np.testing.assert_allclose(ensembles.top_k(jnp.full(4, 0.25), 2), [0.5, 0.5, 0, 0])
  # An expert of prior 0 has no part in the mixture, whatever it says.
  one = ensembles.top_k(jnp.array(PRIOR), 1)
  weights = ensembles.log_posterior(jnp.log(GAVE), one)
  np.testing.assert_allclose(ensembles.mixture(jnp.log(GAVE), weights), np.log(GAVE[0]), rtol=1e-4)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: posterior("next"), "form='next'; accepted: cumulative, token"),
    (lambda: ensembles.top_k(jnp.array(PRIOR), 0), "k=0; accepted: 1 to 3"),
    (lambda: ensembles.top_k(jnp.array(PRIOR), 4), "k=4; accepted: 1 to 3"),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
