"""Configurations: dotted overrides, checked before anything is built."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from launch.errors import ConfigurationError, nearest


def override(config: ml_collections.ConfigDict, values: Mapping[str, Any], where: str) -> None:
  """Sets dotted keys in place.

  Raises:
    ConfigurationError: a key that does not exist, or a value of another type than its default.
  """
  for key, value in values.items():
    known = flat(config)
    check_key(key, known, where)
    old = known[key]
    if not _accepts(old, value):
      raise ConfigurationError(
        f"{where}: config.{key} = {value!r} is a {type(value).__name__}; "
        f"a {type(old).__name__} such as {old!r} is accepted"
      )
    parent, _, leaf = key.rpartition(".")
    node = config[parent] if parent else config
    node[leaf] = float(value) if isinstance(old, float) else value


def check_key(key: str, known: Iterable[str], where: str) -> None:
  """Raises `ConfigurationError` with the nearest known key when there is no such key."""
  if key not in known:
    raise ConfigurationError(f"{where}: unknown key config.{key}{_near(key, known)}")


def _near(key: str, known: Iterable[str]) -> str:
  # A long configuration is not listed whole: its neighbours in the same group are.
  group = key.rpartition(".")[0]
  same = [k for k in known if k.rpartition(".")[0] == group]
  hint = nearest(key, known).partition(" (known")[0]
  return f"{hint} (known there: {', '.join(same)})" if same else hint


def _accepts(old: Any, value: Any) -> bool:
  if old is None or value is None:
    return True
  if isinstance(old, bool) or isinstance(value, bool):
    return isinstance(old, bool) and isinstance(value, bool)
  if isinstance(old, float):
    return isinstance(value, int | float)
  if isinstance(old, list | tuple):
    return isinstance(value, list | tuple)
  return isinstance(value, type(old))


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Dotted key -> value, for every leaf."""
  leaves: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      leaves |= {f"{key}.{k}": v for k, v in flat(value).items()}
    else:
      leaves[key] = value
  return leaves


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The configuration as JSON holds it (tuples become lists)."""
  return json.loads(json.dumps(config.to_dict()))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
  """`key: theirs, now ours` for every dotted key in which two plain configurations differ."""
  a, b = (flat(ml_collections.ConfigDict(c)) for c in (ours, theirs))
  keys = [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
  return [f"{k}: {b.get(k)!r} there, {a.get(k)!r} now" for k in keys]
