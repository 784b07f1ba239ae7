"""Texts come back from token ids as they were, and stay text."""

import json
import os
import re
import shutil
import subprocess
import sys

from buckets import bucket
from disks import full_disk
from etils import epath
import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
import transformers

from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.disk import UnwritableError

VOCAB_SIZE = 1024

TEXTS = (
  "Paris",
  "The capital of France is Paris.",
  "a 'single', a \"double\" and a “curly” quote \u2013 it\u2019s quoted",
  "Curaçao, Åland, Côte d'Ivoire, São Tomé, Türkiye, Łódź, Đà Nẵng",
  "e\u0301 is not \u00e9, and n\u0303 is not \u00f1",  # composed otherwise
  "1234567890, 3.14159, +376, 1 234 and ½ or ²",
  "日本の首都は東京です。中文 한국어 العربية हिन्दी ไทย",
  "a flag 🇫🇷, a family 👩‍👩‍👧 and 🙂🙂",
  "two  spaces,   three, a\ttab, a\nline and \r\n another",
  "no-break\u00a0space, zero\u200bwidth, \u202eright to left\u202c",
  "\x00\x01 control \x7f",
  "<html> & {json: [1, 2]} \\ $x_1^2$ #tag @name https://a.b/c?d=e%20f",
  "UPPER lower MiXeD x" + "y" * 300,
)


def passages():
  return load_passages("world_facts")[:500]


@pytest.fixture(scope="module")
def tokenizer():
  texts = (f"{p.title} {p.text}" for p in passages())
  return train_tokenizer(texts, VOCAB_SIZE)


def bert(folder, cut_and_pad=False, **special):
  """Saves a WordPiece tokenizer in BERT's layout."""
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "paris", "is", "big"]
  vocab = {piece: i for i, piece in enumerate([*pieces, "##gest"])}
  model = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
  model.pre_tokenizer = pre_tokenizers.Whitespace()
  model.decoder = decoders.WordPiece()
  if cut_and_pad:  # as many that are published do
    model.enable_truncation(3)
    model.enable_padding(length=8)
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=model, **special
  ).save_pretrained(folder)
  return folder


BERT = {
  "pad_token": "[PAD]",
  "unk_token": "[UNK]",
  "cls_token": "[CLS]",
  "sep_token": "[SEP]",
  "mask_token": "[MASK]",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back_exactly(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode([text])[0]) == text


def test_every_bundled_passage_comes_back_exactly(tokenizer):
  texts = [p.text for p in load_passages("world_facts")]
  assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts


def test_every_character_of_the_basic_plane_comes_back(tokenizer):
  # Some spaces are not exact: outside a text they are left out.
  points = [c for c in range(0x10000) if not 0xD800 <= c < 0xE000]
  texts = [
    "a" + "".join(map(chr, points[i : i + 64])) + "b"
    for i in range(0, len(points), 64)
  ]
  assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts


@pytest.mark.parametrize("text", [" a b", "a b ", "\n\ta b\n", "\u00a0a b"])
def test_spaces_around_a_text_are_left_out(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode([text])[0]) == "a b"


def test_no_text_has_no_tokens(tokenizer):
  assert tokenizer.encode([]) == []
  assert tokenizer.encode(["", "Paris"])[0] == []
  assert tokenizer.decode([]) == ""


def test_a_text_has_the_same_ids_alone_and_among_others(tokenizer):
  alone = [tokenizer.encode([text])[0] for text in TEXTS]
  assert tokenizer.encode(TEXTS) == alone


def test_each_digit_is_a_token_of_its_own(tokenizer):
  (ids,) = tokenizer.encode(["In 1867 it had 20450 people, by 2003 37."])
  pieces = [piece for piece in tokenizer.tokens(ids) if re.search(r"\d", piece)]
  assert [p.strip() for p in pieces] == list("186720450200337")


@pytest.mark.parametrize(
  "text", ["what's in sao paulo", "WHAT'S IN SÃO PAULO", "What's in São Paulo"]
)
def test_an_uncased_tokenizer_has_the_same_ids_in_every_case(text, tmp_path):
  uncased = train_tokenizer(["What is in São Paulo?"], 400, uncased=True)
  uncased.save(tmp_path)
  for tokenizer in (uncased, load_tokenizer(tmp_path)):
    assert (
      tokenizer.decode(tokenizer.encode([text])[0]) == "what's in sao paulo"
    )


def test_a_first_word_has_the_ids_of_a_later_one(tokenizer):
  for word in ("Paris", "the", "capital", "7", "(", "日", "Ålandic"):
    first, second = tokenizer.encode([word, f"The {word}"])
    assert second == tokenizer.encode(["The"])[0] + first


def test_frequent_words_are_one_token(tokenizer):
  capital, rare = tokenizer.encode(["capital", "zqxj"])
  assert len(capital) == 1
  assert len(rare) > 1


def test_the_ids_are_laid_out_like_those_of_bart(tokenizer):
  assert tokenizer.vocab_size == VOCAB_SIZE
  ids = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id)
  assert ids == (0, 1, 2)
  assert tokenizer.mask_id == 4
  assert tokenizer.tokens(range(5)) == [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "<mask>",
  ]
  assert max(max(ids) for ids in tokenizer.encode(TEXTS)) < VOCAB_SIZE


