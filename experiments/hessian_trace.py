"""Regularizing Deep Neural Networks with Stochastic Estimators of Hessian Trace (SEHT).

2022, arXiv:2208.05924.

Adds to the loss an estimate of the trace of its Hessian on the mini-batch, lambda v' H v with v
random signs (Hutchinson). Dropping most entries of v, or whole tensors, regularises further and is
meant to make it cheaper. Differentiating the penalty takes third derivatives.

Claim (round-up of 2022-08-14): raises the accuracy noticeably, above other regularisers; costs at
least a second backward pass.

The released code turns the estimate into a number before it is differentiated, so that its penalty
has no gradient; the arm `stopped` is that code's effect, to be compared bit by bit with no penalty.
Here masks are scaled by 1 / p, so that lambda means the same for every p. Under `jit` a dropped
tensor's products are still computed: what saves time is the interval between steps with a penalty.

Laptop scale: 200 digits to train on, so that overfitting is real; MLP 64-128-128-10, momentum SGD,
3,000 steps. `none longer` has the gradient evaluations of SEHT, counting the penalty as four.
Paper scale: CIFAR-10 and CIFAR-100 with ResNet-18 and WRN-28-10, as the released code's defaults
are; what the paper's tables say, and how it normalises images, is unknown.

Found at laptop scale (5 seeds, `results/hessian_trace.json`): at the strength that validation picks
the trace at the end is 0.57 of what it is without penalty (interval 0.47 to 0.69), 0.51 with masks
on tensors, 0.85 with masks on entries, for which a weaker penalty was picked; three times the
strength lowers it further and now and then kills a network. Whether it is halved stays undecided.
So does accuracy, which changes by less than a point; no other regulariser stands out either, and
label smoothing and the confidence penalty end at traces 6 and 20 times as high as without: a low
trace is not what makes for accuracy here. Under a stop-gradient no bit changes. An update takes
many times as long with a penalty as without, drawing the signs included, and a few times as long
with one every tenth step.

    python -m experiments.hessian_trace                        # all laptop studies, 3 min, 2 cores
    python -m experiments.hessian_trace --study=tuning         # how strengths were chosen
    python -m experiments.hessian_trace --scale=paper/cifar100-resnet18
    python -m launch.plan hessian_trace --scale=paper/cifar100-wrn
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments.datasets import sources
from launch import Claim, Evaluation, Study, Task, main, supervised
from launch.program import Program
from models import gates
from models.kernels import timing
from objectives import classification, curvature, optimizers

REGULARISERS = ("none", "trace", "smoothing", "confidence", "jacobian", "cutout", "mixup")
PAPER = {"resnet18": {"model": "resnet18"}, "wrn": {"model": "wrn"}}
SCALES = ("laptop", *(f"paper/{data}-{net}" for data in ("cifar10", "cifar100") for net in PAPER))
TOPOLOGIES = {"paper/*": ("v5e-16", "data=16")}


def get_config(scale: str = "laptop") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    {
      "data": {"name": "digits", "take": 200, "augment": False},
      "model": "mlp",  # | resnet18 | wrn
      "regulariser": "none",
      "strength": 0.0,  # lambda; of cutout the width in pixels, of mixup alpha
      "trace": {
        "probes": 1,  # K
        "keep": 1.0,  # p
        "mask": "coordinate",  # | tensor
        "interval": 1,  # steps from one penalty to the next
        "nonnegative": False,  # max(T, 0): biased, but bounded below where the trace is not
        "stopped": False,  # the released code: no gradient
      },
      "measured_probes": 500,
      "optimizer": {
        "lr": 0.1,
        "schedule": "cosine",  # | steps
        "weight_decay": 5e-4,
        "total_steps": 3000,
        "warmup_steps": 0,
      },
      "batch_size": 40,
      "steps_per_dispatch": 100,
      "checkpoint_every": 0,
    }
  )
  if scale == "laptop":
    return config
  data, _, net = scale.removeprefix("paper/").partition("-")
  classes = {"cifar10": 10, "cifar100": 100}[data]
  assert classes
  config.update_from_flattened_dict(
    {"data.name": data, "data.take": 0, "data.augment": True, "strength": 1e-3}
    | {"trace.probes": 5, "trace.keep": 0.1, "trace.interval": 10, "measured_probes": 1}
    | {"batch_size": 32, "steps_per_dispatch": 1, "checkpoint_every": 50_000 // 32}
    | {"optimizer.lr": 0.01, "optimizer.total_steps": 200 * (50_000 // 32)}
    | {"optimizer.schedule": "steps" if net == "wrn" else "cosine"}
    | PAPER[net]
  )
  return config


@functools.lru_cache
def load(name: str, split: str) -> sources.InMemory | sources.Lazy:
  """Images with values from -1 to 1 (what the paper normalises them to is unknown)."""
  half = 8.0 if name == "digits" else 127.5

  def view(example: sources.Example) -> sources.Example:
    inputs = np.asarray(example["image"], np.float32) / np.float32(half) - 1
    return {"inputs": inputs, "labels": np.int32(example["label"])}

  return sources.load(name, split).map(view)


def network(name: str, classes: int) -> Any:
  match name:
    case "mlp":
      return gates.MLP((128, 128), classes)
    case "resnet18":
      return gates.ResNet(classes, small=True)
    case "wrn":
      return gates.WideResNet(classes)
  raise ValueError(f"model={name!r}; accepted: mlp, resnet18, wrn")


def crop_and_flip(key: jax.Array, x_HWC: jax.Array, pad: int = 4) -> jax.Array:
  """A random crop of the image with a black frame, mirrored half of the time."""
  crop_key, flip_key = jax.random.split(key)
  framed = jnp.pad(x_HWC, ((pad, pad), (pad, pad), (0, 0)), constant_values=-1)
  corner = (*jax.random.randint(crop_key, (2,), 0, 2 * pad + 1), 0)
  cropped = jax.lax.dynamic_slice(framed, corner, x_HWC.shape)
  return jnp.where(jax.random.bernoulli(flip_key), cropped[:, ::-1], cropped)


def cutout(key: jax.Array, x_HWC: jax.Array, width: float) -> jax.Array:
  """The image with a black square about a random pixel (arXiv:1708.04552)."""
  rows, columns = (jnp.arange(n) for n in x_HWC.shape[:2])
  i, j = jax.random.uniform(key, (2, 1)) * jnp.array(x_HWC.shape[:2])[:, None] - 0.5
  inside = (abs(rows - i) < width / 2)[:, None] & (abs(columns - j) < width / 2)
  return jnp.where(inside[..., None], -1, x_HWC)


def training_loss(config, model):
  """Cross-entropy on what the regulariser makes of the batch, and its terms on the outputs."""
  kind, strength = config.regulariser, config.strength
  if kind not in REGULARISERS:
    raise ValueError(f"regulariser={kind!r}; accepted: {', '.join(REGULARISERS)}")

  def loss(params, variables, batch, key, *, train):
    image_key, mix_key, cut_key, key = jax.random.split(key, 4)
    x_BHWC, size = batch["inputs"], len(batch["inputs"])
    targets_BC = jax.nn.one_hot(batch["labels"], model.classes)
    if config.data.augment:
      x_BHWC = jax.vmap(crop_and_flip)(jax.random.split(image_key, size), x_BHWC)
    if kind == "cutout":
      cut = functools.partial(cutout, width=strength)
      x_BHWC = jax.vmap(cut)(jax.random.split(cut_key, size), x_BHWC)
    if kind == "mixup":  # arXiv:1710.09412: one coefficient a batch
      share_key, order_key = jax.random.split(mix_key)
      share = jax.random.beta(share_key, strength, strength)
      order = jax.random.permutation(order_key, size)
      mix = lambda x: share * x + (1 - share) * x[order]  # noqa: E731
      x_BHWC, targets_BC = mix(x_BHWC), mix(targets_BC)
    if kind == "smoothing":
      targets_BC = optax.smooth_labels(targets_BC, strength)

    def apply(x):
      keys, kept = {"dropout": key}, list(variables)
      return model.apply({"params": params, **variables}, x, train=True, rngs=keys, mutable=kept)

    logits_BC, updated = apply(x_BHWC)
    _, metrics = classification.cross_entropy(logits_BC, batch)
    value = optax.softmax_cross_entropy(logits_BC, targets_BC).mean()
    if kind == "confidence":  # arXiv:1701.06548
      value -= (
        strength * (jax.nn.softmax(logits_BC) * -jax.nn.log_softmax(logits_BC)).sum(-1).mean()
      )
    if kind == "jacobian":  # ||d logits / d x||^2 / 2 by one random direction, arXiv:1908.02729
      v_BC = jax.random.normal(key, logits_BC.shape)
      (slope,) = jax.vjp(lambda x: apply(x)[0], x_BHWC)[1](v_BC)
      value += strength / 2 * (slope**2).sum() / size
    return value, (metrics, updated if variables else variables)

  return loss


def penalised_update(config, loss, optimizer):
  """A step along the gradient of loss + strength * trace, the trace at every `interval`-th step."""
  options = config.trace

  def update(state, batch, key):
    loss_key, probe_key = jax.random.split(key)

    def objective(params):
      return loss(params, state.variables, batch, loss_key, train=True)

    def penalty(params):
      trace, _ = curvature.hutchinson_trace(
        lambda p: objective(p)[0],
        params,
        probe_key,
        options.probes,
        keep=options.keep,
        mask=options.mask,
      )
      bounded = jnp.maximum(trace, 0) if options.nonnegative else trace
      bounded = jax.lax.stop_gradient(bounded) if options.stopped else bounded
      return config.strength * bounded, trace

    def penalised(grads):
      extra, trace = jax.grad(penalty, has_aux=True)(state.params)
      return optax.tree.add(grads, extra), trace

    (value, (metrics, variables)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    if config.regulariser == "trace":
      due = state.step % options.interval == 0
      grads, trace = jax.lax.cond(due, penalised, lambda g: (g, jnp.zeros(())), grads)
      count = due.astype(jnp.float32)
      metrics |= {"trace": (trace, count), "negative": ((trace < 0) * count, count)}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = state.replace(params=params, variables=variables, opt_state=opt_state)
    return state, {"loss": (value, jnp.ones(()))} | metrics

  return update


def sgd(lr, schedule, weight_decay, total_steps, warmup_steps) -> optax.GradientTransformation:
  """Momentum 0.9. Decay is the optimizer's: in the loss it would add d * decay to the trace."""
  match schedule:
    case "cosine":
      rate = optimizers.warmup_cosine(lr, total_steps, warmup_steps)
    case "steps":
      drops = {int(share * total_steps): 0.2 for share in (0.3, 0.6, 0.8)}
      rate = optax.piecewise_constant_schedule(lr, drops)
    case _:
      raise ValueError(f"schedule={schedule!r}; accepted: cosine, steps")
  return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=0.9))


