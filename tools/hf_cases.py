"""The same work twice, for benchmark_hf.py: in transformers, and here.

In: the name of a case and a size. Out: two functions over the same random
weights and the same inputs, and how alike what they return is.

The weights are made by PyTorch, saved, and read as any checkpoint is.
"""

from collections.abc import Callable
import dataclasses
import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np
import torch
import transformers

from rag_jax.config import MeshConfig
from rag_jax.config import OptimizerConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.decoding.rag import RagDecoder
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.losses import MARGINAL_NLL_FNS
from rag_jax.models.batch import RagBatch
from rag_jax.models.encoders import OneTower
from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.models.partitioning import make_mesh
from rag_jax.models.partitioning import replicated
from rag_jax.models.rag import ContextLayout
from rag_jax.models.rag import RagModel
from rag_jax.models.rag import build_encoder
from rag_jax.models.rag import build_generator
from rag_jax.retrieval.retriever import Embedder
from rag_jax.training.objectives import marginal_loss
from rag_jax.training.optimizer import make_optimizer
from rag_jax.training.state import make_state
from rag_jax.training.step import compile_update
from rag_jax.training.step import update
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_rag
from rag_jax.weights.loaded import LoadedEncoder

B, K, C, Q, T = 4, 5, 128, 32, 16
NEW_TOKENS = 20
NUM_PASSAGES, PASSAGE_LENGTH, ENCODE_BATCH = 256, 256, 32
PAD, BOS, EOS = 1, 0, 2  # BART's; DPR's padding is 0
FIRST_WORD = 5  # ids from here on are neither
LEARNING_RATE = 1e-5

# The same for both; the length counts the start token.
OUR_SEARCH = GenerationSettings(
  max_length=NEW_TOKENS + 1,
  min_length=NEW_TOKENS + 1,
  num_beams=4,
  early_stopping=False,
  bos_token_id=BOS,
  eos_token_id=(EOS,),
  pad_token_id=PAD,
)
THEIR_SEARCH = {
  "max_length": NEW_TOKENS + 1,
  "min_length": NEW_TOKENS + 1,
  "n_docs": K,
  "num_beams": 4,
  "num_return_sequences": 1,
  "early_stopping": False,
  "do_sample": False,
}


@dataclasses.dataclass(frozen=True)
class Size:
  """How large DPR's towers and BART are."""

  encoder_layers: int
  encoder_dim: int
  encoder_vocab: int
  layers: int  # of BART's encoder, and of its decoder
  dim: int
  vocab: int
  head_dim: int = 64


SIZES = {
  "tiny": Size(2, 64, 1000, 2, 64, 1000, head_dim=16),
  "base": Size(12, 768, 30522, 6, 768, 50265),
  "large": Size(12, 768, 30522, 12, 1024, 50265),
}


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a case is made for."""

  size: Size
  dtype: str  # "float32" or "bfloat16", of both
  device: str  # "cpu" or "gpu", of both
  # Of hf_strings.py: a file in SQuAD's format, how many of its questions are
  # asked, and the words of a passage; 0: each paragraph is one.
  questions: str = ""
  num_questions: int = 64
  passage_words: int = 0

  @property
  def torch_dtype(self) -> torch.dtype:
    """The dtype as PyTorch's."""
    return getattr(torch, self.dtype)

  @property
  def torch_device(self) -> str:
    """The device as PyTorch calls it."""
    return {"gpu": "cuda"}.get(self.device, self.device)

  def tensor(self, array: Any) -> torch.Tensor:
    """Returns `array` on the device, whole numbers as PyTorch wants them."""
    tensor = torch.tensor(array, device=self.torch_device)
    return tensor if tensor.is_floating_point() else tensor.long()

  def place(self, params: PyTree) -> PyTree:
    """Returns a copy on the device, kept in the dtype of products."""
    return jax.tree.map(lambda x: jnp.array(x, self.dtype), params)


@dataclasses.dataclass(frozen=True)
class Case:
  """Both return only when all is computed."""

  ours: Callable[[], Any]
  theirs: Callable[[], Any]
  same: Callable[[Any, Any], float]  # of what the two returned
  same_is: str  # what that number means
  note: str = ""
  # Raises if what the two returned first differs where it must not.
  check: Callable[[Any, Any], None] = lambda ours, theirs: None


