"""Every setting of an experiment: its name, type, default and unit.

In: a `Config` that a file in configs/ returns, with overrides of the command
line. Out: the same `Config`, validated. Its JSON is in config_json.py.
"""

# No `from __future__ import annotations` here: ml_collections reads the field
# types at run time to parse command-line overrides. Choices are `str` fields
# for the same reason: it cannot override a `Literal`.

from collections.abc import Collection, Iterator
import dataclasses
import difflib
import math
import typing
from typing import Any


def _choice(default: str, *others: str) -> Any:
  choices = (default, *others)
  return dataclasses.field(default=default, metadata={"choices": choices})


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class DataConfig:
  """What is read, and the fixed lengths that it is cut or padded to."""

  # Passages: "world_facts" (bundled), a .jsonl file of id, title, text, or a
  # DPR .tsv file (psgs_w100.tsv).
  passages: str = "world_facts"
  # Questions: "world_facts" (bundled), a directory with train.jsonl,
  # validation.jsonl and test.jsonl, or "tfds:NAME".
  questions: str = "world_facts"
  n_docs: int = 4  # passages per question (K); 0 = closed book
  question_length: int = 32  # encoder tokens of a question (Q)
  passage_length: int = 64  # encoder tokens of title + passage (L)
  context_length: int = 96  # generator tokens of question + passage (C)
  target_length: int = 16  # generator tokens of an answer (T)
  # Share of the training questions whose answer is changed into another one,
  # there and in their documents: the generator has to read.
  substitute_answers: float = 0.0


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class TokenizerConfig:
  """Where the token ids come from. One tokenizer for encoder and generator."""

  path: str = ""  # a saved tokenizer; "" trains a byte-level BPE on the corpus
  vocab_size: int = 4096  # of the one that is trained


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class EncoderConfig:
  """The retriever: question and passage towers, and how they are compared."""

  num_layers: int = 0  # 0: pooled token embeddings
  embed_dim: int = 128  # D
  num_heads: int = 4
  mlp_dim: int = 512
  pooling: str = _choice("learned", "cls", "mean")
  projection_dim: int = 0  # R; 0 = no projection, R = D
  normalize: bool = False  # divide embeddings by their L2 norm
  tied: bool = True  # one tower embeds questions and passages
  train_passage_encoder: bool = True  # False: passages keep their embeddings
  score_scale: float = 1.0  # doc_scores = scale * inner product
  learn_score_scale: bool = False
  dropout: float = 0.0


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class GeneratorConfig:
  """The encoder-decoder that writes the answer. Defaults are BART's choices."""

  num_layers: int = 2  # in the encoder, and as many in the decoder
  embed_dim: int = 128  # D
  num_heads: int = 4
  mlp_dim: int = 256
  activation: str = _choice("gelu", "relu")
  norm: str = _choice("post", "pre")  # layer norm after or before the block
  embedding_norm: bool = True  # BART's layernorm_embedding
  scale_embedding: bool = False  # multiply embeddings by sqrt(D)
  position_offset: int = 2  # BART's position 0 is row 2 of the table
  max_positions: int = 1024  # rows of the table, without the offset
  position_init: str = _choice("normal", "sinusoid")
  relative_buckets: int = 0  # T5's relative positions, in the encoder; 0: none
  # "copy": attention starts as an induction head, so that a generator trained
  # from scratch quotes its documents from the first steps on.
  init: str = _choice("normal", "copy")
  dropout: float = 0.0


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class OptimizerConfig:
  """AdamW."""

  peak_lr: float = 3e-5  # of the generator
  retriever_lr: float = 3e-5  # of the retriever, at its peak
  warmup_steps: int = 500
  schedule: str = _choice("linear", "constant", "cosine")
  end_lr_ratio: float = 0.0  # of the peak, at the last step
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0  # on matrices; never on biases, norms, scales
  clip_norm: float = 0.0  # of the global gradient; 0.0 turns clipping off
  # Parameters that stay as they are: a parameter is frozen if its path, for
  # instance "generator/encoder/layer_0/mlp/up/kernel", starts with one of
  # these.
  freeze: tuple[str, ...] = ()


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class WarmupConfig:
  """The cold start: learning from the passages alone, before any question.

  Inverse cloze with the in-batch contrastive loss teaches the retriever, span
  infilling teaches the generator to quote. A stage of its own, with its own
  optimizer state and its metrics under `warmup/`.
  """

  num_steps: int = 0  # 0 leaves the stage out
  batch_size: int = 64  # passages
  peak_lr: float = 2e-3  # of the generator
  retriever_lr: float = 2e-3
  warmup_steps: int = 20
  contrastive_weight: float = 1.0  # against 1.0 for span infilling
  span_max_words: int = 3  # masked; whole words, so that answers end at words
  span_max_tokens: int = 10  # of the span; a longer word is cut
  window_tokens: int = 16  # around the span: what stands for the question


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class IndexConfig:
  """How passages are searched."""

  kind: str = _choice("auto", "exact", "scann")  # auto: scann if installed
  path: str = ""  # a built index to open; "" builds it from the passages
  refresh_steps: int = 50  # between rebuilds while the passage encoder learns
  swap_steps: int = 5  # from the start of a rebuild to its first use
  embed_batch_size: int = 512  # passages embedded at a time
  # ScaNN's own settings; below `scann_tree_passages` it scores every passage.
  scann_tree_passages: int = 20_000
  scann_num_leaves: int = 0  # 0: the square root of the number of passages
  scann_leaves_to_search: int = 0  # 0: a tenth of the leaves
  scann_reorder: int = 100  # candidates scored again in float32


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class MeshConfig:
  """How devices are arranged. data * fsdp * tensor = number of devices."""

  data: int = 0  # replicas of the model; 0: all devices that are left
  fsdp: int = 1  # parts that parameters and batch are split into
  tensor: int = 1  # parts that heads, MLPs and vocabulary are split into


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class TrainConfig:
  """The main stage: maximising the marginal likelihood of the answers."""

  num_steps: int = 1000
  batch_size: int = 32  # questions, over all hosts
  log_steps: int = 10
  validate_steps: int = 100  # 0: only at the end
  checkpoint_steps: int = 100  # 0: only at the end
  keep_checkpoints: int = 2  # the last few; the best is kept beside them
  compute_dtype: str = _choice("auto", "float32", "bfloat16")


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class EvalConfig:
  """Measuring: validation while training, the test split at the end."""

  batch_size: int = 64  # questions
  num_validation: int = 256  # validation questions used; 0: all
  num_test: int = 0  # test questions used; 0: all
  min_index_recall: float = 0.0  # refuse to report below; 0.0 never refuses


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class Config:
  """One experiment."""

  seed: int = 0
  loss: str = _choice("rag_token", "rag_sequence")
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  tokenizer: TokenizerConfig = dataclasses.field(
    default_factory=TokenizerConfig
  )
  encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
  generator: GeneratorConfig = dataclasses.field(
    default_factory=GeneratorConfig
  )
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  warmup: WarmupConfig = dataclasses.field(default_factory=WarmupConfig)
  index: IndexConfig = dataclasses.field(default_factory=IndexConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


# Numbers that must be positive, by the last part of their name; the others may
# be 0, which mostly turns a thing off.
_AT_LEAST_ONE = frozenset({
  "embed_dim", "num_heads", "mlp_dim", "question_length", "passage_length",
  "context_length", "target_length", "batch_size", "log_steps",
  "keep_checkpoints", "max_positions", "refresh_steps", "embed_batch_size",
  "fsdp", "tensor", "span_max_words", "span_max_tokens", "window_tokens",
  "scann_reorder",
})  # fmt: skip


def fields(
  config: Any, prefix: str = ""
) -> Iterator[tuple[str, dataclasses.Field, Any]]:
  """Yields (dotted name, field, value) of every setting."""
  for field in dataclasses.fields(config):
    name, value = prefix + field.name, getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from fields(value, name + ".")
    else:
      yield name, field, value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
  """Returns what is wrong with `value` given for `name`, or ""."""
  if value in choices:
    return ""
  close = difflib.get_close_matches(str(value), choices, n=1)
  hint = f" Did you mean {close[0]!r}?" if close else ""
  return f"{name}={value!r} is not one of {sorted(choices)}.{hint}"


def _type_problem(name: str, field: dataclasses.Field, value: Any) -> str:
  """Returns what is wrong with the type or choice of `value`, or ""."""
  if "choices" in field.metadata:
    return check_choice(name, value, field.metadata["choices"])
  if typing.get_origin(field.type) is tuple:
    good = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    return "" if good else f"{name}={value!r} is not a tuple of str."
  accepted, expected = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "a str"),
  }[field.type]
  good = isinstance(value, accepted)
  good &= field.type is bool or not isinstance(value, bool)
  return "" if good else f"{name}={value!r} is not {expected}."


