"""Checkpoint files as mappings from names to arrays: safetensors, GGUF, and PyTorch's without it.

Nothing is read before it is used: tensors are views of the mapped file, or, where a GGUF file has
them quantised, are dequantised when they are turned into arrays. So a file may be larger than
memory, and no file can run code.
"""

import collections
import dataclasses
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SAFETENSORS = {
  "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
  "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2, "I64": np.int64,
  "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32,
  "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
TORCH = {
  "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
  "BFloat16Storage": jnp.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
  "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}  # fmt: skip
TORCH_MAGIC = 0x1950A86A20F9469CFC6C


def read(path: str | os.PathLike) -> dict[str, Any]:
  """Tensors of a local file by name: each has a `shape`, and `numpy.asarray` reads it.

  Args:
    path: .safetensors; .gguf (needs the package gguf); .pth, .pt or .bin, a state dict; or the
      .index.json of a checkpoint in several files, which lie beside it.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is cut off, or not of the format that its name says.
  """
  path = Path(path)
  if path.suffix == ".json":
    files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    return dict(item for file in files for item in read(path.parent / file).items())
  readers = {".safetensors": _safetensors, ".gguf": lambda path: gguf(path)[0]}
  readers |= dict.fromkeys((".pth", ".pt", ".bin"), _torch)
  if path.suffix not in readers:
    raise ValueError(f"path={path}; accepted: a name ending in {', '.join(readers)} or .index.json")
  try:
    return readers[path.suffix](path)
  except (ValueError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as e:
    raise ValueError(f"{path} is cut off or no {path.suffix} file: {e}") from e


def write(
  path: str | os.PathLike,
  specs: Mapping[str, jax.ShapeDtypeStruct],
  values: Iterable[np.ndarray],
  metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes tensors one by one, so that they are never all in memory; whole or not at all.

  Args:
    path: .safetensors, or .gguf (needs the package gguf).
    specs: shapes and dtypes by name.
    values: the arrays in the same order.
    metadata: str to str for safetensors; for GGUF also bools, ints, floats and lists, and
      "general.architecture" at least.

  Raises: ValueError for another kind of file.
  """
  path = Path(path)
  writers = {".safetensors": _write_safetensors, ".gguf": _write_gguf}
  if path.suffix not in writers:
    raise ValueError(f"path={path}; accepted: a name ending in {' or '.join(writers)}")
  partial = path.with_name(f"{path.name}.{os.getpid()}")
  try:
    writers[path.suffix](partial, specs, values, metadata or {})
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


# https://github.com/huggingface/safetensors#format: the length of a JSON header (8 bytes, little
# endian), the header, the tensors. The library reads each tensor whole and writes all at once.


def _safetensors(path: Path) -> dict[str, np.ndarray]:
  data = np.memmap(path, np.uint8, "r")
  start = 8 + int.from_bytes(data[:8].tobytes(), "little")
  header = json.loads(data[8:start].tobytes())
  header.pop("__metadata__", None)
  return {
    name: np.ndarray(
      entry["shape"], SAFETENSORS[entry["dtype"]], data, start + entry["data_offsets"][0]
    )
    for name, entry in header.items()
  }


def _write_safetensors(
  path: Path,
  specs: Mapping[str, jax.ShapeDtypeStruct],
  values: Iterable[np.ndarray],
  metadata: Mapping[str, Any],
) -> None:
  kinds = {np.dtype(dtype): name for name, dtype in SAFETENSORS.items()}
  header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
  end = 0
  for name, spec in specs.items():
    start, end = end, end + spec.size * spec.dtype.itemsize
    header[name] = {
      "dtype": kinds[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end],
    }  # fmt: skip
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for value in values:
      file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


@dataclasses.dataclass(frozen=True)
class Quantised:
  """A tensor of a GGUF file in blocks of few bits; `numpy.asarray` makes it float32."""

  shape: tuple[int, ...]
  kind: Any
  data: np.ndarray

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    import gguf

    return gguf.dequantize(self.data, self.kind).astype(dtype or np.float32, copy=False)


def gguf(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
  """(tensors as of `read`, metadata by key) of a GGUF file."""
  import gguf

  reader = gguf.GGUFReader(path)
  tensors = {
    tensor.name: tensor.data
    if np.issubdtype(tensor.data.dtype, np.floating)
    else Quantised(tuple(tensor.shape[::-1].tolist()), tensor.tensor_type, tensor.data)
    for tensor in reader.tensors
  }
  return tensors, {name: field.contents() for name, field in reader.fields.items()}


def _write_gguf(
  path: Path,
  specs: Mapping[str, jax.ShapeDtypeStruct],
  values: Iterable[np.ndarray],
  metadata: Mapping[str, Any],
) -> None:
  import gguf

  writer = gguf.GGUFWriter(path, metadata["general.architecture"])
  add: dict[type, Any] = {
    bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
    str: writer.add_string, list: writer.add_array,
  }  # fmt: skip
  for name, value in metadata.items():
    if not name.startswith("GGUF.") and name != "general.architecture":
      add[type(value)](name, value)
  for name, spec in specs.items():
    size = spec.size * spec.dtype.itemsize
    writer.add_tensor_info(name, spec.shape, np.dtype(spec.dtype), size)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for value in values:
    writer.write_tensor_data(np.ascontiguousarray(value))
  writer.close()


class _Storage(collections.namedtuple("_Storage", "key dtype size")):
  """What a pickled tensor refers to: the name, dtype and length of a run of numbers."""


class _View(collections.namedtuple("_View", "storage offset shape strides")):
  """A pickled tensor: where it lies in a storage, in numbers."""


class _Unpickler(pickle.Unpickler):
  """Reads state dicts and refuses every name that is not part of one."""

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in TORCH:
      return TORCH[name]
    known = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("torch._utils", "_rebuild_tensor_v2"): lambda *fields: _View(*fields[:4]),
      ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    }
    if (module, name) not in known:
      raise pickle.UnpicklingError(f"{module}.{name} is not part of a state dict")
    return known[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    _, dtype, key, _, size, *_ = pid
    return _Storage(key, np.dtype(dtype), size)


def _torch(path: Path) -> dict[str, np.ndarray]:
  """A state dict, in a zip of today's or in the sequence of pickles of before version 1.6."""
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
      state = _Unpickler(io.BytesIO(archive.read(infos["data.pkl"]))).load()
    data = np.memmap(path, np.uint8, "r")

    def place(info: zipfile.ZipInfo) -> int:
      # A member follows its local header, which ends in a name and an extra field.
      name, extra = data[info.header_offset + 26 : info.header_offset + 30].view("<u2")
      return info.header_offset + 30 + int(name) + int(extra)

    offsets = {name[5:]: place(info) for name, info in infos.items() if name.startswith("data/")}
  else:
    with path.open("rb") as file:
      magic, _, _ = (_Unpickler(file).load() for _ in range(3))
      if magic != TORCH_MAGIC:
        raise ValueError(f"magic={magic}")
      state, keys = (_Unpickler(file).load() for _ in range(2))
      offset = file.tell()
    data = np.memmap(path, np.uint8, "r")
    sizes = {view.storage.key: view.storage for _, view in _views(state)}
    offsets = {}
    for key in keys:  # each is its length as int64 and its numbers
      offsets[key] = offset + 8
      length = int.from_bytes(data[offset : offset + 8].tobytes(), "little")
      offset += 8 + length * sizes[key].dtype.itemsize

  def view(view: _View) -> np.ndarray:
    (key, dtype, _), first, shape, strides = view
    offset, strides = offsets[key] + first * dtype.itemsize, [n * dtype.itemsize for n in strides]
    return np.ndarray(shape, dtype, data, offset, strides)  # refuses to leave the file

  return {name: view(tensor) for name, tensor in _views(state)}


def _views(state: Any) -> Iterator[tuple[str, _View]]:
  if not isinstance(state, Mapping) or not any(isinstance(x, _View) for x in state.values()):
    found = list(state)[:5] if isinstance(state, Mapping) else type(state).__name__
    raise ValueError(f"holds {found}, not tensors by name")
  return ((name, value) for name, value in state.items() if isinstance(value, _View))
