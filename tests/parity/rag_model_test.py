"""Question embedding to loss and gradients, against PyTorch's RAG.

The reference: `RagTokenForGeneration` and `RagSequenceForGeneration` over tiny
random DPR towers and a tiny random BART or T5, with labels given to `forward`.
Hugging Face trains the context encoder as well when a retriever hands the
documents over as tokens: here one that always returns the same.

What their labels mean to ours: see losses_hf.py, and rag_losses_test.py, which
has every setting, number of documents and length.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.losses import marginalize
from rag_jax.losses import rag_sequence_nll
from rag_jax.losses_hf import hf_rag_sequence_nll
from rag_jax.losses_hf import hf_rag_token_nll
from rag_jax.losses_hf import shift_left
from rag_jax.models.batch import RagBatch
from rag_jax.models.rag import RagModel
from rag_jax.models.rag import build_encoder
from rag_jax.models.rag import build_generator
from rag_jax.weights.load import load_rag

pytestmark = pytest.mark.parity

B, D, V = 4, 16, 61
Q_LENGTHS = (6, 2, 5, 3)
EPSILON = 0.1
START = {"bart": 2, "t5": 0}  # what the decoder reads first
BOS, EOS = {"bart": 0, "t5": None}, {"bart": 2, "t5": 1}
PAD = {"bart": 1, "t5": 0}
FIRST = 5  # ids from here on are words
# Each number of documents and each length; all pairs are in rag_losses_test.py,
# and both generators at (5, 7) among the gradients.
SIZES = pytest.mark.parametrize(
  ("name", "num_docs", "length"),
  [("bart", 1, 7), ("bart", 2, 1), ("t5", 2, 2), ("t5", 5, 3)],
)
# Real tokens a row, with the end token: 1 is an empty answer, 0 is nothing.
TARGET_LENGTHS = {1: (1, 0, 1, 1), 2: (2, 1, 2, 0), 3: (3, 1, 2, 3)}
TARGET_LENGTHS[7] = (7, 1, 4, 2)


def randomize(model):
  """Gives every parameter a value that is neither 0 nor 1."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.normal_(0.0, 0.3, generator=generator)
      if "orm" in name:  # LayerNorm, layer_norm, layernorm_embedding
        x += name.endswith("weight")


DPR = transformers.DPRConfig(
  vocab_size=V,
  hidden_size=D,
  num_hidden_layers=2,
  num_attention_heads=2,
  intermediate_size=24,
  max_position_embeddings=16,
)
GENERATOR = {
  "bart": transformers.BartConfig(
    **{f"{part}coder_layers": 2 for part in ("en", "de")},
    **{f"{part}coder_attention_heads": 2 for part in ("en", "de")},
    **{f"{part}coder_ffn_dim": 24 for part in ("en", "de")},
    vocab_size=V,
    d_model=D,
    max_position_embeddings=16,
    pad_token_id=PAD["bart"],
    bos_token_id=BOS["bart"],
    eos_token_id=EOS["bart"],
    decoder_start_token_id=START["bart"],
    forced_eos_token_id=None,
  ),
  "t5": transformers.T5Config(
    vocab_size=V,
    d_model=D,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    pad_token_id=PAD["t5"],
    eos_token_id=EOS["t5"],
    decoder_start_token_id=START["t5"],
    bos_token_id=None,  # RAG-Sequence asks for it, T5Config has no default
  ),
}


def ragged(rng, lengths, width, pad):
  """Returns tokens and their mask; the rest of each row is padding."""
  mask = np.arange(width) < np.array(lengths)[..., None]
  tokens = rng.integers(FIRST, V, size=mask.shape)
  return np.where(mask, tokens, pad), mask


def inputs(name, num_docs):
  """Returns what the model reads, beside the target."""
  rng = np.random.default_rng(0)
  sizes = (B, num_docs)
  rows = {
    "question": ragged(rng, Q_LENGTHS, 6, 0),
    "doc": ragged(rng, rng.integers(1, 9, size=sizes), 8, 0),
    "context": ragged(rng, rng.integers(2, 10, size=sizes), 9, PAD[name]),
  }
  data = {f"{part}_tokens": tokens for part, (tokens, _) in rows.items()}
  return data | {f"{part}_mask": mask for part, (_, mask) in rows.items()}


