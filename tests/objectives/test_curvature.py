"""Against dense float64 Hessians, closed forms, and finite differences of third derivatives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from objectives import curvature

SIZES = (3, 4, 2)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def network(activation=jnp.tanh, seed=0):
  """A small net's loss, its parameters, and its dense Hessian with the map from the flat vector."""
  random = np.random.RandomState(seed)
  dims = itertools.pairwise(SIZES)
  layers = [{"w": random.randn(m, n), "b": random.randn(n)} for m, n in dims]
  params = {"layers": jax.tree.map(jnp.asarray, layers), "scale": jnp.asarray(1.3)}
  x_BD = jnp.asarray(random.randn(8, SIZES[0]))
  labels_B = jnp.asarray(random.randint(0, SIZES[-1], 8))

  def loss(params):
    h = x_BD
    for i, layer in enumerate(params["layers"]):
      h = h @ layer["w"] + layer["b"]
      h = h if i else activation(h)
    logits = params["scale"] * h
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels_B).mean()

  flat, unravel = ravel_pytree(params)
  return loss, params, jax.jit(jax.hessian(lambda f: loss(unravel(f))))(flat), unravel


def test_products_are_those_of_the_dense_hessian(x64):
  loss, params, H, unravel = network()
  v = jnp.asarray(np.random.RandomState(1).randn(len(H)))
  product = jax.jit(curvature.hvp, static_argnums=0)(loss, params, unravel(v))
  np.testing.assert_allclose(ravel_pytree(product)[0], H @ v, rtol=1e-11, atol=1e-13)
  form = jax.jit(curvature.quadratic_form, static_argnums=0)(loss, params, unravel(v))
  np.testing.assert_allclose(form, v @ H @ v, rtol=1e-11)
  trace = jax.jit(curvature.exact_trace, static_argnums=(0, 2))(loss, params, 5)
  np.testing.assert_allclose(trace, jnp.trace(H), rtol=1e-11)


def test_third_derivatives_are_finite_differences(x64):
  """The gradient of the penalty, by central differences of the dense Hessian."""
  loss, params, H, unravel = network()
  flat, _ = ravel_pytree(params)
  v = jnp.asarray(np.random.RandomState(1).randn(len(H)))
  third = jax.grad(curvature.quadratic_form, 1)
  got = jax.jit(lambda f: ravel_pytree(third(loss, unravel(f), unravel(v)))[0])(flat)
  hessian = jax.jit(jax.hessian(lambda f: loss(unravel(f))))
  e = 1e-5
  wanted = [
    (v @ (hessian(flat.at[i].add(e)) - hessian(flat.at[i].add(-e))) @ v) / (2 * e)
    for i in range(len(flat))
  ]
  np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-8)
  key = jax.random.key(3)
  trace_fn = lambda p: curvature.hutchinson_trace(loss, p, key, 4, keep=0.5, parallel=3)[0]  # noqa: E731
  got = ravel_pytree(jax.jit(jax.grad(trace_fn))(params))[0]
  step = jax.jit(lambda i, s: trace_fn(unravel(flat.at[i].add(s))))
  wanted = [(step(i, e) - step(i, -e)) / (2 * e) for i in range(len(flat))]
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)
  assert np.abs(got).max() > 0.1


@pytest.mark.parametrize("mask", curvature.MASKS)
@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_estimates_are_unbiased_for_every_mask(x64, keep, mask):
  """Within four standard errors, themselves as they should be: masks do not rescale the trace."""
  loss, params, H, _ = network()
  estimate, error = jax.jit(
    lambda key: curvature.hutchinson_trace(
      loss, params, key, 20_000, keep=keep, mask=mask, parallel=500
    )
  )(jax.random.key(0))
  assert abs(estimate - jnp.trace(H)) < 4 * error
  # The variance in closed form; `together`: whether two entries are kept or dropped as one.
  sizes = [leaf.size for leaf in jax.tree.leaves(params)]
  owner = np.arange(len(H)) if mask == "coordinate" else np.repeat(np.arange(len(sizes)), sizes)
  together, diagonal = owner[:, None] == owner, np.diag(H)
  outside = np.asarray(H) ** 2 * (1 - np.eye(len(H)))
  variance = (1 / keep - 1) * (together * np.outer(diagonal, diagonal)).sum()
  variance += 2 * (outside * np.where(together, 1 / keep, 1)).sum()
  np.testing.assert_allclose(error, (variance / 20_000) ** 0.5, rtol=0.05)


@pytest.mark.parametrize("mask", curvature.MASKS)
def test_probes_have_identity_covariance(mask):
  params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
  draw = jax.vmap(lambda k: ravel_pytree(curvature.probe(k, params, 0.25, mask))[0])
  v_KD = np.asarray(draw(jax.random.split(jax.random.key(0), 40_000)))
  np.testing.assert_allclose(v_KD.T @ v_KD / len(v_KD), np.eye(8), atol=0.05)
  assert set(np.unique(v_KD)) == {-2.0, 0.0, 2.0}
  whole = {tuple(row) for row in (v_KD[:100, :6] != 0).tolist()}
  assert (len(whole) == 2) == (mask == "tensor")  # all of a tensor's entries or none


