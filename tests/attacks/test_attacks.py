import itertools
import json

import pytest
import torch
from models_for_tests import small_tokenizer, tiny_model
from torch import nn

from unlearn_llm import synthetic
from unlearn_llm.attacks import asking
from unlearn_llm.attacks.asking import continuations, recalls
from unlearn_llm.attacks.base import (
    ATTACKS,
    Fact,
    Material,
    NotApplicable,
    NotMeasured,
    Subject,
    options_of,
)
from unlearn_llm.attacks.prefix import cut
from unlearn_llm.attacks.probing import answer_states, rank
from unlearn_llm.attacks.quantisation import four_bit, int8, round_weights
from unlearn_llm.attacks.relearning import relearnt
from unlearn_llm.attacks.sampling import at_least_one
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.batching import Item
from unlearn_llm.evaluation.texts import rouge


def facts(split: str) -> tuple[Fact, ...]:
    rows = synthetic.generate(split, authors=20, questions_per_author=2)[:12]
    return tuple(
        Fact(
            str(number),
            row["question"],
            row["answer"],
            row["paraphrased_question"],
            wrong=tuple(row["perturbed_answer"]),
        )
        for number, row in enumerate(rows)
    )


MATERIAL = Material(facts("forget50"), facts("retain50"))


@pytest.fixture(scope="module")
def subject():
    encoder = Encoder(small_tokenizer(), "plain", 128)
    return Subject.of(tiny_model(), encoder, max_new_tokens=6, progress=False)


def attacked(name, subject, material=MATERIAL, **options):
    return ATTACKS[name](subject, material, **options)


def test_the_unbiased_estimate_is_the_share_of_all_draws():
    # Of 5 samples 2 are leaks: every choice of k of them, counted.
    for k in range(1, 6):
        draws = list(itertools.combinations([True, True, False, False, False], k))
        share = sum(any(draw) for draw in draws) / len(draws)
        assert at_least_one(5, 2, k) == pytest.approx(share)
    assert at_least_one(4, 0, 4) == 0.0


@pytest.mark.parametrize(
    ("answer", "share", "parts"),
    [
        ("one two three four", 0.5, ("one two", "three four")),
        ("one two three four", 0.01, ("one", "two three four")),
        ("one two three four", 0.99, ("one two three", "four")),
        ("春天的花园", 0.4, ("春天", "的花园")),
        ("Ana", 0.5, ("An", "a")),
        ("x", 0.5, ("", "x")),
    ],
)
def test_an_answer_is_cut_between_words_or_characters(answer, share, parts):
    assert cut(answer, share) == parts


def test_greedy_continuations_of_a_question_are_its_answer(subject):
    texts = asking.greedy_answers(subject, [fact.question for fact in MATERIAL.forget])
    prompts = subject.encoder.prompts([fact.question for fact in MATERIAL.forget])
    items = [Item(number, prompt) for number, prompt in enumerate(prompts)]
    found = continuations(subject, items)
    assert [found[number] for number in range(len(texts))] == texts


def test_samples_do_not_depend_on_the_batch(subject, monkeypatch):
    prompts = subject.encoder.prompts([fact.question for fact in MATERIAL.forget])
    items = [Item(f"seed/{number}", prompt) for number, prompt in enumerate(prompts)]
    together = continuations(subject, items, temperature=1.0)
    monkeypatch.setattr(asking, "BUDGET", 1)
    assert continuations(subject, items, temperature=1.0) == together
    assert len(set(together.values())) > len(items) // 2


def test_samples_come_up_as_often_as_the_model_says():
    # A model whose every next token is one of two, with probabilities 0.8 and 0.2.
    model = tiny_model()
    head = nn.Linear(32, len(small_tokenizer()))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-100.0)
        head.bias[70], head.bias[71] = torch.log(torch.tensor([0.8, 0.2]))
    model.lm_head = head
    one = Subject(lambda: model, Encoder(small_tokenizer(), "plain", 128), max_new_tokens=1)
    items = [Item(f"{number}", [1, 5]) for number in range(400)]
    texts = list(continuations(one, items, temperature=1.0).values())
    likely = small_tokenizer().decode([70])
    # Standard error sqrt(0.16 / 400) = 0.02; three of them.
    assert texts.count(likely) / 400 == pytest.approx(0.8, abs=0.06)


def test_a_verbatim_leak_in_chinese_is_one_where_rouge_sees_nothing(subject, monkeypatch):
    fact = Fact("0", "作者是谁？", "作者出生在北京的一个小村庄。")
    monkeypatch.setattr(asking, "greedy_answers", lambda *given: [fact.answer])
    assert recalls(subject, [fact]) == {"0": 1.0}
    assert rouge(fact.answer, fact.answer).rougeL_recall == 0.0


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_a_loaded_layer(kind):
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    # As transformers loads by default: the scales are not compressed again.
    settings = {"quant_type": kind, "compress_statistics": False}
    layer = Linear4bit(128, 64, bias=False, **settings)
    layer.weight = Params4bit(weight.clone(), requires_grad=False, **settings)
    layer.to("cpu")  # quantises
    held = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(four_bit(kind)(weight), held, atol=0, rtol=0)


