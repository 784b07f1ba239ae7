"""Base64 and the like are found, and language is not."""

import base64
import binascii
import random

import pytest

from rag_jax.corpus.encoded_data import data_spans
from rag_jax.corpus.encoded_data import left_over
from rag_jax.corpus.reading import load_passages

DATA = random.Random(0).randbytes(3_000)
B64 = base64.b64encode(DATA).decode()


def without(text):
  return "".join(left_over(text, data_spans(text)))


@pytest.mark.parametrize(
  "data",
  [
    B64,
    base64.urlsafe_b64encode(DATA).decode(),
    base64.encodebytes(DATA).decode().strip(),
    "\n".join(B64[i : i + 64] for i in range(0, 1000, 64)),
    DATA.hex(),
    f"data:image/png;base64,{B64}",
    "data:image/svg+xml;charset=utf-8," + "%3Csvg%20a" * 20,
    "\\x89\\x50" * 50,
    "begin 644 a.bin\n"
    + "".join(
      binascii.b2a_uu(DATA[i : i + 45]).decode() for i in range(0, 900, 45)
    )
    + "`\nend",
    base64.b64encode(
      b"Plain words, but nobody can read them so. " * 9
    ).decode(),
  ],
)
def test_encoded_data_is_left_out_and_nothing_beside_it(data):
  text = without(f"Before.\n\n{data}\n\nBehind, too.")
  assert " ".join(text.split()) == "Before. Behind, too."


@pytest.mark.parametrize(
  "text",
  [
    "sha256:" + DATA[:32].hex(),
    "sha512-" + base64.b64encode(DATA[:64]).decode(),
    "https://example.org/" + "some/path-to/a_page/" * 9 + "?q=1&b=two#three",
    "src/main/java/org/example/project/service/impl/CustomerAccountServiceImpl"
    "FactoryBeanRegistrationTest/AbstractDependencyInjectionContextTests",
    "x" * 500,
    "ACGT" * 100,
    "snake_case_names_are_long_in_some_places_" * 5,
    "https://example.org/%D0%9C%D0%BE%D1%81%D0%BA%D0%B2%D0%B0" * 3,
    "1234567890" * 30,
    "| a | b |\n|---|---|\n" + "-" * 200,
  ],
)
def test_what_is_searched_for_stays(text):
  assert without(text) == text


def test_no_passage_of_a_real_corpus_is_touched():
  assert not any(data_spans(p.text) for p in load_passages("world_facts"))
