"""Reproducibility Issues for BERT-based Evaluation Metrics.

Chen, Belouadi and Eger, EMNLP 2022, arXiv:2204.00004.

Metrics that replace BLEU compare a translation with its reference by contextual embeddings. The
paper runs four of them again from their authors' code and cannot reproduce what was published:
preprocessing is undocumented, code is missing, baselines are weaker than they need be, and one
metric had been correlated with the wrong column. It then holds MoverScore fixed and varies what is
done before it: stopwords, IDF, word pieces, punctuation.

Claim (round-up of 2022-04-10): such metrics are hard to reproduce because of undocumented
preprocessing. Made executable: at a fixed aggregation (greedy matching as in BERTScore, optimal
transport of MoverScore's vectors, BaryScore's barycenters) the preprocessing moves the correlation
with the truth more than the aggregation does at a fixed preprocessing, and more so in languages
with rich morphology. The paper's own statistic of dispersion is unknown; here it is the range, and
the standard deviation beside it, because a range over 24 cells exceeds one over 3 by chance alone.

Laptop scale: the encoder is all-MiniLM-L6-v2. A reference has hypotheses of severity 0 to 5, that
many of its content words dropped or exchanged, under noise that changes no meaning (articles,
commas, capitals). The score is WMT18's Kendall over the pairs of a reference's hypotheses.
`english` are sentences of Python's reference, `rich` the messages of Django in Finnish, Czech,
Turkish and Russian, and `english catalogue` their originals, a control: it differs from `rich` in
the language alone. Stopwords are the 50 most frequent words, the layer of greedy matching is three
quarters up, both fixed before any result. A seed is a resampling: its own sentences, edits and
noise. Paper scale: the segments of WMT15 to 18 into English with bert-base-uncased; no package
carries the human scores or the weights. SentSim is not here, as its weights are unknown.

Found at laptop scale (5 resamplings, `results/bert_metrics.json`): preprocessing moves Kendall by
0.08 in English and 0.11 in the rich languages, aggregation by 0.03 and 0.02; the ratio of the
ranges rises from 2.8 to 4.9 with morphology, and is 1.7 for the same messages in English. None of
the fifteen resamplings went the other way. By standard deviation, which does not grow with the
number of cells, preprocessing exceeds aggregation in the rich languages alone. The treatment of
word pieces matters most (0.02 to 0.04); IDF lowers the agreement in the rich languages by 0.03.

    python -m experiments.bert_metrics
    python -m experiments.bert_metrics --arm=english --seeds=3
    python -m launch.plan bert_metrics --scale=paper/wmt17
"""

import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import threadpoolctl

from experiments.datasets import rated, sentences, stable, tokenization, weights
from launch import Claim, ConfigurationError, Study, Task, main
from models import pretrained, sequence
from objectives import text_metrics

WMT = {"wmt15-16": 64, "wmt17": 64, "wmt18": 128}  # batch sizes
SCALES = ("laptop", *(f"paper/{year}" for year in WMT))
TOPOLOGIES = {"paper/*": ("v5e-4", "data=4")}

SEVERITIES = 6
Cell = tuple[bool, bool, str, bool]
AGGREGATIONS = ("greedy", "transport", "barycenter")
# Are stopwords dropped, are units weighted by IDF, what is kept of a word, is punctuation kept?
GRID = tuple(itertools.product((False, True), (False, True), text_metrics.SUBWORDS, (False, True)))
PUBLISHED = {  # of each metric; BaryScore's treatment of stopwords and punctuation is taken as none
  "greedy": (False, True, "all", True),
  "transport": (True, True, "first", False),
  "barycenter": (False, True, "all", True),
}
BERT: dict[str, Any] = {  # bert-base-uncased
  **{"model_type": "bert", "position_embedding_type": "absolute", "hidden_act": "gelu"},
  **{"vocab_size": 30_522, "max_position_embeddings": 512, "type_vocab_size": 2},
  **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
  **{"intermediate_size": 3072, "layer_norm_eps": 1e-12},
}


