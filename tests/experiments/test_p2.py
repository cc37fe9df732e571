"""P2 at paper scale and at laptop scale: the weight's arithmetic, averages, sampling, the judge."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import p2
from experiments.datasets import judges, pictures
from launch import mesh as meshes
from launch import runner
from launch.program import Program
from objectives import diffusion

LOG_SNR = diffusion.linear()
STUDY = p2.STUDIES[0]
TINY = {"unet.features": 4, "unet.groups": 2, "unet.multipliers": (1, 1), "batch_size": 4}
TINY |= {"lengths": (1, 3), "sampler.samples": 4, "sampler.batch_size": 2, "sampler.steps": 2}


def compose(arm="gamma 1", overrides=(), scale="laptop"):
  study = next(s for s in p2.STUDIES if s.at(scale))
  return runner.compose(p2, scale, study, arm, dict(overrides))


def program(task, sizes=None, seeds=(0,)):
  mesh = meshes.make(sizes) if sizes else meshes.make({}, jax.devices()[:1])
  return Program(task, mesh, seeds)


class Constant(nn.Module):
  """A network that answers its parameters, one a channel, everywhere."""

  outputs: int

  @nn.compact
  def __call__(self, images, t_B, *, train=False):
    value = self.param("value", nn.initializers.constant(0.2), (self.outputs,))
    return jnp.broadcast_to(value, (*images.shape[:3], self.outputs))


class Pixels(nn.Module):
  """A judge whose features are the pixels."""

  @nn.compact
  def __call__(self, images):
    self.param("none", nn.initializers.zeros, ())
    return images.reshape(len(images), -1)


@pytest.fixture
def constant(monkeypatch):
  monkeypatch.setattr(p2, "UNet", lambda outputs, **_: Constant(outputs))
  monkeypatch.setitem(judges.MODULES, "mlp", Pixels())


# The weight


@pytest.mark.parametrize(
  ("gamma", "shares", "mean"),
  [
    (0.0, (0.26, 0.42, 0.33), 1.0),
    (0.5, (0.13, 0.47, 0.40), 0.81),
    (1.0, (0.07, 0.48, 0.45), 0.72),
  ],
)
def test_shares_of_the_bands(gamma, shares, mean):
  weight = np.asarray(diffusion.p2_weight(LOG_SNR, k=1.0, gamma=gamma))
  assert weight.mean() == pytest.approx(mean, abs=0.005)
  for name, share in zip(("clean-up", "content", "coarse"), shares, strict=True):
    low, high = p2.BANDS[name]
    inside = (np.exp(LOG_SNR) > low) & (np.exp(LOG_SNR) <= high)
    assert weight[inside].sum() / weight.sum() == pytest.approx(share, abs=0.006)


def test_borders_of_the_bands():
  snr = np.exp(LOG_SNR)
  assert [int((snr > border).sum()) for border in (1.0, 1e-2)] == [259, 674]


def test_the_control_has_the_mean_weight():
  assert p2.ARMS["uniform slower"]["lr"] == pytest.approx(
    p2.ARMS["uniform"]["lr"] * float(diffusion.p2_weight(LOG_SNR).mean()), rel=0.01
  )
  assert {k: v for k, v in p2.ARMS["gamma 1"].items() if k != "weight.gamma"} == p2.ARMS["uniform"]


@pytest.mark.parametrize("learned", [False, True])
def test_the_loss_is_the_weighted_error_and_the_bound_is_not_weighted(constant, learned):
  """And the bound does not move the predicted noise; padding counts not."""
  x = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1), minval=-1)
  batch = {"inputs": x, "mask": jnp.array([1.0, 1.0, 1.0, 0.0])}
  of_noise, _ = jax.random.split(jax.random.key(2))
  t, log_snr, noise, z = diffusion.corrupt(of_noise, x, LOG_SNR)
  value = jnp.array([0.3, 0.1])[: 1 + learned]
  x0 = diffusion.to_x0(jnp.full_like(z, 0.3), z, log_snr, "epsilon")
  bits = diffusion.variational_bits(x0, 0.55, x, z, t, diffusion.transitions(LOG_SNR))
  for k in (1.0, 0.25):
    weight = diffusion.p2_weight(log_snr, k=k)
    config = compose(overrides={"weight.k": k, "learned_variance": learned})
    loss = p2.stages(config)["train"].loss

    def total(value, loss=loss):
      return loss({"value": value}, {}, batch, jax.random.key(2), train=True)

    (got, (metrics, _)), grad = jax.value_and_grad(total, has_aux=True)(value)
    error = ((0.3 - noise) ** 2).mean(axis=(1, 2, 3))
    assert float(metrics["error"][0]) == pytest.approx(float(error[:3].sum()), rel=1e-5)
    wanted = (error * weight + learned * bits)[:3].mean()
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)
    slope = 2 * (weight * (0.3 - noise).mean(axis=(1, 2, 3)))[:3].mean()
    assert float(grad[0]) == pytest.approx(float(slope), rel=1e-4)
    assert not learned or abs(float(grad[1])) > 0


# Averages and samples


def test_averages_follow_until_their_length(constant):
  config = compose(overrides=TINY | {"average": 0.5})
  task = p2.stages(config)["train"]
  small = program(dataclasses.replace(task, steps_per_dispatch=1), seeds=(0, 1))
  random = np.random.default_rng(0)
  state = small.initial_state()
  wanted = jax.tree.map(np.asarray, {n: state.params for n in ("1", "3")})
  for step in range(4):
    inputs = random.uniform(-1, 1, (1, 2, 4, 8, 8, 1)).astype(np.float32)
    state, _ = small.update(state, {"inputs": inputs, "mask": np.ones((1, 2, 4), np.float32)})
    for n in wanted:
      if step < int(n):
        wanted[n] = jax.tree.map(lambda a, p: (a + np.asarray(p)) / 2, wanted[n], state.params)
  averages = state.variables["averages"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), averages, wanted)
  assert jax.tree.leaves(averages)[0].shape[0] == 2


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_are_judged_in_their_places(sampler, constant):
  """The features of each batch land behind those before, one row for each training length."""
  config = compose(overrides=TINY | {"sampler.kind": sampler})
  task = p2.stages(config)["sample"]
  small = program(task)
  state = small.initial_state()
  batch = task.data().gather(range(4))["inputs"].reshape(2, 1, 2, 8, 8, 1)
  state, _ = small.update(state, {"inputs": batch, "mask": np.ones((2, 1, 2), np.float32)})
  features = np.asarray(state.variables["drawn"]["features"])[0]
  assert features.shape == (2, 4, 64)
  assert np.abs(features).max() <= 1
  if sampler == "ddim":  # no noise of its own: the two lengths, of one network here, agree
    steps = diffusion.transitions(LOG_SNR, 2)

    def denoise(z, t):
      return diffusion.to_x0(jnp.full_like(z, 0.2), z, jnp.float32(LOG_SNR)[t], "epsilon").clip(
        -1, 1
      )

    wanted = diffusion.ddim(denoise, jnp.asarray(batch.reshape(4, 8, 8, 1)), steps)
    for row in features:
      np.testing.assert_allclose(row, wanted.reshape(4, -1), atol=1e-5)


def test_all_arms_start_from_the_same_noise_and_draw_as_many():
  sources = {arm: p2.stages(compose(arm))["sample"].data() for arm in STUDY.arms}
  assert {len(source) for source in sources.values()} == {2048}
  for source in sources.values():
    np.testing.assert_array_equal(source[7]["inputs"], pictures.noise(2048, (8, 8, 1))[7]["inputs"])
  sampler = compose("uniform").sampler
  assert all(compose(arm).sampler == sampler for arm in STUDY.arms)
  assert sampler.samples >= 2000 and sampler.steps >= 25 and len(p2.LENGTHS) == 3


# Paper scale


def test_published_settings():
  config = compose(scale="paper/oxford_flowers102")
  tasks = p2.stages(config)
  assert program(tasks["train"]).parameters == 93_563_910
  assert (config.lr, config.batch_size, config.average) == (2e-5, 8, 0.9999)
  assert (config.timesteps, config.sampler.kind, config.sampler.steps) == (1000, "ddpm", 250)
  assert (config.weight.k, config.unet.dropout, config.learned_variance) == (1.0, 0.0, True)
  assert config.sampler.samples % config.sampler.batch_size == 0
  features = program(tasks["sample"]).abstract_state.variables["drawn"]["features"]
  assert features.shape == (1, 1, 50_000, 1280)


def test_the_published_network_lowers_sharded():
  """Its plans: test_plans.py."""
  task = p2.stages(compose(scale="paper/celeb_a_hq"))["train"]
  sharded = program(task, {"data": 2, "fsdp": 2, "tensor": 2})
  kernel = sharded.abstract_state.params["down_5_0"]["conv_in"]["kernel"]
  assert kernel.sharding.spec[-2:] == ("fsdp", "tensor")
  average = sharded.abstract_state.variables["averages"]["500000"]["down_5_0"]["conv_in"]["kernel"]
  assert average.sharding == kernel.sharding


def test_mistakes():
  with pytest.raises(KeyError):
    p2.get_config("paper/nothing")
  with pytest.raises(ValueError, match="samples=5; accepted: a multiple of batch_size=2"):
    p2.stages(compose(overrides=TINY | {"sampler.samples": 5}))
  with pytest.raises(ValueError, match=r"kind='heun'; accepted: ddim, ddpm"):
    task = p2.stages(compose(overrides=TINY | {"sampler.kind": "heun"}))["sample"]
    program(task).compile_update()
