"""Which implementation of an operation runs, given its name, the platform and the shapes.

An operation keeps a table `{name: Implementation}`, best first, in which one row takes every
problem on every platform, and is worthwhile. The rows after it run only when they are named:
kernels interpreted step by step, which is slow and shows on any machine whether they are right.
Nothing else in the repository asks for a platform.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Implementation(NamedTuple):
  """One backend of an operation.

  forward, backward: pure functions whose signatures the operation's `interface.py` fixes. They have
    no derivative of their own: the operation's `custom_vjp` is outside.
  platforms: those that it runs on.
  refusal: takes the operands of `forward`, returns why it cannot run them, or None where it can.
  worthwhile: takes them too; where it is false, the implementation runs only if it is named.
  partitioned: whether XLA cuts it between devices. Otherwise it would gather the operands, so that
    the implementation is chosen only where each device has its own part, see `partition.py`.
  """

  forward: Callable[..., Any]
  backward: Callable[..., Any]
  platforms: tuple[str, ...] = PLATFORMS
  refusal: Callable[..., str | None] = lambda *operands: None
  worthwhile: Callable[..., bool] = lambda *operands: True
  partitioned: bool = True


NAMES = ("forward", "backward", "refusal")


def kernel(module: str, *platforms: str, names: Sequence[str] = NAMES) -> Implementation:
  """The functions of an `Implementation` that a module of Pallas kernels has.

  The module is imported when they are called: what it needs of jax is experimental and takes a
  while, and no other platform should have to have it.
  """
  functions = {name: _later(module, name) for name in names}
  return Implementation(**functions, platforms=platforms, partitioned=False)


def interpreted(module: str) -> Implementation:
  """The same step by step on any platform, which is slow."""
  forward, backward = (_later(module, n, interpret=True) for n in ("forward", "backward"))
  return Implementation(forward, backward, refusal=_later(module, "refusal"))


def _later(module: str, name: str, **fixed: Any) -> Callable[..., Any]:
  def call(*operands: Any, **static: Any) -> Any:
    return getattr(importlib.import_module(module), name)(*operands, **static, **fixed)

  return call


def whole() -> bool:
  """Whether every device has its own operands here: there is one, or a `shard_map` around."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.device_count() == 1
  return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)


def check(table: Mapping[str, Implementation], name: str | None, *operands: Any) -> None:
  """Raises ValueError unless `name` is None or an implementation that can run the operands here."""
  if name is None:
    return
  platform = _platform()
  able = [n for n in table if _refusal(table[n], platform, operands) is None]
  why = "unknown" if name not in table else _refusal(table[name], platform, operands)
  if why is not None:
    raise ValueError(f"implementation={name!r}: {why}; available here: {', '.join(able)}")


def choose(
  table: Mapping[str, Implementation], name: str | None, *operands: Any, at_once: bool = False
) -> dict[str, str]:
  """An implementation for each platform: `name`, or else the first that is worth running.

  A kernel that XLA does not partition is chosen only for the platform that is current, and where
  devices have their own operands. With `at_once` all platforms get what that one has: backends that
  keep different things for the derivative cannot be in one program.
  """
  if name is not None:
    return dict.fromkeys(PLATFORMS, name)
  here, apart = _platform(), whole()

  def best(platform: str) -> str:
    rows = {n: r for n, r in table.items() if r.partitioned or (apart and platform == here)}
    return next(
      name
      for name, row in rows.items()
      if _refusal(row, platform, operands) is None and row.worthwhile(*operands)
    )

  return {platform: best(here if at_once else platform) for platform in PLATFORMS}


def forward(
  table: Mapping[str, Implementation], name: str | None, *operands: Any, at_once: bool = False,
  **static: Any,
) -> Any:  # fmt: skip
  """Calls `forward` of what `choose` names for the platform that the program is compiled for."""
  names = choose(table, name, *operands, at_once=at_once)
  return _call(names, {n: table[n].forward for n in names.values()}, operands, static)


def backward(
  table: Mapping[str, Implementation], name: str | None, given: tuple[Any, ...], *operands: Any,
  at_once: bool = False, **static: Any,
) -> Any:  # fmt: skip
  """As `forward`, for the derivative; `given` are the operands by which to choose."""
  names = choose(table, name, *given, at_once=at_once)
  return _call(names, {n: table[n].backward for n in names.values()}, operands, static)


def _call(
  names: Mapping[str, str],
  functions: Mapping[str, Callable[..., Any]],
  operands: tuple[Any, ...],
  static: Mapping[str, Any],
) -> Any:
  bound = {n: lambda *args, f=f: f(*args, **static) for n, f in functions.items()}
  if len(bound) == 1:
    (only,) = bound.values()
    return only(*operands)
  # Decided at lowering: a program may be compiled for a platform other than the default one.
  return lax.platform_dependent(*operands, **{p: bound[n] for p, n in names.items()})


def _refusal(row: Implementation, platform: str, operands: tuple[Any, ...]) -> str | None:
  if platform not in row.platforms:
    return f"runs on {', '.join(row.platforms)}, not on {platform}"
  return row.refusal(*operands)


def _platform() -> str:
  """That of the current mesh, whose devices may be described and not there, or the default one."""
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  name = jax.default_backend() if device is None else device.platform
  return "cuda" if name == "gpu" else name
