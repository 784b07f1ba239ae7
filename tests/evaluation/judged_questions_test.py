"""Questions to measure retrieval with: every format, and what is wrong."""

import gzip
import json

import pytest

from rag_jax.corpus.passages import Passage
from rag_jax.evaluation.judged_questions import JudgedQuestion
from rag_jax.evaluation.judged_questions import gold_rows
from rag_jax.evaluation.judged_questions import read_judged_questions

QUERIES = [
  {"_id": "q1", "text": "Who?"},
  {"_id": "q2", "text": "Where?"},
  {"_id": "q3", "text": "Only in another split?"},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\tp1\t2\nq1\tp2\t0\nq2\tp3\t1\n"
SQUAD = {
  "data": [
    {
      "title": "A",
      "paragraphs": [
        {"context": "Bob.", "qas": []},
        {
          "context": "Ann.",
          "qas": [
            {
              "id": "s1",
              "question": " Who? ",
              "answers": [{"text": "Ann"}, {"text": "Ann"}, {"text": "ann"}],
            },
            {"id": "s2", "question": "When?", "answers": []},
          ],
        },
      ],
    }
  ]
}
DPR = [
  {
    "question": "Who?",
    "answers": ["Ann"],
    "positive_ctxs": [
      {"title": "t", "text": "x", "passage_id": "7"},
      {"psg_id": 8},
      {"title": "no id"},
    ],
  },
  {"question": "Where?", "answers": []},
]


def beir(tmp_path, *, queries=QUERIES, **qrels):
  lines = [q if isinstance(q, str) else json.dumps(q) for q in queries]
  (tmp_path / "queries.jsonl").write_text("\n".join(lines) + "\n")
  (tmp_path / "qrels").mkdir()
  for split, text in qrels.items():
    (tmp_path / "qrels" / f"{split}.tsv").write_text(text)
  return tmp_path


def write(tmp_path, name, content):
  text = content if isinstance(content, str) else json.dumps(content)
  (tmp_path / name).write_text(text)
  return tmp_path / name


def test_beir_keeps_the_questions_that_are_judged_with_their_grades(tmp_path):
  folder = beir(tmp_path, test=QRELS, dev="q3\tp1\t1\n")
  assert read_judged_questions(folder) == [
    JudgedQuestion(id="q1", question="Who?", gold={"p1": 2, "p2": 0}),
    JudgedQuestion(id="q2", question="Where?", gold={"p3": 1}),
  ]
  dev = read_judged_questions(folder / "qrels" / "dev.tsv")
  assert [question.id for question in dev] == ["q3"]


def test_beir_with_one_other_split_uses_it_and_gzip_is_read(tmp_path):
  folder = beir(tmp_path, dev=QRELS)
  plain = folder / "queries.jsonl"
  (folder / "queries.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
  expected = read_judged_questions(folder)
  plain.unlink()
  assert read_judged_questions(folder) == expected
  assert len(expected) == 2


def test_beir_with_two_other_splits_asks_which(tmp_path):
  folder = beir(tmp_path, dev=QRELS, train=QRELS)
  with pytest.raises(ValueError, match=r"dev\.tsv.*train\.tsv.*Give one of"):
    read_judged_questions(folder)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("q2\tp4", r"test\.tsv:5: .*is no judgement.*three fields"),
    ("q2\tp4\t1.5", r"test\.tsv:5: .*a whole number"),
    ("q9\tp4\t1", r"test\.tsv:5: judges passages for the question 'q9'"),
    ("q1\tp1\t1", r"test\.tsv:5: .*the grade 1 .*earlier line 2"),
  ],
)
def test_a_bad_judgement_is_named_by_file_and_line(tmp_path, line, message):
  folder = beir(tmp_path, test=QRELS + line + "\n")
  with pytest.raises(ValueError, match=message):
    read_judged_questions(folder)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"_id": "q2", "te', r"queries\.jsonl:2: not valid JSON"),
    ({"_id": "q2"}, r"queries\.jsonl:2: no field 'text'"),
    ({"_id": "q2", "text": " "}, r"queries\.jsonl:2: the question is empty"),
  ],
)
def test_a_bad_query_is_named_by_file_and_line(tmp_path, line, message):
  folder = beir(tmp_path, queries=[QUERIES[0], line], test=QRELS)
  with pytest.raises(ValueError, match=message):
    read_judged_questions(folder)


