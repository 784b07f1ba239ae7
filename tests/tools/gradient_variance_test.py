"""tools/gradient_variance.py as a person runs it."""

from processes import run_tool
import pytest


def table(text):
  rows = [line.split("|")[1:-1] for line in text.splitlines()[2:]]
  return {name.strip(): list(map(float, rest)) for name, *rest in rows}


def test_a_sum_over_documents_has_no_variance_of_its_own(learned):
  done = run_tool(
    "gradient_variance.py", f"--workdir={learned.workdir}", "--batches=3",
    "--draws=4", "--retriever_losses=reward,reward_sampled", optimized=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = table(done.stdout)
  assert list(found) == ["reward", "reward_sampled"]
  _, within, whole, seconds = found["reward"]
  assert within == 0  # this model has no dropout
  assert 0 < whole < found["reward_sampled"][2]
  assert found["reward_sampled"][1] > 0
  assert seconds > 0


@pytest.mark.parametrize(("flag", "message"), [
  ("--retriever_losses=adist", "Set loss='fid'"),
  ("--retriever_losses=rewards", "Did you mean 'reward'?"),
  ("--draws=1", "draws"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(learned, flag, message):
  done = run_tool("gradient_variance.py", f"--workdir={learned.workdir}", flag)
  assert done.returncode != 0
  assert message in done.stderr
  assert "Traceback" not in done.stderr
