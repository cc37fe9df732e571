"""DFR: features in evaluation mode, standardised by the training set; Group DRO; ResNet-50."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dfr
from experiments.datasets import spurious
from launch import mesh as meshes
from launch import runner
from launch.program import Program

STUDY = dfr.STUDIES[0]


def config(**overrides):
  return runner.compose(dfr, "laptop", STUDY, "rho=0.95", overrides)


def variables(seed=0):
  model, last = dfr.network(config())
  start = model.init(jax.random.key(seed), jnp.zeros((1, 12, 12, 1)))
  return model, last, dfr.nn.meta.unbox(start)


def test_refits_of_a_network_without_training():
  model, last, start = variables()
  layers, known = dfr.reweigh(config(), model, last, start, 100)
  assert set(layers) == {"dfr-val 8", "dfr-val 16", "dfr-val 32", "dfr-train"}
  assert layers["dfr-train"]["kernel"].shape == start["params"][last]["kernel"].shape
  assert all(0 <= v <= 1 for v in known.values())
  assert {"pixels/worst", "foreground/probe", "additivity/r2"} < set(known)
  held = dfr.images(config(), "validation", 100, per_group=8).fields
  assert np.bincount(held["groups"]).tolist() == [8] * 4


def test_each_seed_sees_its_own_images():
  tasks = dfr.stages(config(), (100, 101))
  assert list(tasks) == ["erm", "group dro", "validation 8", "validation 16", "validation 32"]
  data = tasks["erm"].data()
  assert data.fields["inputs"].shape == (1000, 2, 12, 12, 1)
  for s, seed in enumerate((100, 101)):
    own = spurious.digits("train", correlation=0.95, size=1000, seed=seed)
    np.testing.assert_array_equal(data.fields["groups"][:, s], own["groups"])
  assert len(tasks["validation 8"].data()) == 32
  # every network has as many updates, and the test set is the same for all
  assert {task.steps for task in tasks.values()} == {800}
  assert len(tasks["erm"].evaluate["test"].data()) == 710


def batch(tasks):
  data = tasks["erm"].data().gather(np.arange(64))
  return data | {"mask": np.ones(64, np.float32)}


def test_the_loss_reads_the_seed_and_group_dro_its_adversary():
  tasks = dfr.stages(config(), (100, 101))
  rows = batch(tasks)
  start = dfr.nn.meta.unbox(tasks["erm"].init(jax.random.key(0)))
  params, rest = start["params"], {k: v for k, v in start.items() if k != "params"}
  model, _ = dfr.network(config())
  for s in (0, 1):
    own = rest | {"own": {"index": jnp.int32(s)}}
    call = (params, own, rows, jax.random.key(0))
    plain, (metrics, _) = tasks["erm"].loss(*call, train=True)
    log_p = jax.nn.log_softmax(model.apply({"params": params}, rows["inputs"][:, s]))
    loss = -np.float64(log_p)[np.arange(64), rows["labels"][:, s]]
    assert float(plain) == pytest.approx(loss.mean(), rel=1e-5)
    members = rows["groups"][:, s]
    counts = [float(metrics[f"accuracy/group_{g}"][1]) for g in range(4)]
    assert counts == np.bincount(members, minlength=4).tolist()
    means = np.array([loss[members == g].mean() if (members == g).any() else 0 for g in range(4)])
    q = np.exp(0.01 * means) / np.exp(0.01 * means).sum()
    robust, (_, updated) = tasks["group dro"].loss(*call, train=True)
    np.testing.assert_allclose(updated["adversary"]["q"], q, rtol=1e-5)
    assert float(robust) == pytest.approx(float(q @ means), rel=1e-5)
  # evaluation: one image an example, for every seed the same
  test = tasks["erm"].evaluate["test"]
  shown = test.data().gather(np.arange(8)) | {"mask": np.ones(8, np.float32)}
  assert {k: v.shape[1:] for k, v in shown.items() if k != "mask"} == {
    k: v.shape for k, v in test.example.items()
  }
  test.loss(params, rest, shown, jax.random.key(0), train=False)


def test_celeba_trains_a_resnet_50_on_eight_devices():
  study = next(s for s in dfr.STUDIES if s.name == "celeba")
  paper = runner.compose(dfr, "paper/celeba", study, "resnet50")
  tasks = dfr.stages(paper)
  assert set(tasks) == {"erm", "group dro"}
  task = tasks["erm"]
  assert (task.batch_size, task.steps) == (128, 50 * (162_770 // 128))
  assert paper.C == dfr.CELEBA_C and paper.optimizer.lr == 1e-3
  sharded = Program(task, meshes.make({"data": 8}), (0,))
  assert sharded.parameters == 23_512_130  # ResNet-50 of two classes
  with pytest.raises(FileNotFoundError, match="celeb_a"):
    task.data()


@pytest.mark.slow
def test_its_update_compiles():
  paper = dfr.get_config("paper/celeba")
  sharded = Program(dfr.stages(paper)["group dro"], meshes.make({"data": 4, "fsdp": 2}), (0,))
  assert sharded.compile_update().cost_analysis()["flops"] > 0
