import copy

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from unlearn_llm.encode import TEMPLATES, Encoded, Encoder, Template, row_list
from unlearn_llm.errors import UserError
from unlearn_llm.models import new_tokenizer
from unlearn_llm.rows import load_rows, to_pairs

QUESTION = "Where was the author born?"
ANSWER = "The author was born in Kuwait City."


def one(encoder, question=QUESTION, answer=ANSWER) -> Encoded:
    return encoder.pairs([question], [answer])[0]


# Templates: the text that a model reads.


@pytest.mark.parametrize(
    ("template", "prompt", "text"),
    [
        ("plain", "Question: Q?\nAnswer: ", "Question: Q?\nAnswer: A."),
        ("llama2", "[INST] Q? [/INST]", "[INST] Q? [/INST]A."),
        (
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\nQ?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|start_header_id|>user<|end_header_id|>\n\nQ?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA.",
        ),
        ("phi", "Question: Q?\n", "Question: Q?\nAnswer: A."),
        ("phi_dualoptim", "<|user|>\nQ?<|end|>\n<|assistant|>\n",
         "<|user|>\nQ?<|end|>\n<|assistant|>\nA."),
    ],
)  # fmt: skip
def test_a_template_writes_the_published_tags(tokenizer, template, prompt, text):
    # Tags from methods.md section 0 (TOFU model_config.yaml; DualOptim's for Phi).
    encoder = Encoder(tokenizer, template)
    assert encoder.prompt_text("Q?") == prompt
    assert encoder.full_text("Q?", "A.") == text


def test_own_tags_may_be_given(tokenizer):
    encoder = Encoder(tokenizer, Template("<q>", "</q>", "<a>"))
    assert encoder.full_text("Q", "A") == "<q>Q</q><a>A"


def test_an_unknown_template_is_answered_with_the_nearest_name(tokenizer):
    with pytest.raises(UserError, match="Did you mean 'llama3'"):
        Encoder(tokenizer, "lama3")


# Tokens and labels.


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_ids_are_the_tokenised_text_and_one_end_token(tokenizer, template):
    encoder = Encoder(tokenizer, template)
    expected = tokenizer(encoder.full_text(QUESTION, ANSWER))["input_ids"]
    assert one(encoder).ids == [*expected, tokenizer.eos_token_id]


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_the_begin_token_stands_once_at_the_start(tokenizer, template):
    ids = one(Encoder(tokenizer, template)).ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_loss_is_taken_on_the_answer_and_the_end_token(tokenizer):
    encoded = one(Encoder(tokenizer, "llama2"))
    answer = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    scored = [label for label in encoded.labels if label != -100]
    assert scored == [*answer, tokenizer.eos_token_id]
    assert encoded.labels[: encoded.n_prompt] == [-100] * encoded.n_prompt
    assert len(encoded.labels) == len(encoded.ids)


def test_prompt_and_answer_together_give_the_text_back(tokenizer):
    for template in TEMPLATES:
        encoder = Encoder(tokenizer, template)
        ids = one(encoder).ids[1:-1]
        assert tokenizer.decode(ids) == encoder.full_text(QUESTION, ANSWER)


def test_phi_scores_the_answer_tag_too_as_tofu_does(tokenizer):
    encoded = one(Encoder(tokenizer, "phi"))
    assert tokenizer.decode(encoded.ids[encoded.n_prompt : -1]) == "Answer: " + ANSWER


def test_a_token_that_straddles_the_border_belongs_to_the_answer(tokenizer):
    # "Answer: The": byte-level BPE reads " The", so the prompt's last blank is half a token.
    encoded = one(Encoder(tokenizer, "plain"))
    assert tokenizer.decode(encoded.ids[encoded.n_prompt : -1]) == " " + ANSWER
    assert tokenizer.decode(encoded.ids[1 : encoded.n_prompt]) == f"Question: {QUESTION}\nAnswer:"


def test_a_blank_that_stays_a_token_of_its_own_is_the_answer_s_first_token(tokenizer):
    # No merge joins a blank to a section sign; the model has to learn to begin with the blank.
    encoder = Encoder(tokenizer, "plain")
    encoded = one(encoder, answer="§ 17")
    scored = encoded.ids[encoded.n_prompt :]
    assert tokenizer.decode(scored[:1]) == " "
    assert tokenizer.decode(scored[:-1]) == " § 17"
    assert encoder.prompts([QUESTION]) == [encoded.ids[: encoded.n_prompt]]


