"""Which retrieved passages are those that a file of questions names.

In: questions with ids of passages, or pages of Wikipedia (KILT's provenance),
and the corpus. Out: R-precision and gold recall of what was retrieved for a
question, or None where they cannot be known.
"""

from collections.abc import Iterable, Sequence
import dataclasses

from rag_jax.corpus.folding import fold
from rag_jax.corpus.passages import Passage
from rag_jax.data.questions import Question
from rag_jax.evaluation.ranking_metrics import evidence_recall
from rag_jax.evaluation.ranking_metrics import r_precision

GOLD_K = 5  # of gold_recall_at_5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
  """How the passages of a corpus are recognised as the named ones.

  Attributes:
    passages: whether the ids that questions name are ids in the corpus.
    pages_by: "id" or "title", what pages are compared by; "": by nothing, since
      the corpus has none of them.
    notes: sentences on what cannot be scored, or is not in the corpus.
  """

  passages: bool
  pages_by: str
  notes: tuple[str, ...] = ()

  def score(
    self, question: Question, retrieved: Sequence[Passage]
  ) -> tuple[float, float] | None:
    """Returns R-precision and gold recall at 5, or None.

    With named passages, all of them are one set of R, and the recall is their
    share among the first 5. With pages, passages of one page count once, each
    output of KILT is a set, and both are KILT's (ranking_metrics.py).

    Args:
      question: None is returned if it names nothing, or nothing that is known
        to have a counterpart in this corpus.
      retrieved: best first.
    """
    if question.gold and self.passages:
      ids = [passage.id for passage in retrieved]
      recall = evidence_recall(ids, [{id_} for id_ in question.gold], GOLD_K)
      return r_precision(ids, [question.gold]), recall
    if question.pages and self.pages_by == "id":
      sets = [{id_ for id_, _ in pages} for pages in question.pages]
      found = [page_id(passage) for passage in retrieved]
    elif question.pages and self.pages_by == "title":
      sets = [{fold(title) for _, title in pages} for pages in question.pages]
      found = [fold(passage.title) for passage in retrieved]
    else:
      return None
    if any("" in names for names in sets):
      return None  # a page lacks what pages are compared by
    return r_precision(found, sets), evidence_recall(found, sets, GOLD_K)


def page_id(passage: Passage) -> str:
  """Returns the id of the page that a passage is of.

  It is the passage's metadata `wikipedia_id`, or its id without the number that
  splitting gives the parts of a document.
  """
  metadata = dict(passage.metadata)
  if "wikipedia_id" in metadata:
    return metadata["wikipedia_id"]
  id_, _, part = passage.id.rpartition("#")
  return id_ if id_ and part.isdecimal() else passage.id


def find_evidence(
  questions: Sequence[Question], passages: Iterable[Passage]
) -> Evidence:
  """Returns how to recognise what the questions name; reads the corpus once.

  Ids that fit another corpus would score 0 without a word, so each kind is used
  only if the corpus has at least one of those that are named; those that it
  lacks count as not found, as in trec_eval. A page is in the corpus by its id
  only if the title begins like that of the page too, since the passages of
  other corpora have numbers as ids. If no id fits, pages are compared by their
  titles.
  """
  ids = {id_ for question in questions for id_ in question.gold}
  pages = {
    page for question in questions for pages in question.pages for page in pages
  }
  titles = {id_: fold(title) for id_, title in pages if id_}
  wanted_titles = {fold(title) for _, title in pages} - {""}
  found_ids: set[str] = set()
  found_pages: set[str] = set()
  found_titles: set[str] = set()
  for passage in passages if ids or pages else ():
    if passage.id in ids:
      found_ids.add(passage.id)
    if not pages:
      continue
    title, page = fold(passage.title), page_id(passage)
    expected = titles.get(page)
    if expected is not None and (not title or title.startswith(expected)):
      found_pages.add(page)
    if title in wanted_titles:
      found_titles.add(title)

  notes: list[str] = []
  unknown = sum(not (q.gold or q.pages) for q in questions)
  if unknown:
    notes.append(
      f"{unknown} of {len(questions)} questions name no gold passage or page:"
      " they have no R-precision and no KILT scores."
    )
  if ids:
    notes += _missing("passages", len(ids), len(found_ids))
  by = "id" if found_pages else "title" if found_titles else ""
  if pages:
    found = found_pages if by == "id" else found_titles
    named = len(titles) if by == "id" else len(wanted_titles)
    if by == "title":
      notes.append(
        "Gold pages are recognised by their titles: their Wikipedia ids are not"
        " ids in this corpus."
      )
    notes += _missing("pages", named, len(found))
  return Evidence(passages=bool(found_ids), pages_by=by, notes=tuple(notes))


def _missing(what: str, named: int, found: int) -> list[str]:
  if not found:
    return [
      f"None of the {named} gold {what} is in the corpus, so the questions were"
      " made for another one: R-precision and KILT scores cannot be known."
    ]
  if found < named:
    return [
      f"{named - found} of {named} gold {what} are not in the corpus: they"
      " count as not found."
    ]
  return []
