"""Checkpoint files, maps of names, what does not fit, and how much is held on the way."""

import collections
import functools
import json
import os
import pickle
import re
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import mesh as meshes
from models import pretrained
from models.pretrained import formats
from models.transformer import stack_layers

GPT2 = {
  "model_type": "gpt2", "vocab_size": 24, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": None,
  "n_positions": 8, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip
LLAMA = {
  "model_type": "llama", "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "hidden_act": "silu",
  "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True,
}  # fmt: skip
BERT = {
  "model_type": "bert", "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2,
  "num_attention_heads": 2, "intermediate_size": 32, "hidden_act": "gelu", "type_vocab_size": 2,
  "max_position_embeddings": 8, "layer_norm_eps": 1e-12,
}  # fmt: skip
TOKENS = np.arange(8)[None]


def abstract(model):
  return jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def draw(model, seed=0):
  """Unboxed variables of standard normals."""
  rng = np.random.default_rng(seed)
  shapes = nn.meta.unbox(abstract(model))
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def gpt2(tmp_path):
  """(model, names, variables, their file)."""
  model, names = pretrained.gpt2(GPT2)
  variables = draw(model)
  pretrained.save(variables, names, tmp_path / "model.safetensors")
  return model, names, variables, tmp_path / "model.safetensors"


# Files


def specs(tensors):
  return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}


def test_safetensors_are_the_librarys(tmp_path):
  library = pytest.importorskip("safetensors.numpy")
  rng = np.random.default_rng(0)
  kinds = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
  tensors = {kind: rng.integers(0, 2, (3, 5)).astype(kind) for kind in kinds}
  tensors |= {"scalar": np.float32(3), "none": np.zeros((0, 4), np.float32)}
  library.save_file({k: np.asarray(x) for k, x in tensors.items()}, tmp_path / "a.safetensors")
  formats.write(tmp_path / "b.safetensors", specs(tensors), tensors.values(), {"by": "us"})
  for read in (pretrained.read, library.load_file):
    for file in ("a", "b"):
      found = read(tmp_path / f"{file}.safetensors")
      assert found.keys() == tensors.keys()
      for name, x in tensors.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_small_floats(tmp_path, kind):
  x = np.linspace(-2, 2, 12).astype(kind).reshape(3, 4)
  formats.write(tmp_path / "a.safetensors", specs({"x": x}), [x])
  found = pretrained.read(tmp_path / "a.safetensors")["x"]
  assert found.dtype == kind
  np.testing.assert_array_equal(found.astype(np.float32), x.astype(np.float32))


