"""Whether a model answers from what it reads, and what it bears.

In: passages and questions; and what retrieval found. Out: passages that state
other facts, with the answers that follow from them; and documents as a worse
retriever, or a worse corpus, would give them.

Exchanging the passages below a trained model is the test of Lewis et al. 2020
(https://arxiv.org/abs/2005.11401, section 4.5): answers that follow the
passages were read, those that do not were learned by heart.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import io
import re
from typing import Any

from etils import epath
from jaxtyping import Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
import numpy as np

from rag_jax.corpus.folding import fold
from rag_jax.corpus.passages import Passage
from rag_jax.data.questions import Question
from rag_jax.data.substitution import named
from rag_jax.evaluation.plots import write_bytes

# [B, R] passage numbers, best first -> [B, K], what the model reads.
Choice = Callable[[Int[np.ndarray, "B R"]], Int[np.ndarray, "B K"]]

RECALLS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of a worse index


@dataclasses.dataclass(frozen=True)
class Exchanged:
  """Passages that state other facts, and the questions about these."""

  passages: list[Passage]
  before: list[Question]  # with the answers of the passages as they were
  after: list[Question]  # the same, with the new answers
  num_left_out: int  # questions whose fact could not be exchanged


def _pattern(answers: Sequence[str]) -> re.Pattern[str]:
  """Returns what finds answers as whole words, the longest first."""
  words = "|".join(map(re.escape, sorted(answers, key=len, reverse=True)))
  return re.compile(rf"(?<!\w)(?:{words})(?!\w)")


def exchange_facts(
  passages: Sequence[Passage], questions: Sequence[Question], seed: int
) -> Exchanged:
  """Gives the subject of each question the answer of another question.

  The passages about a subject are those whose title the question names. Where
  their text states an accepted answer, it states the first answer of another
  question of the same relation instead; the same one for questions about the
  same fact. A question is left out if no passage about its subject states its
  answer, if the title does too, if there is no other answer, or if it cannot be
  told apart from another fact of the passage.

  Args:
    passages: all that the model can find.
    questions: with answers, and relations if there are.
    seed: of the choice.

  Raises:
    ValueError: no question is left.
  """
  rng = np.random.default_rng(seed)
  rows_of: dict[str, list[int]] = {}
  for row, passage in enumerate(passages):
    rows_of.setdefault(passage.title, []).append(row)
  answers: dict[str, list[str]] = {}
  for question in questions:
    answers.setdefault(question.relation, []).append(question.answers[0])
  texts: dict[int, str] = {}
  gone: dict[tuple[int, str], str] = {}  # row, folded answer -> the new one
  came: set[tuple[int, str]] = set()  # row, folded new answer
  before, after = [], []
  for question in questions:
    old = question.answers
    known, pattern = set(map(fold, old)), _pattern(old)
    others = [x for x in answers[question.relation] if fold(x) not in known]
    titles = named(question.said, rows_of.keys())
    facts = {
      (row, fold(words))
      for title in titles
      for row in rows_of[title]
      for words in pattern.findall(passages[row].text)
    }
    known_as = {gone.get(fact, "") for fact in facts}
    taken = not came.isdisjoint(facts) or len(known_as) > 1
    in_title = any(map(pattern.search, titles))
    if not facts or not others or taken or in_title:
      continue
    again = known_as.pop()
    new = again or others[int(rng.integers(len(others)))]
    for row in {row for row, _ in facts} if not again else ():
      text = texts.get(row, passages[row].text)
      texts[row] = pattern.sub(new.replace("\\", r"\\"), text)
      came.add((row, fold(new)))
    gone |= dict.fromkeys(facts, new)
    before.append(question)
    after.append(dataclasses.replace(question, answers=(new,)))
  if not before:
    raise ValueError(
      f"None of {len(questions)} questions names the title of a passage that"
      " states its answer, so that no fact can be exchanged. Expected questions"
      " about the titles of the corpus. Give another file of questions."
    )
  return Exchanged(
    [
      dataclasses.replace(p, text=texts.get(row, p.text))
      for row, p in enumerate(passages)
    ],
    before,
    after,
    len(questions) - len(before),
  )


def choices(
  n_docs: int, num_passages: int, blank: int, seed: int
) -> dict[str, tuple[str, float, Choice]]:
  """Returns what the model reads under each condition.

  Args:
    n_docs: K.
    num_passages: distractors are drawn from all of them; above 2 * K.
    blank: the row of a passage that says nothing; it is not read otherwise.
    seed: of all draws.

  Returns:
    By a name for the table: the kind of the condition, its degree, and a
    function of the retrieved passages. Each call draws anew.
  """
  rng = np.random.default_rng(seed)

  def best(found: Int[np.ndarray, "B R"]) -> Int[np.ndarray, "B K"]:
    return np.stack([row[row != blank][:n_docs] for row in found])

  def shuffled(found: Int[np.ndarray, "B R"]) -> Int[np.ndarray, "B K"]:
    return rng.permuted(best(found), axis=1)

  def distracted(num: int) -> Choice:
    def choose(found: Int[np.ndarray, "B R"]) -> Int[np.ndarray, "B K"]:
      docs = best(found)
      for row in docs:
        others: list[int] = []
        while len(others) < num:
          other = int(rng.integers(num_passages))
          if other not in (blank, *row, *others):
            others.append(other)
        row[n_docs - num :] = others
      return docs

    return choose

  def filled(num: int, row_of: Callable[[np.ndarray], Any]) -> Choice:
    def choose(found: Int[np.ndarray, "B R"]) -> Int[np.ndarray, "B K"]:
      docs = best(found)
      docs[:, n_docs - num :] = row_of(docs)
      return docs

    return choose

  def missing(recall: float) -> Choice:
    def choose(found: Int[np.ndarray, "B R"]) -> Int[np.ndarray, "B K"]:
      docs = []
      for row in found:
        row = row[row != blank]
        lost = rng.random(len(row)) >= recall
        # Those that were lost come last, for when too few are left.
        docs.append(row[np.argsort(lost, kind="stable")][:n_docs])
      return np.stack(docs)

    return choose

  found: dict[str, tuple[str, float, Choice]] = {
    "as retrieved": ("best", 0.0, best),
    "in random order": ("order", 0.0, shuffled),
  }
  for num in range(1, n_docs):
    of = f"{num} of {n_docs}"
    found[f"{of} random passages"] = ("random", float(num), distracted(num))
    found[f"{of} empty"] = ("empty", float(num), filled(num, lambda _: blank))
    found[f"{of} the best again"] = (
      "again", float(num), filled(num, lambda docs: docs[:, :1])
    )  # fmt: skip
  for recall in RECALLS:
    found[f"index recall {recall:.1f}"] = ("recall", recall, missing(recall))
  return found


def draw(
  path: epath.PathLike,
  title: str,
  points: Mapping[str, Iterable[tuple[float, float, float, float]]],
  n_docs: int,
) -> None:
  """Draws exact match against the spoilt documents, and the recall of an index.

  Args:
    path: a PNG file.
    title: of the figure.
    points: by the kinds of `choices`: degree, exact match, and its interval.
    n_docs: K.
  """
  figure = Figure(
    figsize=(11, 4.2), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12)
  )
  canvas = FigureCanvasAgg(figure)
  figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
  left, right = figure.subplots(1, 2, sharey=True)
  # Colours of Okabe and Ito, as in plots.py.
  for axes, kind, label, color in (
    (left, "random", "random passages", "#D55E00"),
    (left, "empty", "empty documents", "#0072B2"),
    (left, "again", "the best one again", "#009E73"),
    (right, "recall", "passages lost at random", "#0072B2"),
  ):
    drawn = sorted(points.get(kind, ()))
    if kind != "recall":
      drawn = [*points.get("best", ()), *drawn]
    if not drawn:
      continue
    x, mean, low, high = map(np.array, zip(*drawn, strict=True))
    axes.plot(x, mean, marker="o", color=color, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
  left.set_xlabel(f"documents of {n_docs} that are not the retrieved ones")
  left.xaxis.set_major_locator(MaxNLocator(integer=True))
  right.set_xlabel("recall of the index")
  right.invert_xaxis()
  left.set_ylabel("exact match")
  left.set_ylim(bottom=0.0)
  for axes in (left, right):
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.legend(frameon=False)
    for side in ("top", "right"):
      axes.spines[side].set_visible(False)
  png = io.BytesIO()
  canvas.print_png(png)
  write_bytes(epath.Path(path), png.getvalue())
