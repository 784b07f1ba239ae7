"""Every setting of an experiment: its name, type, default and unit.

A file in configs/ returns a `Config`; the command line overrides it. A field
says here which values it takes: `choice` lists texts, `number` has a range.
config_rules.py checks them, and has the rules between fields. config_json.py
reads and writes a config as JSON.

A setting whose comment has "[checkpoint]" is read from the checkpoints of
`encoder.init_from` and `generator.init_from`, unless it is set; the default
here is that of a fresh model. weights/init_from.py has the rules.
"""

# No `from __future__ import annotations` here: ml_collections reads the field
# types at run time to parse command-line overrides. Choices are `str` fields
# for the same reason: it cannot override a `Literal`.

import dataclasses

from rag_jax.config_models import CausalConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.config_models import LoraConfig
from rag_jax.settings import Settings
from rag_jax.settings import choice
from rag_jax.settings import number


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class DataConfig(Settings):
  """The data, and the fixed lengths that texts are cut or padded to."""

  # Passages: "world_facts" (bundled), a .jsonl file of id, title, text, or a
  # DPR .tsv file (psgs_w100.tsv), which are read into memory; or a passage
  # store of any size, such as the folder passages/ of rag-jax build-index.
  passages: str = "world_facts"
  # Expected number; a run refuses another, and plans need it. 0: any.
  num_passages: int = 0
  # Local folder for the token ids of a passage store, which take 3 to 5 bytes
  # per token of passage_length; runs can share it. "" = in the workdir.
  token_cache: str = ""
  # Questions: "world_facts" (bundled), "world_facts_dialogue" (the same, and
  # dialogues made of them), a directory with train.jsonl,
  # validation.jsonl and test.jsonl, or "tfds:NAME".
  questions: str = "world_facts"
  # Passages per question (K); 0 = closed book. [checkpoint] of RAG
  n_docs: int = 4
  # The next four: [checkpoint] 128, 256, 300 and 25, or the lengths it names,
  # limited by its positions.
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
  # the right; "prompt" is a text that the section `prompt` describes. This and
  # the next three: [checkpoint] of RAG
  context_style: str = choice("question_first", "rag", "prompt")
  context_prefix: str = ""
  title_sep: str = " / "
  doc_sep: str = " // "
  # Share of the training questions whose answer is replaced by another one,
  # also in their documents, so that the generator has to read them. Facts of
  # these documents that other training questions ask for are replaced as often.
  substitute_answers: float = number(0.0, most=1)
  # Share of the training questions whose subject (the title of a document that
  # the question names) is replaced by another title, also in the documents. The
  # retriever reads the new title too, if it learns to embed passages and no
  # BM25 scores are added.
  substitute_subjects: float = number(0.0, most=1)
  # Share of the training questions that are changed to how people type them:
  # lower case, "what's", no question mark (data/informal.py).
  informal_questions: float = number(0.0, most=1)


