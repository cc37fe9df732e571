"""A toy experiment (no paper): a classifier of noisy clusters, in the form of a real one."""

import time

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax

from launch import Claim, Evaluation, Study, Task, main, supervised

SCALES = ("laptop", "paper/large")


class Clusters:
  """512 sequences (8, 6) around four centres, the same for everyone."""

  def __init__(self, split: int) -> None:
    random = np.random.RandomState(split)
    self.labels = random.randint(0, 4, 200).astype(np.int32)
    centres = np.random.RandomState(9).randn(4, 8, 6)
    self.x = (centres[self.labels] + random.randn(200, 8, 6)).astype(np.float32)

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {"inputs": self.x[index], "labels": self.labels[index]}


class Network(nn.Module):
  width: int
  layers: int

  @nn.compact
  def __call__(self, x_BLD, *, train: bool, scale: float = 1.0):
    def dense(features, axes):
      init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
      return nn.Dense(features, kernel_init=init)

    x_BLH = dense(self.width, (None, "embed"))(x_BLD * scale)
    for _ in range(self.layers):
      x_BLH = nn.with_logical_constraint(x_BLH, ("batch", "length", None))
      y_BLH = nn.BatchNorm(use_running_average=not train)(x_BLH)
      y_BLH = nn.gelu(dense(2 * self.width, ("embed", "mlp"))(y_BLH))
      y_BLH = nn.Dropout(0.1, deterministic=not train)(y_BLH)
      x_BLH += dense(self.width, ("mlp", "embed"))(y_BLH)
    return dense(4, ("embed", "vocab"))(x_BLH.mean(axis=1))


def cross_entropy(logits_BC, batch):
  mask_B, labels_B = batch["mask"], batch["labels"]
  losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, labels_B)
  count = mask_B.sum()
  total = (losses_B * mask_B).sum()
  hits = ((logits_BC.argmax(-1) == labels_B) * mask_B).sum()
  return total / count, {"loss": (total, count), "accuracy": (hits, count)}


def get_config(scale: str = "laptop") -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      "width": 16 if scale == "laptop" else 32,
      "layers": 1,
      "optimizer": {"name": "adam", "lr": 1e-2},
      "batch_size": 16,
      "steps": 60,
      "map_seeds": True,
      "pause": 0.0,  # seconds a batch, so that a test can interrupt
      "poison": -1,  # the example whose inputs are not a number
    }
  )


class Source(Clusters):
  def __init__(self, split: int, config) -> None:
    super().__init__(split)
    self.pause, self.poison = config.pause, config.poison

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    time.sleep(self.pause)
    example = super().__getitem__(index)
    return example | {"inputs": example["inputs"] * (np.nan if index == self.poison else 1)}


def stages(config) -> dict[str, Task]:
  model = Network(config.width, config.layers)
  example = {
    "inputs": jax.ShapeDtypeStruct((8, 6), np.float32),
    "labels": jax.ShapeDtypeStruct((), np.int32),
  }
  init, loss = supervised(model, cross_entropy, example)
  optimizers = {"adam": optax.adam, "sgd": optax.sgd}
  return {
    "train": Task(
      init=init,
      loss=loss,
      optimizer=optimizers[config.optimizer.name](config.optimizer.lr),
      example=example,
      data=lambda: Source(0, config),
      batch_size=config.batch_size,
      steps=config.steps,
      evaluate={"test": Evaluation(lambda: Clusters(1))},
      evaluate_every=20,
      checkpoint_every=10,
      steps_per_dispatch=5,
      axes={"inputs": ("length", None)},
      map_seeds=config.map_seeds,
    )
  }


STUDIES = [
  Study(
    "learning",
    arms={"adam": {}, "slow": {"optimizer.name": "sgd", "optimizer.lr": 1e-5}},
    claims=[Claim("Adam learns, slow steps do not", "test/accuracy", "adam", "slow", at_least=0.1)],
    scales=("laptop", "paper/*"),
  ),
  Study("alone", arms={"adam": {}}, optional=True, seeds=1),
]

if __name__ == "__main__":
  main(__name__)
