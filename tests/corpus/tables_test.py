"""Tables of the field give their rows, and name the line of what is wrong."""

import gzip

import corpora
from corpora import assert_fails
import pytest

from rag_jax.corpus import text_files

HEADER = "id\ttext\ttitle\n"


@pytest.fixture
def write(write):
  return lambda data, name="x.tsv": write(data, name)


def read(path, action="fail"):
  documents, report = corpora.read(path, action)
  places = [int(d.where.rpartition(":")[2]) for d in documents]
  found = [(d.id, d.title, d.text) for d in documents]
  return found, places, report


def rows(path):
  return read(path)[0]


def refused(path, *parts):
  assert_fails(lambda: read(path), *parts)


def test_dprs_own_way_of_quoting_is_read(write):
  path = write(
    HEADER
    + '1\t"Aaron ( or ; ""Ahärôn"") is a prophet"\tAaron\n'
    + '2\t"God at Sinai granted Aaron the priesthood"\t"""Heroes"" (song)"\n'
    + "3\tIt is 6' 2\" tall\tHeight\n",
    "psgs_w100.tsv",
  )
  found, places, _ = read(path)
  assert found == [
    ("1", "Aaron", 'Aaron ( or ; "Ahärôn") is a prophet'),
    ("2", '"Heroes" (song)', "God at Sinai granted Aaron the priesthood"),
    ("3", "Height", "It is 6' 2\" tall"),
  ]
  assert places == [2, 3, 4]


def test_columns_may_have_any_order_and_others_are_metadata(write):
  path = write("title\tyear\tid\ttext\nA\t1999\t1\tone\nB\t\t2\ttwo\n")
  documents, _ = corpora.read(path)
  assert [(d.id, d.title, d.text, d.metadata) for d in documents] == [
    ("1", "A", "one", (("year", "1999"),)),
    ("2", "B", "two", ()),
  ]


def test_a_quoted_text_may_span_lines_and_the_next_line_number_is_right(write):
  path = write(HEADER + '1\t"two\nlines"\tA\n\n2\tone line\tB\n')
  found, places, _ = read(path)
  assert found == [("1", "A", "two\nlines"), ("2", "B", "one line")]
  assert places == [2, 5]


MS_MARCO = (
  '0\tThe "Manhattan" Project\n'
  '1\t"Heroes" is a song, and\n'
  '2\t"this quote is never closed\n'
  "\n"
  "3\tThe last, with a comma; and more.\r\n"
)
PASSAGES = [
  ("0", "", 'The "Manhattan" Project'),
  ("1", "", '"Heroes" is a song, and'),
  ("2", "", '"this quote is never closed'),
  ("3", "", "The last, with a comma; and more."),
]


@pytest.mark.parametrize("head", ["", "pid\tpassage\n", "id\tpassage\n"])
@pytest.mark.parametrize("name", ["collection.tsv", "collection.tsv.gz"])
def test_ms_marco_has_two_columns_without_names_and_quotes_are_text(
  write, head, name
):
  data = (head + MS_MARCO).encode()
  path = write(gzip.compress(data) if name.endswith(".gz") else data, name)
  found, places, _ = read(path)
  assert found == PASSAGES
  assert places == [line + bool(head) for line in (1, 2, 3, 5)]


def test_a_row_of_ms_marco_with_other_columns_is_named_or_skipped(write):
  path = write("0\tzero\n1\tone\tmore\n2\n3\tthree\n")
  refused(path, f"{path}:2: 3 columns", "Expected 2", "MS MARCO", "Correct")
  found, _, report = read(path, "skip")
  assert [row[0] for row in found] == ["0", "3"]
  assert report.dropped["bad_record"] == 2


CSV = (
  'id,title,text,lang\n1,"A, B","Two\nlines ""quoted"".",en\n2,,Plain; text.,\n'
)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_is_read_with_commas_semicolons_or_tabs(write, delimiter):
  swap = str.maketrans({",": delimiter, delimiter: ","})
  assert rows(write(CSV.translate(swap), "x.csv")) == [
    ("1", "A, B".translate(swap), 'Two\nlines "quoted".'),
    ("2", "", "Plain; text.".translate(swap)),
  ]


def test_the_index_column_that_pandas_writes_has_no_name_and_is_left_out(write):
  path = write(",id,text\n0,a,one\n1,b,two\n", "x.csv")
  documents, _ = corpora.read(path)
  assert [(d.id, d.text, d.metadata) for d in documents] == [
    ("a", "one", ()),
    ("b", "two", ()),
  ]


def test_an_empty_text_is_refused_with_its_line(write):
  path = write(HEADER + '1\tx\tA\n2\t" "\tB\n')
  refused(path, f"{path}:3: the text of document '2' is empty")
  path = write(HEADER + "1\tx\tA\n2\t\tB\n")
  refused(path, f"{path}:3: the text of document '2' is empty")


@pytest.mark.parametrize(
  ("name", "first"),
  [
    ("x.tsv", "1\tone\tA\n"),
    ("x.tsv", "\n"),
    ("x.tsv", "id,text,title\n"),
    ("x.csv", "1,one\n"),
    ("x.csv", "text\n"),
  ],
)
def test_a_table_without_names_of_columns_is_refused(write, name, first):
  path = write(first + "2\ttwo\tB\n", name)
  line = 2 if first == "\n" else 1
  for action in ("fail", "skip"):
    with pytest.raises(ValueError, match=rf"x\....:{line}: the first line is"):
      read(path, action)
  refused(path, "Expected the names of", "['id', 'text', 'title']", "MS MARCO")


