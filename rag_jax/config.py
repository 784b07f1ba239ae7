"""Every setting of an experiment: its name, type, default and unit.

A file in configs/ returns a `Config`; the command line overrides it. A field
says here which values it takes: `choice` lists texts, `number` has a range.
config_rules.py checks them, and has the rules between fields. config_json.py
reads and writes a config as JSON.

A setting whose comment has "[checkpoint]" is what the checkpoints of
`encoder.init_from` and `generator.init_from` say, unless somebody sets it; the
default given here is that of a fresh model. weights/init_from.py has the rules.
"""

# No `from __future__ import annotations` here: ml_collections reads the field
# types at run time to parse command-line overrides. Choices are `str` fields
# for the same reason: it cannot override a `Literal`.

import dataclasses
from typing import Any, TypeVar, cast


def choice(default: str, *others: str) -> Any:
  """Returns a field that is one of these texts."""
  choices = (default, *others)
  return dataclasses.field(default=default, metadata={"choices": choices})


def number(default: int | float, **limits: Any) -> Any:
  """Returns a field whose number has limits; without any it is at least 0.

  Args:
    default: of the field.
    **limits: `least` and `most` are themselves allowed, `above` and `below` are
      not. `why` is the message about a number outside of these limits.
  """
  return dataclasses.field(default=default, metadata=limits)


# "gelu" is exact, "gelu_new" its approximation by tanh.
_ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "tanh")


_T = TypeVar("_T", bound="_Settings")