def _dpr(size: Size) -> transformers.DPRConfig:
  return transformers.DPRConfig(
    vocab_size=size.encoder_vocab,
    hidden_size=size.encoder_dim,
    num_hidden_layers=size.encoder_layers,
    num_attention_heads=size.encoder_dim // size.head_dim,
    intermediate_size=4 * size.encoder_dim,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
  )


def _bart(size: Size) -> transformers.BartConfig:
  heads, mlp = size.dim // size.head_dim, 4 * size.dim
  return transformers.BartConfig(
    vocab_size=size.vocab,
    d_model=size.dim,
    encoder_layers=size.layers,
    decoder_layers=size.layers,
    encoder_attention_heads=heads,
    decoder_attention_heads=heads,
    encoder_ffn_dim=mlp,
    decoder_ffn_dim=mlp,
    # Logits of about +-2: with BART's 0.02 all tokens are almost equally
    # likely, and rounding decides which is the best.
    init_std=2 * size.dim**-0.5,
    dropout=0.0,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
    decoder_start_token_id=EOS,
    forced_eos_token_id=None,
  )


def their_model(kind: str, setup: Setup) -> Any:
  """Returns PyTorch's RAG with random weights, on the host."""
  torch.manual_seed(0)
  config = transformers.RagConfig.from_question_encoder_generator_configs(
    _dpr(setup.size), _bart(setup.size), n_docs=K
  )
  cls = {
    "rag_token": transformers.RagTokenForGeneration,
    "rag_sequence": transformers.RagSequenceForGeneration,
  }[kind]
  return cls(config)


def _rag(kind: str, setup: Setup) -> tuple[Any, RagModel, PyTree]:
  """Returns PyTorch's model, ours, and our parameters on the host."""
  theirs = their_model(kind, setup)
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    loaded = load_rag(folder)
    params = jax.tree.map(np.array, loaded.params)  # no longer of the file
  tower = _tower(loaded.question_encoder, setup)
  generator = build_generator(
    dataclasses.replace(GeneratorConfig(), **loaded.generator.fields),
    vocab_size=setup.size.vocab,
    decoder_start_id=EOS,
    dtype=jnp.dtype(setup.dtype),
  )
  model = RagModel(tower, None, generator=generator)
  return theirs.to(setup.torch_device), model, params


def _tower(loaded: LoadedEncoder, setup: Setup) -> RetrieverEncoder:
  return build_encoder(
    dataclasses.replace(EncoderConfig(), **loaded.fields),
    vocab_size=setup.size.encoder_vocab,
    max_positions=PASSAGE_LENGTH,
    dtype=jnp.dtype(setup.dtype),
  )


def _train(kind: str, setup: Setup) -> Case:
  """One step: forward, backward and AdamW, without dropout."""
  size = setup.size
  theirs, model, params = _rag(kind, setup)
  rng = np.random.default_rng(0)
  contexts = rng.integers(FIRST_WORD, setup.size.vocab, (B, K, C), np.int32)
  questions = rng.integers(FIRST_WORD, size.encoder_vocab, (B, Q), np.int32)
  docs = rng.normal(0, 2 * size.encoder_dim**-0.5, (B, K, size.encoder_dim))
  docs = docs.astype(np.float32)
  # As Hugging Face reads them: the first is read alone, and from the last
  # position nothing is predicted. Both compute T positions.
  labels = rng.integers(FIRST_WORD, size.vocab, (B, T), np.int32)
  labels[:, 0], labels[:, -1] = EOS, EOS
  target = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=PAD)
  batch = RagBatch(
    context_tokens=contexts,
    context_mask=np.ones_like(contexts, bool),
    target_tokens=target,
    target_mask=target != PAD,
    question_tokens=questions,
    question_mask=np.ones_like(questions, bool),
    doc_embeddings=docs,
  )
  return Case(
    _our_step(kind, model, params, batch),
    _their_step(theirs, setup, batch, labels),
    lambda ours, hf: abs(ours - hf) / abs(hf),
    "relative difference of the loss",
  )


