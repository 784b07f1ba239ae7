"""A run trained here, exported as a RAG directory: torch gives its answers."""

import numpy as np
import pytest
import torch
import transformers

from rag_jax.retrieval.index import load_index
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.training.workdir import Workdir
from rag_jax.weights.convert import export_model

pytestmark = pytest.mark.parity

# The shape of the quickstart, which is T5's and a bag of words.
SHAPE = {
  "norm": "pre",
  "norm_kind": "rms",
  "norm_eps": 1e-6,
  "use_bias": False,
  "embedding_norm": False,
  "positions": "none",
  "relative_buckets": 32,
  "relative_shared": True,
  "scale_attention": False,
  "logits_bias": False,
  "init": "copy",
}
NUM_TOKENS = 7  # of an answer; so short a run learns to say nothing


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
  """A finished run."""
  changes = {f"generator__{name}": value for name, value in SHAPE.items()}
  config = tiny.config(
    **changes,
    encoder__projection_dim=16,
    encoder__normalize=True,
    encoder__score_scale=5.0,
    encoder__learn_score_scale=True,
    decoding__min_new_tokens=NUM_TOKENS,
  )
  return tiny.train(tmp_path_factory.mktemp("t5"), config, measure=True)


def test_torch_answers_as_the_run_does(run, tmp_path):
  questions = [q.question for q in run.tiny.split("test")]
  answers = RagPipeline.load(run.path).answer(questions)
  export_model(run.path, tmp_path / "rag")
  model, info = transformers.RagTokenForGeneration.from_pretrained(
    tmp_path / "rag", output_loading_info=True
  )
  assert not info["missing_keys"]
  assert not info["unexpected_keys"]
  model.eval()
  tokenizer = transformers.RagTokenizer.from_pretrained(tmp_path / "rag")

  context = run.experiment.context
  ids, context_ids = context.encode_questions(questions)
  tokens, mask = (torch.tensor(x).long() for x in context.questions(ids))
  rows = np.array([answer.retrieved for answer in answers])  # B K
  contexts = {
    name: torch.tensor(x.reshape(-1, x.shape[-1])).long()
    for name, x in zip(
      ("context_input_ids", "context_attention_mask"),
      context.contexts(context_ids, rows),
      strict=True,
    )
  }
  n_docs = rows.shape[1]
  embeddings = load_index(Workdir(run.path).index).embeddings
  with torch.inference_mode():
    question = model.rag.question_encoder(tokens, attention_mask=mask)[0]
    docs = torch.tensor(embeddings[rows])
    doc_scores = torch.einsum("br,bkr->bk", question, docs)
    written = model.generate(
      **contexts,
      doc_scores=doc_scores,
      n_docs=n_docs,
      num_beams=1,
      do_sample=False,
      min_new_tokens=NUM_TOKENS,
      max_new_tokens=8,
    )
    logits = model(
      **contexts,
      doc_scores=doc_scores,
      decoder_input_ids=written[:, :-1],
      n_docs=n_docs,
    ).logits
    marginal = model.marginalize(logits, doc_scores, n_docs)  # B T V
  for b, answer in enumerate(answers):
    np.testing.assert_allclose(
      sorted(doc_scores[b].tolist()),
      sorted(doc.score for doc in answer.docs),
      rtol=1e-4,
    )
    own = written[b, 1:]
    text = tokenizer.generator.decode(own, skip_special_tokens=True)
    assert text.strip() == answer.text
    size = len(answer.tokens)
    log_probs = marginal[b].gather(1, own[:, None])[:size, 0]
    np.testing.assert_allclose(log_probs, answer.token_log_probs, atol=1e-4)
  # Equality means something: questions are not alike to the model.
  assert len({round(answer.log_prob, 3) for answer in answers}) > 5
