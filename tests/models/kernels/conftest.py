"""What the kernel tests share."""

import re

import jax
import pytest
from jax.experimental import topologies

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
  """Of XLA on a GPU, which otherwise rounds the factors of float32 products."""
  with jax.default_matmul_precision("highest" if jax.default_backend() == "gpu" else None):
    yield


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
