"""SetFit: the recipe, every seed its own split, paper scale on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import setfit
from experiments.datasets import encoders, weights
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


@pytest.mark.parametrize("arm", ["setfit", "fine-tune"])
def test_every_seed_sees_its_own_split(minilm, arm):
  seeds = (100, 101)
  made = setfit.prepare(config(arm), "science", seeds)
  data = setfit.training_data(config(arm), made, seeds)
  (task,) = setfit.stages(config(arm), made, seeds).values()
  for name, spec in task.example.items():
    assert data[0][name].shape == spec.shape
  sides = (2,) if arm == "setfit" else ()
  assert data[0]["inputs"].shape == (2, *sides, 16)
  for s, drawn in enumerate(made.draws):
    allowed = {row.tobytes() for row in made.tokens[drawn.train]}
    shown = {row.tobytes() for row in data.fields["inputs"][:, s].reshape(-1, 16)}
    assert shown <= allowed
  batch = data.gather(np.arange(4)) | {"mask": np.ones(4, np.float32)}
  params = {"encoder": made.start}
  if arm == "fine-tune":
    params["head"] = {"kernel": np.zeros((384, 6)), "bias": np.zeros(6)}
  values = []
  for s in (0, 1):
    variables = {"own": {"index": jnp.int32(s)}}
    value, _ = task.loss(params, variables, batch, jax.random.key(0), train=True)
    values.append(float(value))
    if arm == "setfit":
      rows = batch["inputs"][:, s].reshape(-1, 16), batch["lengths"][:, s].reshape(-1)
      e = np.float64(encoders.sentence_vectors(made.model, made.start, *rows)).reshape(4, 2, -1)
      e /= np.linalg.norm(e, axis=-1, keepdims=True)
      wanted = ((e.prod(1).sum(-1) - batch["targets"][:, s]) ** 2).mean()
      assert value == pytest.approx(wanted, rel=1e-4)
    else:
      assert value == pytest.approx(np.log(6), rel=1e-5)
  assert arm == "fine-tune" or values[0] != values[1]


def test_splits_are_paired_and_apart(minilm):
  """The probe of any arm is measured on the same splits; nothing held out is trained on."""
  one, other = (setfit.prepare(config(arm), "library", (100,)) for arm in ("setfit", "probe"))
  for drawn, again in zip(one.draws, other.draws, strict=True):
    np.testing.assert_array_equal(drawn.train, again.train)
    np.testing.assert_array_equal(drawn.held_out, again.held_out)
    assert not set(drawn.train) & set(drawn.held_out)
    assert (len(drawn.train), len(drawn.held_out)) == (6 * 8, 6 * 100)


def test_missing_weights_are_one_line():
  made = config(encoder="mpnet")
  with pytest.raises(FileNotFoundError, match=r"encoder='mpnet': no .*no package carries its"):
    setfit.prepare(made, "science", (0,))
