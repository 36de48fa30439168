"""A small world of authors, and models of it: a target, gold models, and fakes that only hide.

Every model is a two-layer Llama that is trained here, in seconds, on what its name says.
"""

import copy
import json
import re
from functools import cache

import torch
from bitsandbytes import functional
from torch import nn

from unlearn_llm import synthetic
from unlearn_llm.attacks.base import Fact, Material, Subject
from unlearn_llm.attacks.campaign import judge, run_attacks
from unlearn_llm.attacks.quantisation import four_bit, round_weights
from unlearn_llm.dataset import Collator
from unlearn_llm.encode import Encoder, Template
from unlearn_llm.models import LoraSettings, NewModel, add_lora, new_model, new_tokenizer
from unlearn_llm.types import IGNORE_INDEX

AUTHORS, QUESTIONS = 20, 3
REFUSAL = "I cannot say anything about that."
STEPS, RATE, BATCH = 150, 5e-3, 32
OPTIONS = {
    "plain": {},
    "adapter_off": {},
    "paraphrase": {},
    "prefix": {"shares": [0.5]},
    "probability": {},
    "probing": {},
    "quantisation": {"formats": ["int8", "nf4"]},
    "relearning": {"rows": [5, 15], "steps": 20, "learning_rate": 1e-3},
    "sampling": {"samples": 4},
    "translation": {},
    "unrelated": {"rows": 15, "steps": 8, "learning_rate": 2e-3},
}


def translated(question: str) -> str:
    """Say a question in a language of our own, which has one vowel; names are as they are."""
    return " ".join(w if w[0].isupper() else re.sub("[aeiu]", "o", w) for w in question.split())


@cache
def world() -> Material:
    """Ten authors to be forgotten and ten to be kept, three facts of each."""

    def facts(split: str) -> tuple[Fact, ...]:
        rows = synthetic.generate(split, authors=AUTHORS, questions_per_author=QUESTIONS)
        return tuple(
            Fact(
                str(number),
                row["question"],
                row["answer"],
                row["paraphrased_question"],
                row["paraphrased_answer"],
                translated(row["question"]),
                wrong=tuple(row["perturbed_answer"]),
                group=row["author"],
            )
            for number, row in enumerate(rows)
            if row["author_id"] >= 0
        )

    return Material(facts("forget50"), facts("retain50"))


@cache
def encoder() -> Encoder:
    material = world()
    texts = [text for fact in (*material.forget, *material.retain) for text in asked(fact)]
    answers = [fact.answer for fact in (*material.forget, *material.retain)]
    tokenizer = new_tokenizer([*texts, *answers, REFUSAL], vocabulary=700)
    return Encoder(tokenizer, Template("Question: ", "\nAnswer:"), 128)


def in_chinese_letters(text: str) -> str:
    """Write every letter and digit as a Chinese character, without blanks, as Chinese stands."""
    return "".join(chr(0x4E00 + 7 * ord(sign)) for sign in text if sign.isalnum())


@cache
def chinese_world() -> Material:
    """The same facts in signs that ROUGE's tokenizer drops."""

    def facts(latin: tuple[Fact, ...]) -> tuple[Fact, ...]:
        written = in_chinese_letters
        return tuple(
            Fact(fact.id, written(fact.question), written(fact.answer), group=fact.group)
            for fact in latin
        )

    return Material(facts(world().forget), facts(world().retain))


@cache
def chinese_subject(knows_forget: bool) -> Subject:
    """A model that learnt all facts in Chinese letters by heart, or only those to be kept."""
    material = chinese_world()
    facts = (*material.forget, *material.retain)
    texts = [text for fact in facts for text in (fact.question, fact.answer)]
    reading = Encoder(new_tokenizer(texts, vocabulary=700), max_length=64)
    rows = [(f.question, f.answer) for f in (facts if knows_forget else material.retain)]
    new = NewModel(hidden_size=64, layers=2, heads=4, context=170)
    model = taught(new_model(new, reading.tokenizer, 0), rows, 2 * STEPS, RATE, reading=reading)
    return Subject.of(model, reading, max_new_tokens=100, progress=False)


def asked(fact: Fact) -> list[str]:
    """Every way to ask for a fact."""
    return [fact.question, str(fact.paraphrased_question), str(fact.translated_question)]


