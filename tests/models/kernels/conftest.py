"""What the kernel tests share."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from models.kernels.long_conv import reference

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_memory_size: 80000000000 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
"""


@pytest.fixture(autouse=True)
def _exact_products():
  """On GPUs and TPUs, which otherwise round the factors of float32 products."""
  with jax.default_matmul_precision(None if jax.default_backend() == "cpu" else "highest"):
    yield


@pytest.fixture
def near():
  """Fails where the error of an array is, by its mean square, above a share of what is wanted."""

  def compare(got, want, tolerance, name=""):
    error = np.asarray(got, np.float64) - want
    assert got.shape == want.shape, name
    assert np.sqrt(np.mean(error**2)) <= tolerance * np.sqrt(np.mean(want**2)), name

  return compare


@pytest.fixture
def convolution(near):
  """Operands of `long_conv`'s backends, and a comparison of what one makes of them with the oracle.

  Args: (B, L, H); taps of both kernels, or None; gates: "", "pre" or "both"; dtype.
  """

  def draw(shape, taps, gates, dtype, post_dtype=None):
    rng = np.random.default_rng(0)

    def array(*shape, dtype=jnp.float32):
      return jnp.asarray(rng.normal(size=shape), dtype)

    u, dy = array(*shape, dtype=dtype), array(*shape, dtype=dtype)
    k, behind = (array(shape[2], n) if n else None for n in taps)
    pre = array(*shape, dtype=dtype) if gates else None
    post = array(*shape, dtype=post_dtype or dtype) if gates == "both" else None
    given = u, k, behind, pre, post
    exact = [None if x is None else np.asarray(x, np.float64) for x in given]
    exact.insert(2, np.zeros(shape[2]))

    def compare(y, gradients, tolerance):
      if y is not None:
        near(y, reference.long_conv(*exact), tolerance, "y")
      want = reference.gradients(*exact, np.asarray(dy, np.float64))
      names = "u", "k", "k_backward", "pre", "post"
      for name, x, operand in zip(names, gradients, given, strict=True):
        if operand is None:
          assert x is None
        else:
          assert x.dtype == operand.dtype
          near(x, want[name], tolerance, name)

    return given, dy, compare

  return draw


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


@pytest.fixture
def spills(monkeypatch, capfd):
  """Compiles function(*operands) for an H100: the bytes of registers each kernel has no room for.

  Where jax's CUDA plugin is installed; no GPU is needed.
  """
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

  def compile_for_it(function, *operands):
    try:
      topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    except NotImplementedError as missing:
      pytest.skip(str(missing))
    there = jax.sharding.SingleDeviceSharding(topology.devices[0])
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), operands)
    jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).compile()
    return [int(n) for n in re.findall(r"(\d+) bytes spill", "".join(capfd.readouterr()))]

  return compile_for_it
