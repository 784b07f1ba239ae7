"""Chats as a model was trained on them: its chat template.

In: messages. Out: token ids, by the template in the files of a tokenizer.
"""

from collections.abc import Mapping, Sequence

from etils import epath
import jinja2

from rag_jax.corpus.tokenizer import open_tokenizer

Message = Mapping[str, str]  # "role" and "content"


class Chat:
  """The chat template of a tokenizer."""

  def __init__(self, path: epath.PathLike):
    """Opens the tokenizer in directory `path`.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: it cannot be read, or has no chat template.
    """
    self._tokenizer = open_tokenizer(path)
    if not self._tokenizer.chat_template:
      raise ValueError(
        f"The tokenizer in {path} has no chat template; looked for"
        " chat_template.jinja, and for chat_template in tokenizer_config.json."
        " Expected that of a model trained on chats. Take such a model, or give"
        " this one plain text."
      )
    added = self._tokenizer.added_tokens_decoder.values()
    self._special = [token.content for token in added if token.special]

  def text(self, messages: Sequence[Message], *, answer: bool = True) -> str:
    """Returns the chat as one text.

    Args:
      messages: in turn; "role" is "user", "assistant" and often "system".
      answer: whether it ends with what the assistant's next answer follows.

    Raises:
      ValueError: a message has the text of a special token, with which it could
        pose as another message; or the template refuses the messages.
    """
    for message in messages:
      found = [x for x in self._special if x in message["content"]]
      if found:
        raise ValueError(
          f"The message {message['content'][:60]!r} has the special token"
          f" {found[0]!r}; expected text, which cannot pose as the end of a"
          " message. Remove it."
        )
    try:
      text = self._tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=answer,
      )
    except jinja2.TemplateError as error:
      roles = [message["role"] for message in messages]
      raise ValueError(
        f"The chat template refuses messages of the roles {roles} ({error})."
        " Expected those it was written for, mostly 'user' and 'assistant' in"
        " turn. Change the roles."
      ) from error
    return str(text)

  def ids(
    self, messages: Sequence[Message], *, answer: bool = True
  ) -> list[int]:
    """Returns the token ids of the chat; arguments and errors as in `text`."""
    text = self.text(messages, answer=answer)
    return list(self._tokenizer.encode(text, add_special_tokens=False))
