"""Branch-Train-Merge: Embarrassingly Parallel Training of Expert Language Models (BTM).

Li, Gururangan, Dettmers, Lewis, Althoff, Smith and Zettlemoyer, 2022, arXiv:2208.03306.

A forest of expert language models, one a domain, that share nothing: a seed is trained on all
domains, branched (its whole training state copied to every expert, the schedule going on where it
was), each expert is trained on its own domain alone with 1/k of the batch, and the experts are
merged: by a mixture of their probabilities under a Bayesian posterior of the domain, or by an
average of their weights, which gives one model.

Claim (round-up of 2022-08-14): a much lower perplexity than one model of all domains at the same
cost of training, in domains trained on and in others; the seed phase matters; averages, which cost
no more than one model to run, do well too.

Experts are one program, on a mesh axis over which nothing but metrics is exchanged. An example is a
window of each domain: the dense model reads all columns, an expert its own, so that all see the
same tokens. Dense model, DeMix (feed-forward layers of each domain, the rest of all) and forest are
one definition that differs in which parameters a domain has of its own (`OWN`). The dense model
goes on from the seed as the experts do. The prior of the domains is estimated on development
windows of the domain that is evaluated, known or held out, and then frozen.

Laptop scale: bytes, 128 a window, 2 layers of width 64 (0.12 M parameters), four domains to train
on and three held out. Positions are rotary and matrices are Muon's, since that learns from a
megabyte what AdamW and learned positions do not (2.6 against 3.8 bits); the learning rate is the
dense model's best. All methods are measured in one run of each seed, from one seed phase.

Found at laptop scale (3 seeds, `results/btm.json`): in domains trained on the ensemble is 2.6 %
below the dense model, for every seed but with the margin inside the interval; it is 2.3 % below
DeMix, which is within chance. As good is the prior's average, which is one model: the prior is all
but sure of the domain. Random splits are 5 % and experts without a seed 6 % above the dense model;
the latter's averages are ruined. The uniform average is 9 % above it: half of the updates, at these
rates, take experts far apart. Of held-out domains the claim is refuted: 2.2 % above the dense
model, no better than random splits. Presumably four experts, of one megabyte in all, know too
little of other domains, and the posterior is too sure of itself: the released one-token form, which
forgets, is 1 % below the cumulative form in domains trained on and 3 % in others, where it is 1 %
below the dense model (no claim was made of it). One expert does as well as all where its domain is
known and 2 % worse elsewhere; two are within half a percent everywhere.

Paper scale: the four sizes with the authors' budgets, GPUs as chips, in bfloat16 for fp16. Numbers
of tokens in the vocabulary (recalled) and rematerialisation are ours. The DeMix corpus is in no
package. The incremental curriculum of 64 domains, in which an expert starts from the prior's
average, is not here: its details are unknown.

    python -m experiments.btm
    python -m experiments.btm --config.share=0.25              # a shorter seed phase
    python -m experiments.btm --study=tuning                   # the learning rate
    python -m launch.plan btm --scale=paper/1.3b
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import optax.contrib

from experiments.datasets import domains, sources, text, tokenization
from launch import Claim, Evaluation, Study, Task, independent, main, supervised
from launch import mesh as meshes
from models import merging
from models.transformer import Transformer
from objectives import ensembles, language, recipes

# layers, width, heads, GPUs, updates; half of the updates are the seed phase's.
PAPER = {
  "125m": (12, 768, 12, 16, 80_000),
  "350m": (24, 1024, 16, 32, 32_000),
  "750m": (24, 1536, 16, 64, 24_000),
  "1.3b": (24, 2048, 32, 128, 12_000),
}
SCALES = ("laptop", *(f"paper/{size}" for size in PAPER))
TOPOLOGIES = {
  f"paper/{size}": (f"v5e-{row[3]}", f"data=8,fsdp={row[3] // 8}") for size, row in PAPER.items()
}
DEMIX = ("1b", "openwebtext", "realnews", "reviews", "cs", "legal", "med", "reddit")
DEMIX_HELD_OUT = ("news", "tweets", "yelp", "cord19", "github", "gutenberg", "contracts", "qasper")
# Which parameters a domain has of its own, by their paths; the others are of all domains.
OWN = {"dense": "(?!)", "demix": "(^|/)mlp/", "forest": ""}


def get_config(scale: str = "laptop") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    {
      "domains": ("reference", "science", "c", "licences"),
      "held_out": ("library", "docstrings", "readmes"),
      "split": "test",  # what is measured on
      "measured": 64,  # windows of a domain
      "forests": ("demix", "unseeded", "random", "experts"),
      "length": 128,
      "layers": 2,
      "width": 64,
      "heads": 2,
      "position": "rotary",
      "scan": False,
      "remat": False,
      "dtype": "float32",
      "share": 0.5,  # of the updates, for the seed
      "optimizer": {"name": "muon", "lr": 4e-2, "total_steps": 400, "warmup": 0.08, "clip": 0.1},
      "batch_size": 4,  # of an expert; the dense model's is that of all experts
      "microbatches": 1,
      "prior": {"batch_size": 8, "steps": 12},  # about 100 development windows
      "steps_per_dispatch": 25,
      "checkpoint_every": 0,
    }
  )
  if scale != "laptop":
    layers, width, heads, gpus, steps = PAPER[scale.removeprefix("paper/")]
    values: dict[str, Any] = {"layers": layers, "width": width, "heads": heads, "length": 1024}
    values |= {"domains": DEMIX, "held_out": DEMIX_HELD_OUT, "scan": True, "remat": True}
    values |= {"dtype": "bfloat16", "optimizer.name": "adamw", "optimizer.lr": 5e-4}
    values |= {"position": "learned", "optimizer.total_steps": steps}
    values |= {"microbatches": 32, "batch_size": gpus // 8 * 2 * 32}
    values |= {"prior.batch_size": 16, "prior.steps": 6}
    values |= {"steps_per_dispatch": 1, "checkpoint_every": 1000}
    config.update_from_flattened_dict(values)
  return config


def training(config, phase: str, at_random: bool = False) -> sources.InMemory:
  """What a phase reads, a window of each domain at a time: no phase reads another's windows."""
  source = domains.side_by_side(config.domains, "train", config.length)
  if phase != "both":
    shares = (config.share, 1 - config.share)
    source = domains.parts(source, shares)[("seed", "branches").index(phase)]
  return domains.random_split(source) if at_random else source


