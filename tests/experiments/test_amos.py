"""AMOS: what each part of the step trains, what baselines are, judges, the probe, paper sizes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import amos
from experiments.datasets import manuals, sources
from launch import mesh as meshes
from launch.program import Program
from objectives import replaced

SMALL = {"vocab": 40, "length": 12, "model.features": 16, "model.heads": 2, "model.layers": 1}
SMALL |= {"model.mlp": 16, "model.std": 0.3, "corrupt.rate": 0.25}
KEY = jax.random.key(7)
# Tests compile more than they compute.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def options(method="amos", **overrides):
  config = amos.get_config()
  config.update_from_flattened_dict(SMALL | overrides)
  return amos.options(config, method)


@functools.cache
def started(method="amos"):
  return nn.meta.unbox(jit(amos.pretrain(options(method)).init)(jax.random.key(0)))["params"]


def batch():
  tokens = np.random.RandomState(0).randint(5, 40, (6, 12), np.int32)
  return {"inputs": jnp.array(tokens), "mask": jnp.array([1, 1, 1, 1, 1, 0], jnp.float32)}


@functools.cache
def gradients(method="amos", **overrides):
  """The gradient of lambda L_D alone, and that of all."""
  o = options(method, **overrides)
  whole = amos.pretrain(o).loss

  def parts(params):
    value, (metrics, _) = whole(params, {}, batch(), KEY, train=True)
    masked = sum(metrics[f"masked {d}"][0] / metrics[f"masked {d}"][1] for d in o.probes)
    return jnp.stack([value - masked, value])

  both = jit(jax.jacrev(parts))(started(method))
  return [jax.tree.map(lambda x, i=i: x[i], both) for i in (0, 1)]


def measured(o, params, some):
  """The loss and metrics of an evaluation."""
  loss = amos.pretrain(o).loss
  value, (metrics, _) = jit(lambda p, b: loss(p, {}, b, KEY, train=False))(params, some)
  return value, metrics


def largest(tree):
  return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_detection_never_trains_the_masked_language_model():
  """It reaches the mixing weights, and through the states that these read, the blocks."""
  adversarial, total = gradients()
  head = {k: v for k, v in adversarial.items() if k.startswith("mlm")}
  assert largest(head) < 1e-5 and largest({k: total[k] for k in head}) > 1e-3
  assert largest(adversarial["mixing"]) > 1e-3
  assert all(largest(adversarial["generator"][f"layer_{i}"]) > 1e-4 for i in (1, 2, 3))
  stopped, _ = gradients(**{"corrupt.stop_hidden": True})
  assert largest(stopped["generator"]) < 1e-5 and largest(stopped["mixing"]) > 1e-3


def test_the_mixing_is_reversed_and_nothing_else():
  against, _ = gradients(**{"corrupt.stop_hidden": True})
  along, _ = gradients(**{"corrupt.stop_hidden": True, "corrupt.reversal": 1.0})
  np.testing.assert_allclose(against["mixing"], -along["mixing"], rtol=1e-4, atol=1e-5)
  for part in ("embedding", "discriminator", "original"):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      against[part],
      along[part],
    )
  assert largest(along["embedding"]) > 1e-3


def test_baselines_have_no_adversary():
  for method in ("uniform", "electra"):
    adversarial, total = gradients(method)
    assert largest(adversarial["generator"]) < 1e-5 and largest(total["generator"]) > 1e-3
    assert largest(total["mixing"]) < 1e-6


@pytest.mark.parametrize(
  ("method", "entropy"), [("amos", None), ("uniform", 1.0), ("electra", 0.0)]
)
def test_the_loss_is_the_sum_over_probes_and_50_times_a_mean(method, entropy):
  o = options(method)
  value, metrics = measured(o, started(method), batch())
  means = {k: total / count for k, (total, count) in metrics.items()}
  masked = sum(means[f"masked {d}"] for d in o.probes)
  np.testing.assert_allclose(value, masked + 50 * means["detection"], rtol=1e-5)
  assert metrics["detection"][1] == 5 * 12 and metrics[f"masked {o.probes[0]}"][1] == 5 * 3
  np.testing.assert_allclose(sum(means[f"alpha {d}"] for d in o.probes), 1, rtol=1e-5)
  if entropy is not None:
    np.testing.assert_allclose(means["entropy"], entropy, atol=1e-5)
  assert 0 < means["replaced"] <= 3 / 12


def test_a_sampled_original_is_an_original():
  """With a generator that is always right nothing is replaced."""
  o, some = options(), batch()
  some["inputs"] = jnp.full_like(some["inputs"], 9)
  params = started() | {"mlm_bias": jnp.zeros(40).at[9].set(1e4)}
  _, metrics = measured(o, params, some)
  assert metrics["replaced"][0] == 0


def test_corrupted_rows_and_embeddings_agree():
  o, params = options(), started()
  made = jit(lambda p, b: amos.corrupted(o, p, b, KEY))(params, batch())
  np.testing.assert_array_equal(made.embedded_BLH, params["embedding"][made.tokens_BL])
  np.testing.assert_array_equal(made.original_BL, made.tokens_BL == batch()["inputs"])
  assert 0 < (~made.original_BL).sum(1).max() <= 3


def test_a_judge_sees_what_the_own_discriminator_sees():
  """Held against its own discriminator a generator is as hard as in its own evaluation."""
  config = amos.get_config()
  config.update_from_flattened_dict(SMALL | {"judges": "amos"})
  task, params = amos.judged(config, "amos"), started()
  _, own = measured(options(), params, batch())
  variables = {"judges": {"amos": params}}
  judge = jit(lambda p, v, b: task.loss(p, v, b, KEY, train=False)[1][0])
  judged = judge(params, variables, batch())
  np.testing.assert_allclose(judged["by amos"], own["detection"], rtol=1e-5)
  mesh = meshes.make({}, jax.devices()[:1])
  state = Program(task, mesh, (0, 1)).abstract_state
  assert {x.shape[0] for x in jax.tree.leaves(state.variables)} == {2}


def test_methods():
  config = amos.get_config()
  made = {m: amos.options(config, m) for m in amos.METHODS}
  assert [made[m].probes for m in ("amos", "uniform", "electra")] == [(1, 2, 3), (1, 2, 3), (2,)]
  assert made["electra longer"].steps == round(config.extra * config.steps) > config.steps
  assert made["start"].steps == 0 and len({made[m].optimizer.lr for m in ("amos", "start")}) == 1
  assert (config.detection, config.corrupt.temperature, config.corrupt.rate) == (50.0, 0.3, 0.15)


def test_paragraphs_are_held_out():
  train, test = (manuals.paragraphs(s, 200, most=100).fields for s in ("train", "test"))
  assert train["inputs"].shape == (800, 200) and (np.bincount(train["labels"]) == 100).all()
  texts = [{row.tobytes() for row in part["inputs"]} for part in (train, test)]
  assert len(texts[0] & texts[1]) <= 8  # phrases that manuals repeat
  assert len(np.unique(test["labels"])) == len(manuals.MANUALS)


def test_the_probe_reads_all_of_a_paragraph():
  """Frequencies of bytes tell manuals apart, constants do not; windows change no mean."""
  table = np.random.RandomState(0).randn(261, 24)

  def encode(tokens_KL, lengths_K):
    np.testing.assert_array_equal(lengths_K, (tokens_KL > 0).sum(1))
    return np.stack([table[tokens_KL], np.ones((*tokens_KL.shape, 24))])

  sizes = {"train": 60, "test": 40}
  bytes_, constant = manuals.probe(encode, "validation", 32, windows=3, **sizes)
  assert constant == pytest.approx(1 / 8) and bytes_ > 0.25
  whole, _ = manuals.probe(encode, "validation", 96, windows=1, **sizes)
  assert whole == pytest.approx(bytes_, abs=0.01)


@pytest.mark.parametrize("scale", [s for s in amos.SCALES if s != "laptop"])
def test_paper_scale(scale):
  config = amos.get_config(scale)
  made = amos.stages(config)
  o = amos.options(config, "amos")
  assert (o.probes, o.optimizer.lr, o.batch_size, o.length) == ((4, 6, 8), 5e-4, 2048, 512)
  assert round(o.optimizer.warmup * o.steps) == 10_000 and o.model.dropout == 0.1
  layer = 12 * 768**2 + 13 * 768
  tables = (512 + 2) * 768 + 32 * 12  # positions, norm, relative positions
  head = 768**2 + 4 * 768 + o.vocab  # of the masked language model, with the mixing vector
  count = {"amos": 8, "electra": 6}
  for method, layers in count.items():
    wanted = o.vocab * 768 + (12 + layers) * layer + 2 * tables + head + 769
    program = Program(made[method], meshes.make({}, jax.devices()[:1]), (0,))
    assert program.parameters == wanted
  with pytest.raises(sources.DatasetNotFound, match="no package"):
    made["amos"].data()


def test_the_rate_rises_and_falls():
  transform = amos.optimizer("adam", lr=1.0, warmup=0.1, weight_decay=0.0, steps=100)
  params = {"w": jnp.ones(3)}
  state, sizes = transform.init(params), []
  for _ in range(100):
    updates, state = transform.update(params, state, params)
    sizes.append(-float(updates["w"][0]))
  np.testing.assert_allclose(sizes[:11], np.arange(11) / 10, atol=1e-3)
  np.testing.assert_allclose(sizes[10:], 1 - np.arange(90) / 90, atol=1e-3)


def test_mixture_is_of_logits():
  """Two sure probes that disagree leave both tokens likely; a mixture of logits, not of samples."""
  logits = jnp.array([[[[8.0, 0.0, 7.0]]], [[[0.0, 8.0, 7.0]]]])
  mixed, _ = replaced.mixture(jnp.zeros((2, 1, 1)), logits)
  np.testing.assert_allclose(mixed[0, 0], [4, 4, 7])