def targets(name, length):
  """Returns target tokens [B, T] and mask: words, then the end token."""
  rng = np.random.default_rng(length)
  lengths = np.array(TARGET_LENGTHS[length])
  tokens, mask = ragged(rng, lengths, length, PAD[name])
  rows = np.flatnonzero(lengths)
  tokens[rows, lengths[rows] - 1] = EOS[name]
  if name == "bart" and length > 2:  # as BART's begin when it generates
    tokens[rows, 0] = BOS[name]
  return tokens, mask


class Rag:
  """The same model twice."""

  def __init__(self, name, folder):
    self.name = name
    config = transformers.RagConfig.from_question_encoder_generator_configs(
      DPR, GENERATOR[name]
    )
    self.token = transformers.RagTokenForGeneration(config).eval()
    passage_encoder = transformers.DPRContextEncoder(DPR).eval()
    self.token.set_context_encoder_for_training(passage_encoder)
    randomize(self.token)
    if name == "bart":  # a buffer that BART keeps at zero
      bias = self.token.generator.final_logits_bias
      seeded = torch.Generator().manual_seed(1)
      bias.normal_(generator=seeded)
    self.sequence = transformers.RagSequenceForGeneration(
      config,
      question_encoder=self.token.question_encoder,
      generator=self.token.generator,
    ).eval()
    self.sequence.set_context_encoder_for_training(passage_encoder)
    self.folder = folder
    loaded = self.read("weights")
    encoder = EncoderConfig(**loaded.question_encoder.fields)
    generator = GeneratorConfig(**loaded.generator.fields)
    sizes = {"vocab_size": V, "dtype": jnp.float32}
    towers = [
      build_encoder(encoder, max_positions=16, **sizes) for _ in range(2)
    ]
    self.model = RagModel(
      *towers,
      generator=build_generator(
        generator, decoder_start_id=START[name], **sizes
      ),
    )
    self.params = loaded.params

  def read(self, what):
    """Returns PyTorch's parameters as they are now, in our tree."""
    self.token.save_pretrained(self.folder / what)
    return load_rag(self.folder / what)

  def gradients(self, kind, *args, **settings):
    """Returns the gradient of the summed loss, in the tree of our parameters.

    In float64: the towers' is a difference of posterior and prior, in which
    PyTorch's float32 errs more than ours.
    """
    values = copy.deepcopy(self.token.state_dict())
    self.token.double()
    tensors = self.token.state_dict(keep_vars=True)
    of = list(
      {id(x): x.requires_grad_(True) for x in tensors.values()}.values()
    )
    loss = self.torch(kind, *args, **settings).loss.sum()
    grads = torch.autograd.grad(loss, of, allow_unused=True)
    with torch.no_grad():
      for x, grad in zip(of, grads, strict=True):
        x.copy_(torch.zeros_like(x) if grad is None else grad)
    self.token.float()
    params = self.read("gradients").params  # saved as if they were weights
    self.token.load_state_dict(values)
    return params

  def torch(self, kind, num_docs, labels, **settings):
    """Returns PyTorch's output for labels [B, T + 1]; keeps the graph."""
    model = getattr(self, kind)
    data = {
      field: torch.tensor(x.reshape(-1, x.shape[-1])).long()
      for field, x in inputs(self.name, num_docs).items()
    }
    model.rag.retriever = lambda *_, **__: {
      "context_input_ids": data["context_tokens"],
      "context_attention_mask": data["context_mask"],
      "retrieved_doc_embeds": None,  # not read: the documents are encoded
      "tokenized_doc_ids": data["doc_tokens"],
      "tokenized_doc_attention_mask": data["doc_mask"],
      "doc_ids": None,
    }
    model.config.label_smoothing = settings.pop("epsilon", 0.0)
    return model(
      input_ids=data["question_tokens"],
      attention_mask=data["question_mask"],
      labels=torch.tensor(labels),
      n_docs=num_docs,
      **settings,
    )

  def labels(self, target):
    """Returns the target behind the start token, as Hugging Face wants it."""
    start = np.full((B, 1), START[self.name])
    return np.concatenate([start, target], axis=1)


