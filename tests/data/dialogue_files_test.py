"""Dialogues of all forms become questions with their histories, or errors."""

import json

from corpora import assert_fails
import pytest

from rag_jax.data.questions import SPLITS
from rag_jax.data.questions import Question
from rag_jax.data.questions import load_questions
from rag_jax.data.questions import read_questions
from rag_jax.data.world_dialogues import FOLLOW_UP
from rag_jax.evaluation.judged_questions import read_judged_questions

# The fields of the published files, with other contents.
WIZARD = {
  "chosen_topic": "Maple syrup",
  "persona": "I like syrup.",
  "wizard_eval": 5,
  "dialog": [
    {"speaker": "0_Apprentice", "text": "I like syrup.",
     "retrieved_passages": [], "retrieved_topics": []},
    {"speaker": "1_Wizard", "text": "It is made of sap.",
     "checked_sentence": {"self_Maple_syrup_0": "Maple syrup is made of sap."},
     "checked_passage": {"chosen_topic": "Maple syrup"},
     "retrieved_passages": [], "retrieved_topics": []},
    {"speaker": "0_Apprentice", "text": "Where?", "retrieved_passages": []},
    {"speaker": "1_Wizard", "text": "In Vermont!",
     "checked_sentence": {"no_passages_used": "no_passages_used"},
     "checked_passage": {"no_passages_used": "no_passages_used"}},
  ],
  "chosen_topic_passage": ["Maple syrup is made of sap."],
}  # fmt: skip
CMU = {
  "date": "2018-03-01T00:11:05.970Z",
  "history": [
    {"docIdx": 0, "text": "Hey!", "uid": "user2", "utcTimestamp": "x"},
    {"docIdx": 0, "text": "Seen\n it?", "uid": "user2", "utcTimestamp": "x"},
    {"docIdx": 0, "text": "Yes. ", "uid": "user1", "utcTimestamp": "x"},
    {"docIdx": 1, "text": " ", "uid": "user2", "utcTimestamp": "x"},
    {"docIdx": 1, "text": "A shark dies.", "uid": "user1"},
    {"docIdx": 1, "text": "Oh no.", "uid": "user2"},
    {"docIdx": 1, "text": "Sorry.", "uid": "user1"},
  ],
  "rating": 2,
  "whoSawDoc": ["user1"],
  "wikiDocumentIdx": 7,
}  # fmt: skip
DOCUMENT = {
  "0": {"cast": ["Roy", "Robert"], "movieName": "Jaws", "year": 1975},
  "1": "A shark bites people.",
  "wikiDocumentIdx": 7,
}


def write(path, content):
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return path


def lines(records):
  return "".join(json.dumps(record) + "\n" for record in records)


def test_our_form_has_a_history_and_knowledge(tmp_path):
  record = {
    "question": "And its currency?",
    "history": ["What is the capital of France?", "Paris"],
    "answers": ["Euro"],
    "knowledge": "France uses the Euro.",
  }
  plain = {"question": "Why?", "answers": ["So"], "history": None}
  path = write(tmp_path / "x.jsonl", lines([record, plain]))
  found, other = read_questions(path)
  assert found == Question(
    "And its currency?",
    ("Euro",),
    history=("What is the capital of France?", "Paris"),
    knowledge="France uses the Euro.",
  )
  assert (
    found.said == "What is the capital of France?\nParis\nAnd its currency?"
  )
  assert other == Question("Why?", ("So",))
  # By these, runs know the questions that they were trained on.
  assert repr(other) == (
    "Question(question='Why?', answers=('So',), id='', relation='')"
  )
  assert repr(found) != repr(Question("And its currency?", ("Euro",)))
  searched = [q.question for q in read_judged_questions(path)]
  assert searched == [found.said, "Why?"]


EXPECTED_WIZARD = (
  Question(
    "I like syrup.", ("It is made of sap.",), pages=((("", "Maple syrup"),),),
    knowledge="Maple syrup is made of sap.",
  ),
  Question(
    "Where?", ("In Vermont!",), history=("I like syrup.", "It is made of sap.")
  ),
)  # fmt: skip


