"""Every line of a file comes back, or an error that says where it is wrong."""

import gzip
import json
import pathlib

from corpora import assert_fails
import pytest

from rag_jax.corpus.text_files import bad_character
from rag_jax.corpus.text_files import decode_text
from rag_jax.corpus.text_files import find_file
from rag_jax.corpus.text_files import read_lines
from rag_jax.corpus.text_files import read_records
from rag_jax.corpus.text_files import read_texts
from rag_jax.corpus.text_files import shorten

GOOD = b'{"id": "a", "text": "one"}\n'


@pytest.fixture
def write(write):
  return lambda data, name="file.jsonl": pathlib.Path(write(data, name))


def read(path, **optional):
  required = {"id": (str, int), "text": str}
  return list(read_records(path, required=required, optional=optional))


def refused(path, line, *parts, **optional):
  """Reading fails, and the message has `path:line` and every part in order."""
  assert_fails(lambda: read(path, **optional), f"{path}:{line}: ", *parts)


def test_records_come_with_their_line_and_blank_lines_are_skipped(write):
  path = write(b"\n" + GOOD + b"  \r\n\t\n" + GOOD.replace(b'"a"', b"7"))
  assert read(path) == [
    (2, {"id": "a", "text": "one"}),
    (5, {"id": 7, "text": "one"}),
  ]


def test_the_last_line_needs_no_line_end_and_dos_line_ends_are_fine(write):
  path = write(GOOD.replace(b"\n", b"\r\n") + GOOD.strip())
  assert [line for line, _ in read(path)] == [1, 2]


def test_line_separators_inside_a_text_do_not_end_the_line(write):
  text = "one\u2028two\u0085three\vfour"
  data = json.dumps({"id": "a", "text": text}, ensure_ascii=False)
  assert read(write(data.encode()))[0][1]["text"] == text


def test_a_byte_order_mark_is_dropped(write):
  path = write(b"\xef\xbb\xbf" + GOOD)
  assert read(path) == [(1, {"id": "a", "text": "one"})]
  assert list(read_lines(path)) == [(1, GOOD.decode())]


def test_a_gzip_file_reads_like_the_file_that_it_holds(write):
  data = GOOD + '{"id": "b", "text": "Ahärôn 🜚"}\n'.encode()
  packed = write(gzip.compress(data), "file.jsonl.gz")
  assert read(packed) == read(write(data))


def test_reading_streams_and_fails_only_where_the_bad_line_is(write):
  records = read_records(write(GOOD + b"no\n"), required={"id": str})
  assert next(records)[0] == 1
  with pytest.raises(ValueError, match=r"file\.jsonl:2: not valid JSON"):
    next(records)


def test_fields_that_nobody_names_are_left_alone(write):
  path = write(b'{"id": "a", "text": "one", "more": [1.5, null]}\n')
  assert read(path)[0][1]["more"] == [1.5, None]


def test_an_empty_file_has_no_records(write):
  assert read(write(b"")) == []


def test_a_line_that_is_cut_off_is_named(write):
  refused(
    write(GOOD + b'{"id": "b", "te'),
    *(2, "not valid JSON", '{"id": "b", "te', "Expected one complete JSON"),
    "the file may be cut off: copy it again",
  )


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_are_not_json_are_refused(write, constant):
  line = f'{{"id": "b", "text": "x", "score": {constant}}}\n'
  refused(write(GOOD + line.encode()), 2, f"{constant} is not a JSON value")


def test_nesting_without_end_is_refused(write):
  refused(write(GOOD + b"[" * 200_000), 2, "not valid JSON", "[[[...")


@pytest.mark.parametrize(
  ("value", "name"),
  [
    ("[1, 2]", "a list"),
    ('"x"', "a string"),
    ("3", "a whole number"),
    ("null", "null"),
  ],
)
def test_a_line_that_is_no_object_is_refused(write, value, name):
  line = value.encode() + b"\n"
  refused(
    write(GOOD + line), 2, f"is {name}, not an object", "Expected one complete"
  )


def test_bytes_that_are_not_utf8_are_named_with_their_offset(write):
  before = b"\xef\xbb\xbf" + GOOD.replace(b"one", "Ahärôn".encode())
  bad = '{"id": "b", "text": "café"}\n'.encode("latin-1")
  path = write(before + bad)
  offset = path.read_bytes().index(0xE9)
  refused(
    path,
    *(2, f"byte 0xe9 at offset {offset} of the file is not UTF-8"),
    *("Expected UTF-8 text", "iconv"),
  )


def test_the_line_of_a_bad_byte_is_right_behind_a_byte_order_mark_too():
  with pytest.raises(ValueError, match=r"x\.txt:2: byte 0xe9 at offset 9 of"):
    decode_text(b"\xef\xbb\xbfone\nca\xe9", "x.txt")
  assert decode_text(b"\xef\xbb\xbfone", "x.txt") == "one"


def test_compressed_data_without_the_name_for_it_is_recognised(write):
  path = write(gzip.compress(GOOD))
  refused(path, 1, "byte 0x8b at offset 1", "let its name end in .gz")


def test_utf16_is_recognised(write):
  path = write(GOOD.decode().encode("utf-16"))
  refused(path, 1, "byte 0xff at offset 0", "It looks like UTF-16")


def test_a_gzip_file_that_is_cut_off_is_refused(write):
  packed = gzip.compress(b"".join(b"%d\n" % i for i in range(5000)))
  path = write(packed[:-20], "file.jsonl.gz")
  with pytest.raises(
    ValueError, match=r"file\.jsonl\.gz:\d+: the gzip data is damaged or cut"
  ) as info:
    list(read_lines(path))
  assert "Download or compress it again" in str(info.value)


