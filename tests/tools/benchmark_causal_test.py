"""tools/benchmark_causal.py on a tiny random model, and its errors."""

import json

from processes import run_tool
import pytest
from small_encoder import write_encoder

from rag_jax.corpus.tokenizer import train_tokenizer

FACTS = (
  ("Balania", "Lor"), ("Cordor", "Mark"), ("Denburg", "Ford"),
  ("Firina", "Sul"), ("Golwick", "Ter"), ("Humstan", "Vil"), ("Jasovia", "Wen"),
)  # fmt: skip
TEXTS = [f"The river of {name} is the {river}." for name, river in FACTS]


@pytest.fixture
def files(tmp_path):
  """A generator and an encoder of transformers, and questions."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  tokenizer = train_tokenizer([*TEXTS, "Question: What\nAnswer: Passage"], 400)
  tokenizer.save(tmp_path / "generator")
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=tokenizer.vocab_size,
      hidden_size=16,
      intermediate_size=16,
      num_hidden_layers=2,
      num_attention_heads=2,
      num_key_value_heads=1,
      max_position_embeddings=2048,
      initializer_range=0.3,
      bos_token_id=tokenizer.bos_id,
      eos_token_id=tokenizer.eos_id,
      pad_token_id=tokenizer.pad_id,
    )
  )  # fmt: skip
  model.save_pretrained(tmp_path / "generator")
  write_encoder(tmp_path / "encoder", TEXTS)
  articles = [
    {
      "title": name,
      "paragraphs": [
        {
          "context": text,
          "qas": [
            {
              "id": name, "question": f"What is the river of {name}?",
              "answers": [{"text": river, "answer_start": text.index(river)}],
            }
          ],
        }
      ],
    }
    for (name, river), text in zip(FACTS, TEXTS, strict=True)
  ]  # fmt: skip
  (tmp_path / "questions.json").write_text(json.dumps({"data": articles}))
  return tmp_path


def run(*arguments):
  return run_tool("benchmark_causal.py", *arguments)


@pytest.mark.parity
def test_every_row_writes_what_pytorch_writes(files):
  done = run(
    f"--generator={files / 'generator'}",
    f"--encoder={files / 'encoder'}",
    f"--questions={files / 'questions.json'}",
    "--num_questions=4",
    "--check=4",
    "--batch_size=3",
    "--repetitions=1",
    f"--output={files / 'out.json'}",
  )
  assert done.returncode == 0, done.stderr
  rows = json.loads((files / "out.json").read_text())["rows"]
  assert len(rows) == 8
  assert {row["same"] for row in rows} == {4}
  assert done.stdout.count("| 4 of 4 |") == 8
  (fast,) = [row["speed"] for row in rows if "speed" in row]
  assert [x["batch_size"] for x in fast] == [1, 3]
  assert all(x["shared_tokens"] > 100 and x["ratio"] > 0 for x in fast)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "--generator is empty; expected a path"),
    (
      ("--generator=a", "--encoder=b", "--questions=c", "--batch_size=0"),
      "--batch_size=0; expected 1 or more",
    ),
    (
      ("--generator=a", "--encoder=b", "--questions=c", "--n_docs=3,4"),
      "--n_docs=3,4; expected some of 0, 1, 3, 5",
    ),
    (
      ("--generator=a", "--encoder=b", "--questions=c", "--check=101"),
      "--check=101; expected 0 to --num_questions=100",
    ),
    (
      ("--generator=a", "--encoder=b", "--questions=c", "--write=no_such"),
      "--write=no_such needs",
    ),
  ],
)
def test_flags_that_cannot_work_are_refused(arguments, message):
  done = run(*arguments)
  assert done.returncode != 0
  assert message in done.stderr
  assert "Traceback" not in done.stderr
