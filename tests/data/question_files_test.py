"""Questions in the formats of the field, and what is wrong with others."""

import gzip
import json

import pytest

from rag_jax.data.question_files import read_question_file
from rag_jax.data.questions import load_questions
from rag_jax.data.questions import read_questions
from rag_jax.evaluation.judged_questions import read_judged_questions


@pytest.fixture
def write(tmp_path):
  def write_data(content, name):
    path = tmp_path / name
    text = content if isinstance(content, str) else json.dumps(content)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path

  return write_data


def read(path):
  return list(read_question_file(path))


def pairs(path):
  return [(q.question, q.answers) for q in read(path)]


def one_line(record):
  return json.dumps(record) + "\n"


def test_answers_may_be_missing_where_passages_of_use_are_known(write):
  ours = one_line({"question": "Who?", "gold": ["p1"]})
  dpr = one_line({"question": "Who?", "positive_ctxs": [{"passage_id": "p1"}]})
  for text in (ours, dpr):
    [found] = read(write(text, "q.jsonl"))
    assert (found.answers, found.gold) == ((), {"p1": 1})


@pytest.mark.parametrize(
  ("record", "negatives"),
  [
    ({"negatives": ["p1", 7, "p1"]}, ("p1", "7")),
    ({"negatives": []}, ()),
    ({"negatives": None}, ()),
    ({"hard_negative_ctxs": [{"passage_id": "p1"}, {"psg_id": 2}, {}],
      "negative_ctxs": [{"passage_id": "p3"}]}, ("p1", "2")),
    # As DPR falls back.
    ({"hard_negative_ctxs": [], "negative_ctxs": [{"passage_id": "p3"}]},
     ("p3",)),
    ({"hard_negative_ctxs": None, "negative_ctxs": None}, ()),
    ({"negatives": ["p1"], "negative_ctxs": [{"passage_id": "p3"}]}, ("p1",)),
    ({}, ()),
  ],
)  # fmt: skip
def test_hard_negatives_are_read(record, negatives, write):
  path = write(one_line({"question": "Who?", "answers": ["A"], **record}),
               "q.jsonl")  # fmt: skip
  assert read(path)[0].negatives == negatives
  [question] = read_questions(path)
  assert question.negatives == negatives
  # They do not change which question it is.
  [plain] = read_questions(
    write(one_line({"question": "Who?", "answers": ["A"]}), "p.jsonl")
  )
  assert repr(question) == repr(plain)


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"negatives": "p1"}, "field 'negatives'"),
    ({"negatives": [["p1"]]}, "field 'negatives' holds .*Expected a list of"),
    ({"negatives": [True]}, "field 'negatives' holds True"),
    ({"hard_negative_ctxs": ["p1"]}, r"q\.jsonl:1\.hard_negative_ctxs\[0\]"),
  ],
)
def test_hard_negatives_of_another_kind_are_refused(record, message, write):
  path = write(one_line({"question": "Who?", "answers": ["A"], **record}),
               "q.jsonl")  # fmt: skip
  with pytest.raises(ValueError, match=message):
    read(path)


@pytest.mark.parametrize(
  ("record", "answers"),
  [
    ({"golden_answers": ["Ann", "Bob"]}, ("Ann", "Bob")),  # FlashRAG
    ({"answer": ["Ann", "Bob"]}, ("Ann", "Bob")),  # NQ-open
    ({"answer": "Ann"}, ("Ann",)),  # HotpotQA
    ({"answer": 1999}, ("1999",)),
    ({"answers": [1999, -3, 2.5, "Ann"]}, ("1999", "-3", "2.5", "Ann")),
    ({"answers": ["Ann", "Ann", 7, "7"]}, ("Ann", "7")),
    ({"answers": {"text": ["Ann"], "answer_start": [3]}}, ("Ann",)),
    ({"answers": ["Ann"], "golden_answers": ["no"]}, ("Ann",)),
    # FiD: the answer that is taught.
    ({"answers": ["Ann", "Bob"], "target": "Bob"}, ("Bob", "Ann")),
    ({"answers": ["Ann", "Bob"], "target": "other"}, ("Ann", "Bob")),
  ],
)
def test_answers_have_the_names_and_types_that_the_field_gives_them(
  write, record, answers
):
  record = {"question": "Who?", "metadata": {"a": 1}, "ctxs": []} | record
  expected = [("Who?", answers)]
  assert pairs(write(one_line(record), "q.jsonl.gz")) == expected
  assert pairs(write([record], "q.json")) == expected
  assert pairs(write(one_line(record) * 1, "lines.json")) == expected
  (question,) = read_questions(write(one_line(record), "q.jsonl"))
  assert question.answers == answers


