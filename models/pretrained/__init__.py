"""Weights of released models: checkpoints to our parameter trees and back.

    fields, names = pretrained.gpt2(json.loads(Path("config.json").read_text()))
    model = Transformer(**fields)
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens_BL)
    variables = pretrained.load("model.safetensors", names, abstract)
    pretrained.save(variables, names, "ours.safetensors")

Which tensor is which parameter is data: `Names`, one `Row` a kind of tensor. The families' are in
`models/pretrained/names.py`, the files' formats in `models/pretrained/formats.py`.
"""

from models.pretrained.formats import gguf, read
from models.pretrained.mapping import Names, Row, load, save
from models.pretrained.names import (
  bert,
  clip,
  efficientnet_lite,
  gpt2,
  llama,
  llama_gguf,
  t5,
  vit,
)

__all__ = [
  "Names", "Row", "bert", "clip", "efficientnet_lite", "gguf", "gpt2", "llama",
  "llama_gguf", "load", "read", "save", "t5", "vit",
]  # fmt: skip