def get_config(scale: str = "laptop") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    {
      "data": {
        "languages": "reference",  # or codes of Django's catalogues, such as "fi cs"
        "references": 24,  # a resampling, shared out among the languages
        "content_words": 6,  # the least that a sentence has
        "words": 16,  # the most
        "table": "",  # a file of rated segments in place of all this, see `rated.segments`
        "target": "",  # its column of human scores
      },
      "encoder": "minilm",  # or a folder with config.json, tokenizer.json and model.safetensors
      "layer": 5,  # of greedy matching; counted from 1
      "layers": 5,  # the last so many, of the other two
      "vocab": 30_522,
      "length": 96,
      "statistic": "kendall",  # | pearson, over all segments
      "stopwords": 50,
      "batch_size": 60,
    }
  )
  if scale != "laptop":
    year = scale.removeprefix("paper/")
    config.update({"batch_size": WMT[year], "encoder": "bert-base-uncased", "layer": 9})
    config.update({"length": 512, "statistic": "kendall" if year == "wmt18" else "pearson"})
    config.data.update({"table": f"{year}.tsv", "target": "score"})
  return config


class Segments(NamedTuple):
  """References and hypotheses as text; `target` (N,) is higher for the better hypothesis."""

  references: list[str]
  hypotheses: list[str]
  target: np.ndarray
  source: np.ndarray  # (N,) which reference a hypothesis belongs to; only those are compared
  stopwords: frozenset[str]


def edited(
  text: str, severity: int, draw: Any, stopwords: frozenset[str], vocabulary: list[str]
) -> str:
  """`text` with `severity` content words dropped or exchanged, and noise that changes no meaning.

  Args:
    text: a sentence.
    severity: how many of its content words change.
    draw: `stable.draws(...)`.
    stopwords: words, in lower case, that are no content.
    vocabulary: where the words come from that take others' places.
  """
  words = text.split()
  places = [i for i, word in enumerate(words) if is_content(word, stopwords)]
  for i in sorted(np.array(places)[np.argsort(draw(len(places)))[:severity]], reverse=True):
    drops, which = draw(2)
    words[i : i + 1] = [] if drops < 0.5 else [vocabulary[int(which * len(vocabulary))]]
  article, comma, case, stop = draw(4) < 0.5
  articles = [i for i, word in enumerate(words) if word.lower() in ("a", "an", "the")]
  if article and articles:
    del words[articles[int(draw(1)[0] * len(articles))]]
  if comma:
    words[int(draw(1)[0] * (len(words) - 1))] += ","
  text = " ".join(words)
  text = text.rstrip(".") if stop else text
  return text.upper() if case else text


def is_content(word: str, stopwords: frozenset[str]) -> bool:
  bare = word.strip(".,;:!?()\"'«»“”")
  return bare.isalpha() and len(bare) > 1 and bare.lower() not in stopwords


def resample(config, language: str, count: int, seed: int) -> Segments:
  """`count` sentences of a language, each with a hypothesis of every severity."""
  pool = sentences.reference() if language == "reference" else sentences.catalogue(language)
  stopwords = sentences.frequent(pool, config.stopwords)
  content = {text: [w for w in text.split() if is_content(w, stopwords)] for text in pool}
  least, most = config.data.content_words, config.data.words
  fitting = [t for t in pool if len(content[t]) >= least and len(t.split()) <= most]
  if len(fitting) < count:
    raise ConfigurationError(f"data.references={count}; accepted: up to {len(fitting)} {language}")
  draw = stable.draws(seed, 2204)
  chosen = [fitting[i] for i in np.argsort(draw(len(fitting)))[:count]]
  vocabulary = sorted({re.sub(r"\W", "", w).lower() for ws in content.values() for w in ws})
  hypotheses = [
    edited(text, severity, draw, stopwords, vocabulary)
    for text in chosen
    for severity in range(SEVERITIES)
  ]
  source = np.repeat(np.arange(count), SEVERITIES)
  return Segments(chosen, hypotheses, -np.tile(np.arange(SEVERITIES), count), source, stopwords)


