"""Released weights that packages carry: no other network would say what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_sample_image

from experiments.datasets import weights
from models import decoding, pretrained, sequence


def obtain(function):
  """The package's weights, or a skip that says what to install."""
  try:
    return function()
  except (FileNotFoundError, ModuleNotFoundError) as e:
    pytest.skip(str(e))


def load(model, names, tensors, inputs):
  return pretrained.load(tensors, names, jax.eval_shape(model.init, jax.random.key(0), inputs))


def test_minilm_knows_what_sentences_mean():
  tensors, config, tokenizer = obtain(weights.minilm)
  sentences = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
  ]
  start, end = (tokenizer.specials[name] for name in ("[CLS]", "[SEP]"))
  rows = [[start, *tokenizer.encode(text), end] for text in sentences]
  lengths = jnp.array([len(row) for row in rows])
  tokens = np.array([row + [0] * (16 - len(row)) for row in rows], np.int32)
  model, names = pretrained.bert(config)
  variables = load(model, names, tensors, tokens)
  features = jax.jit(model.apply)(variables, tokens, lengths=lengths)
  embedded = sequence.pool(features, lengths, "mean")
  embedded /= jnp.linalg.norm(embedded, axis=-1, keepdims=True)
  similarity = embedded @ embedded.T
  np.testing.assert_allclose(similarity[0, 1:], [0.755, -0.105], atol=2e-3)


@pytest.mark.slow
def test_smollm2_speaks_english():
  tensors, metadata, tokenizer = obtain(weights.smollm2)
  model, names = pretrained.llama_gguf(metadata, tied="output.weight" not in tensors)
  model = model.clone(scan=True)  # compiles one layer, not thirty
  text = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife."
  )
  tokens = tokenizer.encode(text)
  assert tokenizer.decode(tokens) == text
  variables = load(model, names, tensors, tokens[None])
  log_probs = jax.nn.log_softmax(jax.jit(model.apply)(variables, tokens[None, :-1])[0])
  loss = -log_probs[np.arange(len(tokens) - 1), tokens[1:]].mean()
  assert 15.5 < np.exp(loss) < 16.3  # 15.9 in a forward written with numpy
  prompt = tokenizer.encode("The capital of France is")
  generate = functools.partial(decoding.generate, model, steps=2, temperature=0)
  drawn, _ = jax.jit(generate)(variables, prompt[None], jnp.array([len(prompt)]), jax.random.key(0))
  assert tokenizer.decode(np.asarray(drawn[0])) == " Paris."
  assert tokenizer.specials["<|im_end|>"] == metadata["tokenizer.ggml.eos_token_id"]


def test_efficientnet_lite0_sees_a_palace_and_a_daisy():
  tensors, _, _ = obtain(weights.efficientnet_lite0)

  def crop(name):
    image = PIL.Image.fromarray(load_sample_image(name))
    side = int(min(image.size) * 224 / 256)
    x, y = ((size - side) // 2 for size in image.size)
    image = image.crop((x, y, x + side, y + side)).resize((224, 224), PIL.Image.Resampling.BICUBIC)
    return (np.asarray(image, np.float32) - 127) / 128

  images = np.stack([crop("china.jpg"), crop("flower.jpg")])
  model, names = pretrained.efficientnet_lite()
  variables = load(model, names, tensors, images)
  p = jax.nn.softmax(jax.jit(model.apply)(variables, images))
  assert p.argmax(-1).tolist() == [698, 985]  # palace, daisy
  np.testing.assert_allclose(p.max(-1), [0.360, 0.327], atol=0.01)