KILT = {
  "id": "6",
  "input": "Who?",
  "output": [
    {"answer": "Ann", "provenance": [{"wikipedia_id": "290"}]},
    {"provenance": [{"wikipedia_id": "290"}]},
    {"answer": "Bob"},
  ],
}


def test_kilts_answers_stand_in_its_outputs(write):
  (question,) = read(write(one_line(KILT), "q.jsonl"))
  assert (question.id, question.question) == ("6", "Who?")
  assert question.answers == ("Ann", "Bob")


def test_kilts_pages_are_sets_that_answer_it(write):
  peru = {"wikipedia_id": 7, "title": " Peru "}
  chile = {"wikipedia_id": "8", "title": None}
  outputs = [
    {"answer": "Ann", "provenance": [chile, peru, peru | {"section": "x"}]},
    {"provenance": [peru, chile]},  # the same set
    {"provenance": [{"title": "Lima"}]},
    {"provenance": [peru, {"section": "x"}]},  # a page without a name
    {"answer": "Bob", "provenance": []},
    {"answer": "Cy", "provenance": None},
  ]
  record = {"input": "Who?", "output": outputs}
  (question,) = read(write(one_line(record), "q.jsonl"))
  assert question.pages == ((("7", "Peru"), ("8", "")), (("", "Lima"),))
  path = write(one_line({"input": "Who?", "output": [{"provenance": 1}]}), "q")
  with pytest.raises(ValueError, match=r"output\[0\]: field 'provenance'"):
    read(path.rename(path.with_suffix(".jsonl")))


DPR_QAS = (
  "who is ann?\t['Ann', \"Ann's\"]\n"
  'when?\t["1999"]\n'
  "what is \"x\"?\t['a \"quoted\" one', 'b\\'s']\n"
)


@pytest.mark.parametrize("name", ["nq-test.csv", "qas.tsv", "nq-test.csv.gz"])
def test_dprs_qas_have_two_columns_and_lists_as_python_writes_them(write, name):
  path = write(DPR_QAS, name)
  assert pairs(path) == [
    ("who is ann?", ("Ann", "Ann's")),
    ("when?", ("1999",)),
    ('what is "x"?', ('a "quoted" one', "b's")),
  ]
  assert [q.id for q in read_judged_questions(path)] == ["1", "2", "3"]


@pytest.mark.parametrize("name", ["qas.csv", "q.tsv"])
def test_the_first_of_dprs_qas_may_have_many_answers(write, name):
  path = write("who?\t['A', 'B', 'C', 'D']\nwhen?\t['1999']\n", name)
  assert pairs(path) == [("who?", ("A", "B", "C", "D")), ("when?", ("1999",))]


def test_a_table_may_name_its_columns(write):
  text = 'id,answers,question\n7,"[""Ann"", 3]",Who?\n8,Bob,W?\n'
  found = read(write(text, "q.csv"))
  assert [(q.id, q.question, q.answers) for q in found] == [
    ("7", "Who?", ("Ann", "3")),
    ("8", "W?", ("Bob",)),
  ]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("who?\t__import__('os').system('x')\n", None),  # text, and is not run
    ("who?\t[__import__('os').getcwd()]\n", "which is not a list"),
    ("who?\t['Ann'\n", "which is not a list"),
    ("who?\t" + "[" * 9_000 + "\n", "which is not a list"),
    (
      "who?\t" + "[" * 200 + "'a'" + "]" * 200 + "\n",
      "is not a list|is one of",
    ),
    ("who?\t[None]\n", "None is one of the answers"),
    ("who?\t['']\n", "'' is one of the answers"),
    ("who?\n", "1 columns"),
    ("who?\t['a']\tmore\n", "3 columns"),
    (" \t['a']\n", "the question is empty"),
  ],
)
def test_a_bad_row_of_a_table_is_named_by_its_line(write, line, message):
  path = write(DPR_QAS + line, "q.csv")
  if message is None:
    assert pairs(path)[3] == ("who?", ("__import__('os').system('x')",))
    return
  with pytest.raises(ValueError, match=rf"q\.csv:4: .*({message})"):
    read(path)


SQUAD_2 = {
  "version": "v2.0",
  "data": [
    {
      "title": "A",
      "paragraphs": [
        {
          "context": "Ann.",
          "qas": [
            {
              "id": 17,
              "question": "Who?",
              "is_impossible": False,
              "answers": [{"text": "Ann", "answer_start": 0}, {"text": 7}],
            },
            {
              "id": "b",
              "question": "Who else?",
              "is_impossible": True,
              "answers": [],
              "plausible_answers": [{"text": "Ann", "answer_start": 0}],
            },
            {"id": "c", "question": "When?", "is_impossible": True},
          ],
        }
      ],
    }
  ],
}