def load(config, seed: int) -> list[Segments]:
  """The segments of each language, or those of a table."""
  if config.data.table:
    table = rated.segments(config.data.table, config.data.target)
    stopwords = sentences.frequent(table.references, config.stopwords)
    return [Segments(table.references, table.hypotheses, table.target, table.source, stopwords)]
  languages = config.data.languages.split()
  count = config.data.references // len(languages)
  return [resample(config, language, count, seed) for language in languages]


def encoder(config) -> tuple[Any, Any, Any]:
  """The encoder, its variables (arguments, never constants, of a program) and its tokenizer."""
  if config.encoder == "minilm":
    loaded = weights.minilm()
  else:
    folder = Path(config.encoder)
    if not (folder / "model.safetensors").exists():
      raise FileNotFoundError(f"{folder}/model.safetensors: no such file, and in no package either")
    tensors, fields = (folder / name for name in ("model.safetensors", "config.json"))
    tokenizer = tokenization.from_file(folder / "tokenizer.json")
    loaded = weights.Weights(pretrained.read(tensors), json.loads(fields.read_text()), tokenizer)
  model, names = pretrained.bert(loaded.config)
  tokens = jax.ShapeDtypeStruct((1, config.length), jnp.int32)
  abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)
  return model, pretrained.load(loaded.tensors, names, abstract), loaded.tokenizer


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(model, variables, tokens_BL, lengths_B):
  return model.apply(variables, tokens_BL, lengths=lengths_B, hidden=True)[1]