def stages(config) -> dict[str, Task]:
  name, take, batch_size = config.data.name, config.data.take, config.batch_size
  shape, classes = {"digits": ((8, 8, 1), 10), "cifar10": ((32, 32, 3), 10)}.get(
    name, ((32, 32, 3), 100)
  )
  example = {
    "inputs": jax.ShapeDtypeStruct(shape, np.float32),
    "labels": jax.ShapeDtypeStruct((), np.int32),
  }
  model = network(config.model, classes)
  init, plain = supervised(model, classification.cross_entropy, example)
  # Whole batches, as normalisation by the batch makes the Hessian one of the batch.
  measured = f"train[:{take or 80 * batch_size}]"

  def curvature_of(params, variables, batch, key, *, train):
    """The trace of the plain loss as in training, but without augmentation."""
    loss_fn = lambda p: plain(p, variables, batch, key, train=True)[0]  # noqa: E731
    probes = config.measured_probes
    trace, _ = curvature.hutchinson_trace(loss_fn, params, key, probes, parallel=min(probes, 10))
    count = batch["mask"].sum()
    return jnp.zeros(()), ({"trace": (trace * count, count)}, variables)

  splits = ("validation", "test") if name == "digits" else ("test",)
  optimizer = sgd(**config.optimizer)
  task = Task(
    init=init,
    loss=plain,
    update=penalised_update(config, training_loss(config, model), optimizer),
    optimizer=optimizer,
    example=example,
    data=lambda: load(name, f"train[:{take}]" if take else "train"),
    batch_size=batch_size,
    steps=config.optimizer.total_steps,
    evaluate={s: Evaluation(functools.partial(load, name, s)) for s in splits}
    | {"train": Evaluation(functools.partial(load, name, measured), curvature_of)},
    steps_per_dispatch=config.steps_per_dispatch,
    checkpoint_every=config.checkpoint_every,
  )
  if not (config.regulariser == "trace" and config.trace.stopped):
    return {"train": task}
  without = config.copy_and_resolve_references().unlock()
  without.regulariser = "none"
  update = penalised_update(without, training_loss(without, model), optimizer)
  return {"train": task, "unpenalised": dataclasses.replace(task, update=update)}


