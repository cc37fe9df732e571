"""What a person can mend gets one clear line."""

import difflib
from collections.abc import Iterable


class ConfigurationError(ValueError):
  """A mistake in what was asked for: shown as one line, without a traceback."""


class TrainingError(RuntimeError):
  """A run that cannot go on: shown as one line, without a traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
  """`; did you mean 'x'? known: ...` for a message about an unknown name."""
  known = [str(k) for k in known]
  close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
  hint = f"; did you mean {close[0]!r}?" if close else ""
  return f"{hint} (known: {', '.join(known)})"
