"""Every family against `transformers`, on random weights in its own checkpoint's layout."""

import json
import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest

from models import pretrained
from models.sequence import parameter_count
from models.transformer import ACTIVATIONS

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
library: Any = pytest.importorskip("transformers")
library.logging.set_verbosity_error()
library.logging.disable_progress_bar()

EOS = 49
SIZES = {
  "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
TEXT = {"vocab_size": 50, "max_position_embeddings": 16}
IMAGE = {"image_size": 16, "patch_size": 4}
T5 = {
  "vocab_size": 50, "d_model": 32, "d_kv": 4, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2,
  "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6,
}  # fmt: skip

rng = np.random.default_rng(0)
TOKENS = rng.integers(2, EOS, (2, 12))
TOKENS[0, 7], TOKENS[1, 11] = EOS, EOS
TARGETS = rng.integers(2, EOS, (2, 10))
LENGTHS = np.array([7, 12])
PADDING = (np.arange(12) < LENGTHS[:, None]).astype(int)
PIXELS = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
CHANNELS_FIRST = PIXELS.transpose(0, 3, 1, 2)


class Case(NamedTuple):
  """A model of the library's and a family of ours; `call` and `ours` give comparable outputs."""

  model: str
  config: Any
  family: Any
  inputs: tuple
  call: Any
  ours: Any = lambda model, *inputs: model(*inputs)
  options: dict = {}  # noqa: RUF012
  changes: dict = {}  # noqa: RUF012


def causal(name, config, family):
  return Case(name, config, family, (TOKENS,), lambda model: model(torch.tensor(TOKENS)).logits)


def bert(name, field, **options):
  def call(model):
    outputs = model(torch.tensor(TOKENS), torch.tensor(PADDING), torch.tensor(TOKENS % 2))
    return outputs[field] * torch.tensor(PADDING)[..., None]

  def ours(model, tokens):
    return model(tokens, lengths=LENGTHS, types=tokens % 2) * PADDING[..., None]

  config = library.BertConfig(**SIZES, **TEXT, layer_norm_eps=1e-3)
  return Case(name, config, pretrained.bert, (TOKENS,), call, ours, options)


def vit(name, field, **options):
  config = library.ViTConfig(**SIZES, **IMAGE, id2label={i: str(i) for i in range(5)})
  call = lambda model: model(torch.tensor(CHANNELS_FIRST))[field]  # noqa: E731
  return Case(name, config, pretrained.vit, (PIXELS,), call, options=options)


def clip(eos, activation):
  def call(model):
    return model(torch.tensor(TOKENS), torch.tensor(CHANNELS_FIRST)).logits_per_image

  def ours(model, pixels, tokens):
    images, texts, scale = model(pixels, tokens)
    return scale * images @ texts.T

  config = library.CLIPConfig(
    text_config=SIZES | TEXT | {"eos_token_id": eos, "hidden_act": activation},
    vision_config=SIZES | IMAGE | {"hidden_act": activation},
    projection_dim=24,
  )
  return Case("CLIPModel", config, pretrained.clip, (PIXELS, TOKENS), call, ours)


def t5(changes=None, **fields):
  def call(model):
    outputs = model(
      torch.tensor(TOKENS), torch.tensor(PADDING), decoder_input_ids=torch.tensor(TARGETS)
    )
    return outputs.logits

  def ours(model, tokens, targets):
    return model(tokens, targets, lengths=LENGTHS)

  name, config = "T5ForConditionalGeneration", library.T5Config(**T5, **fields)
  return Case(name, config, pretrained.t5, (TOKENS, TARGETS), call, ours, changes=changes or {})


V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # the library ties them
GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4}
CASES = {
  "gpt2": causal("GPT2LMHeadModel", library.GPT2Config(**GPT2), pretrained.gpt2),
  "gpt2 inner": causal(
    "GPT2LMHeadModel",
    library.GPT2Config(**GPT2, n_inner=24, activation_function="gelu", layer_norm_epsilon=1e-3),
    pretrained.gpt2,
  ),
  "llama tied": causal(
    "LlamaForCausalLM",
    library.LlamaConfig(
      **SIZES, vocab_size=50, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=100.0
    ),
    pretrained.llama,
  ),
  "llama untied": causal(
    "LlamaForCausalLM",
    library.LlamaConfig(**SIZES, vocab_size=50, head_dim=6, rms_norm_eps=1e-3),
    pretrained.llama,
  ),
  "bert": bert("BertModel", "last_hidden_state"),
  "bert mlm": bert("BertForMaskedLM", "logits", head=True),
  "vit": vit("ViTForImageClassification", "logits", classes=5),
  "vit features": vit("ViTModel", "last_hidden_state"),
  "clip": clip(EOS, "quick_gelu"),
  "clip, eos of old": clip(2, "gelu"),
  "t5": t5(),
  "t5 v1.1": t5({"tie_word_embeddings": False}, **V1_1),
  "t5 v1.1 tied": t5(**V1_1),
}