def _range_problem(name: str, field: dataclasses.Field, value: Any) -> str:
  """Returns what is wrong with the size of a number, or ""."""
  if field.type not in (int, float):
    return ""
  if not math.isfinite(value):
    return f"{name}={value} is not a finite number."
  least = 1 if name.rpartition(".")[2] in _AT_LEAST_ONE else 0
  return "" if value >= least else f"{name}={value} must be at least {least}."


def _cross_problems(c: Config) -> Iterator[str]:
  """Yields the settings that contradict one another."""
  for name, part in (("encoder", c.encoder), ("generator", c.generator)):
    if part.embed_dim % part.num_heads:
      yield (
        f"{name}.embed_dim={part.embed_dim} must be a multiple of"
        f" {name}.num_heads={part.num_heads}."
      )
    if part.dropout >= 1.0:
      yield f"{name}.dropout={part.dropout} must be below 1."
  for name in ("b1", "b2"):
    if getattr(c.optimizer, name) >= 1.0:
      yield f"optimizer.{name}={getattr(c.optimizer, name)} must be below 1."
  longest = max(c.data.context_length, c.data.target_length)
  if longest > c.generator.max_positions:
    yield (
      f"generator.max_positions={c.generator.max_positions} is below the"
      f" longest input (data.context_length={c.data.context_length},"
      f" data.target_length={c.data.target_length})."
    )
  g = c.generator
  if 0 < g.relative_buckets < 8 or g.relative_buckets % 2:
    yield (
      f"generator.relative_buckets={g.relative_buckets} must be 0 (none) or an"
      " even number from 8 on: half of them lie behind, half ahead."
    )
  if g.init == "copy" and (
    g.norm != "pre" or g.embedding_norm or not g.relative_buckets
  ):
    yield (
      "generator.init='copy' copies only with generator.norm='pre',"
      " generator.embedding_norm=False and generator.relative_buckets=32."
    )
  if c.data.substitute_answers > 1.0:
    yield (
      f"data.substitute_answers={c.data.substitute_answers} must be at most 1."
    )
  if c.data.passage_length < 4:
    yield (
      f"data.passage_length={c.data.passage_length} leaves no room for a"
      " passage between its special tokens; use at least 4."
    )
  if not c.encoder.score_scale:
    yield "encoder.score_scale=0.0 makes every document score 0; use 1.0."
  if c.data.context_length < 8:
    yield (
      f"data.context_length={c.data.context_length} leaves no room for a"
      " question and a passage; use at least 8."
    )
  if c.warmup.num_steps and (
    c.warmup.span_max_tokens + 1 > c.data.target_length
  ):
    yield (
      f"warmup.span_max_tokens={c.warmup.span_max_tokens} and the end token do"
      f" not fit in data.target_length={c.data.target_length}."
    )
  if not c.encoder.train_passage_encoder and c.encoder.tied:
    yield (
      "encoder.train_passage_encoder=False keeps the passage embeddings as"
      " they are, but encoder.tied=True moves them with the question tower."
      " Set encoder.tied=False."
    )
  if c.index.path and c.encoder.train_passage_encoder:
    yield (
      f"index.path={c.index.path!r} is a fixed index, but"
      " encoder.train_passage_encoder=True makes it stale. Set"
      " encoder.train_passage_encoder=False, or index.path=''."
    )
  if not 0 < c.index.swap_steps < c.index.refresh_steps:
    yield (
      f"index.swap_steps={c.index.swap_steps} must be between 1 and"
      f" index.refresh_steps={c.index.refresh_steps} (exclusive), so that one"
      " rebuild is in use before the next begins."
    )
  if c.eval.min_index_recall > 1.0:
    yield f"eval.min_index_recall={c.eval.min_index_recall} must be at most 1."
  if c.tokenizer.vocab_size < 512 and not c.tokenizer.path:
    yield (
      f"tokenizer.vocab_size={c.tokenizer.vocab_size} is too small: 256 bytes"
      " and the special tokens come first. Use at least 512."
    )


def validate(config: Any) -> Config:
  """Returns `config` if every setting is possible.

  Raises:
    TypeError: `config` is no `Config`.
    ValueError: names every violation, with its value and what was expected.
  """
  if not isinstance(config, Config):
    raise TypeError(
      f"Expected a rag_jax.config.Config, got {type(config).__name__}. Does"
      " get_config() of the --config file return one?"
    )
  problems = [
    f"{name} is {getattr(config, name)!r}, expected a {section.__name__}."
    for name, section in typing.get_type_hints(Config).items()
    if section not in (int, str) and type(getattr(config, name)) is not section
  ]
  for name, field, value in fields(config) if not problems else ():
    problem = _type_problem(name, field, value)
    problems.append(problem or _range_problem(name, field, value))
  problems = [p for p in problems if p]
  # Rules between settings read numbers: only once each is one.
  problems += list(_cross_problems(config)) if not problems else []
  if problems:
    raise ValueError("The config is not valid:\n  " + "\n  ".join(problems))
  return config