def test_an_impossible_question_of_squad_2_has_no_gold_and_no_answer(write):
  path = write(SQUAD_2, "dev-v2.0.json")
  found = read_judged_questions(path)
  assert [(q.id, q.answers, q.gold) for q in found] == [
    ("17", ("Ann", "7"), {"0/0": 1}),
    ("b", (), {}),
    ("c", (), {}),
  ]


def test_what_cannot_be_answered_is_not_taught(write, caplog):
  path = write(SQUAD_2, "dev-v2.0.json")
  (question,) = read_questions(path)
  assert (question.id, question.answers) == ("17", ("Ann", "7"))
  assert "left out 2 questions that the file calls impossible" in caplog.text


def test_whether_a_question_is_impossible_is_true_or_false(write):
  qas = SQUAD_2["data"][0]["paragraphs"][0]["qas"]
  tree = {"data": [{"paragraphs": [{"qas": [qas[0] | {"is_impossible": 1}]}]}]}
  with pytest.raises(ValueError, match=r"qas\[0\]: field 'is_impossible' is 1"):
    read(write(tree, "q.json"))


def test_ids_may_be_numbers_everywhere(write):
  record = {"id": 3, "question": "Who?", "answers": ["Ann"], "gold": [7, "p"]}
  (question,) = read(write(one_line(record), "q.jsonl"))
  assert (question.id, question.gold) == ("3", {"7": 1, "p": 1})
  dpr = {"question": "Who?", "answers": ["Ann"]}
  dpr["positive_ctxs"] = [{"passage_id": 7}, {"psg_id": "8"}, {"psg_id": True}]
  (question,) = read(write([dpr], "q.json"))
  assert question.gold == {"7": 1, "8": 1}
  with pytest.raises(ValueError, match="'gold' holds True"):
    read(write(one_line(record | {"gold": [True]}), "q.jsonl"))


def test_a_file_that_is_not_utf8_keeps_its_own_message(tmp_path):
  path = tmp_path / "q.json"
  path.write_bytes(b'[{"question": "caf\xe9"}]')
  with pytest.raises(ValueError, match=r"q\.json:1: byte 0xe9 at offset 18"):
    read(path)


@pytest.mark.parametrize(
  ("names", "split", "found"),
  [
    (["train.json", "dev.json", "test.json"], "validation", 1),  # FiD
    (["nq-train.csv", "nq-dev.csv", "nq-test.csv"], "validation", 1),  # DPR
    (["curatedtrec_test.tsv.gz", "latest.tsv"], "test", 0),
    (["dev.jsonl", "validation.jsonl"], "validation", 1),  # our name is first
  ],
)
def test_a_split_is_found_by_the_end_of_its_name(
  write, tmp_path, names, split, found
):
  for name in names:
    end = name.removesuffix(".gz").rpartition(".")[2]
    record = {"question": name, "answers": ["Ann"]}
    content = {"json": [record], "jsonl": one_line(record)}
    write(content.get(end, f"{name}\t['Ann']\n"), name)
  (question,) = load_questions(str(tmp_path), split)
  assert question.question == names[found]


def test_two_files_of_a_split_are_refused(write, tmp_path):
  for name in ("nq-test.csv", "trivia-test.csv"):
    write(DPR_QAS, name)
  with pytest.raises(ValueError, match=r"several files of the test split: \['"):
    load_questions(str(tmp_path), "test")


def test_what_is_null_is_absent_but_for_question_and_answers(write):
  record = {"question": "Who?", "answers": ["Ann"]}
  empty = dict.fromkeys(["id", "relation", "entity", "gold", "target"])
  for content, name in (
    (one_line(record | empty), "q.jsonl"),
    ([record | empty], "q.json"),
  ):
    assert read(write(content, name))[0].answers == ("Ann",)
    assert read(write(content, name))[0].id == ""
  for field in ("question", "answers"):
    with pytest.raises(ValueError, match=field):
      read(write(one_line(record | {field: None}), "q.jsonl"))


@pytest.mark.parametrize("blank", ["\u200b", "\u00ad \ufeff"])
def test_questions_and_answers_that_are_not_drawn_are_empty(write, blank):
  record = {"question": "Who?", "answers": ["Ann"]}
  for bad in ({"question": blank}, {"answers": [blank]}):
    with pytest.raises(ValueError, match="empty"):
      read(write(one_line(record | bad), "q.jsonl"))


