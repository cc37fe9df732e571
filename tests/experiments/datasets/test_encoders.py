"""Encoders: published sizes, padding, an embedding without spare words, texts in batches."""

import json

import jax
import numpy as np
import pytest

from experiments.datasets import encoders, sentences

TEXTS = ["Solve a linear system.", "Unpretentiously short.", "A", "The fast transform of it all."]


@pytest.fixture(scope="module")
def minilm():
  try:
    return encoders.load("minilm")
  except FileNotFoundError as e:
    pytest.skip(str(e))


@pytest.mark.parametrize(
  ("name", "count"),
  [("minilm", 22_565_376), ("bert-base-uncased", 108_891_648), ("mpnet", 108_896_256)],
)
def test_published_sizes(name, count):
  model = encoders.architecture(name)
  made = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))
  assert sum(x.size for x in jax.tree.leaves(made)) == count


def test_the_package_is_as_published(minilm):
  assert minilm.model == encoders.architecture("minilm")


def test_a_folder_with_a_configuration(tmp_path):
  fields = {"model_type": "bert", "position_embedding_type": "absolute", "hidden_act": "gelu"}
  fields |= dict(zip(encoders.SIZES, (50, 8, 1, 2, 16, 20, 2, 1e-12), strict=True))
  (tmp_path / "config.json").write_text(json.dumps(fields))
  model = encoders.architecture(str(tmp_path))
  assert (model.vocab, model.features, model.layers) == (50, 8, 1)


def test_what_is_missing_is_said(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    encoders.architecture(str(tmp_path))
  with pytest.raises(FileNotFoundError, match=r"encoder='.*': no .*no package carries its weights"):
    encoders.load(str(tmp_path))


def test_padding_is_not_averaged_and_special_tokens_are(minilm):
  tokens, lengths = sentences.rows(minilm.tokenizer, TEXTS, 12)
  vectors = encoders.sentence_vectors(minilm.model, minilm.params, tokens, lengths)
  noisy = np.where(np.arange(12) < lengths[:, None], tokens, 7)
  again = encoders.sentence_vectors(minilm.model, minilm.params, noisy, lengths)
  np.testing.assert_allclose(again, vectors, atol=1e-5)
  alone = minilm.model.apply({"params": minilm.params}, tokens[2:3, : lengths[2]])
  np.testing.assert_allclose(np.asarray(alone)[0].mean(0), vectors[2], atol=1e-5)


def test_without_spare_words_the_features_are_the_same(minilm):
  tokens, lengths = sentences.rows(minilm.tokenizer, TEXTS, 12)
  model, params, (renumbered,) = encoders.compact(minilm, [tokens])
  assert model.vocab == len(params["embedding"]) == len(np.unique(tokens)) == renumbered.max() + 1
  cut = encoders.sentence_vectors(model, params, renumbered, lengths)
  whole = encoders.sentence_vectors(minilm.model, minilm.params, tokens, lengths)
  np.testing.assert_allclose(cut, whole, atol=1e-5)


def test_texts_whatever_the_batch(minilm):
  one, other = (
    encoders.encode(minilm, TEXTS, length=16, batch_size=size) for size in (3, len(TEXTS))
  )
  for text, again, string in zip(one, other, TEXTS, strict=True):
    assert text.pieces == again.pieces and (text.pieces[0], text.pieces[-1]) == ("[CLS]", "[SEP]")
    np.testing.assert_allclose(text.hidden, again.hidden, atol=1e-5)
    assert text.hidden.shape == (7, len(text.ids), 384)
    joined = "".join(p if p.startswith("##") else f" {p}" for p in text.pieces[1:-1])
    assert joined.replace(" ##", "").replace("##", "").replace(" .", ".").strip() == string.lower()