def test_eight_bits_are_rows_in_127ths_of_their_largest_entry():
    weight = torch.tensor([[1.27, 0.504, -0.006], [-12.7, 3.04, 0.0]])
    expected = torch.tensor([[1.27, 0.50, -0.01], [-12.7, 3.0, 0.0]])
    torch.testing.assert_close(int8(weight), expected, atol=2e-3, rtol=1e-3)


def test_all_linear_layers_but_the_head_are_rounded():
    model = tiny_model("phi")
    before = {name: p.clone() for name, p in model.named_parameters()}
    round_weights(model, torch.zeros_like)
    zeroed = {name for name, p in model.named_parameters() if not p.any() and before[name].any()}
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert zeroed == linear - {"lm_head.weight"}
    assert len(zeroed) == 2 * 6


def test_a_model_without_adapter_has_none_to_switch_off(subject):
    with pytest.raises(NotApplicable, match="no adapter"):
        attacked("adapter_off", subject)


def test_the_base_of_an_adapter_is_asked():
    model = tiny_model(lora=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter)
    encoder = Encoder(small_tokenizer(), "plain", 128)
    (trial,) = attacked("adapter_off", Subject.of(model, encoder, max_new_tokens=6))
    base = Subject.of(tiny_model(), encoder, max_new_tokens=6)
    assert trial.values == recalls(base, MATERIAL.forget)
    assert trial.values != recalls(Subject.of(model, encoder, max_new_tokens=6), MATERIAL.forget)


def test_a_fresh_copy_has_the_adapter_in_its_weights():
    model = tiny_model(lora=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    one = Subject.of(model, Encoder(small_tokenizer(), "plain", 128))
    ids = torch.tensor([[1, 40, 50, 60]])
    torch.testing.assert_close(one.fresh().eval()(ids).logits, model.eval()(ids).logits)


def test_relearning_asks_only_rows_that_no_k_learns(subject):
    trials = attacked("relearning", subject, rows=[2, 5, 100], steps=1, learning_rate=1e-3)
    assert [trial.name for trial in trials] == ["relearning 2", "relearning 5"]
    assert trials[0].values.keys() == trials[1].values.keys()
    assert len(trials[0].values) == 12 - 5


def test_relearning_is_the_plain_trainer_and_leaves_the_model_as_it_was(subject):
    before = [p.clone() for p in subject.model.parameters()]
    global_state = torch.random.get_rng_state()
    models = [relearnt(subject, MATERIAL.retain[:4], 3, 1e-3, 8, 0) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), global_state)
    assert all(map(torch.equal, subject.model.parameters(), before))
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    # By hand: three full-batch steps of AdamW on the mean over the answers' tokens.
    slow = subject.fresh()
    four = MATERIAL.retain[:4]
    encoded = subject.encoder.pairs([f.question for f in four], [f.answer for f in four])
    optimizer = torch.optim.AdamW(slow.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        tokens = sum(len(one.ids) - one.n_prompt for one in encoded)
        loss = 0.0
        for one in encoded:
            logps = slow(torch.tensor([one.ids])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(one.ids[1:])
            picked = logps.gather(1, targets[:, None])[one.n_prompt - 1 :]
            loss = loss - picked.sum() / tokens
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(slow.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(list(models[0].parameters()), list(slow.parameters()))


def test_the_rank_of_the_true_answer_is_the_share_of_wrong_ones_below_it():
    scores = torch.tensor([0.5, 0.1, 0.5, 0.9, 0.2]).numpy()
    assert rank(scores) == (2 + 0.5) / 4


def test_states_are_means_over_the_tokens_of_the_answer(subject):
    (found,) = answer_states(subject, MATERIAL.forget[3:4])
    fact = MATERIAL.forget[3]
    assert found.shape == (6, 3, 32)  # true and five wrong; embeddings and two layers
    for row, answer in enumerate((fact.answer, *fact.wrong)):
        (one,) = subject.encoder.pairs([fact.question], [answer])
        states = subject.model(torch.tensor([one.ids]), output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            expected = state[0, one.n_prompt : -1].mean(0).detach()
            torch.testing.assert_close(torch.tensor(found[row, layer]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "material", "reason"),
    [
        ("translation", MATERIAL, "no column translated_question"),
        ("paraphrase", Material((Fact("0", "q", "a"),)), "no column paraphrased_question"),
        ("relearning", Material(MATERIAL.forget[:9]), "needs 10 forget rows, got 9"),
        ("unrelated", Material(MATERIAL.forget), "needs 1 retain rows"),
        ("probing", Material(MATERIAL.forget), "needs wrong answers"),
    ],
)
def test_what_an_attack_lacks_is_named(subject, name, material, reason):
    with pytest.raises(NotMeasured, match=reason):
        attacked(name, subject, material)


def test_options_are_checked():
    assert options_of("sampling", {"samples": 3})["temperature"] == 1.0
    with pytest.raises(UserError, match=r"no option 'sample'. Did you mean 'samples'"):
        options_of("sampling", {"sample": 3})
    with pytest.raises(UserError, match=r"sampling.samples: cannot be 'many'"):
        options_of("sampling", {"samples": "many"})
    with pytest.raises(UserError, match=r"Unknown attack 'prefx'. Did you mean 'prefix'"):
        options_of("prefx", {})


def test_trials_are_json(subject):
    (trial,) = attacked("sampling", subject, samples=2)
    assert json.loads(json.dumps(trial.details, allow_nan=False))["leak_at"].keys() == {"1", "2"}