def test_claims_of_fever_are_answered_by_their_label(write):
  evidence = [
    [[1, 2, "Soul_Food_-LRB-film-RRB-", 0], [1, 3, "Fox", 4]],
    [[5, 6, "Fox", 7]],
  ]
  lines = [
    {"id": 7, "verifiable": "VERIFIABLE", "label": "SUPPORTS",
     "claim": "Fox made it.", "evidence": evidence},
    {"id": 8, "verifiable": "NOT VERIFIABLE", "label": "NOT ENOUGH INFO",
     "claim": "Fox is nice.", "evidence": [[[9, None, None, None]]]},
    {"id": 9, "claim": "Of the test set."},
  ]  # fmt: skip
  found = read(write("".join(map(one_line, lines)), "fever.jsonl"))
  assert [q.question for q in found] == [line["claim"] for line in lines]
  assert [q.answers for q in found] == [
    ("SUPPORTS",), ("NOT ENOUGH INFO",), ()
  ]  # fmt: skip
  assert found[0].id == "7"
  assert found[0].pages == (
    (("", "Fox"), ("", "Soul Food (film)")), (("", "Fox"),)
  )  # fmt: skip
  assert found[1].pages == found[2].pages == ()


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"claim": " "}, "the claim is empty"),
    ({"claim": 3}, "claim"),
    ({"claim": "Yes.", "label": ["SUPPORTS"]}, "label"),
    ({"claim": "Yes.", "label": " "}, "one of the answers"),
  ],
)
def test_a_damaged_claim_is_named(write, record, message):
  with pytest.raises(ValueError, match=f"q.jsonl:1.*{message}"):
    read(write(one_line(record), "q.jsonl"))


TRIVIA = {
  "Question": "Which king died in 1066?",
  "QuestionId": "tc_1",
  "Answer": {
    "Value": "Harold II",
    "Aliases": ["Harold Godwinson", "Harold II", ""],
    "HumanAnswers": ["king harold"],
    "NormalizedValue": "harold ii",
    "Type": "WikipediaEntity",
  },
  "EntityPages": [],
}
FOUND = (
  "Which king died in 1066?",
  ("Harold II", "Harold Godwinson", "king harold"),
  "tc_1",
)


def test_trivia_qa_is_read_in_both_of_its_forms(write):
  theirs = write({"Data": [TRIVIA], "Domain": "Web"}, "web-dev.json")
  lower = {
    "question": TRIVIA["Question"],
    "question_id": "tc_1",
    "answer": {
      "value": "Harold II",
      "aliases": ["Harold Godwinson", "Harold II"],
      "human_answers": ["king harold"],
    },
    "search_results": {"title": []},
  }
  for path in (theirs, write(one_line(lower), "dev.jsonl")):
    [found] = read(path)
    assert (found.question, found.answers, found.id) == FOUND
  # Without an answer there is nothing to compare with.
  test = {name: x for name, x in TRIVIA.items() if name != "Answer"}
  with pytest.raises(ValueError, match=r"test.json:Data\[1\]: .*'answers'"):
    read(write({"Data": [TRIVIA, test]}, "test.json"))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"Answer": "Harold"}, "field 'Answer'"),
    ({"Answer": {"Value": 3}}, r"\.Answer: field 'Value'"),
    ({"Answer": {"Value": "x", "Aliases": "y"}}, "field 'Aliases'"),
    ({"Answer": {"Value": "x", "Aliases": [[]]}}, "is one of the answers"),
    ({"Question": " "}, "the question is empty"),
  ],
)
def test_what_is_no_question_of_trivia_qa_is_refused(write, change, message):
  path = write({"Data": [TRIVIA | change]}, "dev.json")
  with pytest.raises(ValueError, match=message):
    read(path)


@pytest.mark.parametrize(
  ("target", "answers"),
  [
    ('(list (description "Jamaican English") (description Patois))',
     ("Jamaican English", "Patois")),
    (r'(list (description "The \"King\"") (description "a (b)"))',
     ('The "King"', "a (b)")),
    ("(list (description 1999))", ("1999",)),
  ],
)  # fmt: skip
def test_web_questions_descriptions_are_the_answers(write, target, answers):
  record = {"url": "http://x", "targetValue": target, "utterance": "what?"}
  assert pairs(write([record], "train.json")) == [("what?", answers)]


@pytest.mark.parametrize(
  "target", ["", "(list)", "Paris", "(list (description a b))", "(list (x))"]
)
def test_other_target_values_are_refused(write, target):
  record = {"targetValue": target, "utterance": "what?"}
  with pytest.raises(ValueError, match=r"train.json:\[0\]: .*WebQuestions' li"):
    read(write([record], "train.json"))


def test_a_question_id_alone_does_not_make_trivia_qa(write):
  record = {"question_id": 7, "question": "who?", "answer": ["a", "b"]}
  assert pairs(write(one_line(record), "dev.jsonl")) == [("who?", ("a", "b"))]