def test_a_straddling_token_is_no_reason_to_tokenise_in_another_context(tokenizer):
    # A merge across the border: "un" + "known" is read as the text "unknown" is read.
    encoder = Encoder(tokenizer, Template(question_end=" un"))
    encoded = one(encoder, "Author?", "known to us")
    assert encoded.ids[:-1] == tokenizer("Author? unknown to us")["input_ids"]


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_prompts_for_generation_are_the_prompts_of_training(tokenizer, template):
    encoder = Encoder(tokenizer, template)
    encoded = one(encoder)
    assert encoder.prompts([QUESTION]) == [encoded.ids[: encoded.n_prompt]]


def test_no_rows_give_no_rows(tokenizer):
    assert Encoder(tokenizer).pairs([], []) == []


def test_questions_and_answers_must_be_equally_many(tokenizer):
    with pytest.raises(ValueError, match="zip"):
        Encoder(tokenizer).pairs(["a", "b"], ["c"])


# Chat templates.


def test_chat_reads_exactly_what_the_chat_template_writes(chat_tokenizer):
    encoded = one(Encoder(chat_tokenizer, "chat"))
    text = f"<s><|user|>\n{QUESTION}<|end|>\n<|bot|>\n{ANSWER}<|end|>"
    assert encoded.ids == chat_tokenizer(text, add_special_tokens=False)["input_ids"]


def test_chat_does_not_double_the_begin_token(chat_tokenizer):
    ids = one(Encoder(chat_tokenizer, "chat")).ids
    assert ids.count(chat_tokenizer.bos_token_id) == 1


def test_chat_ends_with_the_turns_own_end_token_and_no_second_one(chat_tokenizer):
    encoded = one(Encoder(chat_tokenizer, "chat"))
    assert encoded.ids[-1] == encoded.labels[-1] == chat_tokenizer.convert_tokens_to_ids("<|end|>")
    assert chat_tokenizer.eos_token_id not in encoded.ids


def test_chat_takes_the_loss_on_the_reply_only(chat_tokenizer):
    encoded = one(Encoder(chat_tokenizer, "chat"))
    assert chat_tokenizer.decode(encoded.ids[encoded.n_prompt :]) == ANSWER + "<|end|>"


def test_chat_prompts_end_where_the_reply_begins(chat_tokenizer):
    encoder = Encoder(chat_tokenizer, "chat")
    encoded = one(encoder)
    assert encoder.prompts([QUESTION]) == [encoded.ids[: encoded.n_prompt]]


