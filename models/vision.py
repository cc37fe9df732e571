"""Transformers that see: ViT, and CLIP's two towers.

ViT: Dosovitskiy et al., arXiv:2010.11929; DINO, arXiv:2104.14294, is the same network trained
otherwise. CLIP: Radford et al., arXiv:2103.00020. For example, of 224 x 224 pixels,

    encoder = Transformer(None, 384, 12, 6, mask="full", project=False, max_length=14 * 14 + 1)
    features_BLH = ViT(encoder, patch=16).apply(variables, images)
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import dense
from models.transformer import Transformer


class ViT(nn.Module):
  """Patches, linearly embedded, behind a class token, through an encoder.

  Attributes:
    encoder: without a vocabulary and with project=False; with learned positions, as many as there
      are patches and one.
    patch: width and height of a patch, in pixels.
    classes: number of classes, told from the class token; None for features.
    patch_bias: of the embedding.
  """

  encoder: Transformer
  patch: int
  classes: int | None = None
  patch_bias: bool = True

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Logits (B, classes), float32, or features (B, 1 + patches, H), the class token's first.

    Args:
      images: (B, height, width, channels) float.
      train: draws the encoder's dropout masks.

    Raises: ValueError for another number of patches than there are positions.
    """
    batch, height, width, channels = images.shape
    rows, columns, length = height // self.patch, width // self.patch, self.encoder.max_length
    if height % self.patch or width % self.patch or length not in (None, rows * columns + 1):
      raise ValueError(
        f"images: {list(images.shape)}; accepted: height and width that are multiples of "
        f"{self.patch}, with {'any' if length is None else length - 1} patches"
      )
    x = images.reshape(batch, rows, self.patch, columns, self.patch, channels)
    x_BLD = x.swapaxes(2, 3).reshape(batch, rows * columns, -1).astype(self.encoder.dtype)
    features = self.encoder.features
    embed = dense(
      features, (None, "embed"), name="embed", dtype=x_BLD.dtype, use_bias=self.patch_bias
    )
    init = nn.with_logical_partitioning(self.encoder.embed_init, ("embed",))
    token_H: Any = self.param("class_token", init, (features,))
    token_B1H = jnp.broadcast_to(token_H.astype(x_BLD.dtype), (batch, 1, features))
    x_BLH = self.encoder(jnp.concatenate([token_B1H, embed(x_BLD)], axis=1), train=train)
    if self.classes is None:
      return x_BLH
    return dense(self.classes, ("embed", "vocab"), name="head")(x_BLH[:, 0].astype(jnp.float32))


class CLIP(nn.Module):
  """Images and texts on one sphere.

  Attributes:
    vision: without classes; its class token stands for the image.
    text: causal and without a head; a text's last token, `eos`, stands for it.
    features: of an embedding.
    eos: the token that ends a text (its first, where there are more); None for the largest there.
  """

  vision: ViT
  text: Transformer
  features: int
  eos: int | None = None

  def setup(self) -> None:
    self.image_projection = dense(self.features, ("embed", None), use_bias=False)
    self.text_projection = dense(self.features, ("embed", None), use_bias=False)
    init = nn.with_logical_partitioning(nn.initializers.constant(math.log(1 / 0.07)), ())
    self.log_scale = self.param("log_scale", init, ())

  def embed_images(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """(B, features) float32 of length 1, of images (B, height, width, channels) float."""
    return _unit(self.image_projection(self.vision(images, train=train)[:, 0]))

  def embed_texts(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
    """(B, features) float32 of length 1, of tokens (B, L) int; what follows `eos` is not seen."""
    x_BLH = self.text(tokens, train=train)
    last_B = jnp.argmax(tokens if self.eos is None else tokens == self.eos, axis=-1)
    last_BH = jnp.take_along_axis(x_BLH, last_B[:, None, None], axis=1)[:, 0]
    return _unit(self.text_projection(last_BH))

  def __call__(
    self, images: jax.Array, tokens: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings of images and of texts, and the scale () by which their products are logits."""
    embedded = self.embed_images(images, train=train), self.embed_texts(tokens, train=train)
    return *embedded, jnp.exp(jnp.asarray(self.log_scale))


def _unit(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