def run(config, lab) -> dict[str, list[float]]:
  """Trains; what a penalty without gradient learns is held against what none does."""
  tasks = stages(config)
  fitted = {stage: lab.fit(stage, task) for stage, task in tasks.items()}
  metrics = fitted["train"].metrics
  if len(tasks) > 1:
    pairs = jax.tree.map(lambda a, b: jnp.abs(a - b), *(f.params for f in fitted.values()))
    apart_S = [jnp.max(x.reshape(len(lab.seeds), -1), axis=1) for x in jax.tree.leaves(pairs)]
    metrics |= {"difference": np.max(apart_S, axis=0).tolist()}
  return metrics


def cost(config, lab) -> dict[str, list[float]]:
  """Time of ten updates over those without penalty, timed in turn in this process."""
  plain = config.copy_and_resolve_references().unlock()
  plain.regulariser = "none"
  contestants = {}
  for name, chosen in (("penalised", config), ("plain", plain)):
    program = Program(stages(chosen)["train"], lab.mesh, (0,))
    batches = {k: np.ones(v.shape, v.dtype) for k, v in program.abstract_batches(10).items()}
    contestants[name] = program.update, (program.initial_state(), batches)
  repeats = len(lab.seeds)
  seconds = {name: r["seconds"] for name, r in timing.race(contestants, 10 * repeats).items()}
  ours, theirs = (np.median(np.reshape(s, (repeats, -1)), axis=1) for s in seconds.values())
  return {"time": (ours / theirs).tolist()}