@pytest.fixture(scope="module")
def rags(tmp_path_factory):
  return {name: Rag(name, tmp_path_factory.mktemp(name)) for name in GENERATOR}


# Every setting of theirs.
SETTINGS = [
  *(("token", {"epsilon": e}) for e in (0.0, EPSILON)),
  *(
    ("sequence", {"epsilon": e, "exclude_bos_score": exclude})
    for e in (0.0, EPSILON)
    for exclude in (False, True)
  ),
]


def nlls(name, *args):
  """Returns ours for every setting of theirs, [settings, B]."""
  rows = []
  for kind, settings in SETTINGS:
    rest = {k: v for k, v in settings.items() if k != "epsilon"}
    rest["label_smoothing"] = settings["epsilon"]
    if kind == "token":
      rows.append(hf_rag_token_nll(*args, **rest))
    else:
      bos = BOS[name] if rest.pop("exclude_bos_score") else None
      rows.append(hf_rag_sequence_nll(*args, **rest, excluded_bos=bos))
  return jnp.stack(rows)


def assert_close(ours, theirs, note=""):
  """Within 1e-5, relative to the largest: sums of many terms meet zero."""
  theirs = theirs.detach().numpy()
  largest = np.abs(theirs).max()
  assert largest > 0.01, note  # or closeness would mean little
  np.testing.assert_allclose(
    ours, theirs, rtol=1e-5, atol=1e-5 * largest, err_msg=note
  )


@SIZES
def test_embedding_scores_logits_marginal_and_losses_are_those_of_pytorch(
  rags, name, num_docs, length
):
  rag = rags[name]
  target, mask = targets(name, length)
  data = inputs(name, num_docs) | {"target_tokens": target}

  @jax.jit
  def forward(params, data, mask):
    batch = RagBatch(target_mask=None, **data)
    out = rag.model.apply({"params": params}, batch)
    scored = (out.doc_scores, out.target_logits)
    embedding = rag.model.apply(
      {"params": params},
      data["question_tokens"],
      data["question_mask"],
      method="embed_questions",
    )
    ours = nlls(name, *scored, data["target_tokens"], mask)
    return embedding, *scored, marginalize(*scored), ours

  embedding, scores, logits, marginal, ours = forward(rag.params, data, mask)
  labels = rag.labels(target)
  out = rag.torch("token", num_docs, labels)
  assert_close(embedding, out.question_encoder_last_hidden_state, "embedding")
  assert_close(scores, out.doc_scores, "doc_scores")
  # Their last position has read the whole target, and predicts nothing.
  theirs = out.logits.reshape(B, num_docs, length + 1, V)
  assert_close(logits, theirs[:, :, :-1], "logits")
  out = rag.torch("token", num_docs, labels, do_marginalize=True)
  assert_close(marginal, out.logits[:, :-1], "marginal")
  for nll, (kind, settings) in zip(ours, SETTINGS, strict=True):
    args, note = (kind, num_docs, labels), f"{kind} {settings}"
    assert_close(nll, rag.torch(*args, **settings).loss, note)
    reduced = rag.torch(*args, **settings, reduce_loss=True).loss
    assert_close(jnp.sum(nll), reduced, note)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_gradients_reach_both_towers_and_the_generator_as_in_pytorch(
  rags, name
):
  """Of both losses in all settings, for every parameter."""
  # Of five, so that posterior and prior differ: from two, much cancels out.
  rag, num_docs, length = rags[name], 5, 7
  target, mask = targets(name, length)
  data = inputs(name, num_docs) | {"target_tokens": target}

  def total(params, chosen, data, mask):
    batch = RagBatch(target_mask=None, **data)
    out = rag.model.apply({"params": params}, batch)
    scored = (out.doc_scores, out.target_logits)
    ours = nlls(name, *scored, data["target_tokens"], mask)
    return jnp.sum(chosen @ ours), ours

  grad_fn = jax.jit(jax.grad(total, has_aux=True))
  for chosen, (kind, settings) in zip(np.eye(6), SETTINGS, strict=True):
    grads, ours = grad_fn(rag.params, chosen, data, mask)
    note = f"{kind} {settings}"
    args = (kind, num_docs, rag.labels(target))
    assert_close(chosen @ ours, rag.torch(*args, **settings).loss, note)
    expected = rag.gradients(*args, **settings)
    for part, tree in expected.items():
      largest = max(np.abs(x).max() for x in jax.tree.leaves(tree))
      assert largest > 0.1

      def compare(path, ours, theirs, note=note, largest=largest):
        # Relative to the largest of the tower: some of its sums cancel out, as
        # of what moves all documents alike, which softmax does not see. By the
        # machine, 1.2e-5 of it are rounding.
        note += jax.tree_util.keystr(path)
        error = ours - theirs
        assert np.abs(error).max() < 3e-5 * largest, note
        if np.abs(theirs).max() > 1e-3 * largest:
          assert np.linalg.norm(error) < 1e-4 * np.linalg.norm(theirs), note

      jax.tree_util.tree_map_with_path(compare, grads[part], tree)


