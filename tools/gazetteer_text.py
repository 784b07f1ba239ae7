"""The phrasings of the corpus `world_facts`: templates that gazetteer.py fills.

In every kind each fact stands now early, now late in the text, so that a
generator has to read and cannot learn a position.
"""

# By kind of passage. {the} is the name with its article, if it has one.
PASSAGES = {
  "capital": (
    "The capital of {the} is {capital}. In international standards its"
    " three-letter code is {iso3}.",
    "{capital} is the capital of {the}, whose internet domain ends in {tld}.",
    "The three-letter ISO code {iso3} stands for {the}, and its capital is the"
    " city of {capital}.",
    "In {the} the city of {capital} is the capital. Internet addresses there"
    " end in {tld}.",
    "Websites registered in {the} carry the internet domain {tld}. The capital"
    " is {capital}.",
    "With {capital} as its capital, {the} is written {iso3} in lists of"
    " three-letter ISO codes.",
    "{the} is abbreviated {iso3} by the ISO. The city that serves as its"
    " capital is called {capital}.",
  ),
  "money": (
    "The currency of {the} is the {currency}. Its telephone calling code is"
    " {calling_code}.",
    "To call {the} from abroad, dial {calling_code}. The money used there is"
    " called the {currency}.",
    "People in {the} pay with the {currency}, their currency, and their phone"
    " numbers begin with {calling_code}.",
    "The {currency} is the currency of {the}. International calls to it start"
    " with the code {calling_code}.",
    "Phone numbers of {the} have the international calling code"
    " {calling_code}. Prices are given in its currency, the {currency}.",
    "The calling code {calling_code} belongs to {the}, where the currency in"
    " use is the {currency}.",
    "{the} uses the {currency} as its currency and {calling_code} as its"
    " calling code for international telephone calls.",
  ),
  "region": (
    "{the} belongs to the continent of {continent} and covers an area of"
    " {area}.",
    "With an area of {area}, {the} is counted as a part of the continent of"
    " {continent}.",
    "On maps {the} is found in {continent}. The area inside its borders is"
    " {area}.",
    "The area of {the} is {area}. The continent it is assigned to is"
    " {continent}.",
    "{continent} is the continent of {the}, a territory with a total area of"
    " {area}.",
    "Covering {area} of land and inland water, {the} forms part of"
    " {continent}.",
    "Geographers place {the} in {continent}. Its surface measures {area} in"
    " total.",
  ),
  "neighbours": (
    "By land, {the} shares a border with {neighbours}. The borders are shown on"
    " most maps.",
    "The neighbours that can be reached by land from {the} include"
    " {neighbours}.",
    "Travellers who leave {the} over a land border can cross into"
    " {neighbours}.",
    "On the map the land borders of {the} separate it from {neighbours}.",
    "Next to {the}, on the other side of a land border, one finds"
    " {neighbours}.",
  ),
  "no_neighbours": (
    "{the} has no land border with any other country, so there are no"
    " neighbours on land.",
    "There is no country that borders {the} by land, so its list of neighbours"
    " is empty.",
    "Lists of international land borders do not mention {the}, which has no"
    " neighbours on land.",
    "The list of neighbours of {the} is empty, because it has no land border at"
    " all.",
    "Without a land border to any other country, {the} has no neighbours next"
    " to it.",
  ),
  "city": (
    "{name} is a city in {the_country}. It has a population of {population}"
    " people.",
    "About {population} people live in {name}, a city that lies in"
    " {the_country}.",
    "The city of {name} lies in {the_country} and counts {population}"
    " inhabitants.",
    "With {population} inhabitants, {name} is one of the cities of"
    " {the_country}.",
    "Among the cities of {the_country} is {name}. Its population is given as"
    " {population}.",
    "The population of {name} is {population}. The city is located in"
    " {the_country}.",
    "{name} belongs to {the_country}. According to the gazetteer {population}"
    " people live in this city.",
    "A city with a population of {population}, {name} is located in"
    " {the_country}.",
  ),
  "county": (
    "{name} lies in the state of {state}. Its five-digit FIPS code is {fips}.",
    "The FIPS code {fips} stands for {name}, which belongs to the state of"
    " {state}.",
    "In the state of {state} there is {name}. Federal tables list it under"
    " FIPS code {fips}.",
    "{name} is a part of {state}. In census files it has the FIPS code {fips}.",
    "Census files number {name} as FIPS code {fips}. The state it is in is"
    " {state}.",
    "Numbered {fips} in the federal list of FIPS codes, {name} is located in"
    " {state}.",
    "{state} is the state to which {name} belongs. Its FIPS code reads {fips}.",
  ),
  "state": (
    "The postal service of the United States abbreviates {name} as {postal}."
    " Its FIPS code is {fips}.",
    "Letters to {name} are addressed with the postal code {postal}, and federal"
    " tables number it {fips}.",
    "{postal} is the two-letter postal abbreviation of {name}. The two-digit"
    " FIPS code is {fips}.",
    "In federal tables the number {fips} stands for {name}. Its postal"
    " abbreviation is {postal}.",
    "{name} has the two-digit FIPS code {fips} and the two-letter postal"
    " abbreviation {postal}.",
  ),
}

# By relation. {own} is the possessive of {name}. The README asks the
# first question of "capital".
QUESTIONS = {
  "capital": (
    "What is the capital of {name}?",
    "Which city is the capital of {name}?",
    "What is the name of the capital of {name}?",
    "What is {own} capital?",
    "{name}: what is its capital city?",
    "Can you name the capital city of {name}?",
    "Which town or city serves as the capital of {name}?",
  ),
  "currency": (
    "What is the currency of {name}?",
    "Which currency is used in {name}?",
    "What money do people pay with in {name}?",
    "What is {own} currency called?",
    "In which currency are prices given in {name}?",
    "{name}: what is its currency?",
    "Which currency does {name} use?",
  ),
  "calling_code": (
    "What is the calling code of {name}?",
    "Which telephone calling code does {name} have?",
    "What code do I dial to call {name}?",
    "With which code do phone numbers in {name} begin?",
    "What is {own} international calling code?",
    "{name}: what is its telephone code?",
    "Which code starts international calls to {name}?",
  ),
  "continent": (
    "On which continent is {name}?",
    "What continent is {name} in?",
    "Which continent does {name} belong to?",
    "To which continent is {name} assigned?",
    "What is {own} continent?",
    "{name}: which continent is it part of?",
    "In which part of the world, on what continent, is {name}?",
  ),
  "country": (
    "In which country is the city of {name}?",
    "Which country is {name} in?",
    "What country does {name} belong to?",
    "{name} is a city in which country?",
    "In what country does {name} lie?",
    "Where is {name}: in which country?",
    "Name the country that the city of {name} is located in.",
  ),
  "population": (
    "What is the population of {name}?",
    "How many people live in {name}?",
    "How many inhabitants does {name} have?",
    "What population does the city of {name} have?",
    "How large is the population of {name}?",
    "What is {own} population?",
    "How many inhabitants are counted in {name}?",
  ),
  "state": (
    "In which state is {name}?",
    "Which state does {name} belong to?",
    "What state is {name} in?",
    "{name} is located in which state?",
    "Which U.S. state is {name} a part of?",
    "What is the state of {name}?",
    "Name the state where {name} lies.",
  ),
}
