"""Pretrained text encoders: published sizes, weights where a package has any, texts through them.

encoder = encoders.load("minilm")                     # or a folder with a BERT's files
texts = encoders.encode(encoder, ["A sentence."], length=96, batch_size=60)
vectors_ND = encoders.sentence_vectors(encoder.model, encoder.params, tokens_NL, lengths_N)
model = encoders.architecture("bert-base-uncased")    # no weights needed: to plan, or to train
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets import sentences, tokenization, weights
from models import pretrained, sequence
from models.transformer import Transformer
from objectives.text_metrics import Text

SIZES = (
  *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
  *("intermediate_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
)
PUBLISHED: dict[str, tuple[float, ...]] = {
  "minilm": (30_522, 384, 6, 12, 1536, 512, 2, 1e-12),  # all-MiniLM-L6-v2
  "bert-base-uncased": (30_522, 768, 12, 12, 3072, 512, 2, 1e-12),
  "mpnet": (30_527, 768, 12, 12, 3072, 514, 1, 1e-5),  # paraphrase-mpnet-base-v2
  "roberta-large": (50_265, 1024, 24, 16, 4096, 514, 1, 1e-5),  # all-roberta-large-v1
}
FILES = ("model.safetensors", "config.json", "tokenizer.json")


class Encoder(NamedTuple):
  """A model, its parameters (arguments, never constants, of a program) and its tokenizer."""

  model: Transformer
  params: Any
  tokenizer: tokenization.Tokenizer


def architecture(name: str) -> Transformer:
  """The model of a name in PUBLISHED, or of a folder with a BERT's config.json; no weights.

  MPNet's and RoBERTa's are BERTs of their sizes, with learned positions.

  Raises: FileNotFoundError where it is neither.
  """
  if name not in PUBLISHED:
    return pretrained.bert(json.loads((Path(name) / "config.json").read_text()))[0]
  fields: dict[str, Any] = dict(zip(SIZES, PUBLISHED[name], strict=True))
  bert = {"model_type": "bert", "position_embedding_type": "absolute", "hidden_act": "gelu"}
  return pretrained.bert(bert | fields)[0]


def load(name: str) -> Encoder:
  """ "minilm", from its package, or a folder with FILES.

  Raises: FileNotFoundError where they are not there: no package has another encoder.
  """
  if name == "minilm":
    loaded = weights.minilm()
  else:
    tensors, fields, tokenizer = (Path(name) / file for file in FILES)
    if not tensors.exists():
      raise FileNotFoundError(f"encoder={name!r}: no {tensors}, and no package carries its weights")
    loaded = weights.Weights(
      pretrained.read(tensors), json.loads(fields.read_text()), tokenization.from_file(tokenizer)
    )
  assert loaded.tokenizer is not None
  model, names = pretrained.bert(loaded.config)
  abstract = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))
  variables = nn.meta.unbox(pretrained.load(loaded.tensors, names, abstract))
  return Encoder(model, variables["params"], loaded.tokenizer)


def compact(
  encoder: Encoder, tokens: Sequence[np.ndarray]
) -> tuple[Transformer, Any, list[np.ndarray]]:
  """The model, its parameters and the tokens, (N, L) each, without the words that no text has.

  Ids are numbered anew, by rows of the embedding in use; the features are the same. What is tuned
  and kept for every seed is a third to a half smaller.
  """
  used = np.unique(np.concatenate([ids.ravel() for ids in tokens]))
  params = {**encoder.params, "embedding": encoder.params["embedding"][used]}
  renumbered = [np.searchsorted(used, ids).astype(np.int32) for ids in tokens]
  return encoder.model.clone(vocab=len(used)), params, renumbered


@functools.partial(jax.jit, static_argnums=0)
def sentence_vectors(
  model: Transformer, params: Any, tokens_NL: jax.Array, lengths_N: jax.Array
) -> jax.Array:
  """(N, D) float32: the mean of the tokens' features, [CLS] and [SEP] with them, padding not."""
  features_NLD: Any = model.apply({"params": params}, tokens_NL, lengths=lengths_N)
  return sequence.pool(features_NLD, lengths_N, "mean")


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(
  model: Transformer, params: Any, tokens_NL: jax.Array, lengths_N: jax.Array
) -> jax.Array:
  """(layers + 1, N, L, H), the embeddings first."""
  return jnp.asarray(model.apply({"params": params}, tokens_NL, lengths=lengths_N, hidden=True)[1])


def encode(encoder: Encoder, texts: Sequence[str], *, length: int, batch_size: int) -> list[Text]:
  """Ids, pieces and hidden states of each text, in batches of one shape.

  `length` is the most tokens of a text; batches are as long as the longest needs, by sixteens.
  """
  tokens_NL, lengths_N = sentences.rows(encoder.tokenizer, texts, length)
  tokens_NL = tokens_NL[:, : -(-lengths_N.max() // 16) * 16]
  names = {i: name for name, i in encoder.tokenizer.specials.items()}
  piece = functools.cache(lambda i: names.get(i) or encoder.tokenizer.decode([i]))
  found = []
  for start in range(0, len(texts), batch_size):
    rows = np.arange(start, start + batch_size).clip(max=len(texts) - 1)
    hidden = np.asarray(
      hidden_states(encoder.model, encoder.params, tokens_NL[rows], lengths_N[rows])
    )
    for row, i in enumerate(rows[: len(texts) - start]):
      ids = tokens_NL[i, : lengths_N[i]]
      found.append(Text(ids, [piece(int(t)) for t in ids], hidden[:, row, : len(ids)]))
  return found
