"""Text as token ids: bytes, byte-level BPE trained here, and the tokenizers of pretrained models.

    tokenizer = tokenization.bytes_tokenizer()
    tokenizer.encode("héllo")                    # (6,) int32, without special tokens
    tokenizer.specials["<eos>"]                  # 2
    bpe = tokenization.train_bpe(texts, 512, sentinels=100)

In the tokenizers made here the special tokens come first, so that padding is 0 as in every other
set, and the sentinels <extra_0>, <extra_1>, ... of span corruption (T5, UL2) come last, so that
asking for more of them changes no other id. Before them come the markers that an objective asks for
by name, such as those of filling in the middle:

    0..4 <pad> <bos> <eos> <mask> <sep> | 5..260 bytes | merges of BPE | markers | sentinels
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import tokenizers
from etils import epath

from experiments.datasets import sources

SPECIALS = ("<pad>", "<bos>", "<eos>", "<mask>", "<sep>")
FIRST_BYTE = len(SPECIALS)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """What models and pipelines know of a tokenizer.

  Attributes:
    vocab_size: number of ids, special tokens and sentinels included.
    specials: ids of the special tokens, markers and sentinels by their names.
    encode: text (str, or UTF-8 bytes) to (n,) int32; adds no special token and reads none.
    decode: ids (n,) to str without the special tokens; malformed UTF-8 becomes U+FFFD.
  """

  vocab_size: int
  specials: Mapping[str, int]
  encode: Callable[[str | bytes], np.ndarray]
  decode: Callable[[Sequence[int] | np.ndarray], str]


def _encode_bytes(text: str | bytes) -> np.ndarray:
  data = text.encode() if isinstance(text, str) else text
  return np.frombuffer(data, np.uint8).astype(np.int32) + FIRST_BYTE


def _decode_bytes(ids: Sequence[int] | np.ndarray) -> str:
  values = np.asarray(ids, np.int64) - FIRST_BYTE
  return bytes(values[(values >= 0) & (values < 256)].tolist()).decode(errors="replace")


def _sentinels(count: int) -> list[str]:
  return [f"<extra_{i}>" for i in range(count)]


@functools.cache
def bytes_tokenizer(sentinels: int = 0, markers: tuple[str, ...] = ()) -> Tokenizer:
  """UTF-8 bytes, byte b as id 5 + b: 261 ids, the markers and the sentinels."""
  first, added = FIRST_BYTE + 256, [*markers, *_sentinels(sentinels)]
  specials = {name: i for i, name in enumerate(SPECIALS)}
  specials |= {name: first + i for i, name in enumerate(added)}
  return Tokenizer(first + len(added), specials, _encode_bytes, _decode_bytes)


def _encode(model: tokenizers.Tokenizer, text: str | bytes) -> np.ndarray:
  model.encode_special_tokens = True  # "<eos>" in a text is text; pickling forgets that
  text = text if isinstance(text, str) else text.decode(errors="replace")
  return np.array(model.encode(text, add_special_tokens=False).ids, np.int32)


def _decode(model: tokenizers.Tokenizer, ids: Sequence[int] | np.ndarray) -> str:
  return model.decode(np.asarray(ids).tolist())


def _wrap(model: tokenizers.Tokenizer) -> Tokenizer:
  added = model.get_added_tokens_decoder().items()
  specials = {token.content: i for i, token in added if token.special}
  encode, decode = functools.partial(_encode, model), functools.partial(_decode, model)
  return Tokenizer(model.get_vocab_size(), specials, encode, decode)


def train_bpe(
  texts: Iterable[str | bytes],
  vocab_size: int,
  *,
  sentinels: int = 0,
  markers: Sequence[str] = (),
  data_dir: str | os.PathLike | None = None,
) -> Tokenizer:
  """Byte-level BPE (Sennrich et al., arXiv:1508.07909, on bytes as in GPT-2) trained on `texts`.

  Trained once: the result is kept under `data_dir` (see `sources.data_folder`) by a hash of the
  texts, the size and the library's version, of which it is a deterministic function.

  Args:
    texts: the training texts.
    vocab_size: ids in all; there are fewer if the texts have too few pairs to merge.
    sentinels: how many of the ids are sentinels.
    markers: names of further special tokens, which are among the ids too.
    data_dir: where to keep it.

  Raises:
    ValueError: `vocab_size` leaves no room for the bytes.
  """
  added = [*markers, *_sentinels(sentinels)]
  merged = vocab_size - len(added)
  if merged < FIRST_BYTE + 256:
    least = FIRST_BYTE + 256 + len(added)
    raise ValueError(f"vocab_size={vocab_size}; accepted: at least {least}, {sentinels} sentinels")
  corpus = [text if isinstance(text, str) else text.decode(errors="replace") for text in texts]
  digest = hashlib.blake2b(f"{tokenizers.__version__} {merged}".encode(), digest_size=8)
  for text in corpus:
    digest.update(hashlib.blake2b(text.encode()).digest())
  folder = epath.Path(sources.data_folder(data_dir)) / "tokenizers"
  path = folder / f"bpe{merged}-{digest.hexdigest()}.json"
  if path.exists():
    model = tokenizers.Tokenizer.from_str(path.read_text())
  else:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=merged,
      special_tokens=list(SPECIALS),
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    model.train_from_iterator(corpus, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{path.name}.{os.getpid()}"
    partial.write_text(model.to_str())
    partial.replace(path)  # whole, whoever else writes the same
  model.add_special_tokens(added)
  return _wrap(model)


def from_file(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer of a pretrained model from its `tokenizer.json`.

  Special tokens keep the model's own names and ids ("[CLS]", "<|endoftext|>"), truncation and
  padding that the file asks for are off.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no tokenizer.
  """
  try:
    model = tokenizers.Tokenizer.from_str(epath.Path(path).read_text())
  except FileNotFoundError:
    raise
  except Exception as e:  # the library raises nothing narrower
    raise ValueError(f"{path} is no tokenizer.json: {e}") from None
  model.no_truncation()
  model.no_padding()
  return _wrap(model)