class OurTraining:
  """Takes steps.

  Attributes:
    state: of the next step.
  """

  def __init__(
    self,
    kind: str,
    model: RagModel,
    params: PyTree,
    context_layout: ContextLayout | None = None,
  ):
    """Compiles nothing yet; `params` are copied."""
    self._mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    layout = jax.tree.map(lambda _: replicated(self._mesh), params)
    # A copy: the step writes over its state.
    params = jax.device_put(
      jax.tree.map(lambda x: jnp.array(x, copy=True), params), layout
    )
    settings = OptimizerConfig(
      peak_lr=LEARNING_RATE,
      retriever_lr=LEARNING_RATE,
      warmup_steps=0,
      schedule="constant",
    )
    optimizer = make_optimizer(settings, params, num_steps=1000)
    self.state, layout = make_state(params, layout, optimizer, self._mesh)
    loss_fn = functools.partial(
      marginal_loss, model=model, nll_fn=MARGINAL_NLL_FNS[kind]
    )
    self._update = compile_update(
      loss_fn,
      optimizer,
      layout,
      self._mesh,
      "train",
      functools.partial(update, context_layout=context_layout),
    )
    self._key = self.place(jax.random.key(0))

  def place(self, batch: PyTree) -> PyTree:
    """Returns a batch on the device."""
    return jax.device_put(batch, replicated(self._mesh))

  def step(self, batch: PyTree) -> float:
    """Takes one step and returns the loss before it."""
    self.state, metrics = self._update(self.state, batch, self._key)
    jax.block_until_ready(self.state)
    return float(metrics["train/loss"])


def _our_step(
  kind: str, model: RagModel, params: PyTree, batch: RagBatch
) -> Callable[[], float]:
  """Returns a function that takes one step and returns the loss before it."""
  training = OurTraining(kind, model, params)
  return functools.partial(training.step, training.place(batch))


class TheirTraining:
  """Takes steps of a model of PyTorch, all of whose dropout is 0."""

  def __init__(self, model: Any, setup: Setup):
    self._setup = setup
    self._optimizer = torch.optim.AdamW(
      model.train().parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )

  def step(self, loss_fn: Callable[[], torch.Tensor]) -> float:
    """Takes one step and returns the loss before it."""
    self._optimizer.zero_grad(set_to_none=True)
    setup = self._setup
    low = setup.dtype == "bfloat16"  # of products; parameters are float32
    with torch.autocast(setup.torch_device, torch.bfloat16, enabled=low):
      loss = loss_fn()
    loss.backward()
    self._optimizer.step()
    if setup.device == "gpu":
      torch.cuda.synchronize()
    return loss.item()


def _their_step(
  model: Any, setup: Setup, batch: RagBatch, labels: np.ndarray
) -> Callable[[], float]:
  """Returns a function that takes one step and returns the loss before it."""
  questions = setup.tensor(batch.question_tokens)
  docs = setup.tensor(batch.doc_embeddings)
  inputs = {
    "context_input_ids": setup.tensor(batch.context_tokens.reshape(B * K, C)),
    "context_attention_mask": setup.tensor(np.ones((B * K, C), np.int32)),
    "labels": setup.tensor(labels),
  }
  num_tokens = float(np.sum(batch.target_mask))

  def loss() -> torch.Tensor:
    embedding = model.question_encoder(
      questions, attention_mask=torch.ones_like(questions)
    )[0]
    doc_scores = torch.bmm(
      embedding[:, None].to(docs.dtype), docs.transpose(1, 2)
    )[:, 0]
    out = model(**inputs, doc_scores=doc_scores, reduce_loss=True)
    return out.loss / num_tokens

  return functools.partial(TheirTraining(model, setup).step, loss)