def test_a_file_is_not_read_whole(tmp_path):
  path, rows = tmp_path / "huge.safetensors", 1 << 26
  entry = {"dtype": "F32", "shape": [rows, 256], "data_offsets": [0, rows * 1024]}
  header = json.dumps({"x": entry}).encode()
  with path.open("wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    file.truncate(8 + len(header) + rows * 1024)  # 64 GiB, of which the disk holds a page
    file.seek(-4, os.SEEK_END)
    file.write(np.float32(7).tobytes())
  x = pretrained.read(path)["x"]
  assert x.T[-1, -1] == 7
  assert x.T[5, 12345] == 0


def test_a_checkpoint_in_several_files(gpt2, tmp_path):
  model, names, variables, path = gpt2
  tensors = pretrained.read(path)
  where = {}
  for i, name in enumerate(tensors):
    where[name] = f"model-{i % 3}.safetensors"
  for file in set(where.values()):
    part = {name: tensors[name] for name in tensors if where[name] == file}
    formats.write(tmp_path / file, specs(part), part.values())
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": where}))
  equal(nn.meta.unbox(pretrained.load(index, names, abstract(model))), variables)


class Evil:
  def __reduce__(self):
    return os.system, ("false",)


@pytest.mark.parametrize("legacy", [False, True])
def test_state_dicts_without_torch(tmp_path, legacy):
  torch = pytest.importorskip("torch")
  x = torch.arange(24.0).reshape(4, 6)
  state = collections.OrderedDict(
    x=x, turned=x.T, part=x[1:3, ::2], half=x.to(torch.bfloat16), count=torch.tensor(5),
    weight=torch.nn.Parameter(x + 1),
  )  # fmt: skip
  path = tmp_path / "model.pth"
  torch.save(state, path, _use_new_zipfile_serialization=not legacy)
  found = pretrained.read(path)
  assert found.keys() == state.keys()
  for name, value in state.items():
    assert found[name].shape == tuple(value.shape)
    np.testing.assert_array_equal(
      found[name].astype(np.float32), value.detach().to(torch.float32).numpy()
    )
  torch.save({"model": state}, path, _use_new_zipfile_serialization=not legacy)
  with pytest.raises(ValueError, match=r"holds \['model'\], not tensors by name"):
    pretrained.read(path)
  torch.save({"x": x, "evil": Evil()}, path, _use_new_zipfile_serialization=not legacy)
  with pytest.raises(ValueError, match=r"(posix|nt).system is not part of a state dict"):
    pretrained.read(path)


def test_files_that_are_not_what_they_are_called(gpt2, tmp_path):
  path = gpt2[3]
  whole = path.read_bytes()
  for size in (4, 60, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"model.safetensors is cut off or no .safetensors file"):
      pretrained.read(path)
  (tmp_path / "a.pth").write_bytes(pickle.dumps(Evil()))
  with pytest.raises(ValueError, match="system is not part"):
    pretrained.read(tmp_path / "a.pth")
  (tmp_path / "b.pth").write_bytes(b"".join(pickle.dumps(0) for _ in range(5)))
  with pytest.raises(ValueError, match="magic=0"):
    pretrained.read(tmp_path / "b.pth")
  with pytest.raises(ValueError, match=r"accepted: a name ending in .safetensors, .gguf"):
    pretrained.read(tmp_path / "model.h5")
  with pytest.raises(ValueError, match=r"accepted: a name ending in .safetensors or .gguf"):
    pretrained.save({}, gpt2[1], tmp_path / "model.pth")
  with pytest.raises(FileNotFoundError):
    pretrained.read(tmp_path / "absent.safetensors")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  def values():
    yield np.zeros(3, np.float32)
    raise RuntimeError("interrupted")

  two = {name: jax.ShapeDtypeStruct((3,), np.float32) for name in "ab"}
  with pytest.raises(RuntimeError, match="interrupted"):
    formats.write(tmp_path / "model.safetensors", two, values())
  assert not list(tmp_path.iterdir())


# Maps


def test_there_and_back(gpt2, tmp_path):
  model, names, variables, path = gpt2
  boxed = pretrained.load(path, names, abstract(model))
  assert jax.tree.structure(boxed) == jax.tree.structure(abstract(model))
  equal(nn.meta.unbox(boxed), variables)
  equal(pretrained.load(path, names, variables["params"]), variables["params"])
  pretrained.save(boxed["params"], names, tmp_path / "again.safetensors")
  assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_scanned_layers_are_stacked(gpt2, tmp_path):
  model, names, variables, path = gpt2
  stacked = pretrained.load(path, names, nn.meta.unbox(abstract(model.clone(scan=True))))
  equal(stacked, {"params": stack_layers(variables["params"])})
  pretrained.save(stacked, names, tmp_path / "again.safetensors")
  assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_numbers_are_cast(gpt2):
  _, names, variables, path = gpt2
  tensors = {k: x.astype(jnp.bfloat16) for k, x in pretrained.read(path).items()}
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
  equal(pretrained.load(tensors, names, rounded), rounded)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
  equal(pretrained.load(tensors, names, variables), wide)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("sizes", ["data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2"])
def test_shards(gpt2, sizes, scan):
  model, names, _, path = gpt2
  model = model.clone(scan=scan)
  mesh, boxed = meshes.make(meshes.parse(sizes)), abstract(model)
  shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, meshes.RULES)
  plain = nn.meta.unbox(boxed)
  found = pretrained.load(path, names, plain, shardings)
  equal(found, pretrained.load(path, names, plain))
  jax.tree.map(lambda x, sharding: x.sharding == sharding or pytest.fail(), found, shardings)
  up = found["params"]["layer" if scan else "layer_1"]["mlp"]["up"]["kernel"]
  assert up.addressable_shards[0].data.size < up.size
  one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  assert jax.tree.leaves(pretrained.load(path, names, plain, one))[0].devices() == one.device_set