def test_decoding_leaves_special_tokens_out(tokenizer):
  (ids,) = tokenizer.encode(["Paris is big"])
  assert tokenizer.decode([0, *ids, 2, 1, 1]) == "Paris is big"


@pytest.mark.parametrize(
  "text",
  [
    "</s>",
    "Ignore this.</s> Ignore that. </s>",
    "<s>a<pad>b<mask>c<unk>",
    " </s>a",
  ],
)
def test_the_name_of_a_special_token_in_a_text_is_text(
  tokenizer, text, tmp_path
):
  tokenizer.save(tmp_path)
  for each in (tokenizer, load_tokenizer(tmp_path)):
    (ids,) = each.encode([text])
    assert min(ids) > 4
    assert each.decode(ids) == text.strip()


def test_the_name_of_a_special_token_stays_text_in_berts_layout(tmp_path):
  tokenizer = load_tokenizer(bert(tmp_path, **BERT))
  (ids,) = tokenizer.encode(["paris [SEP] is [CLS] [PAD] [MASK] big"])
  assert not {0, 2, 3, 4} & set(ids)
  assert [i for i in ids if i > 4] == tokenizer.encode(["paris is big"])[0]


def test_a_tokenizer_is_saved_in_a_bucket_and_opened_from_it(
  tokenizer, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with bucket() as address:
    where = epath.Path(address) / "run" / "tokenizer"
    tokenizer.save(where)
    tokenizer.save(where)  # again, over itself
    assert sorted(file.name for file in where.iterdir()) == [
      "manifest.json",
      "tokenizer.json",
      "tokenizer_config.json",
    ]
    again = load_tokenizer(where, ours=True)
  assert again.fingerprint == tokenizer.fingerprint
  assert again.encode(["Ada, 1815"]) == tokenizer.encode(["Ada, 1815"])
  assert not os.listdir(tmp_path)  # no folder "gs:"


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "a")
  loaded = load_tokenizer(tmp_path / "a")
  assert loaded.fingerprint == tokenizer.fingerprint
  assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)
  for name in ("vocab_size", "pad_id", "bos_id", "eos_id", "mask_id"):
    assert getattr(loaded, name) == getattr(tokenizer, name)
  loaded.save(tmp_path / "b")
  assert load_tokenizer(tmp_path / "b").fingerprint == tokenizer.fingerprint


def test_another_tokenizer_has_another_fingerprint(tokenizer):
  texts = [p.text for p in passages()[:50]]
  others = [train_tokenizer(texts, 400), train_tokenizer(texts, 401)]
  assert len({t.fingerprint for t in (tokenizer, *others)}) == 3


TRAIN = f"""
import sys
from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.tokenizer import train_tokenizer

texts = [f"{{p.title}} {{p.text}}" for p in load_passages("world_facts")[:500]]
train_tokenizer(texts, {VOCAB_SIZE}).save(sys.argv[1])
"""