def test_a_name_that_two_columns_have_is_refused(write):
  path = write("id,text,text\n1,one,two\n", "x.csv")
  refused(path, f"{path}:1: ", "the column 'text' more than once", "Rename")


@pytest.mark.parametrize(
  ("row", "count"), [("2\ttwo\n", 2), ("2\ttwo\tB\tmore\n", 4), ("2", 1)]
)
def test_a_row_with_another_number_of_columns_is_refused(write, row, count):
  path = write(HEADER + "1\tone\tA\n" + row)
  refused(
    path, f"{path}:3: {count} columns, ['2'", "Expected 3", "Correct the line"
  )


OPEN_QUOTES = [
  ('1\t"open\tA\n2\t"two"\tB\n', 3),  # closed by the next text's quote
  ('1\t"open\tA\n2\ttwo\tB\n', 3),  # up to the end of the file
  ('1\tone\t"open\n2\t"two"\tB\n', 3),  # the title's
  ('1\tone\t"open\n', 2),  # the last title's
]


@pytest.mark.parametrize(("text", "last"), OPEN_QUOTES)
def test_a_quote_that_is_not_closed_does_not_merge_rows(write, text, last):
  path = write(HEADER + text)
  refused(
    path,
    *(
      f"{path}:2: a column starts with a double quote",
      f"goes on to line {last}",
    ),
    *("Expected the quote to be closed", "Close it"),
  )


@pytest.mark.parametrize(("text", "last"), OPEN_QUOTES)
def test_after_a_quote_that_is_not_closed_the_next_line_is_read(
  write, text, last
):
  path = write(HEADER + text)
  found, _, report = read(path, "skip")
  assert found == [("2", "B", "two")] * (last - 2)
  assert report.dropped["bad_record"] == 1


@pytest.mark.parametrize("end", ["tsv", "csv"])
@pytest.mark.parametrize("bad", [[0], [3], [9], [2, 3], range(10)])
def test_only_rows_with_an_open_quote_are_lost(write, end, bad):
  tab = "\t" if end == "tsv" else ","
  lines = [tab.join(["id", "text", "title"]) + "\n"]
  for i in range(10):
    text = f'"open {i}' if i in bad else f'"text {i}"' if i % 2 else f"text {i}"
    lines.append(tab.join([str(i), text, "T"]) + "\n")
  # Longer than csv reads, without another quote.
  lines += [tab.join([str(i), "x" * 100, "T"]) + "\n" for i in range(10, 2000)]
  path = write("".join(lines), f"x.{end}")
  found, places, report = read(path, "skip")
  expected = [i for i in range(2000) if i not in bad]
  assert [int(row[0]) for row in found] == expected
  assert places == [i + 2 for i in expected]
  assert report.dropped["bad_record"] == len(bad)


def test_a_column_longer_than_csv_reads_is_refused(write):
  path = write(HEADER + "1\tone\tA\n2\t" + "x" * 140_000 + "\tB\n")
  refused(
    path,
    f"{path}:3: the row that starts here cannot be read (field larger",
    *("at most 131072 characters", "convert longer texts to .jsonl"),
  )


def test_a_nul_is_refused(write):
  path = write(HEADER + "1\tone\0\tA\n")
  refused(path, f"{path}:2: field 'text' holds a NUL", "Remove the character")


def test_bytes_that_are_not_utf8_are_named(write):
  path = write(HEADER.encode() + b"1\tcaf\xe9\tA\n")
  refused(path, f"{path}:2: byte 0xe9 at offset {len(HEADER) + 5}")


@pytest.mark.parametrize("name", ["x.tsv", "x.csv"])
def test_an_empty_table_has_no_rows_and_a_damaged_one_says_so(
  write, name, monkeypatch
):
  assert rows(write("", name)) == rows(write("\n\n", name)) == []
  monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 100)
  path = write("x" * 200, name)
  refused(path, ":1: the line has more than 100 bytes")
  assert read(path, "skip")[2].dropped["undecodable"] == 1


@pytest.mark.parametrize("end", ["tsv", "csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_file_of_utf16_is_called_that(tmp_path, end, encoding, mark):
  line = {"tsv": "id\ttext\n1\tone\n", "csv": "id,text\n1,one\n"}
  text = mark + line.get(end, '{"id": "1", "text": "one"}\n')
  path = tmp_path / f"corpus.{end}"
  path.write_bytes(text.encode(encoding))
  with pytest.raises(ValueError, match=r":1: .*It looks like UTF-16.*iconv"):
    corpora.read(path)


@pytest.mark.parametrize("action", ["fail", "skip"])
def test_names_of_columns_that_cannot_be_read_are_never_skipped(
  tmp_path, action
):
  path = tmp_path / "corpus.tsv"
  path.write_bytes("id\ttext\ttítulo\n1\tone\tT\n".encode("latin-1"))
  with pytest.raises(ValueError, match=r"corpus.tsv:1: byte 0xed .*iconv"):
    corpora.read(path, action)


@pytest.mark.parametrize("name", ["x.tsv", "x.csv"])
@pytest.mark.parametrize("action", ["fail", "skip"])
def test_lines_that_end_in_cr_are_called_that(write, name, action):
  separator = "\t" if name == "x.tsv" else ","
  path = write("id,text\r1,a\r2,b\r".replace(",", separator), name)
  with pytest.raises(ValueError, match=r":1: .*carriage return .*tr '.r' '.n'"):
    read(path, action)
