r"""Makes many vectors of few real embeddings, to measure indexes with.

  python tools/mix_embeddings.py --corpus=xquad.en.json --corpus=world_facts \
      --questions=xquad.en.json --num=100000 --output=runs/mixed \
      --encoder=hf:sentence-transformers/all-MiniLM-L6-v2
  python tools/benchmark_retrieval.py --embeddings=runs/mixed/passages.npy \
      --question_embeddings=runs/mixed/questions.npy --output=runs/retrieval

Each document of the corpora is embedded, and so is each of its sentences: the
real vectors. passages.npy begins with these, of length 1. Each further vector
is w a + (1 - w) b, divided by its length, of two different real ones that are
drawn at random, with w from Beta(--beta, --beta): at 0.5 most are near one of
the two. questions.npy is what --questions embeds to; these are in no mixture.
"""

import itertools

from absl import flags
from absl import logging
from etils import epath
import numpy as np

from rag_jax.benchmarks.vectors import long_and_short_texts
from rag_jax.benchmarks.vectors import mix_embeddings
from rag_jax.commands import command
from rag_jax.corpus.documents import read_documents
from rag_jax.corpus.report import BadRecords
from rag_jax.evaluation.judged_questions import read_judged_questions
from rag_jax.retrieval.retriever import Embedder
from rag_jax.search.text_encoder import open_checkpoint

_ENCODER = flags.DEFINE_string("encoder", None, "Directory, or hf:ORG/NAME.")
_CORPUS = flags.DEFINE_multi_string("corpus", None, "As of build_index.py.")
_QUESTIONS = flags.DEFINE_multi_string(
  "questions", None, "As of benchmark_retrieval.py."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.")
_NUM = flags.DEFINE_multi_integer(
  "num", [100_000], "Vectors; several numbers write passages_NUMBER.npy each."
)
_BETA = flags.DEFINE_float("beta", 0.5, "Of the weights.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws; the same, same files.")
_NAMES = ["encoder", "corpus", "questions", "output"]
flags.mark_flags_as_required(_NAMES)


def main(argv: list[str]) -> None:
  """Runs the command."""
  output = epath.Path(_OUTPUT.value or "").expanduser()
  output.mkdir(parents=True, exist_ok=True)
  encoder = open_checkpoint(_ENCODER.value or "", "question")
  embedder = Embedder(encoder.model, 1)
  documents = itertools.chain.from_iterable(
    read_documents(corpus, bad_records=BadRecords("fail"))
    for corpus in _CORPUS.value or []
  )
  # By length: a batch is as long as its longest text.
  texts = sorted(
    set(long_and_short_texts(documents)), key=lambda t: (len(t), t)
  )
  asked = itertools.chain.from_iterable(
    read_judged_questions(path) for path in _QUESTIONS.value or []
  )
  questions = list(dict.fromkeys(question.question for question in asked))
  logging.info(
    "Embedding %d texts and %d questions.", len(texts), len(questions)
  )
  np.save(
    output / "questions.npy", encoder.embed_questions(embedder, questions)
  )
  real = encoder.embed_questions(embedder, texts)
  sizes = _NUM.value or []
  for num in sizes:
    name = "passages.npy" if len(sizes) == 1 else f"passages_{num}.npy"
    mixed = mix_embeddings(real, num, beta=_BETA.value, seed=_SEED.value)
    np.save(output / name, mixed)
    print(f"{output / name}: {len(mixed)} vectors of {len(real)} real ones.")


if __name__ == "__main__":
  logging.set_verbosity(logging.INFO)
  command.run(main)