def traced(function):
  """The most that numpy held at once."""
  tracemalloc.start()
  try:
    function()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_held_beside_the_model_is_a_parameter(tmp_path, scan):
  config = GPT2 | {"n_embd": 128, "n_layer": 12}
  model, names = pretrained.gpt2(config)
  variables = draw(model.clone(scan=scan))
  path, shapes = tmp_path / "model.safetensors", abstract(model.clone(scan=scan))
  total = sum(x.nbytes for x in jax.tree.leaves(variables))
  largest = max(x.nbytes for x in jax.tree.leaves(variables))
  pretrained.save(variables, names, path)  # imports and compiles
  assert traced(lambda: pretrained.save(variables, names, path)) < total / 4
  # The CPU backend may take a numpy array as it is, so that one copy is the model itself.
  pretrained.load(path, names, shapes)
  assert traced(lambda: pretrained.load(path, names, shapes)) < total + largest + 1e6


def test_older_layouts(tmp_path):
  model, names = pretrained.gpt2(GPT2)
  variables = draw(model)
  pretrained.save(variables, names, tmp_path / "a.safetensors")
  new = pretrained.read(tmp_path / "a.safetensors")
  old = {name.removeprefix("transformer."): x for name, x in new.items()}
  old |= {"h.0.attn.bias": np.tri(8)[None, None], "lm_head.weight": old["wte.weight"]}
  equal(pretrained.load(old, names, variables), variables)

  model, names = pretrained.bert(BERT, head=True)
  variables = draw(model)
  pretrained.save(variables, names, tmp_path / "b.safetensors")
  new = pretrained.read(tmp_path / "b.safetensors")
  kinds = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}.items()
  old = {functools.reduce(lambda n, kind: n.replace(*kind), kinds, k): x for k, x in new.items()}
  old |= {"bert.pooler.dense.bias": np.zeros(16), "cls.seq_relationship.bias": np.zeros(2)}
  old |= {"cls.predictions.decoder.weight": np.zeros((24, 16))}
  equal(pretrained.load(old, names, variables), variables)

  model, names = pretrained.bert(BERT)
  bare = {k.removeprefix("bert."): x for k, x in new.items() if k.startswith("bert.")}
  headless = {"params": {k: x for k, x in variables["params"].items() if "mlm" not in k}}
  equal(pretrained.load(bare | {"embeddings.position_ids": np.zeros(8)}, names, headless), headless)
  equal(pretrained.load(new, names, headless), headless)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"transformer.wte.weight": None}, "1 missing: transformer.wte.weight"),
    ({f"transformer.h.{i}.ln_1.bias": None for i in range(3)}, "3 missing: .*, .*, .*"),
    ({"transformer.h.3.ln_1.bias": (16,)}, "1 extra: transformer.h.3.ln_1.bias"),
    ({f"a{i}": () for i in range(6)}, "6 extra: a0, a1, a2, a3, .."),
    (
      {"transformer.h.1.attn.c_attn.weight": (48, 16)},
      r"1 mis-shaped: transformer.h.1.attn.c_attn.weight \(48, 16\), wanted \(16, 48\)",
    ),
    ({"x": (), "transformer.wpe.weight": None}, "1 missing: transformer.wpe.weight; 1 extra: x"),
  ],
)  # fmt: skip
@pytest.mark.parametrize("scan", [False, True])
def test_what_does_not_fit(gpt2, change, message, scan):
  model, names, _, path = gpt2
  tensors = pretrained.read(path)
  for name, shape in change.items():
    tensors.pop(name, None)
    if shape is not None:
      tensors[name] = np.zeros(shape, np.float32)
  with pytest.raises(ValueError, match=f"checkpoint does not fit the model; {message}$"):
    pretrained.load(tensors, names, abstract(model.clone(scan=scan)))


def test_what_the_map_has_no_row_for(gpt2, tmp_path):
  model, names, variables, path = gpt2
  more = {"params": variables["params"] | {"adapter": jnp.zeros(3)}}
  message = "does not fit the model; 1 without a row in the map: adapter"
  with pytest.raises(ValueError, match=f"{re.escape(str(path))} {message}"):
    pretrained.load(path, names, more)
  with pytest.raises(ValueError, match=f"tree {message}"):
    pretrained.save(more, names, tmp_path / "b.safetensors")
  deeper = abstract(model.clone(layers=4))
  with pytest.raises(ValueError, match=r"12 missing: transformer.h.3.attn.c_attn.weight, .*, ..$"):
    pretrained.load(path, names, deeper)
  shallower = abstract(model.clone(layers=2))
  with pytest.raises(ValueError, match=r"12 extra: transformer.h.2"):
    pretrained.load(path, names, shallower)
  with pytest.raises(ValueError, match=r"embedding: \(24, 16\) does not fit the map's 'v \(n 3\)"):
    row = pretrained.Row("embedding", "x", "v (n 3) -> v n", {})
    pretrained.load({}, pretrained.Names((row,)), abstract(model))