def held(config, split: str, count: int) -> sources.InMemory:
  """Windows of the domains trained on and then of those held out, (count, domains, L)."""
  return domains.side_by_side(config.domains + config.held_out, split, config.length, count)


def optimizer(config, kind: str) -> optax.GradientTransformation:
  """Linear warm-up, linear decay to 0: one schedule for the seed and all that follows it.

  AdamW, or Muon on matrices, which learns from fewer tokens, and Adam on the rest. The gradient is
  clipped by its norm, an expert's by its own.
  """
  o, last = config.optimizer, config.optimizer.total_steps
  knots = np.array([0, o.warmup * last, last + 1]), np.array([0, o.lr, 0])
  rate = lambda n: jnp.interp(n + 1.0, *knots)  # noqa: E731
  if o.name == "adamw":
    rule = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-7, weight_decay=0.1)
  else:
    last_two = lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)  # noqa: E731
    rule = recipes.muon(rate, dimensions=functools.partial(jax.tree.map, last_two))

  def clip(grads):
    return optax.clip_by_global_norm(o.clip).update(grads, optax.EmptyState())[0]

  each = jax.vmap(clip) if kind == "forest" else clip
  return optax.chain(optax.stateless(lambda grads, _: each(grads)), rule)


def stages(config) -> dict[str, Task]:
  count, everywhere = len(config.domains), config.domains + config.held_out
  in_bytes = config.domains[0] in text.DOMAINS
  vocab = tokenization.bytes_tokenizer().vocab_size if in_bytes else 50_304
  fields = {name: config[name] for name in ("heads", "position", "scan", "remat")}
  sizes, fields["dtype"] = (vocab, config.width, config.layers), jnp.dtype(config.dtype)
  model = Transformer(*sizes, max_length=config.length, **fields)
  window = dict.fromkeys(("inputs", "targets"), jax.ShapeDtypeStruct((config.length,), np.int32))
  one = supervised(model, language.next_token, window)
  functions = {kind: independent(*one, count, own) for kind, own in OWN.items()}

  def side_by_side(n: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {k: jax.ShapeDtypeStruct((n, *v.shape), v.dtype) for k, v in window.items()}

  def log_prob(params, inputs_BL, targets_BL):
    logits_BLV = model.apply({"params": params}, inputs_BL)
    return -optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL)

  def by_domain(fn, prior_DK, batch):
    columns = (jnp.moveaxis(batch[name], 1, 0) for name in window)
    return jax.lax.map(lambda column: fn(*column), (prior_DK, *columns))

  def estimate(state, batch, key):
    """An update of the cached priors, from development data."""

    def one(prior_K, *rows):
      found_KBL = jax.vmap(log_prob, (0, None, None))(state.params, *rows)
      weights_KBL = ensembles.log_posterior(found_KBL, prior_K)
      loss = -ensembles.mixture(found_KBL, weights_KBL).mean()
      return ensembles.update_prior(prior_K, weights_KBL, batch["mask"]), loss

    prior_DK, losses_D = by_domain(one, state.variables["prior"], batch)
    metrics = {"loss": (losses_D.sum(), jnp.float32(losses_D.size))}
    return state.replace(variables={"prior": prior_DK}), metrics

  def measure(params, variables, batch, key, *, train, dense=False):
    """Bits a token of each domain, `METHOD/DOMAIN`; of a forest under the priors as they are."""

    def one(prior_K, *rows):
      if dense:
        return {"dense": log_prob(params, *rows)}
      found_KBL = jax.vmap(log_prob, (0, None, None))(params, *rows)
      ensemble = functools.partial(ensembles.ensemble, found_KBL)
      return {
        "ensemble": ensemble(prior_K),
        "one token": ensemble(prior_K, form="token"),
        "top 1": ensemble(ensembles.top_k(prior_K, 1)),
        "top 2": ensemble(ensembles.top_k(prior_K, 2)),
        "average": log_prob(merging.average(params), *rows),
        "prior average": log_prob(merging.average(params, prior_K), *rows),
      }

    def bits(*columns):
      masked = jax.tree.map(lambda x_BL: (x_BL.sum(1) * batch["mask"]).sum(), one(*columns))
      return jax.tree.map(lambda total: -total / jnp.log(2.0), masked)

    prior_DK = jnp.zeros((len(everywhere), 1)) if dense else variables["prior"]
    totals, tokens = by_domain(bits, prior_DK, batch), batch["mask"].sum() * config.length
    metrics = {
      f"{method}/{domain}": (total_D[d], tokens)
      for method, total_D in totals.items()
      for d, domain in enumerate(everywhere)
    }
    return jnp.zeros(()), (metrics, variables)

  data = functools.partial(held, config, config.split, config.measured)
  common = {"steps_per_dispatch": config.steps_per_dispatch, "rules": meshes.MODEL_RULES}

  def train(kind: str, phase: str, at_random: bool = False) -> Task:
    first = round(config.share * config.optimizer.total_steps)
    rest = config.optimizer.total_steps - first
    measured = Evaluation(
      data, functools.partial(measure, dense=True), side_by_side(len(everywhere))
    )
    return Task(
      init=functions[kind][0],
      loss=functions[kind][1],
      optimizer=optimizer(config, kind),
      example=side_by_side(count),
      data=functools.partial(training, config, phase, at_random),
      batch_size=config.batch_size,
      microbatches=config.microbatches,
      steps={"seed": first, "branches": rest, "both": first + rest}[phase],
      evaluate={config.split: measured} if kind == "dense" and phase != "seed" else {},
      axes=dict.fromkeys(window, ("models", None)),
      checkpoint_every=config.checkpoint_every,
      **common,
    )

  uniform = jnp.full((len(everywhere), count), 1 / count)
  return {
    "seed": train("dense", "seed"),
    "dense": train("dense", "branches"),
    "experts": train("forest", "branches"),
    "random": train("forest", "branches", at_random=True),
    "unseeded": train("forest", "both"),
    "demix": train("demix", "both"),
    "merged": Task(
      init=lambda key: functions["forest"][0](key) | {"prior": uniform},
      loss=measure,
      update=estimate,
      example=side_by_side(len(everywhere)),
      data=functools.partial(
        held, config, "validation", config.prior.batch_size * config.prior.steps
      ),
      evaluate={config.split: Evaluation(data)},
      optimizer=optax.identity(),
      **config.prior,
      **common,
    ),
  }


