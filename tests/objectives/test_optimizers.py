"""Groups leaf by leaf, schedules at concrete steps, and what moves under zero gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import sequence, ssm
from objectives import optimizers

OPTIONS = ("standard", "BandCdecay", "BfastandCdecay", "noBCdecay")


def boxed_params(mixer):
  block = functools.partial(sequence.Block, mixer=mixer)
  model = sequence.Classifier(sequence.Encoder(block, 4, 2, vocab=5), 3)
  tokens = jnp.zeros((1, 3), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def ones(boxed):
  return jax.tree.map(lambda x: jnp.ones(x.shape), nn.meta.unbox(boxed))


S5 = boxed_params(functools.partial(ssm.S5, 4, bidirectional=True))
S5_COMPLEX = boxed_params(functools.partial(ssm.S5, 4, c_init="complex_normal"))
S4D = boxed_params(functools.partial(ssm.S4D, 4))


def by_name(labels):
  """Path -> label, the layer's number left out."""
  leaves = jax.tree.leaves_with_path(labels)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/").replace("layer_1", "layer_0"): label
    for path, label in leaves
  }


def expected(mixer):
  layer = "encoder/layer_0"
  other = ["encoder/linear/kernel", "encoder/linear/bias", "decoder/kernel", "decoder/bias"]
  other += [f"{layer}/{name}" for name in ("norm/scale", "norm/bias", "gate/kernel", "gate/bias")]
  return dict.fromkeys(other, "rest") | {f"{layer}/mixer/{k}": v for k, v in mixer.items()}


TRANSITION = {"Lambda_re": "ssm", "Lambda_im": "ssm", "log_step": "ssm"}
TABLE = {
  "standard": {"B": "ssm", "C1": "rest", "C2": "rest", "D": "rest"},
  "BandCdecay": {"B": "ssm_decay", "C1": "rest", "C2": "rest", "D": "rest"},
  "BfastandCdecay": {"B": "rest", "C1": "rest", "C2": "rest", "D": "rest"},
  "noBCdecay": {"B": "ssm", "C1": "ssm", "C2": "ssm", "D": "ssm"},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dt_global", [False, True])
def test_groups_of_s5_leaf_by_leaf(option, dt_global):
  groups = optimizers.s5_groups(option, dt_global)
  mixer = TRANSITION | TABLE[option]
  if dt_global:
    mixer = mixer | {"log_step": "rest"}
  assert by_name(groups(nn.meta.unbox(S5))) == expected(mixer)
  assert by_name(groups(S5)) == expected(mixer)
  one_c = {k: v for k, v in mixer.items() if k not in ("C1", "C2")} | {"C": mixer["C1"]}
  assert by_name(groups(S5_COMPLEX)) == expected(one_c)


@pytest.mark.parametrize("option", OPTIONS)
def test_groups_of_s4d_leaf_by_leaf(option):
  transition = {"log_A_re": "ssm", "A_im": "ssm", "log_step": "ssm"}
  rest = "ssm" if option == "noBCdecay" else "rest"
  labels = by_name(optimizers.s5_groups(option)(S4D))
  assert labels == expected(transition | {"C": rest, "D": rest})


def test_an_unknown_option():
  with pytest.raises(ValueError, match="option='all'; accepted: standard, BandCdecay"):
    optimizers.s5_groups("all")


def test_by_path_takes_the_first_rule_found_anywhere_in_the_path():
  params = {"a": {"kernel": 0, "bias": 0}, "b": {"kernel": 0, "norm": {"scale": 0}}}
  labels = optimizers.by_path(params, [("^a/bias$", "one"), ("^a/", "two"), ("norm", "three")], "x")
  assert labels == {
    "a": {"kernel": "two", "bias": "one"},
    "b": {"kernel": "x", "norm": {"scale": "three"}},
  }


def make(option, **fields):
  fields = {"total_steps": 10, "ssm_lr": 0.1, "lr": 0.2, "weight_decay": 0.5} | fields
  return optimizers.s5_optimizer(option, **fields)


@pytest.mark.parametrize("option", OPTIONS)
def test_only_decayed_parameters_move_under_zero_gradients(option):
  params = ones(S5)
  tx = make(option)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  labels = by_name(optimizers.s5_groups(option)(params))
  size = {"ssm": 0.0, "ssm_decay": -0.1 * 0.5, "rest": -0.2 * 0.5}
  for path, update in by_name(updates).items():
    np.testing.assert_allclose(update, size[labels[path]], rtol=1e-6, err_msg=path)


def test_groups_have_their_learning_rates():
  params = ones(S5)
  tx = make("BandCdecay", weight_decay=0.0)
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
  labels = by_name(optimizers.s5_groups("BandCdecay")(params))
  for path, update in by_name(updates).items():
    rate = 0.2 if labels[path] == "rest" else 0.1
    np.testing.assert_allclose(update, -rate, rtol=1e-5, err_msg=path)


def test_boxed_parameters_are_optimised_like_unboxed_ones():
  params = ones(S5)
  boxed = jax.tree.map(lambda x: jnp.ones(x.shape), S5)
  tx = make("standard")
  updates, _ = tx.update(boxed, tx.init(boxed), boxed)
  plain, _ = tx.update(params, tx.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(updates), plain)


def test_one_parameter_follows_adamw():
  tx = make("standard", warmup_steps=2)
  ours, theirs = {"kernel": jnp.array([1.0, -2.0])}, {"kernel": jnp.array([1.0, -2.0])}
  rate = optimizers.warmup_cosine(0.2, 10, 2)
  reference = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.5)
  states = tx.init(ours), reference.init(theirs)
  for t in range(4):
    grads = {"kernel": jnp.array([0.3 * t + 0.1, -1.0])}
    update, state = tx.update(grads, states[0], ours)
    other, other_state = reference.update(grads, states[1], theirs)
    ours, theirs = optax.apply_updates(ours, update), optax.apply_updates(theirs, other)
    states = state, other_state
  np.testing.assert_allclose(ours["kernel"], theirs["kernel"], rtol=1e-6)


