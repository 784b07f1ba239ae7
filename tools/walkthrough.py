"""From passages to an explained answer in one sitting, about a minute.

  python tools/walkthrough.py

Run all of it, or cell by cell (`# %%`) in an editor such as VS Code or Spyder.
It trains a tiny RAG model on facts about countries, asks it about a country
that no training question named, and edits the passage that it answered from.
Everything is written to a temporary directory, which is kept.
"""

# %% Imports
import json
import math
import pathlib
import tempfile

import rag_jax
from rag_jax.corpus.documents import BUNDLED
from rag_jax.evaluation.report import table
from rag_jax.serving.explanation import explain

# %% 1. Passages and questions are JSON lines. These are the bundled ones about
# capitals and continents. Nothing links a question to the passage that answers
# it: the retriever learns that from the answers alone.
root = pathlib.Path(tempfile.mkdtemp(prefix="walkthrough_"))
for name, field, ends in [
  ("passages", "id", ("/capital", "/region")),
  ("train", "relation", ("capital", "continent")),
  ("validation", "relation", ("capital", "continent")),
  ("test", "relation", ("capital", "continent")),
]:
  lines = (BUNDLED["world_facts"] / f"{name}.jsonl").read_text().splitlines()
  kept = [line for line in lines if json.loads(line)[field].endswith(ends)]
  (root / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
  print(f"{len(kept):5} {name:10}  {kept[0]}")

# %% 2. The configuration: only what differs from the defaults. The retriever is
# a bag of words, and the generator has one layer, whose attention starts by
# copying. In half of the contexts another answer replaces the true one, so that
# the model has to read: memorising does not help.
c = rag_jax.Config()
c.data.passages = str(root / "passages.jsonl")
c.data.questions = str(root)
c.data.n_docs = 2  # K, the passages that the generator reads per question
c.data.question_length = 32  # tokens, like the lengths below
c.data.passage_length = 60
c.data.context_length = c.generator.max_positions = 80
c.data.target_length = 16
c.data.substitute_answers = 0.5
c.tokenizer.vocab_size = 600
c.encoder.embed_dim = c.encoder.projection_dim = c.generator.embed_dim = 64
c.encoder.normalize = True
c.encoder.score_scale = 10.0
c.encoder.learn_score_scale = True
c.generator.num_layers = 1
c.encoder.num_heads = c.generator.num_heads = 2
c.generator.mlp_dim = 128
c.generator.norm = "pre"
c.generator.embedding_norm = False
c.generator.position_offset = 0
c.generator.position_init = "sinusoid"
c.generator.relative_buckets = 32
c.generator.init = "copy"
c.generator.pointer = True  # goes on where it copied
c.optimizer.peak_lr = 4e-3
c.optimizer.retriever_lr = 2e-3
c.optimizer.warmup_steps = 20
c.optimizer.schedule = "cosine"
c.optimizer.b2 = 0.98
c.optimizer.weight_decay = 0.01
c.optimizer.clip_norm = 1.0
c.index.kind = "exact"
c.train.num_steps = 300
c.train.batch_size = 16
c.train.validate_steps = c.train.checkpoint_steps = 0  # only at the end

# %% 3. Train. The loss is -log p(y|x) = -log sum_z p(z|x) p(y|x,z), and its
# gradients flow into retriever and generator. The run ends with the model, the
# index and the metrics of the test questions in its workdir.
print("\nTraining, about half a minute.")
results = rag_jax.train(c, root / "run")
print(table(results))

# %% 4. Ask about a country that no training question named. The prior p(z|x) is
# the retriever's trust in a passage before anything is written. The posterior
# p(z|x,y) also weighs how likely the passage makes the answer.
question = "What is the capital of France?"
pipeline = rag_jax.RagPipeline.load(root / "run")
(answer,) = pipeline.answer(question)
print(f"\n{question}\n{explain(answer)}")

# %% 5. Where the numbers come from: the prior is the softmax of the inner
# products of question and passages. The posterior exists for each token too.
total = sum(math.exp(doc.score) for doc in answer.docs)
for doc in answer.docs:
  print(f"{doc.title}: exp({doc.score:.2f}) / sum = {doc.prior:.3f} = p(z|x)")
  for token, p in zip(answer.tokens, doc.token_posteriors, strict=True):
    print(f"  {token:8} p(z|x,y_t) = {p:.3f}")
  assert math.isclose(math.exp(doc.score) / total, doc.prior, rel_tol=1e-3)

# %% 6. Knowledge lives in the passages. Edit one and ask again. All passages
# are embedded anew; nothing is trained.
text = (root / "passages.jsonl").read_text()
edited = root / "edited.jsonl"
edited.write_text(text.replace("capital is Paris", "capital is Marseille"))
pipeline = rag_jax.RagPipeline.load(root / "run", corpus=edited)
print(f"After the edit: {question}\n{explain(pipeline.answer(question)[0])}")
print(f"The run is in {root}.")
