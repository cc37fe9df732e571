"""Optimizers with groups of parameters, and their schedules, as optax transformations."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Rules = Sequence[tuple[str, str]]


def by_path(params: Any, rules: Rules, default: str) -> Any:
  """Labels for `optax.multi_transform`, from the full path of each parameter.

  Args:
    params: a parameter tree; flax's partitioning boxes count as leaves.
    rules: (pattern, label) in order of precedence. A pattern is a regular expression, searched for
      in paths such as "encoder/layer_0/mixer/log_step"; begin it with `(^|/)` and end it with `$`
      to name a parameter whole.
    default: the label where no pattern is found.

  Returns: a tree of labels, a leaf for each parameter.
  """
  compiled = [(re.compile(pattern), label) for pattern, label in rules]

  def label(path: tuple[Any, ...], leaf: Any) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return next((label for pattern, label in compiled if pattern.search(name)), default)

  def is_box(x: Any) -> bool:
    return isinstance(x, nn.meta.AxisMetadata)

  return jax.tree_util.tree_map_with_path(label, params, is_leaf=is_box)


# Option -> group -> parameters of a state space layer; every other parameter is in "rest".
_TRANSITION = ("Lambda_re", "Lambda_im", "log_A_re", "A_im", "log_step")
_S5_GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
  "standard": {"ssm": ("B", *_TRANSITION)},
  "BandCdecay": {"ssm": _TRANSITION, "ssm_decay": ("B",)},
  "BfastandCdecay": {"ssm": _TRANSITION},
  "noBCdecay": {"ssm": ("B", "C", "C1", "C2", "D", *_TRANSITION)},
}


def s5_groups(option: str, dt_global: bool = False) -> Callable[[Any], Any]:
  """The groups of S5's training recipe (arXiv:2208.04933; the released train_helpers.py).

  "ssm": SSM learning rate, no weight decay; "ssm_decay": SSM learning rate, decay; "rest": global
  learning rate, decay.

  | option         | ssm                                                   | ssm_decay |
  | -------------- | ----------------------------------------------------- | --------- |
  | standard       | B, Lambda_re, Lambda_im, log_step                     |           |
  | BandCdecay     | Lambda_re, Lambda_im, log_step                        | B         |
  | BfastandCdecay | Lambda_re, Lambda_im, log_step                        |           |
  | noBCdecay      | B, C, C1, C2, D, Lambda_re, Lambda_im, log_step       |           |

  Everything else is in "rest": norms too, as in the released code, where the exemption of norms has
  no effect. S4D's log_A_re and A_im go with Lambda, its C and D with S5's, in every option.

  Args:
    option: a row of the table.
    dt_global: moves log_step, of either layer, to "rest", where it decays.

  Returns: a function from a parameter tree to its tree of labels.
  """
  if option not in _S5_GROUPS:
    raise ValueError(f"option={option!r}; accepted: {', '.join(_S5_GROUPS)}")
  rules = [
    (f"(^|/){name}$", group)
    for group, names in _S5_GROUPS[option].items()
    for name in names
    if not (dt_global and name == "log_step")
  ]
  return functools.partial(by_path, rules=rules, default="rest")


def warmup_cosine(peak: float, total_steps: int, warmup_steps: int = 0) -> optax.Schedule:
  """Linear warm-up, then cosine to 0.

  Update n, from 0, has the rate peak (n + 1) / W for n < W = `warmup_steps`, then
  peak (1 + cos(pi (n - W) / (total_steps - W))) / 2.
  """
  _check_steps(total_steps, warmup_steps)

  def schedule(count: Any) -> jax.Array:
    rise = (count + 1) / max(warmup_steps, 1)
    return peak * jnp.where(
      count < warmup_steps, rise, _cosine(count - warmup_steps, total_steps - warmup_steps)
    )

  return schedule


def warmup_linear(peak: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
  """From 0 at update 0 to `peak` at `warmup_steps`, and from there to 0 at `total_steps`."""
  rise = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
  fall = optax.linear_schedule(peak, 0.0, total_steps - warmup_steps)
  return optax.join_schedules([rise, fall], [warmup_steps])


def released_warmup_cosine(peak: float, total_steps: int, warmup_steps: int = 0) -> optax.Schedule:
  """The schedule as S5's released code has it, with its two quirks.

  The rate is set after an update: update 0 has the peak rate, and update n that of count n - 1. The
  cosine counts from the start of the run over total_steps - W, W = `warmup_steps`: it begins below
  the peak and is 0 from update total_steps - W + 1 to the end. With c = n - 1, the rate is
  peak (c + 1) / W for c < W, then peak (1 + cos(pi min(c / (total_steps - W), 1))) / 2.
  """
  _check_steps(total_steps, warmup_steps)

  def schedule(count: Any) -> jax.Array:
    shown = count - 1
    rise = (shown + 1) / max(warmup_steps, 1)
    rate = jnp.where(shown < warmup_steps, rise, _cosine(shown, total_steps - warmup_steps))
    return peak * jnp.where(count == 0, 1.0, rate)

  return schedule


def s5_optimizer(
  option: str = "standard",
  *,
  ssm_lr: float,
  lr: float,
  weight_decay: float,
  total_steps: int,
  warmup_steps: int = 0,
  dt_global: bool = False,
  released_schedule: bool = False,
) -> optax.GradientTransformation:
  """S5's training recipe: Adam for the SSM group, AdamW for the rest, no gradient clipping.

  Betas 0.9 and 0.999, epsilon 1e-8. Weight decay is multiplied by the learning rate (AdamW).

  Args:
    option, dt_global: see `s5_groups`.
    ssm_lr, lr: peak learning rates of the SSM groups and of the rest.
    weight_decay: of the groups that decay.
    total_steps, warmup_steps: updates, of the whole run and of the warm-up in it.
    released_schedule: `released_warmup_cosine` in place of `warmup_cosine`.
  """
  schedule = released_warmup_cosine if released_schedule else warmup_cosine
  ssm_rate = schedule(ssm_lr, total_steps, warmup_steps)
  rate = schedule(lr, total_steps, warmup_steps)
  betas = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
  transforms = {
    "ssm": optax.adam(ssm_rate, **betas),
    "ssm_decay": optax.adamw(ssm_rate, weight_decay=weight_decay, **betas),
    "rest": optax.adamw(rate, weight_decay=weight_decay, **betas),
  }
  return optax.multi_transform(transforms, s5_groups(option, dt_global))


def _cosine(count: Any, horizon: int) -> jax.Array:
  """From 1 at 0 to 0 at `horizon`, where it stays."""
  return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(count / horizon, 0, 1)))


def _check_steps(total_steps: int, warmup_steps: int) -> None:
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f"warmup_steps={warmup_steps}; accepted: 0 to {total_steps - 1}, under"
      f" total_steps={total_steps}"
    )