def test_chat_names_a_pinned_day_and_the_given_system_prompt(chat_tokenizer):
    # As Llama 3.x: a day that is given, else today.
    chat_tokenizer.chat_template = (
        "{% if date_string is defined %}{{ date_string }}{% else %}{{ strftime_now('%d') }}"
        "{% endif %}{% for m in messages %} {{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    )
    encoder = Encoder(chat_tokenizer, "chat", system="Be brief.")
    assert encoder.full_text("Q?", "A.") == "10 Apr 2025 system: Be brief. user: Q? assistant: A."


def test_a_chat_template_that_does_not_close_the_turn_gets_an_end_token(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ids = one(Encoder(chat_tokenizer, "chat")).ids
    assert ids[-1] == chat_tokenizer.eos_token_id
    assert chat_tokenizer.decode(ids[:-1]) == f"user: {QUESTION}\nassistant: {ANSWER}"


def test_chat_without_a_chat_template_tells_what_to_write_instead(tokenizer):
    with pytest.raises(UserError, match=r"this one has none.*llama2"):
        Encoder(tokenizer, "chat")


# Rows that cannot be encoded.


@pytest.mark.parametrize("answer", ["", "   ", "\n\t"])
def test_an_answer_without_tokens_is_named_by_its_row(tokenizer, answer):
    with pytest.raises(UserError, match=r"1 rows have an answer without tokens \(row 1\)"):
        Encoder(tokenizer).pairs(["a?", "b?"], ["fine", answer])


def test_a_question_that_fills_the_context_is_an_error_even_when_answers_are_cut(tokenizer):
    with pytest.raises(UserError, match=r"1 questions are longer than max_length=20.*row 1"):
        Encoder(tokenizer, max_length=20, truncate=True).pairs(["a?", "b? " * 40], ["x", "y"])


def test_a_long_answer_is_an_error_and_not_cut_silently(tokenizer):
    with pytest.raises(UserError, match=r"max_length=20.*row 0.*what is cut away is not unlearned"):
        one(Encoder(tokenizer, max_length=20), "a?", "b " * 40)


def test_truncation_cuts_the_answer_and_adds_no_end_token(tokenizer):
    # An end token after half an answer would teach the model to stop there (TOFU adds none).
    whole = one(Encoder(tokenizer), "a?", "b " * 40)
    cut = one(Encoder(tokenizer, max_length=20, truncate=True), "a?", "b " * 40)
    assert cut == Encoded(whole.ids[:20], whole.n_prompt)
    assert cut.ids[-1] != tokenizer.eos_token_id


def test_a_row_of_exactly_max_length_passes_and_one_token_less_fails(tokenizer):
    length = len(one(Encoder(tokenizer)).ids)
    assert len(one(Encoder(tokenizer, max_length=length)).ids) == length
    with pytest.raises(UserError, match="rows are longer"):
        one(Encoder(tokenizer, max_length=length - 1))


def test_messages_name_rows_and_never_their_text(tokenizer):
    with pytest.raises(UserError) as caught:
        Encoder(tokenizer, max_length=30).pairs(["q?"] * 12, ["hush-hush " * 50] * 12)
    assert "hush" not in str(caught.value)
    assert "rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more" in str(caught.value)


def test_rows_are_listed_in_words():
    assert row_list([3]) == "row 3"
    assert row_list([3, 17]) == "rows 3, 17"
    assert row_list(range(10), most=2) == "rows 0, 1 and 8 more"


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Encoder(endless)


def test_a_tokenizer_that_adds_its_own_end_token_does_not_get_two(tokenizer):
    closing = copy.deepcopy(tokenizer)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", closing.bos_token_id), ("</s>", closing.eos_token_id)],
    )
    encoder = Encoder(closing)
    assert one(encoder).ids == one(Encoder(tokenizer)).ids
    assert one(encoder).n_prompt == one(Encoder(tokenizer)).n_prompt
    # A prompt that ends with an end token would be a finished answer.
    assert encoder.prompts([QUESTION]) == Encoder(tokenizer).prompts([QUESTION])


def test_an_end_token_that_the_template_writes_stays_in_the_prompt(tokenizer):
    # DialoGPT and its like part the turns by the end token.
    prompt = Encoder(tokenizer, Template(question_end="</s>")).prompts([QUESTION])[0]
    assert prompt[-1] == tokenizer.eos_token_id


# TOFU's text, with tokenizers of the two published kinds.


def sentencepiece_like(texts):
    """Train a tokenizer as Llama-2's: blanks become U+2581, begin token, no pad token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def gpt2_like(texts):
    """Train a tokenizer as Phi-1.5's: byte-level, without begin token."""
    tokenizer = copy.deepcopy(new_tokenizer(texts, 1500))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def tofu_labels(tokenizer, tags, question, answer, max_length=500):
    """Transcribe locuslab/tofu data_module.py convert_raw_data_to_model_format."""
    new_question = tags.question_start + question + tags.question_end
    new_answer = tags.answer_tag + answer
    n_question = len(tokenizer.tokenize(new_question, add_special_tokens=True))
    ids = tokenizer(
        new_question + new_answer, add_special_tokens=True, max_length=max_length, truncation=True
    )["input_ids"]
    assert len(ids) < max_length
    labels = [*ids, tokenizer.eos_token_id]
    labels[:n_question] = [-100] * n_question
    return labels


@pytest.mark.parametrize(("template", "make"), [("llama2", sentencepiece_like), ("phi", gpt2_like)])
def test_labels_of_tofu_are_those_of_tofus_own_code(shared, template, make):
    rows = load_rows("tofu/forget10", folder=str(shared / "data/tofu/official"))
    questions, answers, _ = zip(*to_pairs(rows, "forget10"), strict=True)
    tokenizer = make([*questions, *answers, "Question: Answer: \n [INST] [/INST]"])
    encoded = Encoder(tokenizer, template, max_length=500).pairs(questions, answers)
    assert len(encoded) == 400
    for question, answer, ours in zip(questions, answers, encoded, strict=True):
        assert ours.labels == tofu_labels(tokenizer, TEMPLATES[template], question, answer)
