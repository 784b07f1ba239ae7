"""The bundled corpus: real facts, no leaks between passages or splits.

Asserted of the bundled files themselves, with a normaliser of the test's own.
"""

from collections import Counter
from collections import defaultdict
import itertools
import json
import re
import string
import unicodedata

import gazetteer
import gazetteer_text
import pytest

from rag_jax.corpus.documents import BUNDLED

FILES = BUNDLED["world_facts"]


def read(name):
  lines = (FILES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def geonames():
  return gazetteer.read_geonames()


@pytest.fixture(scope="module")
def passages():
  return read("passages")


@pytest.fixture(scope="module")
def questions():
  return {split: read(split) for split in gazetteer.SPLITS}


@pytest.fixture(scope="module")
def all_questions(questions):
  return [q for split in gazetteer.SPLITS for q in questions[split]]


def normalize(text, punctuation):
  """As evaluations do: lower case, no accents, no punctuation."""
  decomposed = unicodedata.normalize("NFD", text.lower())
  plain = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
  table = str.maketrans(dict.fromkeys(string.punctuation, punctuation))
  return f" {' '.join(plain.translate(table).split())} "


def entity_of(passage):
  return "/".join(passage["id"].split("/")[:2])


def by_entity(passages):
  grouped = defaultdict(list)
  for passage in passages:
    grouped[entity_of(passage)].append(passage)
  return grouped


def states(passage, answer):
  """Whether the answer stands in title or text, between word boundaries."""
  pattern = rf"(?<!\w){re.escape(answer)}(?!\w)"
  return re.search(pattern, f"{passage['title']} {passage['text']}") is not None


def test_files_are_small_utf8_json_lines():
  fields = ["id", "question", "answers", "relation", "entity"]
  for name in ("passages", *gazetteer.SPLITS):
    content = (FILES / f"{name}.jsonl").read_bytes()
    assert len(content) < 3_500_000
    assert content.endswith(b"}\n")
    assert b"\\u" not in content
    assert b"\r" not in content
    expected = ["id", "title", "text"] if name == "passages" else fields
    assert all(list(record) == expected for record in read(name))


def test_there_are_enough_passages_and_none_twice(passages):
  assert 5_000 <= len(passages) <= 5_800
  assert len({p["id"] for p in passages}) == len(passages)
  assert len({p["text"] for p in passages}) == len(passages)


def test_passages_are_one_or_two_short_sentences(passages):
  for passage in passages:
    assert 10 <= len(passage["text"].split()) <= 32, passage
    assert passage["text"].endswith("."), passage
    assert passage["title"] in passage["text"], passage
    assert not re.search(r"[{}]|  |\bNone\b", passage["text"]), passage


def test_passages_are_about_the_kinds_of_entity_in_the_readme(passages):
  kinds = Counter(re.sub(r"/[^/]+", "", p["id"], count=1) for p in passages)
  assert kinds.keys() == {
    *(f"country/{k}" for k in ("capital", "money", "region", "neighbours")),
    "city",
    "county",
    "state",
  }
  assert kinds["state"] == 51
  assert kinds["city"] == gazetteer.MAX_CITIES
  assert kinds["county"] == gazetteer.MAX_COUNTIES
  assert min(kinds[k] for k in kinds if k.startswith("country/")) >= 240


def test_a_capital_asked_for_occurs_in_no_passage_but_its_own(
  passages, all_questions
):
  asked = {q["entity"]: q for q in all_questions if q["relation"] == "capital"}
  assert len(asked) > 220
  for mark in ("", " "):
    texts = {
      p["id"]: normalize(f"{p['title']} {p['text']}", mark) for p in passages
    }
    for entity, question in asked.items():
      for answer in question["answers"]:
        form = normalize(answer, mark)
        told_by = [key for key, text in texts.items() if form in text]
        assert told_by == [f"{entity}/capital"], answer


def test_an_answer_stands_in_exactly_one_passage_of_its_entity(
  passages, all_questions
):
  its_passages = by_entity(passages)
  gold_kinds = {"currency": "money", "calling_code": "money"}
  gold_kinds |= {"continent": "region", "capital": "capital"}
  for question in all_questions:
    entity, relation = question["entity"], question["relation"]
    gold = entity
    if relation in gold_kinds:
      gold += "/" + gold_kinds[relation]
    told_by = [
      p["id"] for p in its_passages[entity] if states(p, question["answers"][0])
    ]
    assert told_by == [gold], question


def test_no_question_contains_its_answer(all_questions):
  for question in all_questions:
    for answer in question["answers"]:
      assert answer.lower() not in question["question"].lower(), question


def test_no_passage_names_a_time_zone(geonames, passages):
  zones = {city["timezone"].lower() for city in geonames.cities.values()}
  assert "europe/paris" in zones
  text = "\n".join(p["text"].lower() for p in passages)
  assert "time zone" not in text
  assert not [zone for zone in zones if zone in text]


def test_a_title_means_one_entity(passages):
  titles = defaultdict(set)
  for passage in passages:
    key = normalize(passage["title"], " ")
    titles[key].add(entity_of(passage))
  several = {key: v for key, v in titles.items() if len(v) > 1}
  # The one state whose name is a country's: neither passage has a fact that
  # the other's questions ask for.
  assert several == {" georgia ": {"country/GE", "state/GA"}}


def test_splits_share_no_entity_and_no_question(questions):
  entities = {s: {q["entity"] for q in questions[s]} for s in questions}
  texts = {s: {q["question"].lower() for q in questions[s]} for s in questions}
  for a, b in itertools.combinations(gazetteer.SPLITS, 2):
    assert entities[a].isdisjoint(entities[b])
    assert texts[a].isdisjoint(texts[b])
  for split, found in entities.items():
    assert {gazetteer.split_of(e) for e in found} == {split}


def test_no_question_is_asked_twice(all_questions):
  for field in ("id", "question"):
    assert len({q[field] for q in all_questions}) == len(all_questions)


def test_the_splits_are_about_75_10_and_15_percent_of_the_entities(questions):
  count = [len({q["entity"] for q in questions[s]}) for s in gazetteer.SPLITS]
  shares = [c / sum(count) for c in count]
  assert shares == pytest.approx([0.75, 0.10, 0.15], abs=0.02)


def test_the_capital_of_france_is_a_test_question(questions, passages):
  (question,) = (
    q
    for q in questions["test"]
    if q["question"] == "What is the capital of France?"
  )
  assert question["answers"] == ["Paris"]
  trained_on = {q["entity"] for q in questions["train"]}
  about_france = {entity_of(p) for p in passages if p["title"] == "France"}
  assert about_france == {"country/FR"}
  assert trained_on.isdisjoint(about_france)


def test_each_relation_has_enough_entities_in_every_split(questions):
  for split, least in (("train", 170), ("validation", 20), ("test", 30)):
    entities = defaultdict(set)
    for question in questions[split]:
      entities[question["relation"]].add(question["entity"])
    assert entities.keys() == gazetteer_text.QUESTIONS.keys()
    assert min(len(found) for found in entities.values()) >= least, split


def test_countries_get_every_phrasing_in_training_and_two_elsewhere(questions):
  for split in gazetteer.SPLITS:
    asked = Counter((q["entity"], q["relation"]) for q in questions[split])
    for (entity, relation), count in asked.items():
      kind = entity.split("/")[0]
      every = len(gazetteer_text.QUESTIONS[relation])
      expected = {"country": every, "city": 1, "county": 2}
      if split != "train":
        expected = {"country": 2, "city": 1, "county": 1}
      assert count == expected[kind], (entity, relation)


def test_a_population_is_accepted_without_separators(all_questions):
  for question in all_questions:
    if question["relation"] == "population":
      assert re.fullmatch(r"\d{1,3}(,\d{3})*", question["answers"][0])
      assert question["answers"][-1] == question["answers"][0].replace(",", "")


def test_names_of_cities_and_counties_are_short_and_latin(passages):
  for passage in passages:
    if not passage["id"].startswith("country/"):
      title = passage["title"]
      assert len(title.split()) <= 4, title
      assert not any(c.isdigit() or c in "(),/" for c in title), title
      letters = [c for c in title if c.isalpha()]
      assert all("LATIN" in unicodedata.name(c) for c in letters), title


def test_cities_are_spread_over_the_countries(geonames, passages):
  found = Counter(
    geonames.cities[p["id"].removeprefix("city/")]["countrycode"]
    for p in passages
    if p["id"].startswith("city/")
  )
  assert max(found.values()) == gazetteer.MAX_CITIES_A_COUNTRY
  assert len(found) >= 190
  at_least = gazetteer.MIN_CITIES_A_COUNTRY
  assert sum(count >= at_least for count in found.values()) >= 140


def test_every_kind_is_phrased_in_at_least_five_ways():
  for kind, templates in gazetteer_text.PASSAGES.items():
    assert len(set(templates)) == len(templates) >= 5, kind
  for relation, templates in gazetteer_text.QUESTIONS.items():
    assert 6 <= len(set(templates)) == len(templates) <= 8, relation
  first = gazetteer_text.QUESTIONS["capital"][0]
  assert first == "What is the capital of {name}?"


@pytest.mark.parametrize(
  ("kind", "one", "other"),
  [
    ("capital", "{the}", "{capital}"),
    ("money", "{currency}", "{calling_code}"),
    ("region", "{continent}", "{area}"),
    ("city", "{the_country}", "{population}"),
    ("county", "{state}", "{fips}"),
  ],
)
def test_either_fact_comes_first_in_some_phrasings(kind, one, other):
  order = {t.index(one) < t.index(other) for t in gazetteer_text.PASSAGES[kind]}
  assert order == {True, False}


def test_every_phrasing_of_a_passage_is_used(passages):
  # The words of a template between its fields tell it from the others.
  def pattern(template):
    parts = re.split(r"\{\w+\}", template)
    return re.compile(".+?".join(map(re.escape, parts)), re.IGNORECASE)

  texts = [p["text"] for p in passages]
  for templates in gazetteer_text.PASSAGES.values():
    for template in templates:
      assert any(pattern(template).fullmatch(t) for t in texts), template
