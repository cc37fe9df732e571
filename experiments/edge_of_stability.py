"""Understanding Gradient Descent on Edge of Stability in Deep Learning.

Arora, Li and Panigrahi, ICML 2022, arXiv:2205.09745.

Near a manifold of minimisers, gradient descent normalised by the gradient's norm (algorithm N) and
gradient descent on the root of the loss (algorithm S) lock on to the top eigenvector v_1 of the
Hessian, flip from side to side along it, and meanwhile drift along the manifold to lower curvature:

    N:  dX / dtau = -1/4 P grad log lambda_1        S:  dX / dtau = -1/8 P grad lambda_1

with tau = steps * eta^2 and P the projection on the manifold's tangent space.

Claim (round-up of 2022-05-22): the step direction locks on to the top eigenvector and oscillates
there while the iterate drifts slowly to regions of lower curvature.

Everything is full batch, and in float64 at laptop scale: near the manifold a float32 gradient is
noise. Stableness is eta / ||grad|| times lambda_1 of the loss itself: the Hessian of its root blows
up there. The paper does not say that test accuracy rises; it is measured and not claimed. The
theorem's rare tiny kicks are left to rounding.

Laptop scale: `toy`, L = (1 + x^2) y^2, where both flows are known; `network`, 100 digits, GELU MLP
64-32-10: gradient descent to the manifold, then from there N, S or more gradient descent, and the
flow of N or S itself, with which it is compared seed by seed. Paper scale: 1,000 MNIST digits, MLP
784-128-10 (float64 too), and 5,000 images of CIFAR-10 with a VGG, trained by N and S from the
start, with ReLU as the released run has it, though its flag and its README say GELU.

Found at laptop scale (3 seeds, `results/edge_of_stability.json`): on the toy both algorithms are
where their flows are, with an error that falls to a quarter at half the step. On the network N
lowers lambda_1 to 0.70, S to 0.50 of what it was, gradient descent leaves it (0.99 to 1.05), from
starts less sharp (11 to 23) than those behind the margins (40): the size stays undecided. N is 4 to
7 % behind its flow, S 20 to 30 %, less so as time goes on, which refutes that claim at eta = 0.01.
The sums over consecutive steps are as predicted to 1 or 2 %, but for N's roots (8 to 15 % too
large); the gradient is not always along v_1 (cosines of 0.5 to 1); test accuracy is as before.

    python -m experiments.edge_of_stability                    # all laptop studies, 3 min, 2 cores
    python -m experiments.edge_of_stability --study=network --arm=normalised
    python -m experiments.edge_of_stability --scale=paper/mnist
    python -m launch.plan edge_of_stability --scale=paper/cifar10
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import scipy.special

from experiments.datasets import labelled
from launch import Claim, Evaluation, Study, Task, main
from launch import mesh as meshes
from models import convnets
from objectives import curvature, flow

PAPER: dict[str, dict[str, Any]] = {
  "mnist": {"data.name": "mnist", "data.train": 1000, "data.test": 10_000, "width": 128}
  | {"approach.steps": 9000, "approach.lr": 0.01, "taus": (4.0, 8.0, 12.0)}
  | {"flow.lr": 0.01, "flow.projection_lr": 1e-3},
  "cifar10": {"data.name": "cifar10", "data.train": 5000, "data.test": 10_000, "network": "vgg"}
  | {"approach.steps": 0, "eta": 0.25, "taus": (20_000 * 0.25**2,), "pairs": 2, "inner": 1}
  | {"precision": "float32", "evaluate_every": 500, "checkpoint_every": 500},
}
SCALES = ("laptop", *(f"paper/{row}" for row in PAPER))
TOPOLOGIES = {"paper/mnist": ("v5e-4", "data=4"), "paper/cifar10": ("v5e-16", "data=8,tensor=2")}
# One example is the whole set: its images are spread over the devices.
IMAGES = (("batch", None), ("images", ("data", "fsdp")), *meshes.RULES)
RULES: Any = {"gd": optax.sgd, "normalised": flow.normalised_descent, "root": flow.root_descent}
SPEED = {"normalised": 1 / 4, "root": 1 / 8}  # time of the algorithm's flow in tau


def get_config(scale: str = "laptop") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    {
      "data": {"name": "digits", "train": 100, "test": 355},
      "network": "mlp",  # | vgg
      "width": 32,
      "precision": "float64",
      "algorithm": "normalised",  # any of RULES
      "approach": {"steps": 8000, "lr": 0.04},  # gradient descent to the manifold
      "eta": 0.01,  # of the algorithm; of gradient descent the same number of steps
      "taus": (0.5, 1.0, 2.0),  # when lambda_1 is measured, in steps * eta^2; ends at the last
      "inner": 500,  # steps an update of the engine: every batch is the same
      "flow": {"lr": 0.0125, "projections": 1000, "projection_lr": 2e-2},
      "lanczos": 40,
      "pairs": 20,  # steps over which what alternates is averaged
      "evaluate_every": 0,
      "checkpoint_every": 0,
    }
  )
  if scale != "laptop":
    config.update_from_flattened_dict(PAPER[scale.removeprefix("paper/")])
  return config


def stages(config) -> dict[str, Task]:
  if config.algorithm not in RULES:
    raise ValueError(f"algorithm={config.algorithm!r}; accepted: {', '.join(RULES)}")
  alternates, root = config.algorithm in SPEED, config.algorithm == "root"
  plain, own = optax.sgd(config.approach.lr), RULES[config.algorithm](config.eta)
  whole = functools.partial(labelled.Whole, config.data.name, dtype=config.precision)
  train, test = (whole(split, config.data[split]) for split in ("train", "test"))
  data = labelled.describe(config.data.name)
  vgg = convnets.VGG(data.classes, pool=nn.avg_pool, frozen=True)
  model: Any = {"mlp": convnets.TwoLayer(config.width, data.classes), "vgg": vgg}[config.network]

  def init(key):
    variables = model.init(key, jnp.zeros((1, *data.shape), jnp.result_type(float)))
    return {**variables, "history": {"lambda": jnp.zeros(len(config.taus))}}

  def square_loss(params, variables, batch):
    """mean over images of sum over classes of (f - onehot)^2, and the share of right answers."""
    logits_NC = model.apply({"params": params, **variables}, batch["inputs"][0])
    labels_N = batch["labels"][0]
    errors_NC = logits_NC - jax.nn.one_hot(labels_N, data.classes, dtype=logits_NC.dtype)
    return (errors_NC**2).sum(-1).mean(), (logits_NC.argmax(-1) == labels_N).mean()

  def loss(params, variables, batch, key, *, train):
    value, accuracy = square_loss(params, variables, batch)
    metrics = {"loss": (value, jnp.ones(())), "accuracy": (accuracy, jnp.ones(()))}
    return value, (metrics, variables)

  def sharpness(params, variables, batch, key, *, train):
    """lambda_1 now, and at the times T before over what it was at first; `alignment` with v_1.

    `pair` and `roots` are what theory says of consecutive steps, 1 in the limit, over `pairs`.
    """
    loss_fn = lambda p: square_loss(p, variables, batch)[0]  # noqa: E731
    steps = 1 + alternates * config.pairs, config.lanczos
    value_T, norm_T, lambda_T, cosine_T = flow.observe(loss_fn, own, params, key, *steps)
    first, *before = variables["history"]["lambda"]
    found = {"lambda": lambda_T[0], "lambda at 0": first, "loss": value_T[0]}
    found["alignment"] = cosine_T.mean()
    for tau, value in zip(config.taus, [*before, lambda_T[0]], strict=True):
      found[f"fall at {tau:g}"] = value / first
    if alternates:
      found["pair"], found["roots"] = flow.consecutive(value_T, norm_T, lambda_T, config.eta, root)
    return value_T[0], ({k: (x, jnp.ones(())) for k, x in found.items()}, variables)

  def task(stage, pace, steps=None):
    """A stage whose updates take `pace` of tau each; lambda_1 is kept where taus begin."""
    *begins, end = [round(tau / pace) for tau in (0.0, *config.taus)]
    rule = own if stage == "drift" and alternates else plain
    down = {**config.flow, "logarithm": not root, "iterations": config.lanczos}

    def update(state, batch, key):
      loss_fn = lambda p: square_loss(p, state.variables, batch)[0]  # noqa: E731
      top = lambda: curvature.sharpness(loss_fn, state.params, key, config.lanczos)[0]  # noqa: E731
      history = state.variables["history"]["lambda"], jnp.array(begins), state.step
      variables = {**state.variables, "history": {"lambda": flow.record(*history, top)}}
      params, opt_state = state.params, state.opt_state
      if stage == "flow":
        params = flow.follow(loss_fn, params, key, **down)
        value = loss_fn(params)
      else:
        params, opt_state, values = flow.descend(loss_fn, rule, params, opt_state, config.inner)
        value = values[-1]
      state = state.replace(params=params, opt_state=opt_state, variables=variables)
      return state, {"loss": (value, jnp.ones(()))}

    measured = {"flow" if stage == "flow" else "train": Evaluation(train, sharpness)}
    measured["test"] = Evaluation(test, example=test.example)
    return Task(
      init=init,
      loss=loss,
      update=update,
      optimizer=rule,
      example=train.example,
      data=train,
      batch_size=1,
      steps=end if steps is None else steps,
      evaluate={} if stage == "approach" else measured,
      evaluate_every=config.evaluate_every,
      axes={"inputs": ("images", None, None, None), "labels": ("images",)},
      rules=IMAGES,
      checkpoint_every=config.checkpoint_every,
    )

  pace = config.eta**2 * config.inner
  tasks = {"approach": task("approach", pace, config.approach.steps // config.inner)}
  tasks["drift"] = task("drift", pace)
  if alternates:
    tasks["flow"] = task("flow", config.flow.lr / SPEED[config.algorithm])
  return tasks if config.approach.steps else {"drift": tasks["drift"]}


def run(config, lab) -> dict[str, list[float]]:
  """The algorithm, and its flow, each from where gradient descent arrived."""
  metrics, variables = dict[str, list[float]](), None
  with jax.enable_x64(config.precision == "float64"):
    for stage, task in stages(config).items():
      fitted = lab.fit(stage, task, variables)
      metrics = fitted.metrics | metrics  # the algorithm's test accuracy, not its flow's
      if stage == "approach":
        variables = {"params": fitted.params, **fitted.variables}
  return metrics


def toy(config, lab) -> dict[str, list[float]]:
  """x of L = (1 + x^2) y^2 after tau against the flow, at two step sizes; seeds differ in y.

  As lambda_1 = 2 (1 + x^2), N lowers log x + x^2 / 2 by tau / 2, and S lowers log x by as much. The
  flow starts where gradient flow arrives: log x + x^2 / 2 - y^2 / 2 is its invariant.
  """
  tau, rule, errors = config.taus[0], RULES[config.algorithm], dict[str, list[float]]()
  level = lambda x: np.log(x) + x**2 / 2  # noqa: E731
  at = lambda level: np.sqrt(scipy.special.lambertw(np.exp(2 * level)).real)  # noqa: E731

  def walk(y, eta):
    loss_fn = lambda point: (1 + point["x"] ** 2) * point["y"] ** 2  # noqa: E731
    place = {"x": jnp.full_like(y, 3.0), "y": y}, rule(eta).init({})
    return flow.descend(loss_fn, rule(eta), *place, round(tau / eta**2))[0]["x"]

  for name, eta in (("error", 0.05), ("error at half", 0.025)):
    y_S = np.array([eta * np.random.RandomState(s).uniform(0.2, 0.8) for s in lab.seeds])
    with jax.enable_x64(True):
      x_S = np.asarray(jax.jit(jax.vmap(functools.partial(walk, eta=eta)))(y_S))
    start_S = at(level(3.0) - y_S**2 / 2)
    root_S = start_S * np.exp(-tau / 2)
    exact_S = root_S if config.algorithm == "root" else at(level(start_S) - tau / 2)
    errors |= {name: np.abs(x_S - exact_S).tolist(), f"{name}, x": x_S.tolist()}
  return errors


def follows(name: str, arm: str, tau: str) -> Claim:
  """Seed by seed, as both start from the same point."""
  metrics = f"train/fall at {tau}", arm, arm, f"flow/fall at {tau}"
  return Claim(f"{name} follows its flow at tau {tau}", *metrics, 0.9, 1.1, ratio=True)


ROOT = {"algorithm": "root"}
DRIFT: dict[str, dict[str, Any]] = {"gd": {"algorithm": "gd"}, "normalised": {}, "root": ROOT}
ARMS = {"N": "normalised", "S": "root"}
halves = functools.partial(Claim, metric="error at half", against_metric="error", ratio=True)
fall = functools.partial(Claim, metric="train/fall at 2")
falls = functools.partial(fall, refuted_below=0.0, refuted_above=0.98)
near_one = functools.partial(Claim, at_least=0.95, at_most=1.05)
along = functools.partial(Claim, metric="train/alignment", at_least=0.9)

STUDIES = [
  Study(
    "toy",
    arms={"N": {"taus": (6.0,)}, "S": ROOT | {"taus": (2.0,)}},
    claims=[
      *(Claim(f"{a} is where its flow is", "error", a, at_most=0.0075) for a in ARMS),
      *(
        halves(
          f"half the step, half the error of {a} or less",
          of=a,
          against=a,
          at_most=0.67,
          refuted_above=1.0,
        )
        for a in ARMS
      ),
    ],
    run=toy,
  ),
  Study(
    "network",
    arms=DRIFT | {"root": ROOT | {"flow.lr": 0.0025, "flow.projections": 500}},
    claims=[
      fall("gradient descent stays as sharp", of="gd", at_least=0.98, at_most=1.02),
      falls("N lowers the sharpness by 40 to 50 %", of="normalised", at_least=0.5, at_most=0.6),
      falls("S lowers it by 70 to 80 %", of="root", at_least=0.2, at_most=0.3),
      *(follows(a, arm, tau) for a, arm in ARMS.items() for tau in ("0.5", "1", "2")),
      near_one("of N, 1/S(t) + 1/S(t+1) is 1", "train/pair", "normalised"),
      *(near_one(f"of {a}, the roots add up", "train/roots", arm) for a, arm in ARMS.items()),
      *(along(f"the gradient of {a} is along v_1", of=arm) for a, arm in ARMS.items()),
    ],
  ),
  Study("mnist", scales=("paper/mnist",), arms=DRIFT, claims=[follows("N", "normalised", "12")]),
  Study(
    "cifar",
    scales=("paper/cifar10",),
    arms={arm: DRIFT[arm] for arm in SPEED},
    claims=[near_one("the roots add up", "train/roots", "normalised")],
    seeds=1,
  ),
]

if __name__ == "__main__":
  main(__name__)
