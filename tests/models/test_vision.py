"""ViT and CLIP: what stands for an image and a text, axes, mistakes. Outputs: ..._parity.py."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.transformer import Transformer
from models.vision import CLIP, ViT

# Tests compile more than they compute.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
ENCODER = Transformer(None, 8, 2, 2, mask="full", project=False, max_length=7)
VIT = ViT(ENCODER, patch=2)
TEXT = Transformer(11, 12, 2, 2, max_length=6, head=None)
MODEL = CLIP(VIT, TEXT, features=5, eos=9)
IMAGES = jax.random.normal(jax.random.key(0), (3, 4, 6, 3))
TOKENS = jnp.array([[1, 2, 9, 9, 3, 10], [4, 9, 0, 0, 0, 0], [5, 6, 7, 8, 1, 9]])


def variables(model, *inputs):
  return nn.meta.unbox(jit(model.init)(jax.random.key(2), *inputs))


def test_patches_go_by_rows_behind_the_class_token():
  v = variables(VIT, IMAGES)
  p = v["params"]
  squares = np.stack(
    [IMAGES[:, i : i + 2, j : j + 2].reshape(3, -1) for i in (0, 2) for j in (0, 2, 4)], axis=1
  )
  embedded = squares @ p["embed"]["kernel"] + p["embed"]["bias"]
  token = jnp.broadcast_to(p["class_token"], (3, 1, 8))
  inputs = jnp.concatenate([token, embedded], 1)
  wanted = jit(ENCODER.apply)({"params": p["encoder"]}, inputs)
  np.testing.assert_allclose(jit(VIT.apply)(v, IMAGES), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_classes_are_told_from_the_class_token(dtype):
  model = ViT(ENCODER.clone(dtype=dtype), 2, classes=4)
  v = variables(model, IMAGES)
  features = jit(ViT(model.encoder, 2).apply)(v, IMAGES)
  head = v["params"]["head"]
  wanted = features[:, 0].astype(jnp.float32) @ head["kernel"] + head["bias"]
  logits = jit(model.apply)(v, IMAGES)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, wanted, atol=1e-6)


def test_every_parameter_names_its_axes():
  boxed = jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES, TOKENS)
  leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
  assert all(isinstance(x, nn.LogicallyPartitioned) for x in leaves)


def test_embeddings_are_on_the_sphere():
  v = variables(MODEL, IMAGES, TOKENS)
  images, texts, scale = jit(MODEL.apply)(v, IMAGES, TOKENS)
  for x in (images, texts):
    assert x.shape == (3, 5)
    np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), 1, atol=1e-6)
  np.testing.assert_allclose(scale, 1 / 0.07, rtol=1e-6)
  alone = jit(functools.partial(MODEL.apply, method="embed_images"))(v, IMAGES)
  np.testing.assert_allclose(images, alone, atol=1e-6)


@pytest.mark.parametrize("eos", [9, None])
def test_what_follows_the_end_is_not_seen(eos):
  model = MODEL.clone(eos=eos)
  v = variables(model, IMAGES, TOKENS)
  embed = jit(functools.partial(model.apply, v, method="embed_texts"))
  ends = [2, 1, 5] if eos else [5, 1, 5]  # the first, or the largest
  for position in range(6):
    changed = TOKENS.at[:, position].set(jnp.where(TOKENS[:, position] == 9, 9, 2))
    same = np.isclose(embed(TOKENS), embed(changed), rtol=0, atol=1e-6).all(axis=-1)
    for row, end in enumerate(ends):
      assert same[row] == (position > end or changed[row, position] == TOKENS[row, position])


@pytest.mark.parametrize("shape", [(1, 4, 7, 3), (1, 6, 6, 3)])
def test_mistakes(shape):
  message = r"images: .*; accepted: height and width that are multiples of 2, with 6 patches"
  with pytest.raises(ValueError, match=message):
    VIT.init(jax.random.key(0), jnp.zeros(shape))