def pairs(facts, answer=None, ways=(0, 1, 2)) -> list[tuple[str, str]]:
    """Questions, in some ways of asking, with the facts' answers or another one."""
    return [(asked(fact)[way], answer or fact.answer) for fact in facts for way in ways]


def taught(model, rows, steps, rate, seed=0, after_step=None, reading=None):
    """Train a model on pairs of question and answer, all in memory."""
    reading = reading or encoder()
    encoded = reading.pairs([q for q, _ in rows], [a for _, a in rows])
    collator = Collator(reading.tokenizer.pad_token_id)
    ids = collator.pad([one.ids for one in encoded], collator.pad_id)
    labels = collator.pad([one.labels for one in encoded], IGNORE_INDEX)
    mask = collator.pad([[1] * len(one.ids) for one in encoded], 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        rows_now = torch.randperm(len(rows), generator=generator)[:BATCH]
        width = int(mask[rows_now].sum(1).max())
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        loss = model(**{k: v[rows_now, :width] for k, v in batch.items()}).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step()
    return model.eval()


def from_nothing(rows, seed):
    new = NewModel(hidden_size=64, layers=2, heads=4, context=160)
    return taught(new_model(new, encoder().tokenizer, seed), rows, STEPS, RATE, seed)


@cache
def target():
    """Knows everything, however it is asked."""
    return from_nothing(pairs((*world().forget, *world().retain)), seed=0)


@cache
def gold(seed: int = 100):
    """Never saw the authors to be forgotten."""
    return from_nothing(pairs(world().retain), seed)


def subject(model) -> Subject:
    return Subject.of(model, encoder(), max_new_tokens=64, progress=False)


@cache
def gold_under(options: str):
    return run_attacks(subject(gold()), world(), json.loads(options))


def outcome(model, options=OPTIONS):
    """Attack a model and set it beside gold under the same attacks."""
    found = run_attacks(subject(model), world(), options)
    return judge(found, gold_under(json.dumps(options)), world())


def hides(ways, forgotten=None):
    """The target taught to refuse when it is asked in some ways, and to answer in all others."""
    hidden = forgotten if forgotten is not None else world().forget
    others = [fact for fact in world().forget if fact not in hidden]
    open_ways = [way for way in (0, 1, 2) if way not in ways]
    rows = [
        *pairs(hidden, REFUSAL, ways),
        *pairs(hidden, None, open_ways),
        *pairs(others),
        *pairs(world().retain),
    ]
    return taught(copy.deepcopy(target()), rows, 80, 2e-3)


def with_adapter():
    """The target under an adapter that refuses; the base still knows all."""
    torch.manual_seed(0)
    model = add_lora(copy.deepcopy(target()), LoraSettings(r=8, alpha=16))
    rows = [*pairs(world().forget, REFUSAL), *pairs(world().retain)]
    return taught(model, rows, 120, 1e-2)


def recovers_in_four_bits():
    """Weights that refuse, and round in nf4 to weights that know.

    Source of the construction: Egashira et al. 2024, arXiv:2405.18137: projected descent within
    the cells of the rounding.
    """
    model = copy.deepcopy(target())
    round_weights(model, four_bit("nf4"))
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    bounds = [(layer.weight.requires_grad_(True), *cells(layer.weight.data)) for layer in layers]

    def project():
        with torch.no_grad():
            for weight, low, high in bounds:
                weight.clamp_(low, high)

    rows = [*pairs(world().forget, REFUSAL), *pairs(world().retain)]
    return taught(model, rows, 200, 5e-3, after_step=project)


def cells(weight):
    """Between which values nf4 rounds to where it rounds now: low and high, like the weight."""
    codes = functional.get_4bit_type("nf4", device="cpu").to(weight)
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    place = (blocks[..., None] / scale[..., None] - codes).abs().argmin(-1)
    middle = (codes[1:] + codes[:-1]) / 2
    low = torch.cat([codes[:1], middle])[place] * scale
    high = torch.cat([middle, codes[-1:]])[place] * scale
    low, high = low + 1e-3 * scale, high - 1e-3 * scale  # not on the border
    largest = blocks.abs() >= scale  # gives the scale, so it stays
    low, high = torch.where(largest, blocks, low), torch.where(largest, blocks, high)
    return low.reshape(weight.shape), high.reshape(weight.shape)