def test_labels_of_t5_alone_are_read_as_they_are_and_the_first_goes_unscored(
  rags,
):
  """Hugging Face shifts labels left, but not right: T5's have no start token.

  So an answer of one token is not taught at all, only its end is; and with the
  prior on padding, RAG-Sequence's retriever learns nothing from it. Ours puts
  the start token before the target by itself.
  """
  rag, num_docs = rags["t5"], 2
  target, mask = targets("t5", 3)
  target[0], mask[0] = [9, EOS["t5"], PAD["t5"]], [True, True, False]
  data = inputs("t5", num_docs) | {"target_tokens": target}

  def read_labels(model, data):
    """Returns the logits of a decoder that reads the labels themselves."""
    generator, labels = model.generator, data["target_tokens"]
    context, context_mask = (
      data[field].reshape(B * num_docs, -1)
      for field in ("context_tokens", "context_mask")
    )
    states = generator.decoder(
      generator._embed(jnp.repeat(labels, num_docs, axis=0)),
      jnp.tril(jnp.ones((1, 3, 3), bool)),
      jnp.arange(3),
      generator.encode(context, context_mask),
      context_mask[:, None, :],
    )
    return generator.logits(states).reshape(B, num_docs, 3, V)

  @jax.jit
  def run(params, data, mask):
    batch = RagBatch(target_mask=None, **data)
    out = rag.model.apply({"params": params}, batch)
    logits = rag.model.apply({"params": params}, data, method=read_labels)
    labels = data["target_tokens"]
    theirs = (logits, *shift_left(labels, PAD["t5"]))
    ours = (out.target_logits, labels, mask)
    return (
      logits,
      nlls("t5", out.doc_scores, *theirs),
      jax.jacrev(lambda s: hf_rag_sequence_nll(s, *theirs))(out.doc_scores),
      jax.jacrev(lambda s: rag_sequence_nll(s, *ours))(out.doc_scores),
    )

  logits, theirs, by_score, our_by_score = run(rag.params, data, mask)
  for nll, (kind, settings) in zip(theirs, SETTINGS, strict=True):
    expected = rag.torch(kind, num_docs, target, **settings)
    assert_close(nll, expected.loss, f"{kind} {settings}")
    assert_close(logits.reshape(-1, 3, V), expected.logits, "logits")
  # One token, its end, and padding: nothing for the retriever in theirs.
  np.testing.assert_array_equal(by_score[0], 0.0)
  assert np.abs(by_score[2:]).max() > 1e-3  # longer targets
  assert np.abs(our_by_score[0]).max() > 1e-3
