"""Questions in dialogues, from scratch on the bundled corpus.

  python tools/train.py --config=configs/dialogue.py --workdir=runs/dialogue
  rag-jax ask --workdir=runs/dialogue --chat

The quickstart's model and recipe. Later turns such as "And its currency?" name
nothing: the retriever finds passages, and the generator reads them, by what was
said before. All passages about a country may be needed, hence three documents.

The same without the history is --config.dialogue.turns=0. The results of both
stand in configs/README.md.
"""

import pathlib

from rag_jax import load_config
from rag_jax.config import Config


def get_config() -> Config:
  """Returns the settings of the quickstart, and what differs from them."""
  c = load_config(str(pathlib.Path(__file__).with_name("quickstart.py")))
  c.data.questions = "world_facts_dialogue"
  c.data.n_docs = 3
  c.data.question_length = 48
  c.data.context_length = 88
  c.dialogue.user = "Q: "
  c.dialogue.assistant = "A: "
  c.dialogue.separator = " "
  c.train.batch_size = 32
  return c