@pytest.mark.parametrize("form", ["list", "one", "lines"])
def test_each_turn_of_the_wizard_is_an_answer(tmp_path, form):
  content = {"list": [WIZARD], "one": WIZARD, "lines": lines([WIZARD])}[form]
  name = "train.jsonl" if form == "lines" else "train.json"
  write(tmp_path / name, content)
  assert load_questions(str(tmp_path), "train") == EXPECTED_WIZARD


def test_a_wizard_that_begins_answers_the_topic(tmp_path):
  dialogue = WIZARD | {"dialog": WIZARD["dialog"][1:]}
  first, second = read_questions(write(tmp_path / "x.json", [dialogue]))
  assert (first.question, first.history) == ("Maple syrup", ())
  assert second.question == "Where?"
  assert second.history == ("Maple syrup", "It is made of sap.")


def test_turns_of_one_speaker_are_joined(tmp_path):
  dialog = list(WIZARD["dialog"])
  dialog.insert(2, dict(dialog[1], text="Honest.", checked_sentence={
    "partner_Sap_3": "Sap is a fluid."}))  # fmt: skip
  path = write(tmp_path / "x.json", [WIZARD | {"dialog": dialog}])
  first, second = read_questions(path)
  assert first.answers == ("It is made of sap. Honest.",)
  assert first.knowledge == "Maple syrup is made of sap. Sap is a fluid."
  assert first.pages == ((("", "Maple syrup"),),)
  assert second.history == ("I like syrup.", first.answers[0])


EXPECTED_CMU = (
  ("Hey! Seen it?", "Yes. A shark dies.", ()),
  ("Oh no.", "Sorry.", ("Hey! Seen it?", "Yes. A shark dies.")),
)


@pytest.mark.parametrize("form", ["one", "list", "by id", "lines"])
def test_those_who_saw_the_document_answer(tmp_path, form):
  content = {"one": CMU, "list": [CMU], "by id": {"a": CMU}}
  path = tmp_path / ("x.jsonl" if form == "lines" else "x.json")
  write(path, content.get(form, lines([CMU])))
  found = read_questions(path)
  assert [(q.question, *q.answers, q.history) for q in found] == [*EXPECTED_CMU]
  assert [q.knowledge for q in found] == ["", ""]
  for place in (tmp_path, tmp_path / "conversations"):
    place.mkdir(exist_ok=True)
    write(tmp_path / "wiki_data.json", {"7": DOCUMENT})
    write(place / path.name, path.read_text())
    knowledge = [q.knowledge for q in read_questions(place / path.name)]
    assert knowledge == [
      "Roy Robert Jaws A shark bites people.", "A shark bites people."
    ]  # fmt: skip


def test_both_answer_if_both_saw_it(tmp_path):
  both = CMU | {"whoSawDoc": ["user1", "user2"]}
  unknown = {name: CMU[name] for name in CMU if name != "whoSawDoc"}
  for conversation in (both, unknown):
    found = read_questions(write(tmp_path / "x.json", conversation))
    assert [q.answers[0] for q in found] == [
      "Yes. A shark dies.", "Oh no.", "Sorry."
    ]  # fmt: skip


def test_kilts_inputs_of_several_lines_are_dialogues(tmp_path):
  page = {"wikipedia_id": "1", "title": "Syrup"}
  output = [{"answer": "In Vermont!", "provenance": [page]}]
  entity = "It is\n\n[START_ENT] Vermont [END_ENT]"
  path = write(tmp_path / "x.jsonl", lines([
    {"id": "a", "input": "I like syrup.\nIt is sap.\nWhere?\n",
     "output": output},
    {"id": "b", "input": "Where?", "output": output},
    {"id": "c", "input": entity, "output": [{"answer": "Vermont"}]},
  ]))  # fmt: skip
  found = read_questions(path)
  assert found[0].question == "Where?"
  assert found[0].history == ("I like syrup.", "It is sap.")
  assert found[0].answers == ("In Vermont!",)
  assert found[0].pages == found[1].pages == ((("1", "Syrup"),),)
  assert [q.question for q in found[1:]] == ["Where?", entity]
  assert not found[1].history
  assert not found[2].history
  searched = read_judged_questions(path)
  assert searched[0].question == "I like syrup.\nIt is sap.\nWhere?"


