"""What the GPU kernels (Mosaic GPU) share: loops over steps, `vmap`, interpretation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from models.kernels.rows import GROUP, Row

ENOUGH, WANTED = 64, 132  # programs: fewer are cut in time, into that many
CHUNK = 256  # steps of a chunk, at least, to be worth two more launches

# An index that jax 0.12 does not have any more.
WHOLE: dict[str, Any] = {"idx": ()} if "idx" in inspect.signature(plgpu.load).parameters else {}


def sweep(
  steps: int, descending: bool, load: Callable[..., Any], step: Callable[..., Any], carry: Any,
  store: Callable[..., None] = lambda t, row: None, together: int = GROUP,
) -> Any:  # fmt: skip
  """The carry after all steps of a block: eight are loaded, run and stored at a time.

  step(t, load(t), carry) returns the carry and what `store` gets for that step.
  """
  groups = steps // together

  def group(i: jax.Array, carry: Any) -> Any:
    start = (groups - 1 - i if descending else i) * together
    order = [start + j for j in range(together)[:: -1 if descending else 1]]
    found = []
    for t, loaded in [(t, load(t)) for t in order]:
      carry, result = step(t, loaded, carry)
      found.append(result)
    for t, result in zip(order, found, strict=True):
      store(t, result)
    return carry

  return lax.fori_loop(0, groups, group, carry)


def select(where: jax.Array | bool, x: Row, y: Row) -> Row:
  """x or y, by one truth value, which jax 0.12 does not broadcast."""
  if where is True:
    return x
  return tuple(
    lax.select(jnp.broadcast_to(where, p.shape), p, q) for p, q in zip(x, y, strict=True)
  )


def batched(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function` under `vmap`: the new axis joins the first of every operand and result."""
  mapped = custom_vmap(function)

  @mapped.def_vmap
  def _(size: int, is_mapped: Any, *operands: Any) -> Any:
    def joined(x: jax.Array, has_axis: bool) -> jax.Array:
      x = x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    results = batched(function)(*jax.tree.map(joined, operands, tuple(is_mapped)))
    split = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
    return split, jax.tree.map(lambda _: True, split)

  return mapped


def interpreter() -> Any:
  """What `plgpu.kernel` takes as `interpret`."""
  if hasattr(plgpu, "InterpretGPUParams"):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax 0.10

  return InterpretGPUParams()


def launched(call: Callable[..., Any], out: Any, interpret: bool) -> Callable[..., Any]:
  """The `call` of a kernel with results `out`; of 64 bits, if they are on, Mosaic takes no indices.

  Interpreted it has effects, which derivatives do not allow, so that the host calls it.
  """
  narrow = jax.enable_x64(False)
  if not interpret:
    return narrow(call)
  compiled = jax.jit(call)
  run = narrow(lambda *operands: jax.tree.map(np.asarray, compiled(*operands)))
  return partial(jax.pure_callback, run, out, vmap_method="sequential")


class Machine:
  """The few things that the interpreter of Mosaic GPU kernels has otherwise than a compiler."""

  def __init__(self, interpret: bool, sides: int | None = None) -> None:
    """`sides`: groups of 128 threads where a kernel has two. Interpreting two takes very long."""
    self.interpret = interpret
    self.sides = sides or (1 if interpret else 2)
    self.together = 2 if interpret else GROUP  # steps: each is interpreted and compiled by itself

  def options(self) -> dict[str, Any]:
    """Arguments for `plgpu.kernel`."""
    return {"interpret": interpreter()} if self.interpret else {}

  def load(self, ref: Any, layout: Any) -> jax.Array:
    """The whole of a reference in registers, arranged in a way."""
    return ref[...] if self.interpret else plgpu.load(ref, **WHOLE, layout=layout, optimized=False)

  def zeros(self, count: int, shape: tuple[int, int]) -> Row:
    """As many rows, arranged as references to them are read."""
    zero = jnp.zeros(shape, jnp.float32)
    if not self.interpret:
      spread = plgpu.Layout.WG_STRIDED(shape, vec_size=min(2, math.prod(shape) // 128))
      zero = plgpu.layout_cast(zero, spread)
    return (zero,) * count

  def rows(self, panel: Any, width: int) -> jax.Array:
    """(m n, width) of a reference (m, n, at least width), as a factor of a product."""
    if self.interpret:
      return lax.concatenate([panel[i, :, pl.ds(0, width)] for i in range(panel.shape[0])], 0)
    return self.load(self._flat(panel, width), plgpu.Layout.WGMMA)

  def put_rows(self, panel: Any, width: int, value: jax.Array) -> None:
    """Writes what `rows` reads."""
    if not self.interpret:
      self._flat(panel, width)[...] = value
      return
    m, n, _ = panel.shape
    for i in range(m):
      panel[i, :, pl.ds(0, width)] = lax.slice_in_dim(value, i * n, (i + 1) * n)

  @staticmethod
  def _flat(panel: Any, width: int) -> Any:
    m, n, all_ = panel.shape
    return panel.reshape(m * n, all_).at[:, pl.ds(0, width)]

  def spare(self, *shape: int) -> Any:
    """Scratch for `through`, which no compiled kernel needs."""
    return plgpu.SMEM(shape, jnp.bfloat16) if self.interpret else None

  def multiply(
    self, into: Any, x: Any, y: Any, through: Any = None, *, flip: bool = False, turn: bool = False
  ) -> None:
    """into += x y, by the matrix unit: x in registers or shared memory, y in shared memory.

    `flip` and `turn` transpose x and y where they lie. The interpreter knows neither that nor
    operands in registers: one such goes `through` scratch of its final shape.
    """
    if not self.interpret:
      x = x.T if flip else x
      y = y.T if turn else y
    elif through is not None:
      through[...] = y[...].T if turn else x[...].T if flip else x[...]
      x, y = (x, through) if turn else (through, y)
    plgpu.wgmma(into, x, y)
