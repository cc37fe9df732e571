"""Recipes: schedules, clipping, what decays, which parameters Muon takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from objectives import recipes


def test_adafactor_rate():
  """1 / sqrt(max(step, 10,000)): one hundredth, then falling."""
  transform = recipes.language_model("adafactor", 1.0, 500_000, 10_000)
  params = {"w": jnp.ones((4,))}
  updates, _ = transform.update({"w": jnp.ones((4,))}, transform.init(params), params)
  np.testing.assert_allclose(updates["w"], -0.01, rtol=1e-3)


def test_muon_is_for_kernels():
  """A kernel's update is orthogonal; the rest has Adam's, at a quarter of the rate."""
  transform = recipes.language_model("muon", 0.4, 100, 10)
  random = np.random.RandomState(0)
  params = {"up": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "embedding": jnp.ones((4, 4))}
  grads = jax.tree.map(lambda x: jnp.asarray(random.randn(*x.shape), jnp.float32), params)
  updates, _ = transform.update(grads, transform.init(params), params)
  for other in (updates["up"]["bias"], updates["embedding"]):
    np.testing.assert_allclose(np.abs(other), 0.04 / 4, rtol=1e-3)
  sizes = np.linalg.svd(np.asarray(updates["up"]["kernel"]), compute_uv=False)
  assert sizes.max() / sizes.min() < 2 and sizes.max() < 2 * 0.04


def test_adamw_clips_and_decays():
  transform = recipes.language_model("adamw", 1.0, 100, 1)
  params = {"w": jnp.ones(3)}
  state = transform.init(params)
  updates, state = transform.update({"w": jnp.zeros(3)}, state, params)
  np.testing.assert_allclose(updates["w"], -0.1)
  _, state = transform.update({"w": jnp.full(3, 1e6)}, transform.init(params), params)
  moment = optax.tree.get(state, "mu")["w"]
  assert float(jnp.linalg.norm(moment)) == pytest.approx(0.1, rel=1e-5)


def test_finetuning_rises_and_falls_and_norms_and_biases_do_not_decay():
  transform = recipes.finetuning(1.0, 20, weight_decay=0.5)
  params = {"encoder": {"layer_0": {"norm": {"scale": 1.0, "bias": 1.0}, "up": {"kernel": 1.0}}}}
  params = jax.tree.map(jnp.float32, params)
  state, sizes = transform.init(params), []
  for _ in range(20):
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = transform.update(zeros, state, params)
    inner = updates["encoder"]["layer_0"]
    assert float(inner["norm"]["scale"]) == float(inner["norm"]["bias"]) == 0
    sizes.append(-2 * float(inner["up"]["kernel"]))
  np.testing.assert_allclose(sizes[:3], [0, 0.5, 1.0])
  np.testing.assert_allclose(sizes[2:], 1 - np.arange(18) / 18, atol=1e-6)
  huge = jax.tree.map(lambda x: jnp.full_like(x, 1e6), params)
  _, state = transform.update(huge, transform.init(params), params)
  moment = optax.tree.get(state, "mu")
  assert float(optax.tree.norm(moment)) == pytest.approx(0.1, rel=1e-5)


def test_an_unknown_name():
  with pytest.raises(ValueError, match="optimizer='sgd'; accepted: adamw, muon, adafactor"):
    recipes.language_model("sgd", 1.0, 10, 1)