def changed(**fields):
  """The wizard's dialogue with a changed second turn."""
  dialog = list(WIZARD["dialog"])
  dialog[1] = {
    name: value
    for name, value in (dialog[1] | fields).items()
    if value != "MISSING"
  }
  return [WIZARD, WIZARD | {"dialog": dialog}]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (changed(speaker="Bob"), ":[1].dialog[1]: the speaker is 'Bob'. Expected"),
    (changed(text=3), ":[1].dialog[1]: field 'text' is 3"),
    (changed(text="MISSING"), ":[1].dialog[1]: no field 'text'"),
    (changed(checked_sentence=["a"]), "field 'checked_sentence' is ["),
    (changed(checked_sentence={"a": 1}), "field 'checked_sentence' holds 1"),
    ([WIZARD, WIZARD | {"dialog": ["a"]}], ":[1].dialog[0] is 'a'. Expected"),
    ([WIZARD, WIZARD | {"dialog": "a"}], ":[1]: field 'dialog' is 'a'"),
    ([WIZARD, {"question": "a"}], ":[1]: {'question': 'a'} is no dialogue, as"),
    ([WIZARD, 3], ":[1]: 3 is no dialogue"),
    ([{"dialog": WIZARD["dialog"][1:]}], ":[0]: no field 'chosen_topic'"),
    ([WIZARD | {"dialog": []}], "holds no questions"),
    ({"a": CMU, "b": {}}, ":['b']: {} is no dialogue"),
    ({"a": CMU, "b": CMU | {"whoSawDoc": "user1"}}, ":['b']: field 'who"),
    (CMU | {"history": [{"uid": 1, "text": "a"}]}, ".history[0]: field 'uid'"),
    (CMU | {"history": [*CMU["history"], 3]}, ".history[7] is 3. Expected"),
  ],
)  # fmt: skip
def test_what_is_no_dialogue_is_named_by_its_place(tmp_path, content, message):
  path = write(tmp_path / "x.json", content)
  with pytest.raises(ValueError, match=r"x\.json") as error:
    read_questions(path)
  assert message in str(error.value)


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"history": "Who?"}, "x.jsonl:2: field 'history' is 'Who?'"),
    ({"history": ["Who?", " "]}, "x.jsonl:2: field 'history' has ' ' at pl"),
    ({"history": [["Who?", "Ada"]]}, "x.jsonl:2: field 'history' has ['Who?',"),
    ({"knowledge": 3}, "x.jsonl:2: field 'knowledge' is 3"),
  ],
)  # fmt: skip
def test_a_history_that_is_none_is_named_by_its_line(tmp_path, record, message):
  good = {"question": "Why?", "answers": ["So"]}
  path = write(tmp_path / "x.jsonl", lines([good, good | record]))
  with pytest.raises(ValueError, match=r"x\.jsonl:2") as error:
    read_questions(path)
  assert message in str(error.value)


def test_documents_that_are_none_are_named(tmp_path):
  path = write(tmp_path / "x.json", CMU)
  for content, message in (("{", "cannot be read"), ("[3]", "holds [3]")):
    write(tmp_path / "wiki_data.json", content)
    assert_fails(lambda: read_questions(path), f"wiki_data.json {message}")


def test_the_bundled_dialogues_ask_the_bundled_questions():
  for split in SPLITS:
    bundled = load_questions("world_facts", split)
    made = load_questions("world_facts_dialogue", split)
    assert made == load_questions("world_facts_dialogue", split)
    assert made[: len(bundled)] == bundled
    by_id = {q.id: q for q in bundled}
    texts = {q.question: q for q in bundled}
    later = made[len(bundled) :]
    assert len({q.id for q in made}) == len(made)
    assert {len(q.history) for q in later} == {2, 4}
    for q in later:
      same = by_id[q.id.removesuffix("/later")]
      assert q.answers == same.answers
      assert q.relation == same.relation + FOLLOW_UP
      # The first turn is a question of this split about the same entity.
      first = texts[q.history[0]]
      entity = q.id.split("/")[:2]
      assert first.id.split("/")[:2] == entity
      assert first.relation != same.relation
      assert q.history[1] == first.answers[0]
      assert not any(answer in q.said for answer in q.answers)
    # Later turns name nothing: they are the same few for everything.
    assert len({q.question for q in later}) == 18
