"""Bytes are read in the encoding they are in, whatever the page says."""

import pytest

from rag_jax.corpus.encodings import Decoded
from rag_jax.corpus.encodings import decode_page
from rag_jax.corpus.encodings import likely_encoding

RUSSIAN = "Московский Кремль: крепость в центре города."
GREEK = "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας."
FRENCH = "Été à l’école: où est le château?"


@pytest.mark.parametrize(
  ("text", "codec", "label", "encoding"),
  [
    ("①㈱髙橋", "cp932", "x-sjis", "shift_jis"),
    ("朱镕基囍", "gbk", "gb2312", "gbk"),
    ("똠방각하 펲시", "cp949", "euc-kr", "euc-kr"),
    ("“Größe” – 5 €", "cp1252", "iso-8859-1", "windows-1252"),
    ("İstanbul, güneş", "cp1254", "latin5", "windows-1254"),
    ("東京", "iso2022_jp", "iso-2022-jp", "iso-2022-jp"),
    ("café", "cp1252", "ISO-8859-1 ", "windows-1252"),
    (RUSSIAN, "koi8-r", "koi8-r", "koi8-r"),
    (RUSSIAN, "cp1251", "windows-1251", "windows-1251"),
    ("a\x81b", "latin-1", "windows-1252", "windows-1252"),
    ("é", "utf-8", "utf-16", "utf-8"),  # as the standard says
  ],
)
def test_labels_mean_what_browsers_take_them_for(text, codec, label, encoding):
  assert decode_page(text.encode(codec), label) == Decoded(text, encoding)


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("mark", [True, False])
def test_utf16_is_read_with_and_without_its_mark(codec, mark):
  page = "<p>" + RUSSIAN[:4] + " in English words</p>"
  raw = ("\ufeff" * (mark and codec != "utf-16") + page).encode(codec)
  decoded = decode_page(raw, "iso-8859-1" if mark else "")
  assert decoded is not None
  assert (decoded.text, decoded.label) == (page, "")


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
  "text", [RUSSIAN, GREEK, "Ελλάδα " * 900, "東京 です" * 30, "plain words"]
)
def test_utf16_without_a_mark_need_not_be_markup_for_the_most_part(codec, text):
  page = f"<html><head><title>T</title></head><body><p>{text}"
  decoded = decode_page(page.encode(codec), "")
  assert decoded == Decoded(page, codec.replace("16-", "16"))


@pytest.mark.parametrize(
  "raw",
  [
    RUSSIAN.encode("utf-32-le"),
    RUSSIAN.encode("utf-32-be"),
    b"abc\0de\0" * 50,  # zeros at even and odd places
    b"abc\0" * 50,  # words in ASCII: no UTF-16, whose letters these could be
  ],
)
def test_bytes_with_many_zeros_are_no_page(raw):
  assert decode_page(raw, "") is None
  assert decode_page(raw, "utf-8") is None


@pytest.mark.parametrize("label", ["", "utf-8", "x-sjis", "euc-jp"])
@pytest.mark.parametrize("text", ["東京", "日本の首都は東京です。 Tokyo"])
def test_japanese_in_seven_bits_is_read_whatever_the_label(text, label):
  raw = f"<p>{text}</p>".encode("iso2022_jp")
  decoded = decode_page(raw, label)
  assert decoded == Decoded(f"<p>{text}</p>", "iso-2022-jp", label or "none")


def test_an_escape_that_is_no_japanese_is_left_alone():
  raw = b"<p>\x1b$B is how it starts</p>\x1b$B!"
  assert decode_page(raw, "") == Decoded(raw.decode(), "utf-8")


SLOVAK = "Kôň žltý ťahá v Košiciach šťastne ďalej, teší sa z radosť lásky. "
POLISH = "Zażółć gęślą jaźń, gdzie książka i źródło są piękne. "
FRENCH_WORDS = "L’Académie française a été créée à Paris par un élève naïf. "


@pytest.mark.parametrize(
  ("text", "codec", "encoding", "labels"),
  [
    (
      FRENCH_WORDS,
      "cp1252",
      "windows-1252",
      ["windows-1251", "koi8-r", "windows-1253", "iso-8859-5", "windows-1255"],
    ),
    (
      "Größe, Straße und Übermut führen nach Österreich. ",
      "cp1252",
      "windows-1252",
      ["windows-1251", "iso-8859-7", "x-mac-cyrillic"],
    ),
    (SLOVAK, "iso8859_2", "iso-8859-2", ["windows-1250"]),
    (POLISH, "iso8859_2", "iso-8859-2", ["windows-1250"]),
    (SLOVAK, "cp1250", "windows-1250", ["iso-8859-2"]),
    (
      "Пять языков знает моя тётя Яна, и вся её семья. ",
      "cp1251",
      "windows-1251",
      ["x-mac-cyrillic"],
    ),
  ],
)
@pytest.mark.parametrize("times", [1, 30])
def test_words_that_the_label_breaks_are_whole_in_the_right_encoding(
  text, codec, encoding, labels, times
):
  page = "<p>" + times * text
  for label in labels:
    decoded = decode_page(page.encode(codec), label)
    assert decoded == Decoded(page, encoding, label), label


