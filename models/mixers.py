"""What the sequence mixers share: named parameters, what they refuse, and streaming.

A mixer is a module called `mixer(u_BLH, *, dt=None, step_rescale=1.0) -> y_BLH`. A causal one, and
a network of such, also reads a sequence in pieces:

    state = mixer.initial_state(batch, features)  # of an Encoder or a head: (batch)
    state, y_BLH = mixer.apply(variables, state, chunk_BLH, method="extend")
    state, y_BH = mixer.apply(variables, state, u_BH, method="step")

`extend(state, u_BLH, *, dt=None, step_rescale=1.0)` takes a chunk of any length, and `step` one
sample, `dt` being (B,). The first gap of a chunk is the one since the last sample before it.
Outputs are those of a single call on the whole sequence, up to rounding and however it is cut. A
state is a tree of float32 arrays, the batch in front, whose shapes do not depend on what has been
read: it may be donated to `jit`, or be the carry of a `lax.scan`. Norms are those of evaluation.
"""

from typing import Any

import flax.linen as nn
import jax


def parameter(
  layer: nn.Module, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> Any:
  """A float32 parameter of `layer` with logical axis names."""
  return layer.param(name, nn.with_logical_partitioning(init, axes), shape)


def refuse_sampling(layer: nn.Module, dt: Any, step_rescale: Any) -> None:
  """Raises ValueError for irregular or rescaled steps, which a layer of positions cannot honour."""
  name = type(layer).__name__
  if dt is not None:
    raise ValueError(f"dt: given; {name} accepts only None (regular sampling)")
  if not isinstance(step_rescale, int | float) or step_rescale != 1:
    raise ValueError(f"step_rescale={step_rescale}; {name} accepts only 1")


def refuse_bidirectional(layer: Any) -> None:
  """Raises ValueError for a layer whose outputs depend on inputs still to come."""
  if layer.bidirectional:
    raise ValueError("bidirectional=True: no recurrent form; accepted: False")


def call(
  module: Any,
  u_BLH: jax.Array,
  *,
  dt: jax.Array | None = None,
  step_rescale: float | jax.Array = 1.0,
) -> jax.Array:
  """The outputs of whole sequences, by the `extend` of a mixer that begins anew from None."""
  return module.extend(None, u_BLH, dt=dt, step_rescale=step_rescale)[1]


def step(
  module: Any, state: Any, x: jax.Array, *, dt: jax.Array | None = None, **fields: Any
) -> tuple[Any, Any]:
  """`extend` by one sample: the next state, and the outputs without an axis of time.

  Args:
    state: what `initial_state`, `extend` or `step` gave.
    x: the next input, (B, H) or as the module has it without the axis of time.
    dt: (B,) gap since the last sample, for modules that know gaps.
    fields: others of `extend`.
  """
  if dt is not None:
    fields["dt"] = dt[:, None]
  state, y = module.extend(state, x[:, None], **fields)
  return state, jax.tree.map(lambda leaf: leaf[:, 0], y)
