"""RAG with decoder-only generators, against loops in PyTorch.

The reference reads each prompt with its answer so far as one text, without
padding and without a cache, and sums over documents as the formulas say:
Lewis et al. 2020, https://arxiv.org/abs/2005.11401, sections 2.1 and 2.5.
"""

import dataclasses
import functools

from causal_references import V
from causal_references import reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rag_jax.config import Config
from rag_jax.config_models import CausalConfig
from rag_jax.decoding.rag import RagDecoder
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.decoding.streaming import stream
from rag_jax.models.batch import RagBatch
from rag_jax.models.causal import build_causal
from rag_jax.models.rag import build_model
from rag_jax.training.stages import SpecialIds
from rag_jax.training.stages import main_loss
from rag_jax.weights.load import load_causal

pytestmark = pytest.mark.parity

KINDS = pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
B, K, T, SHARED = 2, 3, 5, 4
END = 2
SPECIAL = SpecialIds(None, (END,), (END,))
LENGTHS = ((11, 7, 9), (5, 13, 8))  # of the prompts


@functools.cache
def prompts():
  """Returns prompts that begin alike, and the scores of their documents."""
  rng = np.random.default_rng(1)
  tokens, mask = (np.zeros((B, K, 13), t) for t in (np.int32, bool))
  start = rng.integers(3, V, size=SHARED)
  for (b, k), length in np.ndenumerate(np.array(LENGTHS)):
    tokens[b, k, :length] = rng.integers(3, V, size=length)
    tokens[b, k, :SHARED] = start
    mask[b, k, :length] = True
  return tokens, mask, rng.normal(size=(B, K)).astype(np.float32)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """Returns a function that reads what transformers saved."""

  @functools.cache
  def load(kind):
    path = tmp_path_factory.mktemp("theirs")
    reference(kind).save_pretrained(path)
    found = load_causal(path)
    config = CausalConfig(**found.fields)
    return build_causal(config, dtype=jnp.float32), found.params, config

  return load


def log_probs_after(kind, b, k, answer):
  """Returns log p of the tokens after prompt (b, k) and an answer so far."""
  text = [*prompts()[0][b, k, : LENGTHS[b][k]].tolist(), *answer]
  logits = reference(kind)(torch.tensor([text])).logits
  return logits[0, -len(answer) - 1 :].log_softmax(-1)


def marginal(kind, b, answer):
  """Returns log p(next token) of RAG-Token."""
  prior = torch.tensor(prompts()[2][b]).log_softmax(0)
  given = [log_probs_after(kind, b, k, answer)[-1] for k in range(K)]
  return torch.logsumexp(prior[:, None] + torch.stack(given), 0)


def greedy(next_log_probs):
  answer = []
  while len(answer) < T and END not in answer:
    answer.append(int(next_log_probs(answer).argmax()))
  return answer


def sequence(kind, b, k, answer):
  """Returns log p(answer | x, z_k)."""
  log_probs = log_probs_after(kind, b, k, answer)[:-1]
  return log_probs[range(len(answer)), answer].sum()


def decode(module, params, mode, num_shared, **settings):
  tokens, mask, scores = prompts()
  decoder = RagDecoder(
    module,
    GenerationSettings(
      max_new_tokens=T, eos_token_id=END, pad_token_id=0, **settings
    ),
    mode,
  )
  return decoder(
    {"generator": params}, scores, tokens, mask, num_shared=num_shared
  )


def answers(out):
  return [out.tokens[b, 0, : out.lengths[b, 0]].tolist() for b in range(B)]


SHARES = pytest.mark.parametrize("num_shared", [0, SHARED])


@KINDS
@SHARES
def test_rag_token_writes_what_the_loop_writes(kind, num_shared, loaded):
  module, params, _ = loaded(kind)
  out = decode(module, params, "rag_token", num_shared)
  with torch.no_grad():
    for b, answer in enumerate(answers(out)):
      assert answer == greedy(functools.partial(marginal, kind, b))
      total = sum(
        float(marginal(kind, b, answer[:t])[token])
        for t, token in enumerate(answer)
      )
      np.testing.assert_allclose(out.log_probs[b, 0], total, rtol=1e-4)


@KINDS
@SHARES
def test_rag_sequence_ranks_all_answers_under_all_documents(
  kind, num_shared, loaded
):
  module, params, _ = loaded(kind)
  out = decode(module, params, "rag_sequence", num_shared)
  prior = torch.tensor(prompts()[2]).log_softmax(1)
  with torch.no_grad():
    for b in range(B):
      scores = {}
      for k in range(K):
        answer = greedy(lambda y: log_probs_after(kind, b, k, y)[-1])  # noqa: B023
        given = [sequence(kind, b, other, answer) for other in range(K)]
        scores[tuple(answer)] = float(
          torch.logsumexp(prior[b] + torch.stack(given), 0)
        )
      best = max(scores, key=scores.__getitem__)
      assert answers(out)[b] == list(best)
      np.testing.assert_allclose(out.log_probs[b, 0], scores[best], rtol=1e-4)


@KINDS
def test_beams_give_what_they_give_without_sharing_and_alone(kind, loaded):
  module, params, _ = loaded(kind)
  for mode in ("rag_token", "rag_sequence_fast"):
    plain, shared = (
      decode(module, params, mode, num, num_beams=3) for num in (0, SHARED)
    )
    np.testing.assert_array_equal(plain.tokens, shared.tokens)
    np.testing.assert_allclose(plain.log_probs, shared.log_probs, rtol=1e-4)
  # What a question gives does not depend on what is beside it.
  tokens, mask, scores = prompts()
  settings = GenerationSettings(
    max_new_tokens=T, eos_token_id=END, pad_token_id=0, num_beams=3
  )
  decoder = RagDecoder(module, settings, "rag_token")
  both = decode(module, params, "rag_token", 0, num_beams=3)
  for b in range(B):
    one = slice(b, b + 1)
    alone = decoder({"generator": params}, scores[one], tokens[one], mask[one])
    np.testing.assert_array_equal(alone.tokens, both.tokens[one])