def test_the_same_texts_give_the_same_file_in_every_process(
  tokenizer, tmp_path
):
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", TRAIN, tmp_path / seed],
      env=os.environ
      | {
        "PYTHONHASHSEED": seed,
        "RAYON_NUM_THREADS": seed,  # of the trainer
        "PYTHONPATH": os.pathsep.join(sys.path),
      },
    )
    for seed in ("1", "2")
  ]
  assert [process.wait(60) for process in processes] == [0, 0]
  tokenizer.save(tmp_path / "here")
  contents = {
    (tmp_path / name / "tokenizer.json").read_bytes()
    for name in ("1", "2", "here")
  }
  assert len(contents) == 1


def test_a_tokenizer_in_berts_layout_is_opened(tmp_path):
  tokenizer = load_tokenizer(bert(tmp_path, **BERT))
  ids = [
    getattr(tokenizer, f"{name}_id") for name in ("pad", "bos", "eos", "mask")
  ]
  assert ids == [0, 2, 3, 4]
  assert tokenizer.vocab_size == 9
  assert tokenizer.decode([2, 5, 6, 7, 8, 3]) == "paris is biggest"


def test_a_tokenizer_does_not_cut_or_pad_on_its_own(tmp_path):
  bert(tmp_path, cut_and_pad=True, **BERT)
  settings = json.loads((tmp_path / "tokenizer.json").read_text())
  assert settings["truncation"]
  assert settings["padding"]
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.encode(["is", "paris is biggest"]) == [[6], [5, 6, 7, 8]]


def test_without_a_mask_token_the_unknown_one_stands_for_it(tmp_path):
  tokenizer = load_tokenizer(
    bert(tmp_path, **{k: v for k, v in BERT.items() if k != "mask_token"})
  )
  assert tokenizer.mask_id == 1


def test_without_padding_the_end_token_pads_and_nothing_need_be_a_mask(
  tmp_path,
):
  only = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
  tokenizer = load_tokenizer(bert(tmp_path, **only))
  assert tokenizer.pad_id == tokenizer.eos_id == 3
  assert tokenizer.mask_id is None
  # Padding beside a real end token: lengths tell them apart.
  passages = [Passage("a", "", "paris"), Passage("b", "paris", "is biggest")]
  tokenized = TokenizedPassages(passages, tokenizer, 9)
  assert tokenized.tokens[0, :4].tolist() == [5, 3, 3, 3]
  assert tokenized.lengths.tolist() == [2, 6]
  assert list(tokenized.titles()) == [[5]]


@pytest.mark.parametrize("left_out", [["sep_token"], list(BERT)])
def test_a_tokenizer_without_an_end_token_is_refused(left_out, tmp_path):
  bert(tmp_path, **{k: v for k, v in BERT.items() if k not in left_out})
  with pytest.raises(
    ValueError,
    match=(
      "The tokenizer has no eos_token or sep_token; expected one, with which"
      r" texts end. Add it to tokenizer_config\.json"
    ),
  ):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize("make_it", [False, True])
def test_a_folder_without_a_tokenizer_is_named(make_it, tmp_path):
  folder = tmp_path / "tokenizer"
  if make_it:
    folder.mkdir()
  with pytest.raises(
    FileNotFoundError,
    match=(
      rf"There is no tokenizer in {folder}; looked for .* Expected a directory"
      " that a tokenizer was saved to; copy its files there"
    ),
  ):
    load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_was_cut_off_is_refused(tokenizer, name, tmp_path):
  tokenizer.save(tmp_path)
  file = tmp_path / name
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  with pytest.raises(
    ValueError,
    match=rf"(?s)The tokenizer in {tmp_path} cannot be read \(.*\). Its files w"
    "ere cut off or edited, or it needs code of its own, which is never run.",
  ):
    load_tokenizer(tmp_path)


def test_an_unknown_token_that_is_no_token_is_a_clear_error(
  tokenizer, tmp_path
):
  tokenizer.save(tmp_path)
  file = tmp_path / "tokenizer_config.json"
  config = json.loads(file.read_text()) | {"unk_token": ""}
  del config["mask_token"]  # for which the unknown token stands
  file.write_text(json.dumps(config))
  # transformers looks for the id of the unknown token without an end.
  with pytest.raises(ValueError, match=r"cannot be read \(maximum recursion"):
    load_tokenizer(tmp_path)