def test_relu_networks_have_a_nonnegative_trace_that_a_probe_may_miss(x64):
  """Without normalisation the diagonal is the Gauss-Newton one; one probe can still be negative."""
  for seed in range(5):
    loss, params, H, _ = network(jax.nn.relu, seed)
    weights = slice(0, len(H) - 1)  # the last entry scales a product: not piecewise linear
    assert (jnp.diag(H)[weights] >= -1e-12).all()
  keys = jax.random.split(jax.random.key(0), 2000)
  single = jax.jit(jax.vmap(lambda k: curvature.hutchinson_trace(loss, params, k)[0]))(keys)
  assert single.min() < 0 < jnp.trace(H)


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("stopped", [False, True])
def test_the_gradient_of_a_penalty_on_the_trace(x64, nonnegative, stopped):
  """That of strength * estimate; nothing where it is stopped, left out, or not due."""
  loss, params, *_ = network()
  options = {"probes": 3, "keep": 0.5, "mask": "tensor"}
  kinds = options | {"nonnegative": nonnegative, "stopped": stopped}

  @jax.jit
  def both(params, sign, due):
    signed = lambda p: sign * loss(p)  # noqa: E731
    key = jax.random.key(2)
    trace = lambda p: curvature.hutchinson_trace(signed, p, key, **options)[0]  # noqa: E731
    ours = curvature.trace_gradient(signed, params, key, 0.3, due, **kinds)
    return *ours, jax.grad(trace)(params), trace(params)

  for sign in (1.0, -1.0):
    found, estimate, slope, trace = both(params, sign, True)
    np.testing.assert_allclose(estimate, trace, rtol=1e-12)
    share = 0.0 if stopped or (nonnegative and trace < 0) else 0.3
    jax.tree.map(
      lambda a, b, x=share: np.testing.assert_allclose(a, x * b, atol=1e-13), found, slope
    )
    found, estimate, *_ = both(params, sign, False)
    assert float(optax.tree.norm(found)) == float(estimate) == 0


@pytest.mark.parametrize("iterations", [40, 1000])
def test_top_eigenpairs(x64, iterations):
  loss, params, H, _ = network()
  pairs = jax.jit(lambda p, k: curvature.top_eigenpairs(loss, p, k, 3, iterations))
  values, vectors = pairs(params, jax.random.key(0))
  wanted = jnp.linalg.eigvalsh(H)[::-1][:3]
  np.testing.assert_allclose(values, wanted, rtol=1e-9)
  for i in range(3):
    v = ravel_pytree(jax.tree.map(lambda x, i=i: x[i], vectors))[0]
    np.testing.assert_allclose(H @ v, wanted[i] * v, atol=1e-7)
    np.testing.assert_allclose(jnp.linalg.norm(v), 1, rtol=1e-12)


@pytest.mark.parametrize(
  ("diagonal", "top"),
  [([-9.0, 1.0, 0.5], [1.0, 0.5]), ([2.0, 2.0, -1.0], [2.0, 2.0]), ([-3.0, -2.0], [-2.0, -3.0])],
  ids=["negative largest", "twice the same", "none positive"],
)
def test_the_largest_is_meant_algebraically(x64, diagonal, top):
  """Power iteration finds -9; a span that ends early must neither stop the search nor invent 0."""
  a = jnp.asarray(diagonal)
  values, _ = curvature.top_eigenpairs(
    lambda x: 0.5 * (a * x**2).sum(), jnp.ones(len(a)), jax.random.key(0), 2
  )
  np.testing.assert_allclose(values, top, rtol=1e-12)


def test_a_long_lanczos_repeats_no_eigenvalue():
  """In float32: without orthogonalisation the top eigenvalue appears many times."""
  a = jnp.concatenate([jnp.linspace(0, 1, 80), jnp.array([50.0, 100.0])]).astype(jnp.float32)
  values, _ = curvature.top_eigenpairs(
    lambda x: 0.5 * (a * x**2).sum(), jnp.zeros(len(a)), jax.random.key(0), 4, 60
  )
  np.testing.assert_allclose(values[:2], [100, 50], rtol=1e-5)
  assert values[2] < 1.01
  assert values.dtype == jnp.float32


def test_under_jit_vmap_and_sharding():
  """Seeds side by side, parameters and batch over eight devices: the same numbers."""
  random = np.random.RandomState(0)
  params = {"w": random.randn(2, 8, 16).astype(np.float32), "v": random.randn(2, 16, 4)}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  x_BD = jnp.asarray(random.randn(16, 8), jnp.float32)

  def both(params, x_BD, key):
    loss = lambda p: jnp.mean((jnp.tanh(x_BD @ p["w"]) @ p["v"] - 1) ** 2)  # noqa: E731
    trace = curvature.hutchinson_trace(loss, params, key, 4, parallel=2)[0]
    return trace, curvature.top_eigenpairs(loss, params, key, 1, 30)[0]

  mapped = jax.vmap(both, in_axes=(0, None, 0))
  keys = jax.random.split(jax.random.key(1), 2)
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
  sharded = {"w": place(params["w"], None, None, "tensor"), "v": place(params["v"], None, "tensor")}
  whole = mapped(params, x_BD, keys)
  parts = jax.jit(mapped)(sharded, place(x_BD, "data"), keys)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), whole, parts)


def test_mistakes():
  x, key = jnp.ones(3), jax.random.key(0)
  with pytest.raises(ValueError, match="keep=0; accepted: above 0, at most 1"):
    curvature.probe(key, x, 0)
  with pytest.raises(ValueError, match="mask='row'; accepted: coordinate, tensor"):
    curvature.probe(key, x, 0.5, "row")
  with pytest.raises(ValueError, match="count=4; accepted: 1 to 3"):
    curvature.top_eigenpairs(lambda x: (x**2).sum(), x, key, 4)
  assert curvature.unit(jnp.zeros(2)).tolist() == [0, 0]