@pytest.mark.parametrize(
  ("text", "codec", "label"),
  [
    (SLOVAK, "cp1250", "windows-1250"),
    (SLOVAK, "iso8859_2", "iso-8859-2"),
    (POLISH, "cp1250", "windows-1250"),
    ("Mondta: «igen»és ment. Őrült tűz, öt űrhajó. ", "cp1250", "windows-1250"),
    (FRENCH_WORDS + "foo®bar 5€ CHF£ ", "cp1252", "windows-1252"),
    ("Straße: 10€, Größe±1, µm, 20°C, „so“—ja ", "cp1252", "windows-1252"),
    ("Купил iPhone’ы и CD-диски за 5€, слово»слово. ", "cp1251", "cp1251"),
    ("Моя тётя Яна и вся её семья. ", "mac_cyrillic", "x-mac-cyrillic"),
    ("la col·lecció, l´eau, 3ª ºC ", "cp1252", "windows-1252"),
    ("İstanbul’da ığdır, 5£ ", "cp1254", "windows-1254"),
    ("ירושלים היא עיר הבירה של ישראל, 5₪. ", "cp1255", "windows-1255"),
    ("القاهرة هي عاصمة جمهورية مصر العربية. ", "cp1256", "windows-1256"),
    ("กรุงเทพมหานครเป็นเมืองหลวง ", "cp874", "windows-874"),
  ],
)
@pytest.mark.parametrize("times", [1, 30])
def test_a_right_label_is_kept_where_words_hold_symbols(
  text, codec, label, times
):
  page = "<p>" + times * text
  decoded = decode_page(page.encode(codec), label)
  assert decoded is not None
  assert (decoded.text, decoded.label) == (page, "")


@pytest.mark.parametrize(
  ("text", "codec", "encoding", "labels"),
  [
    (
      RUSSIAN,
      "cp1251",
      "windows-1251",
      ["iso-8859-1", "koi8-r", "iso-8859-5", "windows-1252", "gb2312", "utf-8"],
    ),
    ("Погода", "cp1251", "windows-1251", ["latin1", "koi8-r"]),
    (GREEK, "cp1253", "iso-8859-7", ["windows-1252", "windows-1251"]),
    ("Čeština: žluťoučký kůň", "cp1250", "windows-1250", ["iso-8859-1"]),
    ("北京是中华人民共和国的首都", "gbk", "gb18030", ["euc-kr", "x-sjis"]),
    (FRENCH, "utf-8", "utf-8", ["iso-8859-1", "windows-1251", "x-sjis"]),
    (RUSSIAN, "cp1251", "windows-1251", ["no-such-label"]),
  ],
)
def test_a_wrong_label_is_found_and_said(text, codec, encoding, labels):
  for label in labels:
    decoded = decode_page(text.encode(codec), label)
    assert decoded == Decoded(text, encoding, label)


def test_a_page_that_names_nothing_is_read_by_its_letters_if_they_are_many():
  raw = RUSSIAN.encode("cp1251")
  assert decode_page(raw, "") == Decoded(RUSSIAN, "windows-1251", "none")
  assert decode_page("Москва".encode("koi8-r"), "") is None  # too few
  assert decode_page("台北".encode("big5"), "") is None
  assert decode_page(b"caf\xe9", "utf-8") is None


@pytest.mark.parametrize(
  ("text", "encoding"),
  [
    ("Le café", "windows-1252"),
    ("He said “this is so” — and left…", "windows-1252"),
    ("Die Straße führt über München nach Österreich.", "windows-1252"),
    ("Łódź jest miastem w środkowej Polsce, żółć", "iso-8859-2"),
    ("İstanbul Türkiye'nin en kalabalık şehridir", "windows-1254"),
  ],
)
def test_a_page_of_latin_letters_that_names_nothing_is_read_as_browsers_do(
  text, encoding
):
  raw = f"<p>{text}</p>".encode(encoding)
  assert decode_page(raw, "") == Decoded(f"<p>{text}</p>", encoding, "none")
  # What is partly UTF-8 is not guessed at.
  assert decode_page(raw + "<p>größer</p>".encode(), "") is None


@pytest.mark.parametrize(
  ("codec", "name"),
  [
    ("utf-16", "UTF-16"),
    ("utf-16-le", "UTF-16LE"),
    ("utf-32", "UTF-32"),
    ("cp1251", "WINDOWS-1251"),
    ("utf-8", ""),
  ],
)
def test_the_likely_encoding_is_one_that_iconv_knows(codec, name):
  text = RUSSIAN if codec == "cp1251" else "plain words"
  assert likely_encoding(text.encode(codec)) == name