def encode(config, model, variables, tokenizer, texts: list[str]) -> list["Text"]:
  """Ids, pieces and hidden states of each text, in batches of one shape."""
  tokens_NL, lengths_N = sentences.rows(tokenizer, texts, config.length)
  tokens_NL = tokens_NL[:, : -(-lengths_N.max() // 16) * 16]
  names = {i: name for name, i in tokenizer.specials.items()}
  piece = functools.cache(lambda i: names.get(i) or tokenizer.decode([i]))
  found = []
  for start in range(0, len(texts), config.batch_size):
    rows = np.arange(start, start + config.batch_size).clip(max=len(texts) - 1)
    hidden = np.asarray(hidden_states(model, variables, tokens_NL[rows], lengths_N[rows]))
    for row, i in enumerate(rows[: len(texts) - start]):
      ids = tokens_NL[i, : lengths_N[i]]
      found.append(Text(ids, [piece(int(t)) for t in ids], hidden[:, row, : len(ids)]))
  return found


class Text(NamedTuple):
  """One text: ids (n,), pieces, and hidden states (layers + 1, n, H), the embeddings first."""

  ids: np.ndarray
  pieces: list[str]
  hidden: np.ndarray


def weights_of(text: Text, groups: list[list[int]], idf: np.ndarray | None) -> np.ndarray:
  """A unit's weight: the mean IDF of its pieces, or 1."""
  each = np.ones(len(text.ids)) if idf is None else idf[text.ids]
  return np.array([each[group].mean() for group in groups])


def scores(config, references: list[Text], hypotheses: list[Text], segments, cell) -> dict:
  """{aggregation: (N,) a score for each hypothesis, higher is better} in one cell of GRID."""
  drops, weighs, subword, punctuation = cell
  stopwords = segments.stopwords if drops else ()

  def prepared(texts: list[Text]) -> tuple[list[list[list[int]]], list[np.ndarray], Any]:
    groups = [text_metrics.group_pieces(t.pieces, subword, stopwords, punctuation) for t in texts]
    pairs = zip(texts, groups, strict=True)
    vectors = [np.stack([t.hidden[:, group].mean(1) for group in gs], 1) for t, gs in pairs]
    ids = [t.ids for t in texts]
    return groups, vectors, inverse(ids) if weighs else None

  inverse = functools.partial(text_metrics.inverse_document_frequency, vocab=config.vocab)
  r_groups, r_vectors, r_idf = prepared(references)
  h_groups, h_vectors, h_idf = prepared(hypotheses)
  last = slice(-config.layers, None)

  def greedy(texts, groups, vectors):
    """One layer, the references' IDF table on both sides, special tokens without weight."""
    found = []
    for text, gs, v in zip(texts, groups, vectors, strict=True):
      special = [text.pieces[group[0]] in ("[CLS]", "[SEP]") for group in gs]
      found.append((v[config.layer], np.where(special, 0, weights_of(text, gs, r_idf))))
    return padded(found, config.length)

  (h, h_w, h_m), (r, r_w, r_m) = (
    greedy(hypotheses, h_groups, h_vectors), greedy(references, r_groups, r_vectors)
  )  # fmt: skip
  at = segments.source
  _, _, f = jax.jit(text_metrics.bert_score)(h, r[at], h_w, r_w[at], h_m, r_m[at])
  # The other two have a table each side, and give special tokens weight 1 without IDF.
  h_weights = [weights_of(*pair, h_idf) for pair in zip(hypotheses, h_groups, strict=True)]
  r_weights = [weights_of(*pair, r_idf) for pair in zip(references, r_groups, strict=True)]
  pairs = list(enumerate(at))
  mover = [
    text_metrics.mover_score(h_vectors[i][last], r_vectors[j][last], h_weights[i], r_weights[j])
    for i, j in pairs
  ]
  h_center, r_center = (
    [text_metrics.barycenter(text_metrics.unit(v[last]), w) for v, w in zip(vs, ws, strict=True)]
    for vs, ws in ((h_vectors, h_weights), (r_vectors, r_weights))
  )
  bary = [-text_metrics.bary_distance(h_center[i], r_center[j]) for i, j in pairs]
  return {"greedy": np.asarray(f), "transport": np.array(mover), "barycenter": np.array(bary)}


def padded(found: list[tuple[np.ndarray, np.ndarray]], length: int) -> tuple[np.ndarray, ...]:
  """Vectors (N, L, H), weights (N, L) and mask (N, L) of texts of different lengths."""
  vectors = np.zeros((len(found), length, found[0][0].shape[-1]), np.float32)
  weights_NL, mask_NL = np.zeros((2, len(found), length), np.float32)
  for i, (v, w) in enumerate(found):
    vectors[i, : len(v)], weights_NL[i, : len(v)], mask_NL[i, : len(v)] = v, w, 1
  return vectors, weights_NL, mask_NL


def agreement(statistic: str, score: np.ndarray, target: np.ndarray, source: np.ndarray) -> float:
  """Kendall over pairs of hypotheses of one reference that people rate apart, or Pearson."""
  if statistic == "pearson":
    return float(np.corrcoef(score, target)[0, 1])
  pairs = (source[:, None] == source) & (target[:, None] > target)
  better, worse = np.nonzero(pairs)
  total, count = text_metrics.kendall(jnp.asarray(score[better]), jnp.asarray(score[worse]))
  return float(total / count)


def spread(table_AG: np.ndarray, grid: Sequence[Cell] = GRID) -> dict[str, float]:
  """How far preprocessing and aggregation move the agreement, (aggregations, cells of `grid`)."""
  found = {}
  for name, axis in (("preprocessing", 1), ("aggregation", 0)):
    found[f"range/{name}"] = np.ptp(table_AG, axis=axis).mean()
    found[f"deviation/{name}"] = table_AG.std(axis=axis, ddof=1).mean()
    found[f"relative deviation/{name}"] = found[f"deviation/{name}"] / abs(table_AG.mean())
  for kind in ("range", "deviation"):
    found[f"{kind}/ratio"] = found[f"{kind}/preprocessing"] / found[f"{kind}/aggregation"]
  names = ("stopwords dropped", "idf", "subword", "punctuation")
  for i, name in enumerate(names):  # the effect of one choice, averaged over all others
    values = [cell[i] for cell in grid]
    means = [table_AG[:, [v == value for v in values]].mean() for value in dict.fromkeys(values)]
    found[f"effect/{name}"] = means[1] - means[0] if len(means) == 2 else np.ptp(means)
  for aggregation, row in zip(AGGREGATIONS, table_AG, strict=True):
    found[f"agreement/{aggregation}"] = row.mean()
    found[f"agreement/{aggregation} as published"] = row[grid.index(PUBLISHED[aggregation])]
  return {name: float(value) for name, value in found.items()}


def sensitivity(config, lab) -> dict[str, list[float]]:
  """Every aggregation in every cell of the grid, for each resampling."""
  model, variables, tokenizer = encoder(config)
  lab.parameters = sum(x.size for x in jax.tree.leaves(variables))
  found: dict[str, list[float]] = {}
  for seed in lab.seeds:
    parts = []
    for segments in load(config, seed):
      texts = [segments.references, segments.hypotheses]
      r, h = (encode(config, model, variables, tokenizer, side) for side in texts)
      with threadpoolctl.threadpool_limits(1):  # small matrices: threads would only wait
        cells = [scores(config, r, h, segments, cell) for cell in GRID]
      measured = functools.partial(agreement, config.statistic)
      where = {"target": segments.target, "source": segments.source}
      parts.append([[measured(c[a], **where) for c in cells] for a in AGGREGATIONS])
    for name, value in spread(np.mean(parts, axis=0)).items():
      found.setdefault(name, []).append(value)
  return found


def stages(config) -> dict[str, Task]:
  """BERTScore of a corpus as a stage of no steps: the encoder and greedy matching on the mesh."""
  fields = BERT if config.encoder != "minilm" else weights.minilm().config
  model, _ = pretrained.bert(fields)
  row = jax.ShapeDtypeStruct((config.length,), jnp.int32)
  weight = jax.ShapeDtypeStruct((config.length,), jnp.float32)
  count = jax.ShapeDtypeStruct((), jnp.int32)
  example: dict[str, Any] = {}
  for side in ("hypothesis", "reference"):
    example |= {side: row, f"{side}_lengths": count, f"{side}_weights": weight}

  def loss(params, variables, batch, key, *, train):
    def side(name: str) -> tuple[jax.Array, jax.Array]:
      lengths = batch[f"{name}_lengths"]
      apply = functools.partial(model.apply, {"params": params}, hidden=True)
      _, hidden = apply(batch[name], lengths=lengths)
      return hidden[config.layer], sequence.length_mask(lengths, config.length)

    (h, h_mask), (r, r_mask) = side("hypothesis"), side("reference")
    weighed = batch["hypothesis_weights"], batch["reference_weights"]
    found = text_metrics.bert_score(h, r, *weighed, h_mask, r_mask)
    names, mask = ("precision", "recall", "f"), batch["mask"]
    metrics = {n: ((x * mask).sum(), mask.sum()) for n, x in zip(names, found, strict=True)}
    return -found[2].mean(), (metrics, variables)

  return {
    "bertscore": Task(
      init=lambda key: model.init(key, jnp.zeros((1, config.length), jnp.int32)),
      loss=loss,
      optimizer=optax.identity(),
      example=example,
      batch_size=config.batch_size,
      steps=0,
    )
  }


more = functools.partial(
  Claim, metric="range/preprocessing", against_metric="range/aggregation", at_least=0.0
)
richer = functools.partial(Claim, metric="range/ratio", of="rich", ratio=True, at_least=1.0)
ARMS: dict[str, dict[str, Any]] = {
  "english": {},
  "english catalogue": {"data.languages": "en"},
  "rich": {"data.languages": "fi cs tr ru"},
}

STUDIES = [
  Study(
    "sensitivity",
    arms=ARMS,
    seeds=5,
    claims=[
      *(
        more(f"preprocessing moves more than aggregation, {arm}", of=arm, against=arm)
        for arm in ARMS
      ),
      *(
        Claim(
          f"and so by standard deviation, {arm}",
          "deviation/preprocessing",
          of=arm,
          against=arm,
          against_metric="deviation/aggregation",
          at_least=0.0,
        )
        for arm in ARMS
      ),
      richer("the more so with rich morphology", against="english"),
      richer("for the morphology and not the subject", against="english catalogue"),
    ],
    run=sensitivity,
  ),
  Study(
    "wmt",
    scales=("paper/*",),
    arms={"as rated": {}},
    seeds=1,
    claims=[more("preprocessing moves more", of="as rated", against="as rated")],
    run=sensitivity,
  ),
]

if __name__ == "__main__":
  main(__name__)