def reference(case):
  """The library's model away from its initial values, where norms are one and biases zero."""
  torch.manual_seed(0)
  model = getattr(library, case.model)(case.config).eval()
  if not case.changes.get("tie_word_embeddings", True):
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return model


def apply(case, model, variables):
  return nn.apply(case.ours, model)(variables, *case.inputs)


def need_quick_gelu():
  if "quick_gelu" not in ACTIVATIONS:
    pytest.skip("our Transformer has no quick_gelu")


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_librarys(name, tmp_path):
  case = CASES[name]
  if "quick_gelu" in str(case.config):
    need_quick_gelu()
  model = reference(case)
  model.save_pretrained(tmp_path)
  with torch.no_grad():
    want = case.call(model).numpy()
  config = json.loads((tmp_path / "config.json").read_text()) | case.changes
  ours, names = case.family(config, **case.options)
  abstract = jax.eval_shape(ours.init, jax.random.key(0), *case.inputs)
  path = tmp_path / "model.safetensors"
  variables = pretrained.load(path, names, nn.meta.unbox(abstract))
  found = jax.jit(lambda variables: apply(case, ours, variables))(variables)
  assert want.std() > 0.1
  np.testing.assert_allclose(found, want, atol=1e-4, rtol=1e-5)

  pretrained.save(variables, names, tmp_path / "ours.safetensors")
  theirs, again = pretrained.read(path), pretrained.read(tmp_path / "ours.safetensors")
  base = "" if again.keys() & theirs.keys() else f"{model.base_model_prefix}."
  theirs = {base + key: tensor for key, tensor in theirs.items() if "pooler" not in key}
  assert again.keys() == theirs.keys()
  for key, tensor in again.items():
    np.testing.assert_array_equal(tensor, theirs[key])
  if hasattr(ours, "scan"):
    stacked = jax.eval_shape(ours.clone(scan=True).init, jax.random.key(0), *case.inputs)
    stacked = pretrained.load(path, names, nn.meta.unbox(stacked))
    found = jax.jit(lambda variables: apply(case, ours.clone(scan=True), variables))(stacked)
    np.testing.assert_allclose(found, want, atol=1e-4, rtol=1e-5)


def test_clip_without_a_field_is_as_the_library_has_it():
  need_quick_gelu()
  with torch.device("meta"):
    wanted = library.CLIPModel(library.CLIPConfig())
  towers = {"text_config": {}, "vision_config": {}}
  model, _ = pretrained.clip({"model_type": "clip", "projection_dim": 512} | towers)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
  tokens = jax.ShapeDtypeStruct((1, 77), np.int32)
  found = jax.eval_shape(model.init, jax.random.key(0), images, tokens)
  assert parameter_count(found) == sum(x.numel() for x in wanted.parameters())


