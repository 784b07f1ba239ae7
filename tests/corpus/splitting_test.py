"""Splitting loses no text, keeps to its sizes, and counts what it does."""

import base64
import random
import re

import pytest

from rag_jax.corpus.document import Document
from rag_jax.corpus.document import Heading
from rag_jax.corpus.markdown_text import read_markdown
from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.report import CorpusReport
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.corpus.splitting import Splitter
from rag_jax.corpus.splitting import validate
from rag_jax.corpus.tokenizer import train_tokenizer

SENTENCES = (
  "One two three. Four five. Six seven eight nine. Ten. Eleven twelve."
)


class Letters:
  """A tokenizer whose tokens are letters; white space is none."""

  def encode(self, texts):
    """Returns a number for each letter."""
    return [[ord(c) for c in text if not c.isspace()] for text in texts]


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer((p.text for p in load_passages("world_facts")), 600)


def document(text, id="a"):
  return Document(id, "Title", text, (("lang", "en"),), "file:1")


def split(documents, settings, **kwargs):
  splitter = Splitter(settings, **kwargs)
  return [p for document in documents for p in splitter.split(document)]


def texts(text, tokenizer=None, report=None, **settings):
  """The texts of the passages."""
  return [
    p.text
    for p in split(
      [document(text)],
      SplitConfig(**settings),
      tokenizer=tokenizer,
      report=report,
    )
  ]


def random_text(seed, num_words=1000):
  rng = random.Random(seed)
  ends = [" "] * 8 + [". ", "\n", ".\n\n", "  ", "? ", ", "]
  return "".join(
    "".join(rng.choices("abcdé", k=rng.randint(1, 12))) + rng.choice(ends)
    for _ in range(num_words)
  )


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
@pytest.mark.parametrize("seed", range(3))
def test_words_are_disjoint_and_give_the_text_back(seed, size):
  text = random_text(seed)
  # The oracle: DPR's loop.
  words = text.split()
  expected = [words[i : i + size] for i in range(0, len(words), size)]
  pieces = texts(text, method="words", size=size)
  assert [piece.split() for piece in pieces] == expected
  assert " ".join(pieces).split() == words


@pytest.mark.parametrize("method", ["words", "sentences"])
@pytest.mark.parametrize("unit", ["words", "tokens"])
@pytest.mark.parametrize("seed", range(6))
def test_no_character_is_lost_in_any_script(seed, unit, method):
  rng = random.Random(seed)
  alphabet = "abc .!?\n“”')。\uff0c\uff01你好ก่\u0301\t"
  text = "".join(rng.choice(alphabet) for _ in range(600))
  text += "x" * 300 + text
  pieces = texts(
    text,
    Letters() if unit == "tokens" else None,
    method=method,
    unit=unit,
    size=9,
    max_word_chars=10,
  )
  assert "".join("".join(pieces).split()) == "".join(text.split())
  assert all(piece in text and piece == piece.strip() for piece in pieces)
  if unit == "tokens":
    sizes = map(len, Letters().encode(pieces))
    assert max(sizes) <= 9


def test_white_space_inside_a_passage_stays_as_it_is():
  assert texts("  a\n\nb  c d ", size=3) == ["a\n\nb  c", "d"]


def test_a_hundred_words_of_chinese_are_a_hundred_characters():
  text = "黑豹队的防守只丢了三百零八分。" * 20
  pieces = texts(text, size=100)
  assert "".join(pieces) == text
  assert [len(re.sub("。", "", p)) for p in pieces] == [100, 100, 80]


def test_none_keeps_the_text_as_it_is():
  assert texts(" a  b\n", method="none", size=1) == [" a  b\n"]


def test_a_passage_has_title_and_metadata_of_its_document():
  passages = list(
    split([document("a b c"), document("d", "b")], SplitConfig(size=2))
  )
  lang = (("lang", "en"),)
  assert passages == [
    Passage("a#0", "Title", "a b", lang),
    Passage("a#1", "Title", "c", lang),
    Passage("b", "Title", "d", lang),
  ]


