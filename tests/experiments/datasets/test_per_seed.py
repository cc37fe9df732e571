"""Data of each seed's own: which part of a batch a seed reads, in training and in testing."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets import per_seed


def init(key):
  return {"params": {"w": jax.random.normal(key, ())}, "running": {"sum": jnp.zeros(())}}


def loss(params, variables, batch, key, *, train, scale=1.0):
  assert set(variables) == {"running"}
  total = (batch["inputs"].sum(-1) * batch["mask"]).sum()
  updated = {"running": {"sum": variables["running"]["sum"] + total}}
  value = scale * params["w"] * total
  return value, ({"loss": (value, batch["mask"].sum())}, updated if train else variables)


def test_a_seed_reads_its_own_part():
  sets = [{"inputs": np.full((4, 2), 10.0**s), "labels": np.full(4, s)} for s in range(3)]
  data = per_seed.together(sets)
  assert (
    len(data) == 4 and data[0]["inputs"].shape == (3, 2) and data[1]["labels"].tolist() == [0, 1, 2]
  )
  one = {"inputs": jax.ShapeDtypeStruct((2,), jnp.float32)}
  assert per_seed.example(one, 3)["inputs"].shape == (3, 2)
  own_init, own_loss = per_seed.own(init, loss)
  start = per_seed.start(own_init, (5, 6, 7))
  assert start["own"]["index"].tolist() == [0, 1, 2]
  for s, seed in enumerate((5, 6, 7)):
    assert start["params"]["w"][s] == init(jax.random.key(seed))["params"]["w"]
  batch = jax.tree.map(jnp.asarray, data.gather([0, 1]) | {"mask": np.array([1.0, 0.0])})
  params = {"w": jnp.ones(3)}
  rest = {k: v for k, v in start.items() if k != "params"}

  def one_seed(params, variables):
    return own_loss(params, variables, batch, jax.random.key(0), train=True, scale=2.0)

  values, (metrics, updated) = jax.vmap(one_seed)(params, rest)
  np.testing.assert_allclose(values, [4, 40, 400])
  np.testing.assert_allclose(updated["running"]["sum"], [2, 20, 200])
  assert updated["own"]["index"].tolist() == [0, 1, 2] and metrics["loss"][1].tolist() == [1, 1, 1]


def test_a_shared_set_is_the_same_for_all():
  _, shared = per_seed.own(init, loss, shared=True)
  start = per_seed.start(per_seed.own(init, loss)[0], (0, 1))
  batch = {"inputs": np.ones((4, 2)), "mask": np.ones(4)}
  rest = {k: v for k, v in start.items() if k != "params"}
  values, (_, kept) = jax.vmap(lambda p, v: shared(p, v, batch, jax.random.key(0), train=False))(
    {"w": jnp.ones(2)}, rest
  )
  np.testing.assert_allclose(values, [8, 8])
  assert kept["own"]["index"].tolist() == [0, 1]
