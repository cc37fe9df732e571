"""The families: from a checkpoint's configuration to (our model, the map of its names).

Each takes the plain dict of config.json (or a GGUF file's metadata) and refuses a value that our
model has no field for, so that nothing is computed that the checkpoint does not mean. Other fields
are for `model.clone`: `model.clone(scan=True, dtype=jnp.bfloat16)`.
"""

import functools
from collections.abc import Mapping
from typing import Any

from models.efficientnet import EfficientNetLite, blocks
from models.pretrained.mapping import Names, Row
from models.t5 import T5
from models.transformer import GATED, Transformer
from models.vision import CLIP, ViT

Config = Mapping[str, Any]

ACTIVATIONS = {
  "gelu": "gelu_exact",
  "gelu_new": "gelu",
  "gelu_pytorch_tanh": "gelu",
  "quick_gelu": "quick_gelu",
  "relu": "relu",
}
LLAMA = functools.partial(
  Transformer, position="rotary", norm="rms", activation="swiglu", use_bias=False
)
# What a config.json leaves out of the towers' fields is this.
CLIP_TEXT = {
  "vocab_size": 49_408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
  "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5, "eos_token_id": 49_407,
}  # fmt: skip
CLIP_VISION = {
  "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "patch_size": 32,
  "num_attention_heads": 12, "image_size": 224, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip


def gpt2(config: Config) -> tuple[Transformer, Names]:
  """GPT-2's models of one stack, with logits."""
  _only(config, "model_type", "gpt2")
  _only(config, "scale_attn_weights", True)
  _only(config, "scale_attn_by_inverse_layer_idx", False)
  _only(config, "tie_word_embeddings", True)
  config = {"activation_function": "gelu_new"} | dict(config)
  model = Transformer(
    config["vocab_size"],
    config["n_embd"],
    config["n_layer"],
    config["n_head"],
    mlp=config.get("n_inner"),
    activation=_one_of(config, "activation_function", ACTIVATIONS),
    max_length=config["n_positions"],
    epsilon=config["layer_norm_epsilon"],
  )
  ours, theirs = "layer_{layer}", "transformer.h.{layer}"
  qkv = tuple(f"{ours}/attention/{name}" for name in ("query", "key", "value"))
  rows = (
    Row("embedding", "transformer.wte.weight"),
    Row("position_embedding", "transformer.wpe.weight"),
    *_linear(qkv, f"{theirs}.attn.c_attn", ""),
    *_layer(ours, theirs, "ln_1", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj", pattern=""),
    *_norm("final_norm", "transformer.ln_f"),
  )
  # The first files have no prefix, and the causal mask among the tensors.
  prefix = (r"^(?!transformer\.|lm_head\.)", "transformer.")
  ignore = (r"lm_head\.weight", r"transformer\.h\.\d+\.attn\.(masked_)?bias")
  return model, Names(rows, (prefix,), ignore)


def llama(config: Config) -> tuple[Transformer, Names]:
  """Llama and what is built like it: SmolLM2, with logits."""
  _only(config, "model_type", "llama")
  _only(config, "attention_bias", False)
  _only(config, "mlp_bias", False)
  _only(config, "hidden_act", "silu")
  _only(config, "rope_interleaved", False)
  rope: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
  _only(rope, "rope_type", "default")
  _only(rope, "type", "default")
  tied = config.get("tie_word_embeddings", False)
  model = LLAMA(
    config["vocab_size"],
    config["hidden_size"],
    config["num_hidden_layers"],
    config["num_attention_heads"],
    kv_heads=config.get("num_key_value_heads"),
    head_dim=config.get("head_dim"),
    mlp=config["intermediate_size"],
    rotary_base=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
    epsilon=config["rms_norm_eps"],
    head="tied" if tied else "untied",
  )
  rows = _llama_layer(
    "model.layers.{layer}",
    attention_norm="input_layernorm",
    attention="self_attn.{}_proj",
    out="o",
    mlp_norm="post_attention_layernorm",
    mlp="mlp.{}_proj",
  )
  rows += _llama_ends("model.embed_tokens", "model.norm", None if tied else "lm_head")
  ignore = (r".*\.rotary_emb\.inv_freq", *((r"lm_head\.weight",) if tied else ()))
  return model, Names(rows, ignore=ignore)


def llama_gguf(metadata: Config, *, tied: bool) -> tuple[Transformer, Names]:
  """As `llama`, from a GGUF file: it is tied if it has no tensor "output.weight".

  There the rotary pairs of queries and keys are neighbours, in ours (and in `llama`'s files) they
  are halves apart.
  """
  _only(metadata, "general.architecture", "llama")
  _only(metadata, "llama.rope.scaling.type", None, "none")
  config = {name.removeprefix("llama."): value for name, value in metadata.items()}
  features, heads = config["embedding_length"], config["attention.head_count"]
  head_dim = config.get("attention.key_length", features // heads)
  _only(config, "rope.dimension_count", None, head_dim)
  model = LLAMA(
    config.get("vocab_size") or len(config["tokenizer.ggml.tokens"]),
    features,
    config["block_count"],
    heads,
    kv_heads=config.get("attention.head_count_kv"),
    head_dim=head_dim,
    mlp=config["feed_forward_length"],
    rotary_base=config.get("rope.freq_base", 10_000.0),
    epsilon=config["attention.layer_norm_rms_epsilon"],
    head="tied" if tied else "untied",
  )
  rows = _llama_layer(
    "blk.{layer}",
    attention_norm="attn_norm",
    attention="attn_{}",
    out="output",
    mlp_norm="ffn_norm",
    mlp="ffn_{}",
    half=head_dim // 2,
  )
  rows += _llama_ends("token_embd", "output_norm", None if tied else "output")
  return model, Names(rows)


def _llama_layer(
  theirs: str,
  *,
  attention_norm: str,
  attention: str,
  out: str,
  mlp_norm: str,
  mlp: str,
  half: int | None = None,
) -> tuple[Row, ...]:
  """Rows of a layer without biases; {} stands for q, k, v and `out`, and for gate, up and down.

  `half` of a head's width is given where rotary pairs are neighbours.
  """
  ours = "layer_{layer}"
  rows = [
    Row(f"{ours}/attention_norm/scale", f"{theirs}.{attention_norm}.weight"),
    Row(f"{ours}/mlp_norm/scale", f"{theirs}.{mlp_norm}.weight"),
  ]
  for us, them in {"query": "q", "key": "k", "value": "v", "out": out}.items():
    row = _linear(f"{ours}/attention/{us}", f"{theirs}.{attention.format(them)}", bias=False)[0]
    if half is not None and us in ("query", "key"):
      pairs = "(n half two) i -> i (n two half)"
      row = row._replace(pattern=pairs, sizes={"half": half, "two": 2})
    rows.append(row)
  for name in ("gate", "up", "down"):
    rows += _linear(f"{ours}/mlp/{name}", f"{theirs}.{mlp.format(name)}", bias=False)
  return tuple(rows)


def _llama_ends(embedding: str, norm: str, head: str | None) -> tuple[Row, ...]:
  rows = (Row("embedding", f"{embedding}.weight"), Row("final_norm/scale", f"{norm}.weight"))
  return rows if head is None else (*rows, Row("unembedding", f"{head}.weight", "o i -> i o"))


def bert(config: Config, *, head: bool = False) -> tuple[Transformer, Names]:
  """BERT and MiniLM: features without the pooler, or with `head` logits of masked tokens."""
  _only(config, "model_type", "bert")
  _only(config, "position_embedding_type", "absolute")
  _only(config, "is_decoder", False)
  model = Transformer(
    config["vocab_size"],
    config["hidden_size"],
    config["num_hidden_layers"],
    config["num_attention_heads"],
    mlp=config["intermediate_size"],
    activation=_one_of(config, "hidden_act", ACTIVATIONS),
    mask="full",
    max_length=config["max_position_embeddings"],
    types=config["type_vocab_size"],
    prenorm=False,
    epsilon=config["layer_norm_eps"],
    embed_norm=True,
    head="mlm" if head else None,
  )
  ours, theirs, cls = "layer_{layer}", "bert.encoder.layer.{layer}", "cls.predictions"
  rows = (
    Row("embedding", "bert.embeddings.word_embeddings.weight"),
    Row("position_embedding", "bert.embeddings.position_embeddings.weight"),
    Row("type_embedding", "bert.embeddings.token_type_embeddings.weight"),
    *_norm("embedding_norm", "bert.embeddings.LayerNorm"),
    *(
      row
      for name in ("query", "key", "value")
      for row in _linear(f"{ours}/attention/{name}", f"{theirs}.attention.self.{name}")
    ),
    *_layer(
      ours,
      theirs,
      "attention.output.LayerNorm",
      "attention.output.dense",
      "output.LayerNorm",
      "intermediate.dense",
      "output.dense",
    ),
    *_linear("mlm_dense", f"{cls}.transform.dense"),
    *_norm("mlm_norm", f"{cls}.transform.LayerNorm"),
    Row("mlm_bias", f"{cls}.bias"),
  )
  aliases = (
    (r"^(?!bert\.|cls\.)", "bert."),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
  )
  spare = r"cls\.(seq_relationship|predictions\.decoder)\..*" if head else r"cls\..*"
  ignore = (r"bert\.embeddings\.position_ids", r"bert\.pooler\..*", spare)
  return model, Names(rows, aliases, ignore)


def vit(
  config: Config, *, classes: int | None = None, layout: str = "transformers"
) -> tuple[ViT, Names]:
  """ViT and DINO: features, or logits of `classes` where the checkpoint has a classifier.

  `layout` names the tensors: "transformers", or "timm" for that library's and DINO's own files,
  which have no config.json: give the fields by hand.
  """
  _only({"layout": layout}, "layout", "transformers", "timm")
  _only(config, "model_type", "vit")
  _only(config, "qkv_bias", True)
  side, patch = config["image_size"], config["patch_size"]
  encoder = Transformer(
    None,
    config["hidden_size"],
    config["num_hidden_layers"],
    config["num_attention_heads"],
    mlp=config["intermediate_size"],
    activation=_one_of(config, "hidden_act", ACTIVATIONS),
    mask="full",
    max_length=(side // patch) ** 2 + 1,
    project=False,
    epsilon=config["layer_norm_eps"],
  )
  ours, squeeze = "encoder/layer_{layer}", ("1 1 h -> h", "1 l h -> l h")
  qkv = tuple(f"{ours}/attention/{name}" for name in ("query", "key", "value"))
  if layout == "timm":
    theirs = "blocks.{layer}"
    rows = (
      Row("class_token", "cls_token", squeeze[0]),
      Row("encoder/position_embedding", "pos_embed", squeeze[1]),
      *_patches("embed", "patch_embed.proj", patch),
      *_linear(qkv, f"{theirs}.attn.qkv"),
      *_layer(ours, theirs, "norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"),
      *_norm("encoder/final_norm", "norm"),
      *_linear("head", "head"),
    )
    names = Names(rows, ((r"^(module\.)?backbone\.", ""),), () if classes else (r"head\..*",))
  else:
    theirs = "vit.encoder.layer.{layer}"
    rows = (
      Row("class_token", "vit.embeddings.cls_token", squeeze[0]),
      Row("encoder/position_embedding", "vit.embeddings.position_embeddings", squeeze[1]),
      *_patches("embed", "vit.embeddings.patch_embeddings.projection", patch),
      *(
        row
        for us in qkv
        for row in _linear(us, f"{theirs}.attention.attention.{us.rpartition('/')[2]}")
      ),
      *_layer(
        ours,
        theirs,
        "layernorm_before",
        "attention.output.dense",
        "layernorm_after",
        "intermediate.dense",
        "output.dense",
      ),
      *_norm("encoder/final_norm", "vit.layernorm"),
      *_linear("head", "classifier"),
    )
    spare = (r"vit\.pooler\..*", *(() if classes else (r"classifier\..*",)))
    names = Names(rows, ((r"^(?!vit\.|classifier\.)", "vit."),), spare)
  return ViT(encoder, patch, classes), names


def clip(config: Config) -> tuple[CLIP, Names]:
  """CLIP's towers and projections."""
  _only(config, "model_type", "clip")
  vision, text = CLIP_VISION | config["vision_config"], CLIP_TEXT | config["text_config"]

  def tower(config: Config, vocab: int | None, **fields: Any) -> Transformer:
    return Transformer(
      vocab,
      config["hidden_size"],
      config["num_hidden_layers"],
      config["num_attention_heads"],
      mlp=config["intermediate_size"],
      activation=_one_of(config, "hidden_act", ACTIVATIONS),
      epsilon=config["layer_norm_eps"],
      **fields,
    )

  patch, eos = vision["patch_size"], text["eos_token_id"]
  length = (vision["image_size"] // patch) ** 2 + 1
  sees = tower(vision, None, mask="full", max_length=length, project=False, embed_norm=True)
  reads = tower(text, text["vocab_size"], max_length=text["max_position_embeddings"], head=None)
  rows: list[Row] = []
  for us, them in (("vision/encoder", "vision_model"), ("text", "text_model")):
    ours, theirs = f"{us}/layer_{{layer}}", f"{them}.encoder.layers.{{layer}}"
    rows += _layer(
      ours, theirs, "layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"
    )
    for name in ("query", "key", "value"):
      rows += _linear(f"{ours}/attention/{name}", f"{theirs}.self_attn.{name[0]}_proj")
    rows.append(Row(f"{us}/position_embedding", f"{them}.embeddings.position_embedding.weight"))
  rows += [
    Row("vision/class_token", "vision_model.embeddings.class_embedding"),
    *_patches("vision/embed", "vision_model.embeddings.patch_embedding", patch, bias=False),
    *_norm("vision/encoder/embedding_norm", "vision_model.pre_layrnorm"),
    *_norm("vision/encoder/final_norm", "vision_model.post_layernorm"),
    Row("text/embedding", "text_model.embeddings.token_embedding.weight"),
    *_norm("text/final_norm", "text_model.final_layer_norm"),
    *_linear("image_projection", "visual_projection", bias=False),
    *_linear("text_projection", "text_projection", bias=False),
    Row("log_scale", "logit_scale"),
  ]
  # 2 stands for the last token in files written before that field meant anything.
  model = CLIP(
    ViT(sees, patch, patch_bias=False), reads, config["projection_dim"], None if eos == 2 else eos
  )
  return model, Names(tuple(rows), ignore=(r".*\.position_ids",))


def efficientnet_lite(
  *, width: float = 1.0, depth: float = 1.0, classes: int = 1000
) -> tuple[EfficientNetLite, Names]:
  """EfficientNet-lite in the layout of its PyTorch port; there is no config.json."""

  def convolution(ours: str, theirs: str) -> Row:
    return Row(f"{ours}/kernel", f"{theirs}.weight", "o i h w -> h w i o")

  def norm(ours: str, theirs: str) -> tuple[Row, ...]:
    running = ("mean", "var")
    return *_norm(ours, theirs), *(
      Row(f"batch_stats/{ours}/{name}", f"{theirs}.running_{name}") for name in running
    )

  rows = [
    convolution("stem", "_conv_stem"),
    *norm("stem_norm", "_bn0"),
    convolution("head", "_conv_head"),
    *norm("head_norm", "_bn1"),
    *_linear("classifier", "_fc"),
  ]
  for i in range(len(blocks(width, depth))):
    for j, name in enumerate(("expand", "depthwise", "project")):
      rows.append(convolution(f"block_{i}/{name}", f"_blocks.{i}._{name}_conv"))
      rows += norm(f"block_{i}/{name}_norm", f"_blocks.{i}._bn{j}")
  model = EfficientNetLite(classes, width, depth)
  return model, Names(tuple(rows), ignore=(r".*\.num_batches_tracked",))


def t5(config: Config) -> tuple[T5, Names]:
  """T5 and T5 v1.1 (and those trained from them: Flan-T5, UL2)."""
  _only(config, "model_type", "t5")
  kinds = {"relu": "relu", "gelu": "gelu_exact", "gated-gelu": "geglu", "gated-silu": "swiglu"}
  activation = _one_of(config, "feed_forward_proj", kinds)
  tied = config.get("tie_word_embeddings", True)
  model = T5(
    config["vocab_size"],
    config["d_model"],
    config["num_layers"],
    config["num_heads"],
    head_dim=config["d_kv"],
    decoder_layers=config.get("num_decoder_layers"),
    mlp=config["d_ff"],
    activation=activation,
    buckets=config["relative_attention_num_buckets"],
    max_distance=config.get("relative_attention_max_distance", 128),
    epsilon=config["layer_norm_epsilon"],
    tied=tied,
    scaled=config.get("scale_decoder_outputs", tied),  # newer files tell the two apart
  )
  rows = [Row("embedding", "shared.weight")]
  if not tied:
    rows.append(Row("unembedding", "lm_head.weight", "o i -> i o"))
  inner = {"gate": "wi_0", "up": "wi_1"} if activation in GATED else {"up": "wi"}
  for stack, last in (("encoder", 1), ("decoder", 2)):
    ours, theirs = f"{stack}/layer_{{layer}}", f"{stack}.block.{{layer}}.layer"
    relative = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rows += [
      Row(f"{stack}/relative", relative),
      Row(f"{stack}/final_norm/scale", f"{stack}.final_layer_norm.weight"),
      Row(f"{ours}_attention_norm/scale", f"{theirs}.0.layer_norm.weight"),
      Row(f"{ours}_cross_norm/scale", f"{theirs}.1.layer_norm.weight"),
      Row(f"{ours}_mlp_norm/scale", f"{theirs}.{last}.layer_norm.weight"),
    ]
    for name in ("query", "key", "value", "out"):
      for us, them in (("attention", "0.SelfAttention"), ("cross", "1.EncDecAttention")):
        rows += _linear(f"{ours}_{us}/{name}", f"{theirs}.{them}.{name[0]}", bias=False)
    for us, them in (inner | {"down": "wo"}).items():
      rows += _linear(f"{ours}_mlp/{us}", f"{theirs}.{last}.DenseReluDense.{them}", bias=False)
  ignore = [r"(en|de)coder\.embed_tokens\.weight", *([r"lm_head\.weight"] if tied else [])]
  # Of a memory no position is biased; the first files have a table for it, which nothing reads.
  ignore.append(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
  return model, Names(tuple(rows), ignore=tuple(ignore))


def _only(config: Config, name: str, *accepted: Any) -> None:
  """ValueError for a value that is there and not one of those."""
  if config.get(name, accepted[0]) not in accepted:
    raise ValueError(f"{name}={config[name]!r}; accepted: {', '.join(map(repr, accepted))}")


def _one_of(config: Config, name: str, accepted: Mapping[str, str]) -> str:
  """Ours for the configuration's value, which by default is the first."""
  _only(config, name, *accepted)
  return accepted[config.get(name, next(iter(accepted)))]


def _linear(
  ours: str | tuple[str, ...], theirs: str, pattern: str = "o i -> i o", bias: bool = True
) -> tuple[Row, ...]:
  """Rows of a linear layer, or of several that are one in the checkpoint."""
  names = (ours,) if isinstance(ours, str) else ours
  kernel = Row(tuple(f"{name}/kernel" for name in names), f"{theirs}.weight", pattern)
  return (kernel, Row(tuple(f"{name}/bias" for name in names), f"{theirs}.bias"))[: 1 + bias]


def _norm(ours: str, theirs: str) -> tuple[Row, Row]:
  return Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")


def _patches(ours: str, theirs: str, size: int, *, bias: bool = True) -> tuple[Row, ...]:
  """Rows of a convolution whose stride is its `size`, which for us is linear in the patch."""
  sizes = {"p": size, "q": size}
  kernel = Row(f"{ours}/kernel", f"{theirs}.weight", "o c p q -> (p q c) o", sizes)
  return (kernel, Row(f"{ours}/bias", f"{theirs}.bias"))[: 1 + bias]


def _layer(
  ours: str,
  theirs: str,
  norm: str,
  out: str,
  mlp_norm: str,
  up: str,
  down: str,
  *,
  pattern: str = "o i -> i o",
) -> tuple[Row, ...]:
  """Rows of a layer with biases, but for queries, keys and values; names are behind `theirs`."""
  return (
    *_norm(f"{ours}/attention_norm", f"{theirs}.{norm}"),
    *_linear(f"{ours}/attention/out", f"{theirs}.{out}", pattern),
    *_norm(f"{ours}/mlp_norm", f"{theirs}.{mlp_norm}"),
    *_linear(f"{ours}/mlp/up", f"{theirs}.{up}", pattern),
    *_linear(f"{ours}/mlp/down", f"{theirs}.{down}", pattern),
  )
