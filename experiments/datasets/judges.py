"""Classifiers that do not change, in whose features samples are compared with real images.

    variables = judges.variables("mlp", train)               # train: digits of `pictures.load`
    real = judges.features("mlp", variables, test)           # (N, 32)
    features = judges.MODULES["mlp"].apply(variables, samples)
    probabilities = judges.probabilities(train, features)    # (N, 10)

No released classifier reads small digits, so "mlp" is one of scikit-learn's, trained once on the
digits that it is given; "efficientnet" is EfficientNet-lite0, of an installed package.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

from experiments.datasets import weights
from models import pretrained
from models.attention import dense
from models.efficientnet import EfficientNetLite


class Hidden(nn.Module):
  """The hidden layers of an MLP with ReLU, the last one the features."""

  widths: tuple[int, ...] = (128, 32)

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = images.reshape(len(images), -1)
    for i, width in enumerate(self.widths):
      x = nn.relu(dense(width, (None, None), name=f"layer_{i}")(x))
    return x


class Photographs(nn.Module):
  """EfficientNet-lite0's features of images in [-1, 1]."""

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    resized = jax.image.resize(images, (len(images), 224, 224, 3), "bilinear")
    return EfficientNetLite(None, name="network")((127.5 * (resized + 1) - 127) / 128)


MODULES: dict[str, nn.Module] = {"mlp": Hidden(), "efficientnet": Photographs()}


@functools.cache
def perceptron(train: Any) -> MLPClassifier:
  """Trained on the `inputs` and `labels` of a source in memory, always the same for the same."""
  x = train.fields["inputs"].reshape(len(train), -1)
  network = MLPClassifier(Hidden.widths, early_stopping=True, n_iter_no_change=20, random_state=0)
  with threadpool_limits(1):  # layers so small wait for threads longer than they compute
    return network.fit(x, train.fields["labels"])


def variables(name: str, train: Any = None) -> dict[str, Any]:
  """Of `MODULES[name]`; `train` is what "mlp" learns from."""
  if name == "mlp":
    network = perceptron(train)
    pairs = zip(network.coefs_[:-1], network.intercepts_[:-1], strict=True)
    layers = {f"layer_{i}": {"kernel": k, "bias": b} for i, (k, b) in enumerate(pairs)}
    return {"params": jax.tree.map(np.float32, layers)}
  model, names = pretrained.efficientnet_lite()
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
  loaded = pretrained.load(weights.efficientnet_lite0().tensors, names, shapes)
  loaded["params"].pop("classifier")
  return {kind: {"network": loaded[kind]} for kind in ("params", "batch_stats")}


def features(name: str, judge: Any, source: Any) -> np.ndarray:
  """(N, D) float32 of the `inputs` of a source; `judge` has the variables."""
  apply = jax.jit(MODULES[name].apply)
  parts = np.array_split(np.arange(len(source)), -(-len(source) // 500))
  return np.concatenate([apply(judge, source.gather(part)["inputs"]) for part in parts])


def probabilities(train: Any, features_ND: np.ndarray) -> np.ndarray:
  """(N, C) what the "mlp" that learnt from `train` says of its features."""
  network = perceptron(train)
  return softmax(features_ND @ network.coefs_[-1] + network.intercepts_[-1], axis=-1)


def drawing(
  name: str,
  init: Callable[[jax.Array], Any],
  draw: Callable[[Any, jax.Array, jax.Array], jax.Array],
  models: Sequence[str],
  shape: tuple[int, ...],
  samples: int,
  batch_size: int,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """`init` and `update` of a task that draws samples, and keeps what a judge sees in them.

  An update draws the samples of one batch of noise by each of the models. Its state has the models'
  parameters by name; the collections "judge" and "drawn", of which {"features": (models, samples,
  D)} fills as updates go on.

  Args:
    name: of MODULES.
    init: `init(key) -> params` of one model.
    draw: `draw(params, noise, key) -> images`.
    models: names.
    shape: of an image.
    samples, batch_size: in all, and of an update.

  Raises: ValueError for samples that fill no whole batches.
  """
  if samples % batch_size:
    raise ValueError(f"samples={samples}; accepted: a multiple of batch_size={batch_size}")
  judge = MODULES[name]

  def init_all(key):
    image = jnp.zeros((1, *shape))
    seen = judge.init(key, image)
    width = jax.eval_shape(judge.apply, seen, image).shape[-1]
    return {"params": {n: init(key) for n in models}, **start(seen, len(models), samples, width)}

  def update(state, batch, key):
    def features(params):
      return judge.apply(state.variables["judge"], draw(params, batch["inputs"], key))

    stacked = jax.tree.map(lambda *p: jnp.stack(p), *(state.params[n] for n in models))
    seen = jax.lax.map(features, stacked)
    at = (0, state.step * batch_size, 0)
    drawn = jax.lax.dynamic_update_slice(state.variables["drawn"]["features"], seen, at)
    variables = state.variables | {"drawn": {"features": drawn}}
    return state.replace(variables=variables), {"loss": (seen.mean(), jnp.ones(()))}

  return init_all, update


def start(judge: Any, models: int, samples: int, width: int) -> dict[str, Any]:
  """What `drawing` starts from beside parameters: the judge's variables, and nothing drawn."""
  return {"judge": judge, "drawn": {"features": jnp.zeros((models, samples, width))}}
