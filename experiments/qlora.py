"""QLoRA: Efficient Finetuning of Quantized LLMs.

Dettmers, Pagnoni, Holtzman and Zettlemoyer, NeurIPS 2023, arXiv:2305.14314.

A pretrained model is frozen in four bits, on levels that suit normally distributed weights (NF4),
with scales that are quantised in turn; what is trained are low-rank adapters of every linear layer.
Weights are dequantised where they are used, in the backward pass once more, so that no float copy
of the model is ever there.

Claim (round-up of 2023-05-28): much less memory than LoRA at the accuracy of 16-bit fine-tuning.
At small scale: NF4 errs less than int4 and FP4 of the same blocks; adapters on NF4 with double
quantisation lose at most 0.02 nats a token to adapters on the floats, refuted beyond 0.03.

Laptop scale. `adapt`: a LLaMA of 2 layers and width 128 learns Python's docstrings (BPE of 512), is
rounded in every format, and is adapted to the readmes of installed packages; all methods start from
one base a seed, so there is one arm. `smollm2`: perplexity of SmolLM2-135M, its linear layers
rounded, on Python's manual, two passages of 256 tokens a seed. The released file has those layers
in 4 bits already (Q4_1: 16 equal steps from the least to the greatest of 32 weights), so that a
format is judged by what it adds. `memory`: the compiled update at width 512. "fp4" is the released
code's table (recalled), whose smallest value is 1/192; in a true E2M1 it is 1/12. The optimizer is
not paged to host memory: the engine keeps its state on the device. Paper scale: Guanaco, 7 to 65 B
parameters (shapes of 13 and 33 B recalled); neither LLaMA's weights nor OASST1 is in a package.

Found at laptop scale (`results/qlora.json`): on the small model's weights NF4 errs a fifth less
than int4, asymmetric int4 a tenth less than NF4; rounding costs 0.01 nats. Once adapted, nothing
tells formats apart, three bits included: QLoRA is 0.01 nats behind LoRA, interval -0.03 to 0.06, as
two trainings on nearly the same weights differ that much at this rate. Full fine-tuning is 0.15
nats better than any adapter of so small a base, rank 4 (at rank 16's rate) 0.15 worse, adapters of
query and value alone 0.25. On SmolLM2 NF4 with double quantisation adds 0.31 nats, 0.09 less than
the released FP4 and 0.61 less than E3M0; whether less than int4 (0.06) and a true E2M1 (0.01) stays
open. The update takes a third of LoRA's memory; where autodiff decides what is kept two thirds, not
all of it as was claimed.

    python -m experiments.qlora                        # smollm2 needs `make weights`
    python -m experiments.qlora --study=tuning         # how learning rates were chosen
    python -m launch.plan qlora --scale=paper/65b
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments.datasets import sources, text, weights
from launch import Claim, Evaluation, Study, Task, main, supervised
from launch.program import Program
from models import attention, lora, quantised
from models.pretrained.names import LLAMA
from objectives import language, optimizers, rounding

# Layers, width, heads, MLP, learning rate, LoRA dropout.
PAPER: dict[str, tuple[int, int, int, int, float, float]] = {
  "7b": (32, 4096, 32, 11_008, 2e-4, 0.1),
  "13b": (40, 5120, 40, 13_824, 2e-4, 0.05),
  "33b": (60, 6656, 52, 17_920, 1e-4, 0.05),
  "65b": (80, 8192, 64, 22_016, 1e-4, 0.05),
}
SCALES = ("laptop", *(f"paper/{size}" for size in PAPER))
TOPOLOGIES = {"paper/7b": ("v5e-4", "fsdp=4"), "paper/33b": ("v5e-8", "fsdp=8")}
TOPOLOGIES["paper/*"] = ("v5e-16", "fsdp=16")  # blocks of 64 inputs must not straddle chips

# Without a format the base is float, without a rank all of it is trained.
METHODS: dict[str, dict[str, Any]] = {
  "full": {"rank": 0, "format": "", "lr": 1e-3},
  "lora": {"format": ""},
  "qlora": {},
  "qlora single": {"double": False},
  "qlora r=4": {"rank": 4},
  "qlora r=64": {"rank": 64},
  "qlora qv": {"targets": ("query", "value")},
  "int4": {"format": "int4"},
  "nf3": {"format": "nf3"},
  "int3": {"format": "int3"},
}
COMPARED = ",".join(METHODS)
TUNED, GRID = ("full", "lora", "qlora", "qlora qv"), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TUNING = {f"{m} lr={rate:g}": METHODS[m] | {"lr": rate} for m in TUNED for rate in GRID}
METHODS |= TUNING | {"fp4": {"format": "fp4"}, "qlora kept": {"remat": False}}
ROUNDED = ("nf4", "nf4+dq", "int4", "affine4", "fp4", "fp4_e2m1", "fp4_e3m0")
SMALLER = ("nf3", "int3", "nf2", "int2")


def get_config(scale: str = "laptop") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    {
      "model": {"vocab": 512, "features": 128, "layers": 2, "heads": 4, "mlp": 256, "remat": False},
      "dtype": "float32",
      "length": 64,
      "base": {"data": "docstrings", "share": "[:20%]", "steps": 400, "batch_size": 16, "lr": 5e-3},
      "adapt": {"data": "readmes", "share": "", "steps": 150, "batch_size": 8},
      "split": "test",
      "methods": COMPARED,
      "method": {
        **{"format": "nf4", "double": True, "remat": True},  # dequantised again going backward
        **{"rank": 16, "alpha": 16.0, "targets": (), "dropout": 0.0, "lr": 1e-2},
      },
      "steps_per_dispatch": 25,
      "checkpoint_every": 0,
    }
  )
  if scale != "laptop":
    layers, width, heads, mlp, lr, dropout = PAPER[scale.removeprefix("paper/")]
    model = {"vocab": 32_000, "features": width, "layers": layers, "heads": heads, "mlp": mlp}
    config.update({"model": model | {"remat": True}, "dtype": "bfloat16", "length": 512})
    config.update({"methods": "qlora", "method": {"rank": 64, "dropout": dropout, "lr": lr}})
    config.update({"steps_per_dispatch": 1, "checkpoint_every": 250, "base": {"steps": 0}})
    config.update({"adapt": {"data": "oasst1", "steps": 1875, "batch_size": 16}})
  return config


def model_and_loss(config, dense: attention.Factory = attention.dense) -> tuple[Any, Any]:
  """LLaMA; layers are scanned, so that one matrix at a time is dequantised."""
  fields = {"epsilon": 1e-6, "head": "untied", "scan": True, "dtype": jnp.dtype(config.dtype)}
  model = LLAMA(**config.model, **fields, dense=dense)
  return supervised(model, language.next_token, text.example(config.length))


def task(config, part: str, init, loss, measured, optimizer) -> Task:
  o, example = config[part], text.example(config.length)

  def load(split: str) -> sources.Source:
    if o.data == "oasst1":
      raise sources.DatasetNotFound("data=oasst1: in no package, and neither are LLaMA's weights")
    vocabulary = text.bpe(config.base.data, config.model.vocab)
    return text.windows(o.data, split, config.length, vocabulary)

  return Task(
    init=init,
    loss=loss,
    optimizer=optimizer,
    example=example,
    data=lambda: load("train"),
    batch_size=o.batch_size,
    steps=o.steps,
    evaluate={config.split: Evaluation(lambda: load(config.split + o.share), measured)},
    axes=dict.fromkeys(example, ("length",)),
    steps_per_dispatch=config.steps_per_dispatch,
    checkpoint_every=config.checkpoint_every,
  )


def base_task(config) -> Task:
  """Pretraining; then the float kernels are rounded to every format."""
  init, loss = model_and_loss(config)
  rate = optimizers.warmup_cosine(config.base.lr, config.base.steps, config.base.steps // 10)
  adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))
  return task(config, "base", init, loss, rounding.rounded(loss, ROUNDED + SMALLER), adamw)


def adapt_task(config, method: str) -> Task:
  """AdamW at a constant rate, without decay, on clipped gradients (the released scripts)."""
  layer = config.method.to_dict() | METHODS[method]
  adam = optax.chain(optax.clip_by_global_norm(0.3), optax.adam(layer.pop("lr"), b2=0.999))
  init, loss = model_and_loss(config, lora.factory(**layer))
  _, undropped = model_and_loss(config, lora.factory(**layer | {"dropout": 0.0}))
  if layer["rank"]:
    _, undropped = lora.freeze(init, undropped)
    init, loss = lora.freeze(init, loss, dtype=config.dtype)
  return task(config, "adapt", init, loss, undropped, adam)


def stages(config) -> dict[str, Task]:
  tasks = {"base": base_task(config)} if config.base.steps else {}
  return tasks | {m: adapt_task(config, m) for m in config.methods.split(",")}


def run(config, lab) -> dict[str, list[float]]:
  """Pretrains, rounds, and adapts by each method: "test/M" is the loss of method M, in nats."""
  tasks, split = stages(config), f"{config.split}/"
  if not config.base.steps:
    ((method, only),) = tasks.items()
    return lab.fit(method, only).metrics
  base = lab.fit("base", tasks.pop("base"))
  metrics = {k.replace(split, "base/"): values for k, values in base.metrics.items()}
  keys = jax.vmap(jax.random.key)(jnp.array(lab.seeds))
  for method, chosen in tasks.items():
    fresh = jax.jit(jax.vmap(lambda key, init=chosen.init: nn.meta.unbox(init(key))))(keys)
    layer = config.method.to_dict() | METHODS[method]
    start = lora.around(base.params, fresh, layer["format"], layer["double"])
    metrics[split + method] = lab.fit(method, chosen, start).metrics[f"{split}loss"]
  return metrics


def smollm2(config, lab) -> dict[str, list[float]]:
  """Loss in nats a token, and perplexity, of SmolLM2 with its kernels rounded."""
  model, params, tokenizer = weights.language_model()
  passages = {"length": 256, "rows": 2, "seeds": lab.seeds, "end": "<|endoftext|>"}
  tokens_SBL = text.passages("reference", "train", tokenizer=tokenizer, **passages)

  @jax.jit
  def loss(params, tokens_BL):
    logits_BLV: Any = model.apply({"params": params}, tokens_BL[:, :-1])
    return language.next_token(logits_BLV, {"targets": tokens_BL[:, 1:]})[0]

  losses = rounding.losses(loss, params, tokens_SBL, ROUNDED)
  perplexities = {f"perplexity {name}": np.exp(v).tolist() for name, v in losses.items()}
  return {f"loss {name}": v for name, v in losses.items()} | perplexities


def memory(config, lab) -> dict[str, list[float]]:
  """Of the compiled update: bytes in all, and bits a weight of the frozen kernels."""
  program = Program(adapt_task(config, config.methods), lab.mesh, (0,))
  used = program.compile_update().memory_analysis()
  total = used.argument_size_in_bytes + used.temp_size_in_bytes
  stored = program.abstract_state.variables.get(quantised.COLLECTION)
  bits = quantised.bits(stored, config.method.format) if stored else 32.0
  return {name: [value] * len(lab.seeds) for name, value in (("bytes", total), ("bits", bits))}


ONE = "one base"


def compare(name: str, of: str, than: str, arm: str = ONE, at_most=0.0, **margins: Any) -> Claim:
  """Two metrics of one arm, seed by seed."""
  return Claim(name, of, arm, arm, against_metric=than, at_most=at_most, **margins)


errs, NF4 = functools.partial(compare, ratio=True, at_most=1.0), "base/error nf4"
as_good = functools.partial(compare, of="test/qlora", at_most=0.02, refuted_above=0.03)
alike = functools.partial(compare, than="test/qlora", at_least=-0.02, at_most=0.02)
bytes_of = functools.partial(Claim, metric="bytes", against="lora", ratio=True)
STUDIES = [
  Study(
    "adapt",
    arms={ONE: {}},
    claims=[
      errs("NF4 errs less than int4", NF4, "base/error int4"),
      errs("and that less than FP4", "base/error int4", "base/error fp4"),
      errs("NF4 errs as asymmetric int4", NF4, "base/error affine4", at_least=0.9, at_most=1.1),
      compare("four bits cost little", "base/loss nf4+dq", "base/loss", at_most=0.05),
      as_good("QLoRA is as good as LoRA", than="test/lora"),
      as_good("and as full fine-tuning", than="test/full"),
      alike("double quantisation is free", of="test/qlora single", at_least=-0.005, at_most=0.005),
      *(alike(f"rank {rank} is as good as 16", of=f"test/qlora r={rank}") for rank in (4, 64)),
      compare("all layers beat query and value", "test/qlora", "test/qlora qv"),
      compare("NF4 is as good as int4, adapted", "test/qlora", "test/int4"),
      compare("NF3 is as good as int3, adapted", "test/nf3", "test/int3"),
    ],
  ),
  Study(
    "smollm2",
    arms={"smollm2": {}},
    seeds=5,
    claims=[
      compare(f"NF4 predicts better than {f}", "loss nf4+dq", f"loss {f}", "smollm2")
      for f in ("int4", "fp4", "fp4_e2m1", "fp4_e3m0")
    ],
    run=smollm2,
  ),
  Study(
    "memory",
    config={"model.features": 512, "model.layers": 8, "model.mlp": 1024, "adapt.batch_size": 1},
    arms={m: {"methods": m} for m in ("qlora", "qlora kept", "lora")},
    claims=[
      Claim("4.127 bits a weight", "bits", of="qlora", at_least=4.126, at_most=4.13),
      bytes_of("half of LoRA's memory", of="qlora", at_most=0.5),
      bytes_of("which autodiff alone would not save", of="qlora kept", at_least=1.0),
    ],
    run=memory,
  ),
  Study(
    "guanaco",
    scales=("paper/*",),
    seeds=1,
    arms={m: {"methods": m} for m in ("qlora", "lora", "fp4")},
    claims=[Claim("as good as LoRA", "test/loss", of="qlora", against="lora", at_most=0.02)],
  ),
  Study(  # on validation text 1e-3 was best to "full", and 3e-3 and 1e-2 alike to adapters
    "tuning",
    arms={ONE: {}},
    config={"split": "validation", "methods": ",".join(TUNING)},
    seeds=(100, 101),
    plot=[f"validation/{method}" for method in TUNING],
    optional=True,
  ),
]

if __name__ == "__main__":
  main(__name__)
