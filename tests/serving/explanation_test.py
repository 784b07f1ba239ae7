"""What a person reads fits a terminal and cannot control it; JSON has all."""

import dataclasses
import json
import math
import unicodedata

import pytest

from rag_jax.decoding.answerer import Answer
from rag_jax.decoding.answerer import AnswerDoc
from rag_jax.serving.explanation import explain
from rag_jax.serving.explanation import to_json

FRANCE = AnswerDoc(
  id="country/FR/capital",
  title="France",
  text="Websites registered in France end in .fr. The capital is Paris.",
  score=14.25,
  prior=0.625,
  posterior=0.9991,
  token_posteriors=(0.75, 0.875),
)
SPAIN = AnswerDoc(
  id="country/ES/capital",
  title="Spain",
  text="Spain is abbreviated ESP. The city that serves as its capital is Rome.",
  score=13.75,
  prior=0.375,
  posterior=0.0009,
  token_posteriors=(0.25, 0.125),
)
PARIS = Answer(
  question="What is the capital of France?",
  text="Paris",
  log_prob=-0.25,
  tokens=(" Paris", "</s>"),
  token_log_probs=(-0.125, -0.125),
  docs=(FRANCE, SPAIN),
  question_cut=False,
  retrieved=(3, 2),
)
SHOWN = """\
Paris   (p = 0.78)

p(z|x)  p(z|x,y)  passage
 0.625     0.999  France [country/FR/capital]
                  Websites registered in France end in .fr. The capital is
                  Paris.
 0.375     0.001  Spain [country/ES/capital]
                  Spain is abbreviated ESP. The city that serves as its capital
                  is Rome.
"""


@pytest.mark.parametrize("least", [14.25, 14.26])
def test_an_answer_from_a_passage_that_fits_badly_is_said_to_be_unsure(least):
  answer = dataclasses.replace(PARIS, docs=(SPAIN, FRANCE))
  shown = " ".join(explain(answer, 0.7, least).split())
  assert shown.startswith(f"Paris (p = 0.78{', not sure' * (least > 14.25)}) ")
  assert (
    "not sure: the best passage scores 14.25; for 99.5 % of the"
    " validation questions it scores 14.26 or more. Perhaps" in shown
  ) == (least > 14.25)
  assert json.loads(to_json(answer, 0.7, least))["sure"] is (least <= 14.25)
  # Closed book, there is none that could fit badly.
  assert json.loads(to_json(dataclasses.replace(PARIS, docs=()), 0.7, least))[
    "sure"
  ]


def answer_from(**fields):
  doc = dataclasses.replace(FRANCE, **fields)
  return dataclasses.replace(PARIS, docs=(doc, SPAIN))


def columns(line):
  """Returns the columns of a line without characters that take none."""
  return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line)


def test_the_answer_comes_first_then_each_passage_with_its_probabilities():
  assert explain(PARIS) == SHOWN


@pytest.mark.parametrize("p", [0.69, 0.71])
def test_an_answer_of_a_low_probability_is_said_to_be_unsure(p):
  answer = dataclasses.replace(PARIS, log_prob=math.log(p))
  shown = explain(answer)
  assert shown.startswith(f"Paris   (p = {p}{', not sure' * (p < 0.7)})\n")
  assert ("not sure: p is below 0.7" in shown) == (p < 0.7)
  assert json.loads(to_json(answer))["sure"] is (p > 0.7)
  assert "not sure" not in explain(answer, sure=0.5)
  assert json.loads(to_json(answer, sure=0.9))["sure"] is False


def test_an_empty_answer_is_said_to_be_none():
  shown = explain(dataclasses.replace(PARIS, text=""))
  assert shown.startswith("(no answer)   (p = 0.78)\n")


def test_a_question_that_was_cut_is_mentioned():
  assert "Note" not in explain(PARIS)
  lines = explain(dataclasses.replace(PARIS, question_cut=True)).split("\n")
  assert " ".join(lines[1:3]) == (
    "Note: the question is longer than the model takes; its end was not read"
    " (data.question_length, data.context_length)."
  )


