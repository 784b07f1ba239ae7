"""Which passages go and come, against documents that are split anew."""

import random

from etils import epath
import numpy as np
import pytest

from rag_jax.corpus.document import Document
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.report import CorpusReport
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.corpus.splitting import Splitter
from rag_jax.corpus.twins import Twins
from rag_jax.corpus.twins import open_twins
from rag_jax.corpus.twins import write_twins
from rag_jax.search.changes import find_changes

SPLIT = Splitter(SplitConfig(size=3))


def parts(documents):
  for id_, text in documents.items():
    document = Document(id_, "", text, (), f"{id_}:1")
    for passage in SPLIT.split(document):
      yield document, passage


def passages(documents):
  return [passage for _, passage in parts(documents)]


def changes(before, upserts, deletes=(), drop=False, report=None):
  return find_changes(
    PassageList(passages(before), "here"),
    parts(upserts),
    deletes,
    drop_duplicate_texts=drop,
    report=report or CorpusReport(),
  )


def test_afterwards_there_is_what_all_documents_split_anew_give():
  rng = random.Random(0)

  def text():
    return " ".join(rng.choices("abcdef", k=rng.randint(1, 9)))

  for _ in range(100):
    before = {f"d{i}": text() for i in range(5)}
    upserts = {
      f"d{i}": rng.choice([text(), before.get(f"d{i}", text())])
      for i in rng.sample(range(8), 3)
    }
    rest = [id_ for id_ in before if id_ not in upserts]
    deletes = rng.sample(rest, rng.randint(0, len(rest)))
    made = changes(before, upserts, deletes)
    old = passages(before)
    left = [p for row, p in enumerate(old) if row not in made.gone]
    after = {d: t for d, t in (before | upserts).items() if d not in deletes}
    # In the order of the documents only where nothing came behind the others.
    assert sorted(p.id for p in left + made.added) == sorted(
      p.id for p in passages(after)
    )
    assert set(left + made.added) == set(passages(after))
    # What is the same stays.
    assert not {old[row] for row in made.gone} & set(made.added)
    assert {*made.added_documents} == upserts.keys() - before.keys()
    assert {*made.changed_documents} == {
      d for d, t in upserts.items() if d in before and before[d] != t
    }
    assert made.deleted == tuple(deletes)
    for passage, row in zip(made.added, made.same_text, strict=True):
      same = [i for i, p in enumerate(old) if p.text == passage.text]
      assert row == (same[0] if same else -1)


def test_a_document_named_like_a_part_stays_when_the_other_goes():
  made = changes({"a": "x", "a#1": "y", "b": "z"}, {}, ["a"])
  assert made.gone == [0]


def test_one_passage_of_a_document_can_be_deleted():
  made = changes({"a": "1 2 3 4 5 6 7"}, {}, ["a#1"])
  assert made.gone == [1]


def test_a_text_that_another_has_is_left_out_and_counted_if_the_build_did():
  report = CorpusReport()
  before = {"a": "x", "b": "y"}
  made = changes(
    before, {"b": "x", "c": "x", "d": "z", "e": "z"}, (), True, report
  )
  assert [p.id for p in made.added] == ["d"]
  assert made.gone == [1]
  assert made.changed_documents == ("b",)
  assert report.dropped["duplicate_text"] == 3
  assert made.added_documents == ("c", "d", "e")
  assert [p.id for p in made.twins[1]] == ["b", "c", "e"]
  assert made.twin_rows.tolist() == [0, 0, 1]
  # The one that has it may go in the same update.
  made = changes(before, {"c": "x"}, ["a"], True)
  assert [p.id for p in made.added] == ["c"]
  assert made.same_text == [0]


def test_with_twins_there_is_afterwards_what_all_documents_give():
  rng = random.Random(0)

  def text():
    return " ".join(rng.choices("ab", k=rng.randint(1, 4)))

  for _ in range(60):
    documents = {f"d{i}": text() for i in range(6)}
    shown, twins = [], Twins(np.zeros(0, np.int64))
    for step in range(4):  # the first builds, the others update
      upserts = documents if not step else {}
      for name in rng.sample(range(9), 3) if step else ():
        old = documents.get(f"d{name}", text())
        upserts[f"d{name}"] = rng.choice([text(), old])
      rest = [d for d in documents if d not in upserts]
      deletes = rng.sample(rest, rng.randint(0, len(rest)))
      made = find_changes(
        PassageList(shown, "here"),
        parts(upserts),
        deletes,
        drop_duplicate_texts=True,
        report=CorpusReport(),
        twins=twins,
      )
      before = documents
      documents = {d: t for d, t in (documents | upserts).items()
                   if d not in deletes}  # fmt: skip
      for passage, row in zip(made.added, made.same_text, strict=True):
        assert row < 0 or shown[row].text == passage.text
      if step:
        assert {*made.added_documents} == upserts.keys() - before.keys()
        assert {*made.changed_documents} == {
          d for d, t in upserts.items() if before.get(d, t) != t
        }
      shown = [p for i, p in enumerate(shown) if i not in made.gone]
      shown += made.added
      numbers, came = made.twins
      all_twins = [*twins.each(numbers), *came]
      twins = Twins(made.twin_rows, PassageList(all_twins, "here"))
      # Each text is shown once, and every passage is there under its id.
      texts = [p.text for p in shown]
      assert len({*texts}) == len(texts)
      assert sorted(p.id for p in shown + all_twins) == sorted(
        p.id for p in passages(documents)
      )
      assert {*shown, *all_twins} == {*passages(documents)}
      for row, passage in enumerate(shown):
        assert {*twins.of(row)} == {
          p for p in all_twins if p.text == passage.text
        }


def test_twins_are_kept_on_the_disk(tmp_path):
  twins = [Passage(id, "T", "x", (("k", id),)) for id in "cab"]
  path = epath.Path(tmp_path / "twins")
  write_twins(path, twins, np.array([7, 2, 7]))
  write_twins(path, twins, np.array([7, 2, 7]))  # what is there is replaced
  made = open_twins(path)
  assert [*made] == twins
  assert [[p.id for p in made.of(row)] for row in (2, 3, 7)] == [
    ["a"],
    [],
    ["c", "b"],
  ]
  assert (made.number_of("b"), made.number_of("x")) == (2, None)
  assert [p.id for p in made.each([2, 0])] == ["b", "c"]
  (path / "rows.npy").unlink()
  with pytest.raises(ValueError, match=r"rows\.npy is missing"):
    open_twins(path)
  write_twins(path, [], np.zeros(0, np.int64))
  assert (len(open_twins(path)), open_twins(path).of(0)) == (0, ())


@pytest.mark.parametrize(
  ("upserts", "deletes", "message"),
  [
    ({}, ["a", "x"], r"1 ids to delete are not there: \['x'\].*Nothing was"),
    ({"a": "z"}, ["a"], r"\['a'\] are to be deleted, but are also among"),
    ({}, ["a", "b"], "All 2 passages would be deleted"),
  ],
)
def test_what_cannot_be_meant_is_refused(upserts, deletes, message):
  with pytest.raises(ValueError, match=message):
    changes({"a": "x", "b": "y"}, upserts, deletes)
