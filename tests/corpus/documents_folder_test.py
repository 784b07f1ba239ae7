"""A folder of text files gives a document a file, in the order of the names."""

import gzip
import os
import pathlib
import re

from corpora import read
import pytest

from rag_jax.corpus.document import Document


@pytest.fixture
def write(write):
  return lambda name, data: pathlib.Path(write(data, name))


def test_files_are_read_by_their_end_at_any_depth_in_order(write, tmp_path):
  write("b.txt", "Plain.\n")
  write("a/z.md", "Intro.\n\n## The heading ##\nText.")
  write("a/b/c.HTML", "<title>A page</title><p>Text.")
  write("a.txt", "\ufeffFirst é.")
  documents, report = read(tmp_path)
  assert documents == [
    Document("a/b/c.HTML", "A page", "Text.", (), f"{tmp_path}/a/b/c.HTML:1"),
    Document(
      "a/z.md",
      "The heading",
      "Intro.\nThe heading\nText.",
      (),
      f"{tmp_path}/a/z.md:1",
    ),
    Document("a.txt", "a", "First é.", (), f"{tmp_path}/a.txt:1"),
    Document("b.txt", "b", "Plain.\n", (), f"{tmp_path}/b.txt:1"),
  ]
  assert (report.documents, report.other_files) == (4, 0)


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.html"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_single_file_is_one_document(write, name, packed):
  data, name = b"Some text.", name + ".gz" * packed
  path = write(name, gzip.compress(data) if packed else data)
  documents, _ = read(path)
  assert documents == [Document(name, "x", "Some text.", (), f"{path}:1")]


@pytest.mark.parametrize(
  ("text", "title"),
  [
    ("# One\n## Two", "One"),
    ("#not a heading\n   ### Three # \n", "Three"),
    ("```\n# a comment\n```\n# After", "After"),
    ("~~~\n```\n# a comment\n~~~\n# After", "After"),
    ("    # code\n", "x"),
    ("Set\n===\n", "Set"),
    ("---\ntitle: Front\n---\n# One", "Front"),
    ("#\n# \nText", "x"),
  ],
)
def test_the_title_of_markdown_is_its_first_heading(write, text, title):
  documents, _ = read(write("x.md", text))
  assert [d.title for d in documents] == [title]


def test_other_files_hidden_ones_and_links_to_folders_are_counted(
  write, tmp_path
):
  write("a.txt", "x")
  write("picture.png", "x")
  write(".hidden.txt", "x")
  write(".git/a.txt", "x")
  os.symlink(tmp_path, tmp_path / "loop")
  documents, report = read(tmp_path)
  assert [d.id for d in documents] == ["a.txt"]
  assert report.other_files == 4
  names = {os.path.basename(place) for place in report.places["other_files"]}
  assert names == {"picture.png", ".hidden.txt", ".git", "loop"}


@pytest.mark.parametrize("name", ["bad.txt", "bad.md", "bad.html"])
def test_a_file_that_is_not_utf8_is_named_or_skipped(write, tmp_path, name):
  write("a.txt", "one")
  write("z.txt", "two")
  path = write(name, b"line\nca\xe9 fe" + "Москва".encode("koi8-r"))
  with pytest.raises(ValueError, match=f"{path}:2: byte 0xe9 at offset 7 of"):
    read(tmp_path)
  documents, report = read(tmp_path, "skip")
  assert [d.id for d in documents] == ["a.txt", "z.txt"]
  assert report.dropped["undecodable"] == 1
  assert report.places["undecodable"][0].startswith(f"{path}:2: byte 0xe9")


def test_a_page_may_name_another_encoding(write):
  head = '<meta charset="iso-8859-1"><p>'
  documents, _ = read(write("x.html", head.encode() + b"caf\xe9"))
  assert documents[0].text == "café"