def branch(task: Task, params: Any, opt_state: Any = ()) -> tuple[dict[str, Any], Any]:
  """What `task` starts from: axes (seed, ...), copied to every domain where it has one for each."""
  wanted = meshes.unboxed(jax.eval_shape(task.init, jax.random.key(0)))["params"]

  def copies(x: jax.Array, own: jax.ShapeDtypeStruct) -> jax.Array:
    return x if x.ndim > len(own.shape) else jnp.broadcast_to(x[:, None], (len(x), *own.shape))

  moments = jax.eval_shape(task.optimizer.init, wanted) if opt_state else ()
  return {"params": jax.tree.map(copies, params, wanted)}, jax.tree.map(copies, opt_state, moments)


def run(config, lab) -> dict[str, list[float]]:
  """Bits a token, `METHOD/trained` and `METHOD/held out`: means over domains."""
  tasks, found = stages(config), {}

  def record(name: str, method: str, metrics: Mapping[str, list[float]]) -> None:
    for group, names in (("trained", config.domains), ("held out", config.held_out)):
      values = [metrics[f"{config.split}/{method}/{domain}"] for domain in names]
      found[f"{name}/{group}"] = np.mean(values, 0).tolist()

  seed = lab.fit("seed", tasks["seed"])
  goes_on = lab.fit("dense", tasks["dense"], *branch(tasks["dense"], seed.params, seed.opt_state))
  record("dense", "dense", goes_on.metrics)
  shape = (len(lab.seeds), *tasks["merged"].example["inputs"].shape[:1], len(config.domains))
  prior = jnp.full(shape, 1 / shape[-1])
  for name in config.forests:
    branched = branch(tasks[name], seed.params, seed.opt_state) if name in FROM_SEED else ()
    forest, _ = branch(tasks["merged"], lab.fit(name, tasks[name], *branched).params)
    merged = lab.fit(f"{name}-merged", tasks["merged"], forest | {"prior": prior})
    for method in METHODS if name == "experts" else METHODS[:2]:
      record(method if name == "experts" else f"{name} {method}", method, merged.metrics)
  return found


