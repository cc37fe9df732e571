"""SetFit: pooling, the recipe, every seed its own split, paper scale on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import setfit
from experiments.datasets import weights
from launch import mesh as meshes
from launch import runner
from launch.program import Program

FEW = setfit.STUDIES[0]


@pytest.fixture(scope="module")
def minilm():
  try:
    return weights.minilm()
  except FileNotFoundError as e:
    pytest.skip(str(e))


def config(arm="setfit", **overrides):
  return runner.compose(setfit, "laptop", FEW, arm, overrides)


def program(scale, arm, sizes=None):
  study = next(s for s in setfit.STUDIES if s.name == "paper")
  made = runner.compose(setfit, scale, study, arm)
  (task,) = setfit.stages(made).values()
  mesh = meshes.make(sizes) if sizes else meshes.make({}, jax.devices()[:1])
  return made, task, Program(task, mesh, (0,))


@pytest.mark.parametrize(
  ("arm", "steps", "batch"),
  [("setfit N=8", 80, 16), ("fine-tune N=8", 160, 16), ("setfit N=64", 640, 16)],
)
def test_one_epoch_of_pairs_or_as_many_passes(arm, steps, batch):
  made, task, _ = program("paper/mpnet", arm)
  assert (task.steps, task.batch_size) == (steps, batch)
  assert (made.repeats, made.length, made.optimizer.lr) == (20, 256, 2e-5)
  pairs = 2 if made.method == "setfit" else 1
  assert task.steps * task.batch_size * pairs == 2 * 2 * 20 * made.per_class * 4


@pytest.mark.parametrize(
  ("scale", "millions"), [("minilm", 22.6), ("mpnet", 108.9), ("roberta-large", 354.3)]
)
def test_published_sizes(scale, millions):
  _, _, paper = program(f"paper/{scale}", "setfit N=8")
  assert paper.parameters / 1e6 == pytest.approx(millions, abs=0.1)


def test_the_update_compiles_on_eight_devices():
  _, _, sharded = program("paper/mpnet", "setfit N=8", {"data": 2, "fsdp": 2, "tensor": 2})
  memory = sharded.compile_update().memory_analysis()
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sharded.abstract_state))
  assert memory.argument_size_in_bytes < 0.5 * whole
  assert memory.alias_size_in_bytes > 0


def test_the_rate_rises_and_falls_and_norms_and_biases_do_not_decay():
  made = config(**{"optimizer.lr": 1.0, "optimizer.weight_decay": 0.5})
  transform = setfit.adamw(made, 20)
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
  clipped, _ = optax.clip_by_global_norm(1.0).update(huge, None)
  assert float(optax.tree.norm(clipped)) == pytest.approx(1)


def test_padding_is_not_averaged(minilm):
  made = setfit.prepare(config(), "science", (100,))
  i = int(np.argmin(made.lengths[0]))
  short, n = made.tokens[0][i : i + 1], made.lengths[0][i : i + 1]
  vector = setfit.embed(made.model, made.start, short, n)
  noisy = short.copy()
  noisy[0, n[0] :] = 7
  np.testing.assert_allclose(
    setfit.embed(made.model, made.start, noisy, n), vector, atol=1e-5, rtol=1e-4
  )
  whole = made.model.apply({"params": made.start}, short, lengths=n)
  wanted = np.asarray(whole)[0, : n[0]].mean(0)
  np.testing.assert_allclose(vector[0], wanted, atol=1e-5)  # [CLS] and [SEP] included


def test_cutting_the_embedding_changes_nothing(minilm):
  made = setfit.prepare(config(), "science", (100,))
  assert made.model.vocab == len(made.start["embedding"]) < 4000
  variables = setfit.pretrained.load(
    minilm.tensors,
    setfit.pretrained.bert(minilm.config)[1],
    jax.eval_shape(setfit.encoder(config()).init, jax.random.key(0), made.tokens[0][:1]),
  )
  rows, lengths = setfit.sentences.rows(minilm.tokenizer, made.pools[0].texts[:4], 16)
  whole = setfit.embed(setfit.encoder(config()), variables["params"], rows, lengths)
  cut = setfit.embed(made.model, made.start, made.tokens[0][:4], made.lengths[0][:4])
  np.testing.assert_allclose(cut, whole, atol=1e-5)


@pytest.mark.parametrize("arm", ["setfit", "fine-tune"])
def test_every_seed_sees_its_own_split(minilm, arm):
  made = setfit.prepare(config(arm), "science", (100, 101))
  data = setfit.training_data(config(arm), made)
  (task,) = setfit.stages(config(arm), made).values()
  for name, spec in task.example.items():
    assert data[0][name].shape == spec.shape
  sides = (2,) if arm == "setfit" else ()
  assert data[0]["inputs"].shape == (2, *sides, 16)
  for s, drawn in enumerate(made.draws):
    allowed = {row.tobytes() for row in made.tokens[0][drawn.train]}
    shown = {row.tobytes() for row in data.fields["inputs"][:, s].reshape(-1, 16)}
    assert shown <= allowed
  batch = data.gather(np.arange(4)) | {"mask": np.ones(4, np.float32)}
  params = {"encoder": made.start}
  if arm == "fine-tune":
    params["head"] = {"kernel": np.zeros((384, 4)), "bias": np.zeros(4)}
  values = []
  for s in (0, 1):
    variables = {"split": {"index": jnp.int32(s)}}
    value, _ = task.loss(params, variables, batch, jax.random.key(0), train=True)
    values.append(float(value))
    if arm == "setfit":
      rows = batch["inputs"][:, s].reshape(-1, 16), batch["lengths"][:, s].reshape(-1)
      e = np.float64(setfit.embed(made.model, made.start, *rows)).reshape(4, 2, -1)
      e /= np.linalg.norm(e, axis=-1, keepdims=True)
      wanted = ((e.prod(1).sum(-1) - batch["targets"][:, s]) ** 2).mean()
      assert value == pytest.approx(wanted, rel=1e-4)
    else:
      assert value == pytest.approx(np.log(4), rel=1e-5)
  assert arm == "fine-tune" or values[0] != values[1]


def test_missing_weights_are_one_line():
  made = config(encoder="mpnet")
  with pytest.raises(FileNotFoundError, match="encoder='mpnet': no package carries its weights"):
    setfit.prepare(made, "science", (0,))