def test_sentences_stay_whole_as_long_as_they_fit():
  assert texts(SENTENCES, method="sentences", size=5) == [
    "One two three. Four five.",
    "Six seven eight nine. Ten.",
    "Eleven twelve.",
  ]


def test_overlap_repeats_whole_sentences_that_fit():
  assert texts(SENTENCES, method="sentences", size=6, overlap=2) == [
    "One two three. Four five.",
    "Four five. Six seven eight nine.",
    "Ten. Eleven twelve.",  # four words would be too many to repeat
  ]
  assert texts(SENTENCES, method="sentences", size=5, overlap=2) == [
    "One two three. Four five.",
    "Six seven eight nine. Ten.",  # with "Four five." it would be 6 words
    "Ten. Eleven twelve.",
  ]


def packed_slowly(sizes, size, overlap):
  """The oracle: (start, end) of passages of parts of these sizes."""
  spans, start, begin = [], 0, 0  # of the passage; of what is new in it
  while begin < len(sizes):
    while start < begin and sum(sizes[start : begin + 1]) > size:
      start += 1
    end = begin + 1
    while end < len(sizes) and sum(sizes[start : end + 1]) <= size:
      end += 1
    spans.append((start, end))
    previous, start, begin = start, end, end
    while start - 1 > previous and sum(sizes[start - 1 : end]) <= overlap:
      start -= 1
  return spans


@pytest.mark.parametrize("seed", range(30))
def test_sentences_are_packed_as_a_slow_loop_packs_them(seed):
  rng = random.Random(seed)
  size = rng.randint(5, 30)
  overlap = rng.randint(0, size - 1)
  sizes = [rng.randint(1, min(size, 9)) for _ in range(60)]
  parts = [" ".join(["w"] * (n - 1) + [f"{i}."]) for i, n in enumerate(sizes)]
  expected = [
    " ".join(parts[a:b]) for a, b in packed_slowly(sizes, size, overlap)
  ]
  text = " ".join(parts)
  settings = {"method": "sentences", "size": size, "overlap": overlap}
  assert texts(text, **settings) == expected
  if overlap > size // 2 and max(sizes) < 9:
    assert len(expected) > len(texts(text, method="sentences", size=size))


@pytest.mark.parametrize("method", ["words", "sentences"])
@pytest.mark.parametrize("size", [8, 40, 200])
def test_passages_of_tokens_have_at_most_so_many(tokenizer, method, size):
  text = "\n\n".join(p.text for p in load_passages("world_facts")[:150])
  text += " " + "naïve黑豹队🜚" * 30
  settings = {"method": method, "unit": "tokens", "size": size}
  pieces = texts(text, tokenizer, **settings)
  counts = [len(ids) for ids in tokenizer.encode(pieces)]
  assert max(counts) <= size
  assert sum(counts) > 0.7 * size * len(counts)  # they are well filled
  assert "".join("".join(pieces).split()) == "".join(text.split())


def test_a_sentence_that_is_too_long_is_divided_between_words_and_counted():
  report = CorpusReport()
  text = "Short one. This sentence is longer than five words. End."
  pieces = texts(text, method="sentences", size=5, report=report)
  assert pieces == [
    *("Short one.", "This sentence is longer than", "five words. End."),
  ]
  assert report.broken == 1
  assert report.places["broken"] == ["file:1"]


TEN_MB = 10_000_000


@pytest.mark.parametrize(
  "settings",
  [{}, {"method": "sentences", "size": 10, "max_word_chars": 1_000}],
)
def test_ten_mb_without_a_space_are_split_and_counted(settings):
  report = CorpusReport()
  pieces = texts("x" * TEN_MB, report=report, **settings)
  assert [len(p) for p in pieces] == [10_000] * 1_000
  assert (report.split, report.broken, report.cut) == (1, 999, 0)