def test_dino_has_one_matrix_for_queries_keys_and_values(tmp_path):
  """DINO's and timm's names, made from the library's ViT, whose network is the same."""
  case = CASES["vit"]
  model = reference(case)
  model.save_pretrained(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  ours, names = pretrained.vit(config, classes=5)
  tensors = pretrained.read(tmp_path / "model.safetensors")
  renamed = {}
  kinds = {
    "vit.embeddings.cls_token": "cls_token", "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.encoder.layer": "blocks",
    "layernorm_before": "norm1", "layernorm_after": "norm2", "intermediate.dense": "mlp.fc1",
    "attention.output.dense": "attn.proj", "output.dense": "mlp.fc2", "vit.layernorm": "norm",
    "classifier": "head",
  }  # fmt: skip
  for name, tensor in tensors.items():
    theirs = name
    for kind in kinds.items():
      theirs = theirs.replace(*kind)
    renamed[theirs] = tensor
  for layer in range(3):
    for kind in ("weight", "bias"):
      parts = [
        renamed.pop(f"blocks.{layer}.attention.attention.{part}.{kind}")
        for part in ("query", "key", "value")
      ]
      renamed[f"blocks.{layer}.attn.qkv.{kind}"] = np.concatenate(parts)
  abstract = nn.meta.unbox(jax.eval_shape(ours.init, jax.random.key(0), PIXELS))
  _, timm = pretrained.vit(config, classes=5, layout="timm")
  variables = pretrained.load(renamed, timm, abstract)
  jax.tree.map(np.testing.assert_array_equal, variables, pretrained.load(tensors, names, abstract))
  pretrained.save(variables, timm, tmp_path / "timm.safetensors")
  again = pretrained.read(tmp_path / "timm.safetensors")
  assert again.keys() == renamed.keys()
  for name, tensor in again.items():
    np.testing.assert_array_equal(tensor, renamed[name])
  features, headless = pretrained.vit(config, layout="timm")
  abstract = jax.eval_shape(features.init, jax.random.key(0), PIXELS)
  student = {f"module.backbone.{name}": tensor for name, tensor in renamed.items()}
  pretrained.load(student, headless, abstract)


def efficientnet(tensors, x):
  """EfficientNet-lite0 in the words of PyTorch, from the names of its port."""
  weights = {name: torch.tensor(np.array(tensor)) for name, tensor in tensors.items()}
  functions = torch.nn.functional

  def convolution(x, name, stride=1):
    weight = weights[f"{name}.weight"]
    sides = []
    for size in x.shape[:1:-1]:  # of the last axis first; TensorFlow's SAME, the odd pixel behind
      total = max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0)
      sides += [total // 2, total - total // 2]
    groups = x.shape[1] // weight.shape[1]
    return functions.conv2d(functions.pad(x, sides), weight, stride=stride, groups=groups)

  def norm(x, name):
    fields = (weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return functions.batch_norm(x, *fields, eps=1e-3)

  x = functions.relu6(norm(convolution(x, "_conv_stem", 2), "_bn0"))
  for block in range(16):
    name, before = f"_blocks.{block}", x
    if block:
      x = functions.relu6(norm(convolution(x, f"{name}._expand_conv"), f"{name}._bn0"))
    stride = 2 if block in (1, 3, 5, 11) else 1
    x = functions.relu6(norm(convolution(x, f"{name}._depthwise_conv", stride), f"{name}._bn1"))
    x = norm(convolution(x, f"{name}._project_conv"), f"{name}._bn2")
    x = x + before if x.shape == before.shape else x
  x = functions.relu6(norm(convolution(x, "_conv_head"), "_bn1")).mean((2, 3))
  return x @ weights["_fc.weight"].T + weights["_fc.bias"]


def test_efficientnet_lite_is_its_definition_in_torch(tmp_path):
  rng = np.random.default_rng(0)
  model, names = pretrained.efficientnet_lite(classes=7)
  images = rng.normal(size=(2, 36, 33, 3)).astype(np.float32)
  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))

  def draw(path, leaf):
    x = rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
    return (np.abs(x) + 0.5 if path[-1].key in ("var", "scale") else x).astype(np.float32)

  variables = jax.tree_util.tree_map_with_path(draw, shapes)
  pretrained.save(variables, names, tmp_path / "a.safetensors")
  tensors = pretrained.read(tmp_path / "a.safetensors")
  counts = {"_blocks.0._bn1.num_batches_tracked": np.int64(3)}
  loaded = pretrained.load(tensors | counts, names, shapes)
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)
  want = efficientnet(tensors, torch.tensor(images.transpose(0, 3, 1, 2)))
  assert want.std() > 0.1
  np.testing.assert_allclose(jax.jit(model.apply)(loaded, images), want, atol=1e-4, rtol=1e-5)