# Four strengths a regulariser, and what was best among them on the validation set (`tuning`).
GRID: dict[str, tuple[dict[str, Any], tuple[float, ...], float]] = {
  "full": ({"regulariser": "trace"}, (1e-4, 3e-4, 1e-3, 3e-3), 1e-3),
  "coordinate": ({"regulariser": "trace", "trace.keep": 0.05}, (1e-4, 3e-4, 1e-3, 3e-3), 3e-4),
  "tensor": (
    {"regulariser": "trace", "trace.keep": 0.5, "trace.mask": "tensor"},
    (1e-4, 3e-4, 1e-3, 3e-3),
    1e-3,
  ),
  "smoothing": ({"regulariser": "smoothing"}, (0.0125, 0.025, 0.05, 0.1), 0.025),
  "confidence": ({"regulariser": "confidence"}, (0.03, 0.1, 0.3, 1.0), 0.3),
  "jacobian": ({"regulariser": "jacobian"}, (1e-4, 1e-3, 1e-2, 1e-1), 1e-3),
  "cutout": ({"regulariser": "cutout"}, (1.0, 2.0, 3.0, 4.0), 1.0),
  "mixup": ({"regulariser": "mixup"}, (0.03, 0.1, 0.3, 1.0), 0.1),
}
SEHT = ("full", "coordinate", "tensor")
BEST = {arm: fixed | {"strength": best} for arm, (fixed, _, best) in GRID.items()}
ARMS: dict[str, dict[str, Any]] = {
  "none": {},
  **BEST,
  "stopped": BEST["full"] | {"trace.stopped": True},
  "none longer": {"optimizer.total_steps": 5 * 3000},
}
trace_falls = functools.partial(
  Claim, metric="train/trace", against="none", ratio=True, at_most=0.5, refuted_above=1.0
)
as_accurate = functools.partial(Claim, metric="test/accuracy", at_least=0.0)

STUDIES = [
  Study(
    "digits",
    arms=ARMS,
    seeds=5,
    claims=[
      *(trace_falls(f"the trace at the end is halved: {arm}", of=arm) for arm in SEHT),
      *(as_accurate(f"accuracy rises: {arm}", of=arm, against="none") for arm in SEHT),
      *(
        as_accurate(f"full is at least as accurate as {arm}", of="full", against=arm)
        for arm in ("smoothing", "confidence", "jacobian", "cutout", "mixup", "none longer")
      ),
      Claim("a penalty under a stop-gradient changes no bit", "difference", "stopped", at_most=0.0),
    ],
  ),
  Study(
    "cost",
    config=BEST["full"],
    arms={"every step": {}, "every tenth": {"trace.interval": 10}},
    claims=[Claim("costs a second backward pass or more", "time", "every step", at_least=5 / 3)],
    run=cost,
  ),
  Study(
    "cifar",
    scales=("paper/*",),
    arms={"full": {"regulariser": "trace"}, "none": {}}
    | {"smoothing": {"regulariser": "smoothing", "strength": 0.1}},
    claims=[
      trace_falls("the trace at the end is halved", of="full"),
      as_accurate("accuracy rises", of="full", against="none"),
    ],
    seeds=1,
  ),
  Study(
    "tuning",
    arms={
      f"{arm} {strength:g}": fixed | {"strength": strength}
      for arm, (fixed, strengths, _) in GRID.items()
      for strength in strengths
    }
    | {f"none lr={lr:g}": {"optimizer.lr": lr} for lr in (0.01, 0.03, 0.1, 0.3)},
    config={"measured_probes": 10},
    seeds=(100, 101),
    plot=["validation/accuracy"],
    optional=True,
  ),
]

if __name__ == "__main__":
  main(__name__)