FROM_SEED = ("random", "experts")  # of the forests
METHODS = ("ensemble", "average", "prior average", "top 1", "top 2", "one token")


def claims(group: str) -> list[Claim]:
  def bits(name: str, of: str, against: str, **margins: Any) -> Claim:
    metrics: dict[str, Any] = {"metric": f"{of}/{group}", "against_metric": f"{against}/{group}"}
    return Claim(f"{group}: {name}", of="btm", against="btm", ratio=True, **metrics, **margins)

  return [
    bits("ensemble beats dense", "ensemble", "dense", at_most=0.98, refuted_above=1.0),
    bits("ensemble beats DeMix", "ensemble", "demix ensemble", at_most=1.0),
    bits("domains beat random splits", "ensemble", "random ensemble", at_most=1.0),
    bits("random splits do not beat dense", "random ensemble", "dense", at_least=0.99),
    bits("the seed phase matters", "ensemble", "unseeded ensemble", at_most=1.0),
    bits("unseeded experts cannot be averaged", "unseeded average", "dense", at_least=1.25),
    bits("uniform average near dense", "average", "dense", at_most=1.02),
    bits("prior's average beats dense", "prior average", "dense", at_most=1.0),
    bits("ensemble beats prior's average", "ensemble", "prior average", at_most=1.0),
  ]


CLAIMS = [*claims("trained"), *claims("held out")]
SHOWN = ("dense", "demix ensemble", "random ensemble", "unseeded ensemble", *METHODS)
PLOT = [f"{method}/{group}" for group in ("trained", "held out") for method in SHOWN]
STUDIES = [
  Study("merge", arms={"btm": {}}, claims=CLAIMS, plot=PLOT),
  Study("paper", arms={"btm": {}}, claims=CLAIMS, scales=("paper/*",), seeds=1),
  Study(  # the rate of get_config was best here, for the dense model
    "tuning",
    config={"split": "validation", "forests": ()},
    arms={f"lr={rate}": {"optimizer.lr": rate} for rate in (2e-2, 4e-2, 8e-2)},
    seeds=(100, 101),
    plot=["dense/trained"],
    optional=True,
  ),
]

if __name__ == "__main__":
  main(__name__)
