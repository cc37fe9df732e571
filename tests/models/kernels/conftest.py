"""What the kernel tests share."""

import re

import jax
import pytest


@pytest.fixture
def whole_passes_in_loops():
  """A function of (function, operands, shape): copies of whole arrays inside compiled loops.

  One such copy makes a loop over time quadratic in the length of the sequence.
  """

  def find(function, operands, *shapes):
    text = jax.jit(function).lower(*operands).compile().as_text()
    computations = {}
    for block in text.split("\n\n"):
      name = re.match(r"\s*(?:ENTRY )?%?([\w.-]+) ", block)
      computations[name and name[1]] = block
    bodies = [computations[name] for name in re.findall(r"body=%?([\w.-]+)", text)]
    assert bodies, "no loop in the program"
    called = [computations[name] for b in bodies for name in re.findall(r"calls=%?([\w.-]+)", b)]
    sizes = "|".join(",".join(map(str, shape)) for shape in shapes)
    whole = rf"= \w+\[(?:{sizes})\]\S* (?:copy|convert)\("
    return [
      line for part in bodies + called for line in part.splitlines() if re.search(whole, line)
    ]

  return find