def test_code_that_comes_with_a_tokenizer_is_not_run(
  tokenizer, tmp_path, monkeypatch
):
  tokenizer.save(tmp_path)
  config_file = tmp_path / "tokenizer_config.json"
  config = json.loads(config_file.read_text())
  config["tokenizer_class"] = "Evil"
  config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
  config_file.write_text(json.dumps(config))
  (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
  # transformers asks; a script may answer yes to everything.
  monkeypatch.setattr("builtins.input", lambda prompt="": "y")
  with pytest.raises(ValueError, match="code of its own, which is never run"):
    load_tokenizer(tmp_path)
  assert not (tmp_path / "ran").exists()


def test_the_class_takes_any_tokenizer_of_transformers(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  backend = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert Tokenizer(backend).encode(TEXTS) == tokenizer.encode(TEXTS)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    (
      "Guinea-Bissau counts 1,863 people.",
      ["Guinea-Bissau", "counts", "1,863", "people", "."],
    ),
    ("Dial +33 (or 1-868)!", ["Dial", "+", "33", "(", "or", "1-868", ")", "!"]),
    ("Étoile 東京", ["Étoile", "東京"]),
    ("E\u0301toile a_b", ["E\u0301toile", "a", "_", "b"]),
    ("हिन्दी भाषा।", ["हिन्दी", "भाषा", "।"]),
    ("می\u200cخواهم کتاب", ["می\u200cخواهم", "کتاب"]),
    ("", []),
  ],
)
def test_words_are_joined_from_the_tokens_that_begin_them(
  tokenizer, text, words
):
  (ids,), (begins,) = tokenizer.encode_words([text])
  assert [ids] == tokenizer.encode([text])
  starts = [i for i, begin in enumerate(begins) if begin]
  stops = [*starts[1:], len(ids)] if starts else []
  joined = [
    tokenizer.decode(ids[i:j]) for i, j in zip(starts, stops, strict=True)
  ]
  assert joined == words


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_saved_tokenizer_that_was_edited_is_refused(
  tokenizer, tmp_path, name
):
  tokenizer.save(tmp_path)
  data = bytearray((tmp_path / name).read_bytes())
  data[len(data) // 2] ^= 1
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=f"{name} in .* was damaged.*Put the"):
    load_tokenizer(tmp_path, ours=True)


def test_a_file_upon_which_the_tokenizers_panic_is_an_error(
  tokenizer, tmp_path
):
  tokenizer.save(tmp_path)
  (tmp_path / "manifest.json").unlink()
  file = tmp_path / "tokenizer.json"
  content = json.loads(file.read_text())
  # Longer than the tokens, of which it is cut off.
  content["model"]["continuing_subword_prefix"] = "x" * 50
  file.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r"cannot be read .*library failed"):
    load_tokenizer(tmp_path)


def test_a_tokenizer_inside_another_is_named_with_it(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "retriever")
  tokenizer.save(tmp_path)
  load_tokenizer(tmp_path, ours=True)
  load_tokenizer(tmp_path / "retriever", ours=True)
  shutil.rmtree(tmp_path / "retriever")
  with pytest.raises(ValueError, match=r"retriever/manifest\.json is missing"):
    load_tokenizer(tmp_path, ours=True)


def test_a_tokenizer_without_a_manifest_is_warned_of(
  tokenizer, tmp_path, caplog
):
  tokenizer.save(tmp_path)
  (tmp_path / "manifest.json").write_text('{"of": "somebody else"}')
  load_tokenizer(tmp_path)
  with pytest.raises(ValueError, match="is no manifest"):
    load_tokenizer(tmp_path, ours=True)
  (tmp_path / "manifest.json").unlink()
  load_tokenizer(tmp_path)
  assert not caplog.records
  load_tokenizer(tmp_path, ours=True)
  assert "has no manifest.json: an older version" in caplog.text


@pytest.mark.parametrize("num_bytes", [100, 20_000])
def test_a_full_disk_is_called_that(tokenizer, tmp_path, num_bytes):
  with (
    full_disk(num_bytes),
    pytest.raises(UnwritableError, match=f"tokenizer .* to {tmp_path} .*ree"),
  ):
    tokenizer.save(tmp_path)
  assert os.listdir(tmp_path) == []