def _generate(kind: str, mode: str, setup: Setup, note: str = "") -> Case:
  """Beam search with 4 beams for 20 tokens, the end token ruled out."""
  theirs, model, params = _rag(kind, setup)
  theirs = theirs.eval().to(setup.torch_dtype)
  rng = np.random.default_rng(0)
  contexts = rng.integers(FIRST_WORD, setup.size.vocab, (B, K, C), np.int32)
  doc_scores = rng.normal(0, 2, (B, K)).astype(np.float32)
  decoder = RagDecoder(model.generator, OUR_SEARCH, mode)
  params = setup.place({"generator": params["generator"]})
  inputs = jax.device_put((doc_scores, contexts, np.ones_like(contexts, bool)))
  their_inputs = {
    "context_input_ids": setup.tensor(contexts.reshape(B * K, C)),
    "context_attention_mask": setup.tensor(np.ones((B * K, C), np.int32)),
    "doc_scores": setup.tensor(doc_scores).to(setup.torch_dtype),
  }

  def ours() -> np.ndarray:
    return np.asarray(decoder(params, *inputs).tokens[:, 0])

  def hf() -> np.ndarray:
    with torch.inference_mode():
      tokens = theirs.generate(
        **their_inputs,
        **THEIR_SEARCH,
      )
    return tokens[:, 1:].cpu().numpy()  # without the start token

  return Case(ours, hf, equal_tokens, "share of equal tokens", note)


def equal_tokens(ours: np.ndarray, hf: np.ndarray) -> float:
  """Returns the share of equal tokens."""
  return float(np.mean(ours == hf)) if ours.shape == hf.shape else 0.0


def _encode_passages(setup: Setup) -> Case:
  """Passages of about 100 words, sorted by length, 32 at a time."""
  torch.manual_seed(0)
  theirs: Any = transformers.DPRContextEncoder(_dpr(setup.size)).eval()
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    loaded = load_encoder(folder, role="passage")
    params = setup.place(loaded.params)
  theirs = theirs.to(setup.torch_device, setup.torch_dtype)
  tower = _tower(loaded, setup)
  rng = np.random.default_rng(0)
  lengths = rng.lognormal(np.log(125), 0.35, NUM_PASSAGES)  # in tokens
  lengths = np.sort(np.clip(lengths, 16, PASSAGE_LENGTH).astype(np.int32))
  mask = np.arange(PASSAGE_LENGTH) < lengths[:, None]
  words = rng.integers(FIRST_WORD, setup.size.encoder_vocab, mask.shape)
  tokens = np.where(mask, words, 0).astype(np.int32)
  starts = range(0, NUM_PASSAGES, ENCODE_BATCH)
  batches = [slice(start, start + ENCODE_BATCH) for start in starts]
  # What building an index calls.
  embedder = Embedder(OneTower(tower), ENCODE_BATCH)

  def passage_tokens(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tokens[rows], mask[rows]

  def ours() -> np.ndarray:
    rows = np.arange(NUM_PASSAGES)
    return embedder.rows({"question_encoder": params}, passage_tokens, rows)

  def hf() -> np.ndarray:
    blocks = []
    with torch.inference_mode():
      for rows in batches:
        longest = lengths[rows][-1]
        out = theirs(
          setup.tensor(tokens[rows, :longest]),
          attention_mask=setup.tensor(mask[rows, :longest]),
        )
        blocks.append(out.pooler_output.float())
      return torch.cat(blocks).cpu().numpy()

  def same(ours: np.ndarray, hf: np.ndarray) -> float:
    return float(np.abs(ours - hf).max() / np.abs(hf).max())

  return Case(ours, hf, same, "largest difference by the largest number")


CASES: dict[str, Callable[[Setup], Case]] = {
  "train_rag_token": functools.partial(_train, "rag_token"),
  "train_rag_sequence": functools.partial(_train, "rag_sequence"),
  "generate_rag_token_beam4": functools.partial(
    _generate, "rag_token", "rag_token"
  ),
  "generate_rag_sequence_thorough_beam4": functools.partial(
    _generate, "rag_sequence", "rag_sequence"
  ),
  "generate_rag_sequence_fast_beam4": functools.partial(
    _generate,
    "rag_sequence",
    "rag_sequence_fast",
    note="transformers has no fast decoding of RAG-Sequence: ours is compared"
    " with its thorough one, which may rank other candidates first.",
  ),
  "encode_passages": _encode_passages,
}