class _Settings:
  """Knows which of its fields were set, even if to their defaults."""

  __slots__ = ("_set",)
  _set: set[str] | frozenset[str]  # frozen: no field can be set

  def __post_init__(self):
    """Forgets what __init__ set: a default there is no choice."""
    object.__setattr__(self, "_set", set())

  def __setattr__(self, name: str, value: Any):
    chosen = getattr(self, "_set", None)
    if isinstance(chosen, frozenset):
      raise dataclasses.FrozenInstanceError(
        f"{name} is part of a model. Change it in the config, and build the"
        " model again."
      )
    object.__setattr__(self, name, value)
    if chosen is not None:
      chosen.add(name)

  def __setstate__(self, state: tuple[None, dict[str, Any]]):
    """Copies without setting; the set itself is never shared."""
    for name, value in state[1].items():
      value = type(value)(value) if name == "_set" else value
      object.__setattr__(self, name, value)

  def frozen(self: _T, **changes: Any) -> _T:
    """Returns a copy with `changes` that nobody can change: of a model."""
    copy: Any = dataclasses.replace(cast(Any, self), **changes)
    object.__setattr__(copy, "_set", frozenset())
    return copy

  def is_set(self, name: str) -> bool:
    """Returns whether field `name` was assigned, or is not its default."""
    default = getattr(type(self)(), name)
    return name in self._set or getattr(self, name) != default


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class DataConfig(_Settings):
  """What is read, and the fixed lengths that it is cut or padded to."""

  # Passages: "world_facts" (bundled), a .jsonl file of id, title, text, or a
  # DPR .tsv file (psgs_w100.tsv): read into memory. Or a passage store, such as
  # the folder passages/ of what tools/build_index.py writes: of any size.
  passages: str = "world_facts"
  # Local folder for the token ids of a passage store, which take 3 to 5 bytes
  # a token of passage_length; runs can share it. "" = in the workdir.
  token_cache: str = ""
  # Questions: "world_facts" (bundled), a directory with train.jsonl,
  # validation.jsonl and test.jsonl, or "tfds:NAME".
  questions: str = "world_facts"
  # Passages per question (K); 0 = closed book. [checkpoint] of RAG
  n_docs: int = 4
  # [checkpoint] 128, 256, 300 and 25, or what it says, as far as its positions
  # go.
  question_length: int = number(32, least=1)  # encoder tokens of a question (Q)
  # Encoder tokens of title + passage (L).
  passage_length: int = number(
    64,
    least=4,
    why="leaves no room for a passage between its special tokens; use at"
    " least 4.",
  )
  # Generator tokens of question + passage (C).
  context_length: int = number(
    96,
    least=8,
    why="leaves no room for a question and a passage; use at least 8.",
  )
  target_length: int = number(16, least=1)  # generator tokens of an answer (T)
  # What the generator reads. "question_first" never cuts the question; "rag" is
  # Hugging Face's: context_prefix title title_sep text doc_sep question, cut on
  # the right. [checkpoint] of RAG, and so the next three
  context_style: str = choice("question_first", "rag")
  context_prefix: str = ""
  title_sep: str = " / "
  doc_sep: str = " // "
  # Share of the training questions whose answer is changed into another one,
  # there and in their documents: the generator has to read. What other training
  # questions ask of these documents changes there as often.
  substitute_answers: float = number(0.0, most=1)
  # Share whose subject, the title of a document that the question names, is
  # changed into another title, there and in the documents. The retriever reads
  # it too, if it learns to embed passages and no BM25 scores are added.
  substitute_subjects: float = number(0.0, most=1)
  # Share of the training questions that are read as people type them: lower
  # case, "what's", no question mark (data/informal.py).
  informal_questions: float = number(0.0, most=1)


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class TokenizerConfig(_Settings):
  """Where the token ids come from."""

  # A saved tokenizer for encoder and generator. "" takes each checkpoint's own;
  # for a fresh model, a byte-level BPE is trained on the corpus, for both.
  path: str = ""
  vocab_size: int = 4096  # of the one that is trained
  # Where one is trained: "uncased" trains another for the retriever, without
  # case and accents, as BERT's: "france" finds France.
  retriever: str = choice("same", "uncased")


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class EncoderConfig(_Settings):
  """The retriever: question and passage towers, and how they are compared.

  With `init_from`, what describes the architecture (up to `projection_dim`) is
  read from the checkpoint.
  """

  # Weights to start from: a directory or "hf:ORG/NAME" of a DPR, BERT,
  # sentence-transformers or RAG checkpoint. "" starts fresh.
  init_from: str = ""
  passage_init_from: str = ""  # of the passage tower; "": as init_from
  vocab_size: int = 0  # rows of the embedding table; 0: the tokenizer's ids
  max_positions: int = 0  # rows of the position table; 0: the longest input
  num_layers: int = number(0, least=0, most=1000)  # 0: pooled embeddings
  embed_dim: int = number(128, least=1)  # D
  num_heads: int = number(4, least=1)
  mlp_dim: int = number(512, least=1)
  activation: str = choice(*_ACTIVATIONS)
  norm_eps: float = 1e-12  # BERT's
  num_token_types: int = 0  # BERT has 2, of which every token gets the first
  pooler: bool = False  # BERT's pooler exists: tanh of a dense layer on CLS
  pooling: str = choice("learned", "cls", "mean", "max", "pooler")
  normalize: bool = False  # divide embeddings by their L2 norm
  projection_dim: int = 0  # R; 0 = no projection, R = D
  tied: bool = True  # one tower embeds questions and passages
  train_passage_encoder: bool = True  # False: passages keep their embeddings
  # doc_scores = scale * inner product [checkpoint] 1
  score_scale: float = number(
    1.0, above=0, why="makes every document score 0; use 1.0."
  )
  learn_score_scale: bool = False
  # Of what layers add, and of embeddings [checkpoint]
  dropout: float = number(0.0, below=1)
  # Of attention's weights [checkpoint]
  attention_dropout: float = number(0.0, below=1)


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class TransformerConfig(_Settings):
  """What all layers of a transformer have in common. Defaults are BART's."""

  embed_dim: int = number(128, least=1)  # D
  num_heads: int = number(4, least=1)
  head_dim: int = 0  # H; 0: embed_dim / num_heads
  mlp_dim: int = number(256, least=1)
  activation: str = choice(*_ACTIVATIONS)
  gated: bool = False  # T5 v1.1: the MLP's activation multiplies
  norm: str = choice("post", "pre")  # after or before the block
  norm_kind: str = choice("layer", "rms")
  norm_eps: float = 1e-5
  use_bias: bool = True  # of dense layers
  relative_buckets: int = 0  # T5's relative positions; 0: none
  # Beyond it, all share the last bucket.
  relative_max_distance: int = number(128, least=1)
  scale_attention: bool = True  # divide its logits by sqrt(H); T5 does not
  # Of what layers add, and of embeddings [checkpoint].
  dropout: float = number(0.0, below=1)
  # Of attention's weights [checkpoint].
  attention_dropout: float = number(0.0, below=1)
  # Between the MLP's layers [checkpoint].
  activation_dropout: float = number(0.0, below=1)

  @property
  def head_size(self) -> int:
    """H, also where `head_dim` leaves it open."""
    return self.head_dim or self.embed_dim // self.num_heads


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class GeneratorConfig(TransformerConfig):
  """The encoder-decoder that writes the answer. Defaults are BART's choices.

  With `init_from`, all that describes the architecture is read from the
  checkpoint. `init` and `position_init` are of a fresh one.
  """

  # Weights to start from: a directory or "hf:ORG/NAME" of a BART, T5 or RAG
  # checkpoint. "" starts fresh.
  init_from: str = ""
  vocab_size: int = 0  # rows of the embedding table; 0: the tokenizer's ids
  num_layers: int = number(2, least=0, most=1000)  # in the encoder
  num_decoder_layers: int = number(0, least=0, most=1000)  # 0: as many
  num_decoder_heads: int = 0  # 0: as many
  decoder_mlp_dim: int = 0  # 0: as wide
  embedding_norm: bool = True  # BART's layernorm_embedding
  scale_embedding: bool = False  # multiply embeddings by sqrt(D)
  positions: str = choice("learned", "none")  # absolute ones
  position_offset: int = 2  # BART's position 0 is row 2 of the table
  # Rows of the table, without the offset.
  max_positions: int = number(1024, least=1)
  position_init: str = choice("normal", "sinusoid")
  # T5: one table for all layers of the encoder, another for the decoder. False:
  # one a layer, in the encoder alone.
  relative_shared: bool = False
  tied_output: bool = True  # logits are inner products with the embeddings
  scale_output: bool = False  # divide the tied output by sqrt(D), as T5 v1.0
  logits_bias: bool = True  # BART's final_logits_bias
  # Read before the first token; -1: the end token.
  decoder_start_id: int = number(-1, least=-1)
  # A pointer over the context: the next token is written, or copied from where
  # the last one was copied (models/pointer.py). Hugging Face has no form of it.
  pointer: bool = False
  # "copy": attention starts as an induction head, so that a generator trained
  # from scratch quotes its documents from the first steps on.
  init: str = choice("normal", "copy")
  # Parameters below "generator/" that do not learn, because they are constants
  # in the original: of BART its bias, of Pegasus its sinusoids [checkpoint].
  # () trains all.
  fixed: tuple[str, ...] = ("final_logits_bias",)


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class OptimizerConfig(_Settings):
  """AdamW."""

  peak_lr: float = 3e-5  # of the generator [checkpoint] 3e-5
  retriever_lr: float = 3e-5  # of the retriever, at its peak [checkpoint] 3e-5
  # Of the two weights of index.hybrid, at its peak: 0.01 changes a weight by at
  # most about 1 % a step, whatever its size.
  hybrid_lr: float = 1e-2
  warmup_steps: int = 500
  schedule: str = choice("linear", "constant", "cosine")
  end_lr_ratio: float = 0.0  # of the peak, at the last step
  b1: float = number(0.9, below=1)
  b2: float = number(0.999, below=1)
  eps: float = 1e-8
  weight_decay: float = 0.0  # on matrices; never on biases, norms, scales
  clip_norm: float = 0.0  # of the global gradient; 0.0 turns clipping off
  # Parameters that stay as they are: a parameter is frozen if its path, for
  # instance "generator/encoder/layer_0/mlp/up/kernel", starts with one of
  # these.
  freeze: tuple[str, ...] = ()


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class WarmupConfig(_Settings):
  """The cold start: learning from the passages alone, before any question.

  Inverse cloze with the in-batch contrastive loss teaches the retriever, span
  infilling teaches the generator to quote. A stage of its own, with its own
  optimizer state and its metrics under `warmup/`.
  """

  num_steps: int = 0  # 0 leaves the stage out
  batch_size: int = number(64, least=1)  # passages
  peak_lr: float = 2e-3  # of the generator [checkpoint] 3e-5
  retriever_lr: float = 2e-3  # [checkpoint] 3e-5
  warmup_steps: int = 20
  contrastive_weight: float = 1.0  # against 1.0 for span infilling
  # Masked; whole words, so that answers end at words.
  span_max_words: int = number(3, least=1)
  # Of the span; a longer word is cut.
  span_max_tokens: int = number(10, least=1)
  # Around the span: what stands for the question.
  window_tokens: int = number(16, least=1)


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class IndexConfig(_Settings):
  """How passages are searched."""

  # "auto": scann if installed. "device" lies in the accelerators' memory.
  kind: str = choice("auto", "exact", "scann", "device")
  path: str = ""  # a built index to open; "" builds it from the passages
  # Between rebuilds while the passage encoder learns.
  refresh_steps: int = number(50, least=1)
  # Above 0, with kind "device", the step itself searches, and embeds about so
  # many passages again, in turn, instead of rebuilding. 0: searched between
  # steps.
  refresh_rows: int = 0
  swap_steps: int = 5  # from the start of a rebuild to its first use
  embed_batch_size: int = number(512, least=1)  # passages embedded at a time
  # More passages are several searchers on the host, built one after the other;
  # 0: one of all.
  passages_per_shard: int = 0
  # Refuse to train or evaluate with an index that finds less, from 0 to 1: by
  # its certificate at data.n_docs, or among the top 5 for the questions that
  # are measured; 0.0 never refuses. tools/train.py: also --min_index_recall.
  min_recall: float = number(0.0, most=1)
  # Search by words too (BM25): p(z|x) = softmax(a * inner product + b * BM25
  # score), whose two weights the marginal likelihood trains.
  hybrid: bool = False
  hybrid_dense: float = 1.0  # a before the first step
  hybrid_bm25: float = 0.1  # b; BM25 scores are often 5 to 30
  # A saved BM25 index to open; "" builds it from the passages at each start, at
  # some 5,000 passages of 100 words a second.
  bm25_path: str = ""
  # For what a word is: 2 takes "STRASSE" for "straße" and "1,000" for "1000";
  # 1 is that of runs that began before there was a choice.
  word_rule: int = number(
    2,
    least=1,
    most=2,
    why="is no rule for what a word is; expected 2, or 1, that of older runs.",
  )
  # ScaNN's own settings; below `scann_tree_passages` it scores every passage.
  # rag_jax/retrieval/tuner.py finds the fastest for a recall.
  scann_tree_passages: int = 20_000
  scann_num_leaves: int = 0  # 0: the square root of the number of passages
  scann_leaves_to_search: int = 0  # 0: a tenth of the leaves
  # Each passage in a second leaf too (SOAR, arXiv:2404.00774); the weight of
  # how orthogonal its two residuals are, 0.0: in one leaf.
  scann_soar_lambda: float = 0.0
  scann_soar_overretrieve: float = 0.0  # 0.0: ScaNN's own, else above 1
  # Leaves and codes are of so many principal components (PCA) in place of all
  # dimensions: half of them is twice as fast, and finds a little less. 0: off.
  scann_pca_dims: int = 0
  # Dimensions that share a 4-bit code.
  scann_dims_per_block: int = number(2, least=1)
  # How much an error along a passage counts more than one across it (Guo et
  # al. 2020, T of section 3.2); 0.0: both alike.
  scann_anisotropic_threshold: float = number(
    0.2, below=1, why="must be below 1; 0.0 turns it off."
  )
  # Candidates scored again, from larger numbers, which are:
  scann_reorder: int = number(100, least=1)
  scann_reorder_dtype: str = choice("float32", "bfloat16", "int8")
  # What the accelerators hold; int8 has a scale a passage.
  device_storage: str = choice("float32", "bfloat16", "int8")
  # 1.0 is exact; below, approx_max_k aims at it.
  device_recall_target: float = number(
    1.0,
    above=0,
    most=1,
    why="must be above 0 and at most 1, which is exact.",
  )
  device_chunk_passages: int = 65_536  # scored at a time; 0: a device's all


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class MeshConfig(_Settings):
  """How devices are arranged. data * fsdp * tensor = number of devices."""

  data: int = 0  # replicas of the model; 0: all devices that are left
  # Parts that parameters and batch are split into.
  fsdp: int = number(1, least=1)
  # Parts that heads, MLPs and vocabulary are split into.
  tensor: int = number(1, least=1)


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class TrainConfig(_Settings):
  """The main stage: maximising the marginal likelihood of the answers."""

  num_steps: int = 1000
  batch_size: int = number(32, least=1)  # questions, over all hosts
  log_steps: int = number(10, least=1)
  validate_steps: int = 100  # 0: only at the end
  checkpoint_steps: int = 100  # 0: only at the end
  # The last few; the best is kept beside them.
  keep_checkpoints: int = number(2, least=1)
  compute_dtype: str = choice("auto", "float32", "bfloat16")
  # Rows of the vocabulary whose logits exist at a time; 0: all of them. Smaller
  # needs less memory, and computes logits twice.
  vocab_chunk: int = 0


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class DecodingConfig(_Settings):
  """How answers are written, in validation, evaluation and serving."""

  # "auto" is "rag_token" or "rag_sequence", as `loss` is. The latter is
  # thorough: each document's candidates are scored under all. "fid" reads all
  # documents at once, "single" the first alone.
  mode: str = choice(
    "auto", "rag_token", "rag_sequence", "rag_sequence_fast", "fid", "single"
  )
  # 1 is greedy [checkpoint], and so the next three.
  num_beams: int = number(1, least=1)
  length_penalty: float = 1.0  # scores are divided by length ** this
  no_repeat_ngram_size: int = 0  # 0 allows repetition
  min_new_tokens: int = 0  # before the end token
  # What else the generation_config.json of the checkpoint says, as JSON
  # [checkpoint]; "{}" leaves it out. Without a length in it, answers have up to
  # data.target_length tokens.
  generation_config: str = ""


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class EvalConfig(_Settings):
  """Measuring: validation while training, the test split at the end."""

  batch_size: int = number(64, least=1)  # questions
  num_validation: int = 256  # validation questions used; 0: all
  num_test: int = 0  # test questions used; 0: all
  # When two answers are equal, and when a passage holds one: evaluation/
  # answers.py says what each does. "squad" is comparable with papers to the
  # letter, "numbers" compares numbers as such; with "regex" answers are regular
  # expressions, as CuratedTREC's.
  answers: str = choice("multilingual", "squad", "numbers", "regex")
  # Whose articles are left out of answers; "" leaves all in. Not for "squad".
  language: str = choice("en", "es", "de", "vi", "ar", "")


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class Config(_Settings):
  """One experiment."""

  seed: int = number(0, most=2**63 - 1)  # what a random key takes
  # Weights of retriever and generator to start from: the workdir of a run that
  # has ended, a model directory that tools/convert_hf.py wrote, or a RAG
  # checkpoint. The same as init_from of both; these win.
  init_from: str = ""
  loss: str = choice("rag_token", "rag_sequence")  # [checkpoint] of RAG
  # Of the targets, given each document. [checkpoint] of RAG
  label_smoothing: float = number(0.0, below=1)
  # Hugging Face's loss with its defects (losses_hf.py), to reproduce a
  # fine-tuning. It needs the logits of the whole vocabulary.
  hf_loss: bool = False
  # With hf_loss and "rag_sequence": a first token that is the begin token in
  # all targets of a batch is not scored. [checkpoint] of RAG
  exclude_bos_score: bool = False
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
  decoding: DecodingConfig = dataclasses.field(default_factory=DecodingConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