def test_a_gzip_file_with_a_wrong_byte_is_refused(write):
  packed = bytearray(gzip.compress(GOOD * 100))
  packed[-6] ^= 0xFF  # in the checksum
  with pytest.raises(ValueError, match=r"gzip data is damaged.*CRC check"):
    read(write(bytes(packed), "file.jsonl.gz"))


def test_a_file_that_only_calls_itself_gzip_is_refused(write):
  path = write(GOOD, "file.jsonl.gz")
  refused(path, 1, "the gzip data is damaged", "Not a gzipped file")


def test_a_missing_field_is_named_with_the_fields_that_are_there(write):
  refused(
    write(GOOD + b'{"id": "b", "txet": "two"}\n'),
    *(2, "no field 'text'; the record has ['id', 'txet']"),
    *("Expected 'text' to be a string", "Add or rename"),
  )


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    ("3", "3, a whole number"),
    ("null", "None, null"),
    ("1.5", "1.5, a number"),
    ('["x"]', "['x'], a list"),
  ],
)
def test_a_field_of_the_wrong_type_is_shown(write, value, shown):
  line = f'{{"id": "b", "text": {value}}}\n'.encode()
  refused(
    write(GOOD + line),
    *(2, f"field 'text' is {shown}", "Expected a string", "Correct the record"),
  )


def test_true_is_not_a_whole_number(write):
  line = b'{"id": true, "text": "x"}'
  refused(
    write(line), 1, "'id' is True, true or false", "a string or a whole number"
  )


def test_a_long_value_is_shortened_in_the_message(write):
  path = write(b'{"id": "b", "text": [%s1]}\n' % (b"1, " * 10_000))
  with pytest.raises(ValueError, match=r"field 'text' is \[1, 1.*\.\.\.") as e:
    read(path)
  assert len(str(e.value)) < 300 + len(str(path))


def test_a_string_in_the_place_of_a_list_gets_a_hint(write):
  refused(
    write(b'{"id": "b", "text": "x", "answers": "Paris"}\n'),
    *(1, "field 'answers' is 'Paris', a string", "Expected a list"),
    'Put it into a list: "answers": ["..."]',
    answers=list,
  )


def test_optional_fields_may_be_missing_but_not_of_another_type(write):
  path = write(GOOD + b'{"id": "b", "text": "x", "relation": 4}\n')
  assert len(read(path)) == 2
  refused(path, 2, "field 'relation' is 4", "a string", relation=str)


@pytest.mark.parametrize(
  ("escape", "name"),
  [("\\u0000", "a NUL character"), ("\\ud83d", "surrogate pair (\\ud83d)")],
)
@pytest.mark.parametrize("form", ['"x%s"', '["fine", "x%s"]'])
def test_characters_that_no_tokenizer_takes_are_refused(
  write, escape, name, form
):
  value = form % escape
  line = f'{{"id": "b", "text": "x", "more": {value}}}\n'.encode()
  refused(
    write(GOOD + line),
    *(2, "field 'more' holds", name, "Remove the character"),
    more=(str, list),
  )


def test_a_whole_surrogate_pair_is_one_good_character(write):
  path = write(b'{"id": "b", "text": "\\ud83d\\ude00"}\n')
  assert read(path)[0][1]["text"] == "😀"
  assert bad_character("Ahärôn 😀") == ""


def test_shortening_keeps_what_fits_and_marks_what_it_cuts():
  assert shorten("x" * 58) == repr("x" * 58)
  assert shorten("x" * 59) == "'" + "x" * 56 + "..."
  assert shorten(list(range(1000)), 10) == "[0, 1, ..."


def test_a_file_that_is_there_is_found(write, tmp_path, monkeypatch):
  path = write(GOOD)
  monkeypatch.setenv("HOME", str(tmp_path))
  assert find_file(path, "a file") == path
  assert find_file("~/file.jsonl", "a file") == path


def test_a_missing_file_is_reported_with_the_nearest_names(write, tmp_path):
  write(b"", "passages.jsonl")
  write(b"", "cat.png")
  with pytest.raises(FileNotFoundError) as info:
    find_file(tmp_path / "pasages.jsonl", "a .jsonl file")
  assert "no file" in str(info.value)
  assert "Expected a .jsonl file. The nearest names in" in str(info.value)
  assert "are ['passages.jsonl']; correct" in str(info.value)


def test_a_missing_file_unlike_any_other_is_reported_with_what_is_there(
  write, tmp_path
):
  write(b"", "cat.png")
  with pytest.raises(
    FileNotFoundError, match=r"The files in .* are \['cat.png'\]"
  ):
    find_file(tmp_path / "documents.jsonl", "a .jsonl file")


def test_a_missing_folder_is_reported_as_such(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"its folder .*no does not exist"
  ):
    find_file(tmp_path / "no" / "x.jsonl", "a .jsonl file")


def test_a_folder_in_the_place_of_a_file_is_refused(write, tmp_path):
  write(b"", "x.jsonl")
  with pytest.raises(
    ValueError, match=r"is a folder, not a file.*holds \['x.jsonl'\]"
  ):
    find_file(tmp_path, "a .jsonl file")


def test_texts_are_the_lines_that_are_not_empty(write):
  path = write("\ufeff one two \r\n\n  \nthrée".encode(), "questions.txt")
  assert read_texts(path) == ["one two", "thrée"]
  with pytest.raises(FileNotFoundError, match=r"questions\.txt"):
    read_texts(path.parent / "question.txt")
