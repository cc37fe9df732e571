"""A toy experiment that keeps in its state which examples it was trained on, and in what order.

Variables of the environment disturb it: PAUSE, seconds to read a call's batch; STUCK, the call
whose batch never comes, or "native" to be stuck in native code while data is loaded; MISSING, the
process that has no data.
"""

import hashlib
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from launch import Evaluation, Study, Task, main

SCALES = ("laptop",)
EXAMPLES, FEATURES, BATCH, STEPS = 50, 8, 8, 30


class Numbers:
  """Points of a noisy linear function; each example carries its own number."""

  def __init__(self) -> None:
    random = np.random.RandomState(1)
    self.x = random.randn(EXAMPLES, FEATURES).astype(np.float32)
    self.y = (self.x @ random.randn(FEATURES) + random.randn(EXAMPLES)).astype(np.float32)
    self.calls = 0

  def __len__(self) -> int:
    return EXAMPLES

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {k: v[0] for k, v in self.gather(np.array([index])).items()}

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    return {"inputs": self.x[indices], "targets": self.y[indices], "index": np.int32(indices)}


class Disturbed(Numbers):
  made = 0  # once to be checked, once to be read

  def __init__(self) -> None:
    super().__init__()
    Disturbed.made += 1
    if os.environ.get("MISSING") == str(jax.process_index()):
      raise FileNotFoundError("numbers: not prepared")
    if os.environ.get("STUCK") == "native" and Disturbed.made == 2:
      hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    if len(indices) > 1:  # a call's
      time.sleep(600 if os.environ.get("STUCK") == str(self.calls) else 0)
      time.sleep(float(os.environ.get("PAUSE", "0")))
      self.calls += 1
    return super().gather(indices)


def init(key: jax.Array):
  weights = nn.LogicallyPartitioned(jax.random.normal(key, (FEATURES,)), ("embed",))
  trace = {"order": jnp.full((STEPS, BATCH), -1), "updates": jnp.zeros((), jnp.int32)}
  return {"params": {"w": weights}, "trace": trace}


def loss(params, variables, batch, key, *, train):
  error_B = batch["inputs"] @ params["w"] - batch["targets"]
  total, count = (error_B**2 * batch["mask"]).sum(), batch["mask"].sum()
  trace = variables["trace"]
  if train:
    order = trace["order"].at[trace["updates"]].set(batch["index"])
    trace = {"order": order, "updates": trace["updates"] + 1}
  return total / count, ({"loss": (total, count)}, {"trace": trace})


def get_config(scale: str = "laptop") -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict({"lr": 0.03})


def stages(config) -> dict[str, Task]:
  return {
    "train": Task(
      init=init,
      loss=loss,
      optimizer=optax.adam(config.lr),
      example={
        "inputs": jax.ShapeDtypeStruct((FEATURES,), np.float32),
        "targets": jax.ShapeDtypeStruct((), np.float32),
        "index": jax.ShapeDtypeStruct((), np.int32),
      },
      data=Disturbed,
      batch_size=BATCH,
      steps=STEPS,
      evaluate={"test": Evaluation(Numbers)},
      evaluate_every=10,
      checkpoint_every=10,
      steps_per_dispatch=2,
    )
  }


STUDIES = [Study("toy", arms={"linear": {}}, seeds=2, plot=["test/loss"])]

if __name__ == "__main__":
  main(__name__)