# GGUF


def test_gguf_has_neighbours_for_rotary_pairs(tmp_path):
  """Against the permutation that llama.cpp's converter does, on tensors in two kinds of blocks."""
  gguf = pytest.importorskip("gguf")
  model, names = pretrained.llama(LLAMA)
  variables = draw(model)
  pretrained.save(variables, names, tmp_path / "a.safetensors")
  tensors = pretrained.read(tmp_path / "a.safetensors")
  path = tmp_path / "a.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(2)
  writer.add_embedding_length(64)
  writer.add_feed_forward_length(96)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(1e5)
  writer.add_rope_dimension_count(16)
  writer.add_vocab_size(32)
  writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
  kinds = (
    ("embed_tokens", "token_embd"), ("layers.", "blk."), ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("self_attn.o_proj", "attn_output"),
    ("self_attn.", "attn_"), ("mlp.", "ffn_"), ("_proj", ""), ("model.norm", "output_norm"),
    ("model.", ""),
  )  # fmt: skip
  for name, x in tensors.items():
    heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
    turned = x.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(-1, 64) if heads else x
    quantise = {"embed": "Q8_0", "gate": "Q4_1"}.get(re.sub(r".*(embed|gate).*", r"\1", name))
    kind = gguf.GGMLQuantizationType[quantise or "F32"]
    data = gguf.quantize(np.array(turned), kind)
    theirs = functools.reduce(lambda n, pair: n.replace(*pair), kinds, name)
    writer.add_tensor(theirs, data, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()

  tensors, metadata = pretrained.gguf(path)
  found_model, names = pretrained.llama_gguf(metadata, tied=True)
  assert found_model.clone(epsilon=model.epsilon) == model.clone(head_dim=16)
  found = pretrained.load(path, names, variables)

  def compare(place, ours, exact):
    name = jax.tree_util.keystr(place)
    step = 1 / 100 if "embedding" in name else 1 / 8 if "gate" in name else 0
    np.testing.assert_allclose(ours, exact, atol=4 * step, rtol=0, err_msg=name)
    assert step == 0 or not np.array_equal(ours, exact)

  jax.tree_util.tree_map_with_path(compare, found, variables)
  with pytest.raises(ValueError, match="1 without a row in the map: unembedding"):
    untied = found_model.clone(head="untied")
    pretrained.load(path, names, abstract(untied))

  pretrained.save(found, names, tmp_path / "b.gguf", metadata)
  tensors, again = pretrained.gguf(tmp_path / "b.gguf")
  assert {k: v for k, v in again.items() if "GGUF" not in k} == {
    k: v for k, v in metadata.items() if "GGUF" not in k
  }
  equal(pretrained.load(tensors, names, variables), found)


# Configurations


@pytest.mark.parametrize(
  ("family", "config", "change", "message"),
  [
    (pretrained.gpt2, GPT2, {"scale_attn_weights": False}, "scale_attn_weights=False"),
    (pretrained.gpt2, GPT2, {"activation_function": "tanh"}, "accepted: .*'gelu_new'"),
    (pretrained.llama, LLAMA, {"model_type": "gemma"}, "model_type='gemma'; accepted: 'llama'"),
    (pretrained.llama, LLAMA, {"attention_bias": True}, "attention_bias=True; accepted: False"),
    (pretrained.llama, LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, "rope_type='llama3'"),
    (pretrained.llama, LLAMA, {"rope_scaling": {"type": "linear"}}, "type='linear'"),
    (pretrained.bert, BERT, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
  ],
)  # fmt: skip
def test_what_our_models_do_not_do(family, config, change, message):
  family(config)
  with pytest.raises(ValueError, match=message):
    family(config | change)


def test_where_the_rotary_base_stands():
  bare = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
  assert pretrained.llama(bare)[0].rotary_base == 1e4
  assert pretrained.llama(LLAMA | {"rope_scaling": None})[0].rotary_base == 1e5
  newer = bare | {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}}
  assert pretrained.llama(newer)[0].rotary_base == 3e5