def test_a_word_of_many_tokens_is_split_into_as_many_as_fit(tokenizer):
  report = CorpusReport()
  settings = {"method": "sentences", "unit": "tokens", "size": 250}
  pieces = texts("xy" * 50_000, tokenizer, report, **settings)
  assert sum(map(len, pieces)) == 100_000
  assert max(len(i) for i in tokenizer.encode(pieces)) <= 250
  assert report.broken == len(pieces) - 1


def test_ten_mb_in_one_piece_are_cut_where_settings_say_and_counted():
  report = CorpusReport()
  text = "word " * (TEN_MB // 5)
  settings = {"method": "none", "max_chars": 1_000}
  assert texts(text, report=report, **settings) == [text[:1_000]]
  assert (report.split, report.cut) == (0, 1)
  assert report.cut_chars == TEN_MB - 1_000
  assert report.places["cut"] == [f"file:1: {TEN_MB - 1_000} characters"]
  assert texts(text, method="none") == [text]


def test_documents_that_are_split_are_counted_with_their_place():
  report = CorpusReport()
  list(
    split(
      [document("a b c"), document("d")], SplitConfig(size=2), report=report
    )
  )
  assert report.split == 1
  assert report.places == {"split": ["file:1"]}


def page(text):
  """A document as Markdown gives it."""
  read = read_markdown(text)
  return Document("a", read.title, read.text, (), "file:1", read.headings)


def fitted(document, size, report=None, **settings):
  """(title, text) of the passages, in letters."""
  settings = SplitConfig(method="fit", unit="tokens", size=size, **settings)
  passages = split([document], settings, tokenizer=Letters(), report=report)
  return [(p.title, p.text) for p in passages]


def test_passages_end_with_their_section_and_are_named_by_its_headings():
  text = "in\n# A\none\n## B\ntwo\n### C\n## D\n### E\nthree\n# F\n## G"
  assert fitted(page(text), 200) == [
    ("A", "in"),
    ("A", "one"),
    ("A > B", "two"),
    ("A > B", "C"),  # has no text of its own
    ("A > D > E", "three"),
    ("A > F", "G"),
  ]


def test_a_heading_that_the_title_says_is_not_said_again():
  text = "---\ntitle: Install the tool\n---\n# Install\n## Linux\nx"
  assert fitted(page(text), 200) == [("Install the tool > Linux", "x")]
  assert fitted(page("# A\n# A"), 50) == [("A", "A\nA")]
  assert fitted(page("# A"), 50) == [("A", "A")]


def test_a_passage_ends_with_a_sentence_else_a_line_else_a_word():
  assert fitted(document("Aa bb. Cc dd. Ee."), 5 + 3 + 8) == [
    ("Title", "Aa bb. Cc"[:6]), ("Title", "Cc dd. Ee."),
  ]  # fmt: skip
  code = "if a:\n    b = 1\n    c = 2\nelse:\n    d = 3"
  assert fitted(document(code), 5 + 3 + 9) == [
    ("Title", "if a:\n    b = 1"),
    ("Title", "    c = 2\nelse:"),
    ("Title", "    d = 3"),
  ]
  assert fitted(document("abcd efgh ijkl"), 5 + 3 + 8) == [
    ("Title", "abcd efgh"), ("Title", "ijkl"),
  ]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("overlap", [0, 5])
def test_what_fits_is_never_cut_and_no_character_is_lost(seed, overlap):
  rng = random.Random(seed)
  alphabet = "abc .!?\n“”')。\uff0c你好\u0301\t"
  text, marks = "", []
  for level in rng.choices([0, 0, 1, 2, 3], k=40):
    body = "".join(rng.choices(alphabet, k=rng.randint(0, 60))) + "z"
    start = len(text) + 1
    heading = f"h{len(marks)} {body[: rng.randint(1, 40)]}".split("\n")[
      0
    ].strip()
    if level:
      text += f"\n{heading}\n"
      marks.append(Heading(start, start + len(heading), level, heading))
    text += body
  size = rng.randint(24, 60)
  found = list(
    split(
      [Document("a", "T", text, (), "f:1", tuple(marks))],
      SplitConfig(method="fit", unit="tokens", size=size, overlap=overlap),
      tokenizer=Letters(),
    )
  )
  for passage in found:
    sizes = map(len, Letters().encode([passage.title, passage.text]))
    assert sum(sizes) + 3 <= size, passage
  if not overlap:
    seen = "".join(p.title + p.text for p in found)
    for c in set("".join(text.split())):
      assert seen.count(c) >= text.count(c) or c in "".join(
        h.title for h in marks
      )
    assert sum(p.text.count("z") for p in found) >= 40


def test_a_title_that_leaves_no_room_is_shortened_and_counted():
  report = CorpusReport()
  long = Document("a", "many words in a title " * 20, "text " * 20, (), "f:1")
  found = fitted(long, 60, report)
  assert all(title.endswith(" …") for title, _ in found)
  assert all(len("".join((a + b).split())) + 3 <= 60 for a, b in found)
  assert " ".join(text for _, text in found).split() == ["text"] * 20
  assert report.shortened == 1
  text = "# A" + "a" * 30 + "\n## B" + "b" * 30 + "\n## C\nx"
  assert fitted(page(text), 80)[-1] == ("C", "x")


def test_encoded_data_is_left_out_and_the_headings_stay_where_they_are():
  report = CorpusReport()
  data = base64.b64encode(random.Random(0).randbytes(900)).decode()
  text = f"# A\none {data} two\n## B\n{data}\n\nthree\n# C\n{data}"
  found = fitted(page(text), 100, report, drop_encoded=True)
  assert [(t, " ".join(x.split())) for t, x in found] == [
    ("A", "one two"), ("A > B", "three"), ("A", "C"),
  ]  # fmt: skip
  assert (report.left_out, report.left_out_chars) == (3, 3 * len(data))
  assert len(fitted(page(text), 100)) > 30
  assert fitted(document(data), 100, report, drop_encoded=True) == []
  assert report.dropped["empty"] == 1


def test_a_length_is_needed_where_nothing_is_fitted_to():
  with pytest.raises(ValueError, match="there is no encoder here"):
    fitted(document("a"), 0)


def test_every_impossible_setting_is_named_in_one_message():
  settings = SplitConfig(method="word", size=0, overlap=-1, max_word_chars=0)
  with pytest.raises(ValueError, match="The splitting is not valid") as info:
    validate(settings)
  for part in (
    "split.method='word' is not one of ['fit', 'none', 'sentences', 'words']",
    "Did you mean 'words'?",
    "split.size=0 must be at least 1",
    "split.overlap=-1 must be at least 0",
    "split.max_word_chars=0 must be at least 1",
  ):
    assert part in str(info.value)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"overlap": 5}, "split.overlap=5 is for split.method='sentences' or"),
    (
      {"method": "sentences", "size": 5, "overlap": 5},
      "split.overlap=5 must be below split.size=5",
    ),
    ({"method": "none", "unit": "tokens"}, "split.unit='tokens' is the unit"),
  ],
)
def test_settings_that_contradict_one_another_are_refused(settings, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    validate(SplitConfig(**settings))


@pytest.mark.parametrize(
  ("unit", "tokenizer", "given"),
  [("tokens", None, "none is given"), ("words", Letters(), "a tokenizer is")],
)
def test_a_tokenizer_is_needed_for_tokens_alone(unit, tokenizer, given):
  with pytest.raises(ValueError, match=f"split.unit='{unit}', but {given}"):
    texts("a b", tokenizer, unit=unit)