def test_a_beir_folder_without_queries_says_so(tmp_path):
  folder = beir(tmp_path, test=QRELS)
  (folder / "queries.jsonl").unlink()
  with pytest.raises(FileNotFoundError, match="the questions that"):
    read_judged_questions(folder)


def test_squad_questions_belong_to_their_paragraph(tmp_path):
  path = write(tmp_path, "squad.json", SQUAD)
  assert read_judged_questions(path) == [
    JudgedQuestion(
      id="s1", question="Who?", answers=("Ann", "ann"), gold={"0/1": 1}
    ),
    JudgedQuestion(id="s2", question="When?", gold={"0/1": 1}),
  ]


def test_dpr_questions_have_the_passages_that_have_an_id(tmp_path):
  path = write(tmp_path, "dpr.json", DPR)
  assert read_judged_questions(path) == [
    JudgedQuestion(
      id="0", question="Who?", answers=("Ann",), gold={"7": 1, "8": 1}
    ),
    JudgedQuestion(id="1", question="Where?", gold={}),
  ]


def test_jsonl_has_gold_as_a_list_or_with_grades(tmp_path):
  lines = [
    {"question": "Who?", "answers": ["Ann"], "gold": ["p1"]},
    {"id": "x", "question": "Where?", "answers": [], "gold": {"p2": 3}},
  ]
  text = "\n\n".join(map(json.dumps, lines))
  assert read_judged_questions(write(tmp_path, "q.jsonl", text)) == [
    JudgedQuestion(id="1", question="Who?", answers=("Ann",), gold={"p1": 1}),
    JudgedQuestion(id="x", question="Where?", gold={"p2": 3}),
  ]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("q.json", '{"data": [\n{"par', r"q\.json:2: not valid JSON"),
    ("q.json", "[" * 200_000, r"q\.json:1: .*nested more than"),
    ("q.json", '{"a": 1}', r"q\.json:1: .*neither a list of questions"),
    ("q.json", "[]", "no questions in"),
    ("q.json", "[3]", r"q\.json:\[0\]: 3 is not an object"),
    ("q.json", [{"question": "Who?"}], r"q\.json:\[0\]: no field 'answers'"),
    (
      "q.json",
      [{"question": "Who?", "answers": [None]}],
      r"q\.json:\[0\]: None is one of the answers",
    ),
    (
      "q.json",
      {"data": [{"paragraphs": [{"qas": [{"question": "Who?"}]}]}]},
      r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: no field 'id'",
    ),
    ("q.jsonl", '{"question": "Who?"}', r"q\.jsonl:1: no field 'answers'"),
    (
      "q.jsonl",
      '{"question": "Who?", "answers": [], "gold": {"p": true}}',
      r"q\.jsonl:1: field 'gold' gives passage 'p' the grade True",
    ),
    (
      "q.jsonl",
      '{"id": "a", "question": "Who?", "answers": []}\n' * 2,
      "question id 'a' twice",
    ),
    ("q.txt", "Who?", r"q\.txt ends in .*not a format of questions"),
  ],
)
def test_what_cannot_be_used_is_named(tmp_path, name, content, message):
  with pytest.raises(ValueError, match=message):
    read_judged_questions(write(tmp_path, name, content))


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no\.json"):
    read_judged_questions(tmp_path / "no.json")


def test_gold_passages_that_the_corpus_lacks_are_counted_and_never_found():
  passages = [Passage(id=id_, title="", text="x") for id_ in "abc"]
  questions = [
    JudgedQuestion(id="1", question="?", gold={"c": 2, "z": 1}),
    JudgedQuestion(id="2", question="?", gold={"y": 1, "z": 3}),
  ]
  rows, missing = gold_rows(questions, passages)
  assert missing == 2
  assert rows == [{2: 2, -3: 1}, {-2: 1, -3: 3}]