def test_closed_book_says_that_nothing_was_read():
  shown = explain(dataclasses.replace(PARIS, docs=(), retrieved=()))
  assert shown == ("Paris   (p = 0.78)\n(closed book: no passages were read)\n")


@pytest.mark.parametrize(
  "text",
  [
    "word " * 300,
    "x" * 3000,
    "東京" * 500,
    "Tokyo 東京は日本の首都です。" * 90,
  ],
  ids=["words", "one word", "wide", "mixed"],
)
@pytest.mark.parametrize("field", ["title", "id", "text", "answer"])
def test_no_line_is_wider_than_a_terminal(field, text):
  answer = answer_from(**({} if field == "answer" else {field: text}))
  if field == "answer":
    answer = dataclasses.replace(PARIS, text=text)
  lines = explain(answer).split("\n")
  widths = [columns(line) for line in lines]
  assert max(widths) <= 80
  assert max(widths) > 70  # as much as fits is used
  if field == "answer":  # is shown to its end
    shown = "".join(lines[: lines.index("")]).replace(" ", "")
    assert shown == text.replace(" ", "") + "(p=0.78)"


def test_wide_characters_count_as_two_columns():
  lines = explain(answer_from(text="漢" * 60)).split("\n")
  assert lines[4:7] == [
    " " * 18 + "漢" * 31,
    " " * 18 + "漢" * 29,
    " 0.375     0.001  Spain [country/ES/capital]",
  ]


def test_combining_accents_take_no_column():
  text = "e\u0301" * 62
  assert explain(answer_from(text=text)).split("\n")[4] == " " * 18 + text


def test_of_a_long_passage_three_lines_are_shown_and_a_mark():
  lines = explain(answer_from(text="word " * 300)).split("\n")
  assert lines[4:7] == [
    " " * 18 + "word " * 11 + "word",
    " " * 18 + "word " * 11 + "word",
    " " * 18 + "word " * 10 + "word [...]",
  ]
  assert "Spain" in lines[7]


def test_a_passage_of_exactly_three_lines_is_shown_to_its_end():
  text = " ".join(["x" * 62] * 3)
  assert "[...]" not in explain(answer_from(text=text))
  assert "[...]" in explain(answer_from(text=text + "x"))


@pytest.mark.parametrize("field", ["title", "id", "text", "answer"])
def test_no_passage_controls_the_terminal(field):
  plain = "red and blue, up and gone"
  hostile = (
    "\x1b[31mred\x1b[0m\x07 \x00and\r\n\x9b1;34mblue\u202e,\t"
    "\x1b]0;a title\x07up\x1b[2J and\x7f \x1b]8;;http://x.y\x1b\\gone\x1bc\u200b"
  )
  if field == "answer":
    shown = explain(dataclasses.replace(PARIS, text=hostile))
    expected = explain(dataclasses.replace(PARIS, text=plain))
  else:
    shown = explain(answer_from(**{field: hostile}))
    expected = explain(answer_from(**{field: plain}))
  assert shown == expected


def test_a_passage_without_title_is_shown_by_its_id():
  line = explain(answer_from(title="")).split("\n")[3]
  assert line == " 0.625     0.999  [country/FR/capital]"


def test_json_holds_every_field_on_one_line():
  answer = dataclasses.replace(PARIS, text='東 "Paris"\n\x1b[0m')
  line = to_json(answer)
  assert "\n" not in line
  assert "\x1b" not in line
  assert "東" in line  # readable as it is
  record = json.loads(line)
  assert record.pop("sure") is True
  docs = [
    AnswerDoc(**doc | {"token_posteriors": tuple(doc["token_posteriors"])})
    for doc in record["docs"]
  ]
  lists = ("tokens", "token_log_probs", "retrieved", "labels")
  record |= {name: tuple(record[name]) for name in lists}
  assert Answer(**record | {"docs": tuple(docs)}) == answer