@pytest.mark.parametrize("mode", ["single", "concatenate"])
def test_one_prompt_is_what_pytorch_generates(mode, loaded):
  module, params, _ = loaded("llama")
  tokens, mask, scores = prompts()
  best = scores.argmax(1)
  if mode == "concatenate":
    rows = np.arange(B)
    tokens, mask = tokens[rows, best][:, None], mask[rows, best][:, None]
  settings = GenerationSettings(
    max_new_tokens=T, eos_token_id=END, pad_token_id=0
  )
  inputs = {"generator": params}, scores, tokens, mask
  decoder = RagDecoder(module, settings, mode)
  out = decoder(*inputs, num_shared=SHARED)
  for b in range(B):
    text = prompts()[0][b, best[b], : LENGTHS[b][best[b]]]
    expected = reference("llama").generate(
      torch.tensor(text[None]), max_new_tokens=T, do_sample=False,
      eos_token_id=END, pad_token_id=0,
    )[0, len(text) :]  # fmt: skip
    assert answers(out)[b] == expected.tolist()
  steps = list(stream(decoder, *inputs, num_shared=SHARED))
  np.testing.assert_array_equal(
    np.stack(steps, axis=-1), out.tokens[:, :, : len(steps)]
  )


TARGETS = ((9, 4, END), (11, 5, 7, 8, END))


def batch():
  tokens, mask, _ = prompts()
  targets = np.zeros((B, T), np.int32)
  for b, target in enumerate(TARGETS):
    targets[b, : len(target)] = target
  rng = np.random.default_rng(2)
  return RagBatch(
    context_tokens=jnp.asarray(tokens),
    context_mask=jnp.asarray(mask),
    target_tokens=jnp.asarray(targets),
    target_mask=jnp.asarray(
      np.arange(T) < np.array([len(t) for t in TARGETS])[:, None]
    ),
    question_tokens=jnp.asarray(rng.integers(5, V, size=(B, 4))),
    question_mask=jnp.ones((B, 4), bool),
    doc_embeddings=jnp.asarray(rng.normal(size=(B, K, 8)), jnp.float32),
  )


def torch_loss(kind, loss, scores):
  """Returns the loss per target token."""
  prior = scores.log_softmax(1)
  total = torch.zeros(())
  for b, target in enumerate(TARGETS):
    given = torch.stack(
      [
        log_probs_after(kind, b, k, target)[:-1][range(len(target)), target]
        for k in range(K)
      ]
    )  # K T
    if loss == "rag_token":
      total -= torch.logsumexp(prior[b][:, None] + given, 0).sum()
    else:
      total -= torch.logsumexp(prior[b] + given.sum(1), 0)
  return total / sum(map(len, TARGETS))


@KINDS
@pytest.mark.parametrize("loss", ["rag_token", "rag_sequence"])
@pytest.mark.parametrize("chunk", [0, 16])
def test_losses_and_gradients_are_those_of_the_loop(kind, loss, chunk, loaded):
  _, params, sizes = loaded(kind)
  config = Config(loss=loss)
  config.generator.kind = "causal"
  rates = dict.fromkeys(
    ("dropout", "attention_dropout", "activation_dropout"), 0.0
  )
  config.causal = dataclasses.replace(sizes, **rates)
  config.encoder.embed_dim, config.encoder.num_layers = 8, 0
  config.encoder.train_passage_encoder = False
  config.train.vocab_chunk = chunk
  config.train.compute_dtype = "float32"
  model = build_model(config, vocab_size=V, decoder_start_id=0)
  variables = model.init(jax.random.key(0), batch())["params"]
  variables = jax.tree.map(lambda x: x, {**variables, "generator": params})
  scores = torch.tensor(
    np.asarray(
      model.apply({"params": variables}, batch(), True, method="doc_scores")
    ),
    requires_grad=True,
  )

  def ours(params):
    return main_loss(config, model, SPECIAL)(
      params, batch(), jax.random.key(0)
    )[0]

  value, grads = jax.jit(jax.value_and_grad(ours))(variables)
  theirs = reference(kind)
  theirs.zero_grad()
  expected = torch_loss(kind, loss, scores)
  expected.backward()
  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  table = theirs.get_input_embeddings().weight.grad.numpy()
  mine = np.asarray(grads["generator"]["token_embedding"]["embedding"])
  np.testing.assert_allclose(mine, table, atol=2e-5 * np.abs(table).max())
  # And through the scores to the question's tower.
  by_question = np.einsum(
    "BK,BKR->BR", scores.grad.numpy(), batch().doc_embeddings
  )
  _, back = jax.vjp(
    lambda p: model.apply(
      {"params": p}, batch().question_tokens, batch().question_mask,
      method="embed_questions",
    ),
    variables,
  )  # fmt: skip
  for a, b in zip(
    jax.tree.leaves(grads["question_encoder"]),
    jax.tree.leaves(back(jnp.asarray(by_question))[0]["question_encoder"]),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_fid_and_the_defects_of_transformers_are_refused(loaded):
  module, _, _ = loaded("llama")
  settings = GenerationSettings(max_new_tokens=T, eos_token_id=END)
  with pytest.raises(ValueError, match=r"mode='fid' joins .*'concatenate'"):
    RagDecoder(module, settings, "fid")
  with pytest.raises(ValueError, match=r"3 contexts per question .* Join them"):
    decode(module, {}, "concatenate", 0)
