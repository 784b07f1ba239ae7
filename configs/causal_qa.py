"""Questions answered by a decoder-only generator that reads prompts.

  python tools/train.py --config=configs/causal_qa.py --workdir=runs/causal \
      --config.generator.init_from=smollm2 --config.encoder.init_from=minilm \
      --config.data.passages=passages.jsonl --config.data.questions=questions/

It trains nothing: three examples in the prompt show what an answer is, and the
test split is measured. --config.train.num_steps trains it: gradients into both
the question tower and the generator; then leave the examples out, by
--config.prompt.shots="". All documents are in one prompt with
--config.loss=concatenate and --config.retriever_loss=none.
tools/benchmark_causal.py compares all of these: see configs/README.md.
"""

import pathlib

from rag_jax.config import Config

_TEMPLATE = """\
{% for passage in passages -%}
Passage: {{ passage.title + '. ' if passage.title else '' }}{{ passage.text }}
{% endfor -%}
Question: {{ question }}
Answer:"""


def get_config() -> Config:
  """Returns the settings that differ from the defaults."""
  c = Config()
  c.encoder.init_from = "hf:sentence-transformers/all-MiniLM-L6-v2"
  c.encoder.score_scale = 20.0  # what sentence-transformers trains with
  c.encoder.tied = False
  c.encoder.train_passage_encoder = False
  c.generator.kind = "causal"
  c.generator.init_from = "hf:HuggingFaceTB/SmolLM2-135M-Instruct"

  c.data.n_docs = 3
  c.data.context_style = "prompt"
  c.data.context_length = 1536
  c.data.target_length = 16
  c.prompt.template = _TEMPLATE
  c.prompt.shots = str(pathlib.Path(__file__).parent / "qa_shots.jsonl")
  c.prompt.stop = "\n"

  # Greedy, whatever the checkpoint says.
  c.decoding.generation_config = "{}"
  c.index.kind = "exact"
  c.train.num_steps = 0
  c.train.batch_size = 8
  c.eval.batch_size = 8
  return c
