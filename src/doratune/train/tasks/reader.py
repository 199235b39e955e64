"""From rows of documents, prompts and chats to tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from doratune.train import tokens
from doratune.train.chats import SYSTEM_COLUMNS, asked, short, system_of
from doratune.train.columns import described, half_of, roles_of_text
from doratune.train.config import TrainConfig
from doratune.train.gather import BadRow, Say, lacks, rows
from doratune.train.prompt_template import fields_of, filled
from doratune.train.sources import Row, columns_of
from doratune.train.tokens import Tokens


class Reader:
    """Makes tokens of rows, once the names of their columns have shown what kind of rows they are."""

    def __init__(self, config: TrainConfig, tokenizer: Any, say: Say) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.without_tools = 0
        """Chats with functions that the chat template does not write."""
        self.run_together, self.such_as = 0, ""
        """Prompts whose last word runs into the completion's first, and one of them."""
        names, where = columns_of(config.data, config.split, config.streaming)
        self.columns = roles_of_text(config, names or ["text"], where)
        if "messages" in self.columns or config.as_chat:
            tokens.require_template(tokenizer, config.model)
        if names and names != ["text"]:
            say(f"columns: {described(self.columns, config, names, self._used_beside())}")

    @cached_property
    def marked(self) -> str | None:
        """Chat template that marks what the assistant says."""
        return None if self.config.loss_on == "all" else tokens.marked_template(self.tokenizer)

    @property
    def documents(self) -> bool:
        """Whether rows are plain texts."""
        return "text" in self.columns

    def _used_beside(self) -> Sequence[str]:
        """Columns that are used besides those with a role."""
        if "messages" in self.columns:
            return ("tools", *SYSTEM_COLUMNS)
        return fields_of(self.config.prompt_template) if self.config.prompt_template else ()

    def rows(self, names: Sequence[str], split: str) -> Iterator[Row]:
        """Rows of these sources."""
        return rows(names, split, self.config.streaming)

    def use(self, row: Row) -> Tokens:
        """The tokens of a row.

        Raises:
            BadRow: if it has none to learn.
        """
        config, tokenizer = self.config, self.tokenizer
        if problem := lacks(row.values, self.columns.values()):
            raise BadRow(problem)
        if problem := half_of(self.columns, row.values, config):  # its names may not have been looked at
            raise BadRow(problem)
        values = {role: row.values[name] for role, name in self.columns.items()}
        learn_all = config.loss_on == "all"
        if "text" in values:
            return tokens.document(values["text"], tokenizer)
        if "messages" in values:
            return self._chat(values["messages"], row)
        prompt = filled(config.prompt_template, row.values) if config.prompt_template else values["prompt"]
        if isinstance(prompt, list | tuple):  # TRL's form: messages, and messages that follow
            answer = values["completion"]
            if not isinstance(answer, list | tuple):
                raise BadRow(f"completion: expected messages, as the prompt has, found {short(answer)}")
            return self._chat([*asked(prompt), *answer], row)
        if config.as_chat:
            turns = [("user", tokens.string(prompt, "prompt")), ("assistant", values["completion"])]
            return tokens.chat([{"role": r, "content": c} for r, c in turns], tokenizer, learn_all, self.marked)
        example = tokens.completion(prompt, values["completion"], tokenizer, learn_all)
        if (prompt[-1].isalnum() or prompt[-1] in ".!?") and values["completion"][0].isalnum():
            self.run_together += 1
            self.such_as = self.such_as or prompt[-20:] + values["completion"][:20]
        return example

    def _chat(self, messages: Any, row: Row) -> Tokens:
        tokens.require_template(self.tokenizer, self.config.model)
        tools = row.values.get("tools")
        if tools and "tools" not in (self.marked or self.tokenizer.chat_template):
            self.without_tools += 1
        learn_all, system = self.config.loss_on == "all", system_of(row.values)
        return tokens.chat(messages, self.tokenizer, learn_all, self.marked, tools, system)

    def tell(self, say: Say) -> None:
        """What is likely not meant about the rows that were read, though they can be used."""
        if self.run_together:
            say(
                f"{self.run_together:,} prompts run into their completions, such as {self.such_as!r}: nothing is put "
                "between them; --as-chat makes chats of them, --prompt-template a prompt that ends as you want"
            )
        if self.without_tools:
            say(
                f"{self.without_tools:,} chats have a column 'tools', which the model's chat template does not write: "
                "the model learns without knowing these functions"
            )