_TEMPLATE = """\
{% for passage in passages -%}
{{ passage.title }}
{{ passage.text }}

{% endfor -%}
Question: {{ question }}
Answer:"""


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class PromptConfig(Settings):
  """The text that the generator reads, with data.context_style="prompt"."""

  # A Jinja template of `question` and `passages`, each with a `title` and a
  # `text`: one of them, or all data.n_docs with loss="concatenate". `history`
  # has the earlier turns of a dialogue, each with a `speaker` ("user" or
  # "assistant") and a `text`; in a template without it they are messages of the
  # chat, or else stand before the question.
  template: str = _TEMPLATE
  # Examples before the question, from a file of JSON lines: {"question": ...,
  # "answer": ..., "passages": [{"title": ..., "text": ...}]}. "": none.
  shots: str = ""
  shot_separator: str = "\n\n"  # after each example
  # Put prompt and examples into the chat template of the tokenizer, as messages
  # of user and assistant.
  chat: bool = False
  system: str = ""  # the system message of a chat; "": none
  before_answer: str = " "  # text between the prompt and an answer
  # An answer also ends at this text, which one token has to hold; "": only at
  # the end token. "\n" is for models that were not trained to end answers.
  stop: str = ""


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class DialogueConfig(Settings):
  """How a question is read that follows other turns of a dialogue."""

  # Earlier turns that the generator reads, the last ones; -1: all. They stand
  # before the question; where there is no room, the oldest go first.
  turns: int = number(-1, least=-1)
  retriever_turns: int = number(-1, least=-1)  # -1: as many as the generator
  # The most generator tokens of earlier turns, so that they leave room for
  # passages; 0: half of data.context_length.
  history_length: int = 0
  # Texts before the turns of the one who asks, and of the one who answers; and
  # between turns. A chat (prompt.chat) has messages instead.
  user: str = ""
  assistant: str = ""
  separator: str = "\n"


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class TokenizerConfig(Settings):
  """Where the token ids come from."""

  # A saved tokenizer for encoder and generator. "" takes the tokenizer of each
  # checkpoint; for a fresh model it trains a byte-level BPE on the corpus.
  path: str = ""
  vocab_size: int = 4096  # of a tokenizer that is trained
  # If tokenizers are trained: "uncased" trains a second one for the retriever,
  # without case and accents as in BERT, so that "france" finds France.
  retriever: str = choice("same", "uncased")


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class OptimizerConfig(Settings):
  """AdamW, or Adafactor, which needs almost no memory for its state."""

  # "adamw" keeps two numbers per parameter; "adafactor" (arXiv:1804.04235) one
  # per row and per column of a matrix, and no momentum.
  kind: str = choice("adamw", "adafactor")
  momentum_dtype: str = choice("float32", "bfloat16")  # AdamW's first moment
  peak_lr: float = 3e-5  # of the generator [checkpoint] 3e-5
  retriever_lr: float = 3e-5  # of the retriever, at its peak [checkpoint] 3e-5
  # Of the two weights of index.hybrid, at its peak: 0.01 changes a weight by at
  # most about 1 % per step, whatever its size.
  hybrid_lr: float = 1e-2
  warmup_steps: int = 500
  schedule: str = choice("linear", "constant", "cosine")
  end_lr_ratio: float = 0.0  # of the peak, at the last step
  b1: float = number(0.9, below=1)  # this and the next two: of AdamW
  b2: float = number(0.999, below=1)
  eps: float = 1e-8
  weight_decay: float = 0.0  # on matrices; never on biases, norms, scales
  clip_norm: float = 0.0  # of the global gradient; 0.0 turns clipping off
  # A parameter is not trained if its path, for instance
  # "generator/encoder/layer_0/mlp/up/kernel", starts with one of these.
  freeze: tuple[str, ...] = ()


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class WarmupConfig(Settings):
  """The cold start: training on the passages only, before any question.

  Inverse cloze with the in-batch contrastive loss teaches the retriever, span
  infilling teaches the generator to quote. A stage of its own, with its own
  optimizer state and its metrics under `warmup/`.
  """

  num_steps: int = 0  # 0: no warmup
  batch_size: int = number(64, least=1)  # passages
  peak_lr: float = 2e-3  # of the generator [checkpoint] 3e-5
  retriever_lr: float = 2e-3  # [checkpoint] 3e-5
  warmup_steps: int = 20
  contrastive_weight: float = 1.0  # against 1.0 for span infilling
  # Masked words. They are whole words, so that answers end with a word.
  span_max_words: int = number(3, least=1)
  # Tokens of the span; a longer word is cut.
  span_max_tokens: int = number(10, least=1)
  # Tokens around the span, which take the place of the question.
  window_tokens: int = number(16, least=1)


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class ContrastiveConfig(Settings):
  """Training of the retriever alone on questions with known passages (DPR).

  A stage between warm-up and main stage, with its own optimizer state and its
  metrics under `contrastive/`. A question has to find its own passage (`gold`
  in the question files) among all passages of the batch. What is not here,
  schedule and clipping for instance, is as in `optimizer`.
  """

  num_steps: int = 0  # 0: no such stage
  batch_size: int = number(64, least=1)  # questions, over all hosts
  # Hard negatives per question, from `negatives` of the question files, which
  # rag-jax mine-negatives writes. 0: the other passages of the batch alone.
  negatives: int = 0
  retriever_lr: float = 3e-5  # at its peak [checkpoint] 3e-5
  warmup_steps: int = 100
  temperature: float = number(1.0, above=0)  # scores are divided by it
  # A passage that states an accepted answer of a question is no negative of it.
  mask_answers: bool = True
  # Questions or passages that are encoded at a time, over all devices; they are
  # encoded twice, and the gradient is the same (GradCache). 0: all.
  chunk: int = 0


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class IndexConfig(Settings):
  """How passages are searched."""

  # "auto": scann if installed. "device" is in the accelerators' memory.
  kind: str = choice("auto", "exact", "scann", "device")
  path: str = ""  # a built index to open; "" builds it from the passages
  # Steps between rebuilds, while the passage encoder is trained.
  refresh_steps: int = number(50, least=1)
  # Above 0, with kind "device": the compiled step itself searches, and embeds
  # about this many passages again, in turn, instead of rebuilding. 0: search
  # between steps.
  refresh_rows: int = 0
  swap_steps: int = 5  # from the start of a rebuild to its first use
  embed_batch_size: int = number(512, least=1)  # passages embedded at a time
  # Most passages per searcher on the host. More passages get several searchers,
  # of which each host of a pod holds some. 0: one, of all, on every host.
  passages_per_shard: int = 0
  # Refuse to train or evaluate with an index whose recall is lower, 0 to 1: in
  # its certificate at data.n_docs, or at 5 for the questions of an evaluation;
  # 0.0 never refuses. rag-jax train has --min_index_recall too.
  min_recall: float = number(0.0, most=1)
  # Search by words too (BM25): p(z|x) = softmax(a * inner product + b * BM25
  # score); a and b are trained with the marginal likelihood.
  hybrid: bool = False
  hybrid_dense: float = 1.0  # a before the first step
  hybrid_bm25: float = 0.1  # b; BM25 scores are often 5 to 30
  # A saved BM25 index to open; "" builds it from the passages at each start, at
  # some 5,000 passages of 100 words per second.
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
  # rag_jax/retrieval/tuner.py finds the fastest settings for a recall.
  scann_tree_passages: int = 20_000
  scann_num_leaves: int = 0  # 0: the square root of the number of passages
  scann_leaves_to_search: int = 0  # 0: a tenth of the leaves
  # Above 0.0 each passage is in a second leaf too (SOAR, arXiv:2404.00774): the
  # weight of how orthogonal its two residuals are. 0.0: in one leaf.
  scann_soar_lambda: float = 0.0
  scann_soar_overretrieve: float = 0.0  # 0.0: ScaNN's own, else above 1
  # Principal components (PCA) that leaves and codes are computed from: half as
  # many as dimensions is twice as fast, with a little less recall. 0: no PCA.
  scann_pca_dims: int = 0
  # Dimensions that share a 4-bit code.
  scann_dims_per_block: int = number(2, least=1)
  # How much more an error parallel to a passage counts than an orthogonal one
  # (Guo et al. 2020, T of section 3.2); 0.0: both count the same.
  scann_anisotropic_threshold: float = number(
    0.2, below=1, why="must be below 1; 0.0 turns it off."
  )
  # Candidates that are scored again, with embeddings of type:
  scann_reorder: int = number(100, least=1)
  scann_reorder_dtype: str = choice("float32", "bfloat16", "int8")
  # Type of the embeddings on the accelerators; int8 has a scale per passage.
  device_storage: str = choice("float32", "bfloat16", "int8")
  # 1.0 is exact; below, it is the target of approx_max_k.
  device_recall_target: float = number(
    1.0,
    above=0,
    most=1,
    why="must be above 0 and at most 1, which is exact.",
  )
  device_chunk_passages: int = 65_536  # scored at a time; 0: all of a device


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class MeshConfig(Settings):
  """How devices are arranged. data * fsdp * tensor = number of devices."""

  data: int = 0  # replicas of the model; 0: from the number of devices
  # Parts into which parameters and batch are split.
  fsdp: int = number(1, least=1)
  # Parts into which heads, MLPs and vocabulary are split.
  tensor: int = number(1, least=1)


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class TrainConfig(Settings):
  """The main stage: maximising the marginal likelihood of the answers."""

  num_steps: int = 1000
  batch_size: int = number(32, least=1)  # questions, over all hosts
  log_steps: int = number(10, least=1)
  validate_steps: int = 100  # 0: only at the end
  checkpoint_steps: int = 100  # 0: only at the end
  # Number of newest checkpoints to keep; the best one is kept too, and the
  # newest one after which the loss was still good.
  keep_checkpoints: int = number(2, least=1)
  compute_dtype: str = choice("auto", "float32", "bfloat16")
  # Tokens whose logits are in memory at a time, but computed twice; 0: all.
  vocab_chunk: int = 0
  # Compile one layer and run it in a loop: for models of many layers.
  scan_layers: bool = False
  # What a layer keeps for the backward pass, from everything to its input.
  remat: str = choice("none", "dots", "attention", "full")
  # Rows whose attention a device computes at a time, in training; 0: all.
  attention_rows: int = 0
  # Parts that a batch of the main stage is computed in, to save memory.
  accumulate: int = number(1, least=1)
  # Lengths that contexts are padded to, in groups; 1: data.context_length.
  length_groups: int = number(1, least=1)
  pack_contexts: bool = False  # several into a row of the generator's encoder
  # Of dropout. "rbg" is faster on a single TPU or GPU, but not for several.
  dropout_prng: str = choice("threefry2x32", "rbg")
  # Peak TFLOP/s of a device in bfloat16, for train/mfu; 0.0: that in chips.py.
  peak_tflops: float = 0.0
  # (first, last) of the steps to profile into WORKDIR/profile; (): none.
  profile_steps: tuple[int, ...] = ()


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class DecodingConfig(Settings):
  """How answers are written, in validation, evaluation and serving."""

  # "auto" is "rag_token" or "rag_sequence", as `loss`. "rag_sequence" is
  # thorough: the candidates of each document are scored under all documents.
  # "fid" reads all documents at once, "concatenate" too, in one context,
  # "single" only the first.
  mode: str = choice(
    "auto", "rag_token", "rag_sequence", "rag_sequence_fast", "fid",
    "concatenate", "single",
  )  # fmt: skip
  # 1: greedy search. This and the next three: [checkpoint].
  num_beams: int = number(1, least=1)
  length_penalty: float = 1.0  # scores are divided by length ** this
  no_repeat_ngram_size: int = 0  # 0 allows repetition
  min_new_tokens: int = 0  # before the end token
  # Other settings of generation_config.json, as JSON [checkpoint]; "{}": none.
  # Without a length in it, answers have up to data.target_length tokens.
  generation_config: str = ""


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class RerankConfig(Settings):
  """A second stage of retrieval: a cross-encoder reads question and passage.

  It chooses the data.n_docs passages that are read for an answer, in
  validation, evaluation and serving. Training steps read what the retriever
  finds: the gradient of the marginal likelihood needs its p(z|x), and a
  cross-encoder would have to read every candidate of every batch.
  """

  # A directory or "hf:ORG/NAME" of a cross-encoder with one label: BERT,
  # RoBERTa, XLM-RoBERTa, DistilBERT or MPNet (...ForSequenceClassification), or
  # a CrossEncoder of sentence-transformers. "": no second stage.
  init_from: str = ""
  candidates: int = number(100, least=1)  # passages of the first stage
  # Tokens of question and passage, limited by its positions. The longer text is
  # cut first.
  length: int = number(512, least=8)
  batch_size: int = number(64, least=1)  # pairs scored together
  # What p(z|x) is, over the passages read: the softmax of the retriever's
  # scores, with which the generator was trained, or that of the reranker's
  # logits. Those were trained to order passages, at a scale of their own, so
  # that their softmax is no estimate of p(z|x) unless it was calibrated.
  prior: str = choice("retriever", "reranker")


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class EvalConfig(Settings):
  """Validation during training, and the test split at the end."""

  batch_size: int = number(64, least=1)  # questions
  num_validation: int = 256  # validation questions used; 0: all
  num_test: int = 0  # test questions used; 0: all
  # How answers are compared with each other and with passages; see
  # evaluation/answers.py. "squad" is exactly the rule of the papers, "numbers"
  # compares numbers by value; with "regex" answers are regular expressions, as
  # in CuratedTREC.
  answers: str = choice("multilingual", "squad", "numbers", "regex")
  # Language whose articles are ignored in answers; "": none. Not for "squad".
  language: str = choice("en", "es", "de", "vi", "ar", "")


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class Config(Settings):
  """One experiment."""

  seed: int = number(0, most=2**63 - 1)  # the range of jax.random.key
  # Weights of retriever and generator to start from: the workdir of a run that
  # has ended, a model directory that rag-jax convert-hf wrote, or a RAG
  # checkpoint. encoder.init_from and generator.init_from take precedence.
  init_from: str = ""
  # "fid": the generator reads all documents at once, each encoded alone;
  # "concatenate": all in one context. [checkpoint] of RAG
  loss: str = choice("rag_token", "rag_sequence", "fid", "concatenate")
  # How the retriever learns: "marginal", by the gradient of `loss`; "none", not
  # at all; the others, by a loss of its own (losses.RetrieverLoss).
  retriever_loss: str = choice(
    "marginal", "none", "emdr2", "emdr2_token", "pdist", "loop", "replug",
    "adist", "dkrr", "reward", "reward_sampled",
  )  # fmt: skip
  # Of the answer given one document, with the last two: F1 of its tokens, or
  # whether all are right.
  reward: str = choice("f1", "em")
  # Of the two distributions over documents in a loss of its own: the prior's,
  # and that of the generator's scores.
  retriever_temperature: float = number(1.0, above=0)
  target_temperature: float = number(1.0, above=0)
  retriever_weight: float = number(1.0)  # of that loss
  # Of the targets, given each document. [checkpoint] of RAG
  label_smoothing: float = number(0.0, below=1)
  # Hugging Face's loss with its defects (losses_hf.py), to reproduce a
  # fine-tuning. It needs the logits of the whole vocabulary.
  hf_loss: bool = False
  # With hf_loss and "rag_sequence": the first token is not scored if it is the
  # begin token in all targets of a batch. [checkpoint] of RAG
  exclude_bos_score: bool = False
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
  dialogue: DialogueConfig = dataclasses.field(default_factory=DialogueConfig)
  tokenizer: TokenizerConfig = dataclasses.field(
    default_factory=TokenizerConfig
  )
  encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
  generator: GeneratorConfig = dataclasses.field(
    default_factory=GeneratorConfig
  )
  causal: CausalConfig = dataclasses.field(default_factory=CausalConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  warmup: WarmupConfig = dataclasses.field(default_factory=WarmupConfig)
  contrastive: ContrastiveConfig = dataclasses.field(
    default_factory=ContrastiveConfig
  )
  index: IndexConfig = dataclasses.field(default_factory=IndexConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  decoding: DecodingConfig = dataclasses.field(default_factory=DecodingConfig)
  rerank: RerankConfig = dataclasses.field(default_factory=RerankConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

  @property
  def generator_sizes(self) -> GeneratorConfig | CausalConfig:
    """The section that describes the generator's layers."""
    return self.causal if self.generator.kind == "causal" else self.generator

  @property
  def rewards_answers(self) -> bool:
    """Whether the retriever learns from answers that the generator writes."""
    return self.retriever_loss in ("reward", "reward_sampled")

  @property
  def steps_before_main(self) -> int:
    """Steps of the run before the first one of the main stage."""
    return self.warmup.num_steps + self.contrastive.num_steps

  @property
  def contexts_per_question(self) -> int:
    """How many contexts the generator reads: one holds all, or K one each."""
    joined = self.loss == "concatenate"
    return 1 if joined else max(self.data.n_docs, 1)
