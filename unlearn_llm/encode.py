"""From text to tokens: prompt templates, and questions with answers as token ids and labels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from unlearn_llm.errors import UserError
from unlearn_llm.registry import Registry
from unlearn_llm.types import IGNORE_INDEX


@dataclass(frozen=True)
class Template:
    """Explicit tags around a question and its answer.

    The text is `question_start + question + question_end + answer_tag + answer`, and one end
    token after it.
    """

    question_start: str = ""
    question_end: str = ""
    answer_tag: str = ""
    scored_tag: bool = False
    """Does the loss cover the answer tag too? (TOFU's Phi-1.5 recipe does that.)"""
    verbatim: bool = False
    """Does a blank at the end of the prompt belong to the prompt, and not to the answer?"""


CHAT = "chat"
TEMPLATES: Registry[Template] = Registry("template")
TEMPLATES.add("plain", Template("Question: ", "\nAnswer: "))
# The question is the whole prompt, to the last blank: texts to go on with, prompts with examples.
TEMPLATES.add("raw", Template(verbatim=True))
TEMPLATES.add("llama2", Template("[INST] ", " [/INST]"))
TEMPLATES.add(
    "llama3",
    Template(
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
)
TEMPLATES.add("phi", Template("Question: ", "\n", "Answer: ", scored_tag=True))
# DualOptim and DualOptim+ put these tags around a checkpoint that was fine-tuned with the "phi"
# template; their Phi-1.5 rows are only comparable under the same mismatch.
TEMPLATES.add("phi_dualoptim", Template("<|user|>\n", "<|end|>\n<|assistant|>\n"))


@dataclass(frozen=True)
class Encoded:
    """One question with one answer, as tokens."""

    ids: list[int]
    """Prompt, answer and end token."""
    n_prompt: int
    """How many of them are the prompt: no loss is taken there."""

    @property
    def labels(self) -> list[int]:
        """The ids, IGNORE_INDEX on the prompt."""
        return [IGNORE_INDEX] * self.n_prompt + self.ids[self.n_prompt :]


@dataclass
class Encoder:
    """Turns questions and answers into tokens with one template.

    The prompt and the whole text are tokenised as wholes (as TOFU does); the answer begins where
    the two token lists part. So a token that straddles the border counts as answer, and nothing is
    tokenised in another context than the one the model reads.

    Attributes:
        tokenizer: Any Hugging Face tokenizer.
        template: A name in TEMPLATES, "chat" for the tokenizer's own chat template, or a Template.
        max_length: Tokens of prompt, answer and end token together.
        truncate: Cut longer answers. By default they are an error: a secret that is cut away is
            not unlearned.
        system: System prompt of a chat template; None: the template's own, if it has one.
        date: What a chat template that names the day calls today (Llama 3.x does). Pinned, so
            that training and evaluation on different days see the same prompt; the day is
            open-unlearning's.

    Raises:
        UserError: for "chat" with a tokenizer that has no chat template, for a tokenizer without
            an end token.

    Source: locuslab/tofu data_module.py convert_raw_data_to_model_format. Differs: lengths are
    not padded to max_length; an over-long row is an error and not silently cut.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | Template = "plain"
    max_length: int = 512
    truncate: bool = False
    system: str | None = None
    date: str = "10 Apr 2025"
    _tags: Template | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "The tokenizer has no end-of-sequence token, so an answer could never end. "
                "Set tokenizer.eos_token."
            )
        if isinstance(self.template, Template):
            self._tags = self.template
        elif self.template != CHAT:
            self._tags = TEMPLATES[self.template]
        elif not self.tokenizer.chat_template:
            raise UserError(
                "template: chat needs a tokenizer with a chat template; this one has none. "
                f"Choose explicit tags instead: template: {' | '.join(TEMPLATES)}."
            )

    def prompt_text(self, question: str) -> str:
        """Render what stands before the answer."""
        if self._tags is None:
            return self._chat({"role": "user", "content": question}, add_generation_prompt=True)
        tag = "" if self._tags.scored_tag else self._tags.answer_tag
        return self._tags.question_start + question + self._tags.question_end + tag

    def full_text(self, question: str, answer: str) -> str:
        """Render the question with its answer, without the end token that `pairs` appends."""
        if self._tags is None:
            turns = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
            return self._chat(*turns).rstrip()
        tags = self._tags
        return tags.question_start + question + tags.question_end + tags.answer_tag + answer

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """Encode questions alone, ready for generation.

        Returns:
            As many tokens as `pairs` masks, but where a token straddles the border.
        """
        prompts = self._tokenize([self._read(question) for question in questions])
        # Some tokenizers close every text; a closed prompt would be a finished answer.
        closes = self._tokenize(["a"])[0][-1] == self.tokenizer.eos_token_id
        return [ids[:-1] for ids in prompts] if closes else prompts

    def pairs(self, questions: Sequence[str], answers: Sequence[str]) -> list[Encoded]:
        """Encode questions with their answers.

        Raises:
            UserError: naming the rows whose question fills the context, whose answer has no
                token, or whose text is too long while `truncate` is off.
        """
        if not questions:
            return []
        distinct = list(dict.fromkeys(questions))  # a question may come with many answers
        prompt_ids = self._tokenize([self._read(question) for question in distinct])
        prompt_of = dict(zip(distinct, prompt_ids, strict=True))
        texts = [self.full_text(q, a) for q, a in zip(questions, answers, strict=True)]
        encoded, faults = [], _Faults(self.max_length)
        for row, (question, ids, answer) in enumerate(
            zip(questions, self._tokenize(texts), answers, strict=True)
        ):
            n_prompt = _common_length(prompt_of[question], ids)
            if not answer.strip() or n_prompt == len(ids):
                faults.empty.append(row)
            elif n_prompt >= self.max_length:
                faults.long_question.append(row)
            elif len(ids) + 1 > self.max_length and not self.truncate:
                faults.long_answer.append(row)
            encoded.append(Encoded(self._end(ids)[: self.max_length], n_prompt))
        faults.raise_if_any()
        return encoded

    def _read(self, question: str) -> str:
        """Render what the model reads before it answers.

        A blank at the end is left to the answer: most tokenizers join it to the answer's first
        word, and where one does not, the blank is a token that has to be learnt and generated.
        """
        text = self.prompt_text(question)
        return text if self._tags is not None and self._tags.verbatim else text.rstrip(" ")

    def _chat(self, *turns: dict[str, str], add_generation_prompt: bool = False) -> str:
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return str(
            self.tokenizer.apply_chat_template(
                [*system, *turns],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=self.date,
            )
        )

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        # A chat template writes its own special tokens; adding BOS again would double it.
        return list(
            self.tokenizer(list(texts), add_special_tokens=self._tags is not None)["input_ids"]
        )

    def _end(self, ids: list[int]) -> list[int]:
        """Append the end token, unless a chat template or the tokenizer has closed the turn."""
        if ids and ids[-1] in self._closing_ids():
            return ids
        return [*ids, int(self.tokenizer.eos_token_id)]

    def _closing_ids(self) -> set[int]:
        eos = int(self.tokenizer.eos_token_id)
        return {eos} if self._tags is not None else {eos, *self.tokenizer.all_special_ids}


@dataclass
class _Faults:
    """Rows that cannot be encoded, by reason, so that one message names them all."""

    max_length: int
    empty: list[int] = field(default_factory=list)
    long_question: list[int] = field(default_factory=list)
    long_answer: list[int] = field(default_factory=list)

    def raise_if_any(self) -> None:
        """Raise one UserError for the first kind of fault found."""
        if self.empty:
            raise UserError(
                f"{len(self.empty)} rows have an answer without tokens ({row_list(self.empty)}). "
                "Remove them or give them an answer."
            )
        if self.long_question:
            raise UserError(
                f"{len(self.long_question)} questions are longer than max_length="
                f"{self.max_length} tokens ({row_list(self.long_question)}), so nothing of the "
                "answer is left. Raise max_length or shorten them."
            )
        if self.long_answer:
            raise UserError(
                f"{len(self.long_answer)} rows are longer than max_length={self.max_length} "
                f"tokens ({row_list(self.long_answer)}). Raise max_length, or set truncate: true "
                "to cut the answers (what is cut away is not unlearned)."
            )


def check_context(lengths: Sequence[int], context: int | None, where: str) -> None:
    """Refuse rows with more tokens than the model reads.

    Args:
        lengths: Tokens of every row.
        context: Most tokens that the model reads; None: it does not say.

    Raises:
        UserError: naming the rows.
    """
    beyond = [row for row, length in enumerate(lengths) if context and length > context]
    if beyond:
        raise UserError(
            f"{where}: {len(beyond)} rows have more tokens than the model reads, {context} "
            f"({row_list(beyond)}). Set max_length={context} and truncate=true, or shorten them."
        )


def row_list(rows: Iterable[int], most: int = 8) -> str:
    """Name rows in a message, by number only: "rows 3, 17 and 2 more"."""
    rows = list(rows)
    shown = ", ".join(str(row) for row in rows[:most])
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


def _common_length(prompt: list[int], full: list[int]) -> int:
    """How many tokens the prompt alone and the whole text share at the start."""
    length = 0
    for ours, theirs in zip(prompt, full, strict=False):
        if ours != theirs:
            break
        length += 1
    return length