# Schedules


def rates(schedule, steps):
  return np.array([schedule(jnp.asarray(n)) for n in range(steps)])


def test_clean_schedule():
  given = rates(optimizers.warmup_cosine(2.0, 10, 4), 11)
  np.testing.assert_allclose(given[:4], [0.5, 1.0, 1.5, 2.0])
  np.testing.assert_allclose(given[4:], 1 + np.cos(np.pi * np.arange(7) / 6), atol=1e-6)
  assert given[10] == 0
  without = rates(optimizers.warmup_cosine(2.0, 4), 4)
  np.testing.assert_allclose(without, 1 + np.cos(np.pi * np.arange(4) / 4), atol=1e-6)


def simulate_released(peak, total, warmup):
  """The released loop: an update at the current rate, then the rate is set from the old count."""
  rate, used = peak, []
  for step in range(total):
    used.append(rate)
    if step < warmup:
      rate = peak * (step + 1) / warmup
    else:
      horizon = total - warmup
      rate = peak * 0.5 * (1 + np.cos(np.pi * min(step, horizon) / horizon))
  return np.array(used)


@pytest.mark.parametrize(("total", "warmup"), [(20, 4), (20, 0), (10, 1), (10, 7)])
def test_released_schedule_is_the_released_loop(total, warmup):
  given = rates(optimizers.released_warmup_cosine(2.0, total, warmup), total)
  np.testing.assert_allclose(given, simulate_released(2.0, total, warmup), atol=1e-6)


def test_quirks_of_the_released_schedule_at_concrete_steps():
  given = rates(optimizers.released_warmup_cosine(2.0, 20, 4), 20)
  # The first update has the full rate; the warm-up is one update late.
  np.testing.assert_allclose(given[:5], [2.0, 0.5, 1.0, 1.5, 2.0])
  # The cosine starts where its clock has run for the warm-up: cos(pi 4/16), below the peak.
  np.testing.assert_allclose(given[5], 1 + np.cos(np.pi / 4), rtol=1e-6)
  # It ends at 20 - 4 = 16 counts, one update late, and then the rate is exactly zero.
  assert given[16] > 0
  np.testing.assert_array_equal(given[17:], 0)


def test_released_schedule_is_an_option_of_the_optimizer():
  params = {"kernel": jnp.ones(2)}
  for released, first in ((False, 0.2 / 4), (True, 0.2)):
    tx = make("standard", warmup_steps=4, released_schedule=released, weight_decay=0.0)
    updates, _ = tx.update({"kernel": jnp.ones(2)}, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -first, rtol=1e-5)


def test_a_warm_up_as_long_as_the_run_is_refused():
  for schedule in (optimizers.warmup_cosine, optimizers.released_warmup_cosine):
    with pytest.raises(ValueError, match="warmup_steps=10; accepted: 0 to 9"):
      schedule(1.0, 10, 10)
