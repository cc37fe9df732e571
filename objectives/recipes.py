"""Whole training recipes as optax transformations: schedule, clipping, decay and its exemptions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from objectives import optimizers


def language_model(
  name: str, lr: float, total_steps: int, warmup_steps: int
) -> optax.GradientTransformation:
  """The optimizer of a language model trained from scratch.

  Args:
    name: "adamw", GPT-3's (arXiv:2005.14165, appendix B: betas 0.9 and 0.95, decay 0.1, gradients
      clipped at norm 1); "muon", Muon (Jordan et al., 2024) on kernels and Adam at a quarter of the
      rate on the rest, which learns from fewer tokens; both with `optimizers.warmup_cosine`.
      "adafactor", T5's (arXiv:1910.10683, section 3.1.2), at lr / sqrt(max(step, warmup_steps)).
    lr: peak rate; of Adafactor the factor above, 1.0 in T5.
    total_steps, warmup_steps: updates, of the whole run and of the warm-up in it.

  Raises: ValueError for another name, or a warm-up that is not below `total_steps`.
  """
  if name == "adafactor":
    return optax.adafactor(lambda count: lr / jnp.sqrt(jnp.maximum(count, warmup_steps)))
  rate = optimizers.warmup_cosine(lr, total_steps, warmup_steps)
  if name == "muon":
    return muon(rate)
  if name != "adamw":
    raise ValueError(f"optimizer={name!r}; accepted: adamw, muon, adafactor")
  adamw = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1)
  return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def muon(
  rate: optax.Schedule, matrices: str = "kernel$", *, dimensions: Any = None, **adam: float
) -> optax.GradientTransformation:
  """Muon (Jordan et al., 2024) on matrices, Adam at a quarter of the rate on the rest.

  Args:
    rate: of Muon.
    matrices: a regular expression found in the paths of the former.
    dimensions: optax's `muon_weight_dimension_numbers`; by default matrices have two axes.
    **adam: further arguments of `optax.adam`.
  """
  on_matrices = optax.contrib.muon(rate, muon_weight_dimension_numbers=dimensions)
  groups = {"matrix": on_matrices, "rest": optax.adam(lambda n: rate(n) / 4, **adam)}
  label = functools.partial(optimizers.by_path, rules=[(matrices, "matrix")], default="rest")
  return optax.multi_transform(groups, label)


def finetuning(
  lr: float, steps: int, *, warmup: float = 0.1, weight_decay: float = 0.01, clip: float = 1.0
) -> optax.GradientTransformation:
  """AdamW as pretrained encoders are tuned with (arXiv:1810.04805, appendix A.3).

  The rate rises linearly over the first `warmup` share of the updates and falls linearly to 0;
  gradients are clipped at global norm `clip`; biases and the scales of norms do not decay.
  """
  rate = optimizers.warmup_linear(lr, steps, int(warmup * steps))
  rules = [("(bias|norm/scale)$", "plain")]

  def decays(params: Any) -> Any:
    labels = optimizers.by_path(params, rules, default="decays")
    return jax.tree.map(lambda label: label == "decays", labels)

  decayed = optax.adamw(rate, weight_decay=weight_decay, mask=decays)
  return optax.chain(optax.clip_by_global_norm(clip), decayed)
