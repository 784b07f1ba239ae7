"""A corpus of forty sentences, and how it is made searchable in seconds."""

import pathlib

from rag_jax.corpus.splitting import SplitConfig
from rag_jax.search.build import BuildConfig
from rag_jax.search.build import build_search_directory

ANIMALS = ("cats", "dogs", "owls", "bees", "eels", "cows", "hens", "rams")
PLACES = ("hills", "woods", "lakes", "caves", "barns")
QUESTION = "where do the owls live in the caves"


def sentence(animal, place):
  return f"the {animal} of the north live in the {place} by day and by night"


def config(**fields):
  made = BuildConfig(
    split=SplitConfig(method="none"),
    embed_batch_size=4,
    passages_per_embedding_shard=10,
    speed_secs=0.0,
  )
  made.index.kind = "exact"
  for name, value in fields.items():
    setattr(made, name, value)
  return made


def build(corpus, encoder, output, made=None, **kwargs):
  return build_search_directory(
    str(corpus), str(encoder), output, made or config(), **kwargs
  )


def files_of(path):
  """Returns what each file holds, but for what was measured or depends on time.

  The certificate has speeds, and so the manifests that digest it differ.
  """
  path = pathlib.Path(path)
  return {
    str(f.relative_to(path)): f.read_bytes()
    for f in sorted(path.rglob("*"))
    if f.is_file() and f.suffix != ".tmp" and f.name != "manifest.json"
  }