@pytest.mark.parametrize("name", ["utf-8", "no-such-encoding", "undefined"])
def test_a_page_that_is_not_in_the_encoding_it_names_is_refused(write, name):
  page = f'<meta charset="{name}"><p>'.encode() + b"caf\xe9"
  with pytest.raises(ValueError, match=r"x\.html:1: byte 0xe9"):
    read(write("x.html", page))


def test_a_page_with_a_wrong_label_is_read_and_reported(write):
  page = '<meta charset="iso-8859-1"><p>Московский Кремль'
  path = write("x.html", page.encode("cp1251"))
  documents, report = read(path)
  assert documents[0].text == "Московский Кремль"
  assert report.mislabelled == 1
  assert report.places["mislabelled"] == [
    f"{path}:1: says iso-8859-1, was read as windows-1251"
  ]
  assert "1  pages in another encoding than they say" in report.table()


@pytest.mark.parametrize("page", ["<![CD[x]]>", "<![", "<!", "<a <b", "\0", ""])
def test_a_page_without_text_never_ends_a_build_that_skips(write, page):
  write("a.txt", "one")
  path = write("b.html", page)
  documents, report = read(path.parent, "skip")
  assert documents[0].id == "a.txt"
  assert len(documents) + sum(report.dropped.values()) == 2


@pytest.mark.parametrize(
  "codec", ["utf-16", "utf-16-le", "utf-16-be", "cp1251"]
)
@pytest.mark.parametrize("end", ["txt", "md"])
def test_the_advice_names_the_encoding_of_a_file(write, codec, end):
  path = write(f"x.{end}", "Это страница о погоде\n".encode(codec))
  if codec in ("utf-16-le", "utf-16-be"):
    path = write(f"x.{end}", "Plain words.\n".encode(codec))
  name = {"cp1251": "WINDOWS-1251"}.get(
    codec, codec.upper().replace("16-", "16")
  )
  with pytest.raises(ValueError, match=f"`iconv -f {name} -t UTF-8`"):
    read(path)


def test_a_picture_inside_of_markdown_is_left_out_and_counted(write):
  data = "data:image/png;base64," + "iVBORw0KGgo" * 100
  documents, report = read(write("x.md", f"# A\n![p]({data})\ntext"))
  assert documents[0].text == "A\np text"
  assert report.left_out == 1
  assert report.left_out_chars == len(data) - len("data:,")


def test_a_file_with_a_nul_is_refused_as_another_kind_of_file(write):
  path = write("x.txt", "one\ntw\0o")
  with pytest.raises(
    ValueError, match=re.escape(f"{path}:2: the text")
  ) as info:
    read(path)
  assert "holds a NUL character" in str(info.value)
  assert "Is it another kind of file? Rename it" in str(info.value)


def test_a_damaged_gzip_file_is_named_or_skipped(write, tmp_path):
  write("a.txt", "one")
  path = write("b.txt.gz", gzip.compress(b"text" * 100)[:20])
  with pytest.raises(ValueError, match=f"{path}:1: the gzip data is damaged"):
    read(tmp_path)
  documents, report = read(tmp_path, "skip")
  assert [d.id for d in documents] == ["a.txt"]
  assert report.dropped["undecodable"] == 1


def test_an_empty_file_is_named_or_skipped(write, tmp_path):
  write("a.txt", "one")
  path = write("b.txt", " \n")
  with pytest.raises(
    ValueError, match=f"{path}:1: the text of document 'b.txt'"
  ):
    read(tmp_path)
  documents, report = read(tmp_path, "skip")
  assert [d.id for d in documents] == ["a.txt"]
  assert report.dropped["empty"] == 1


@pytest.mark.parametrize("action", ["fail", "skip"])
def test_a_folder_without_text_is_refused_with_what_it_holds(
  write, tmp_path, action
):
  write("docs.jsonl", "{}")
  with pytest.raises(ValueError, match=f"{tmp_path} holds no text") as info:
    read(tmp_path, action)
  for part in ("'.txt', '.md'", "corpus.jsonl", "docs.jsonl", "Give the path"):
    assert part in str(info.value)
