import pytest
import torch
from models_for_tests import make_trainer, small_tokenizer, synthetic_pairs, tiny_model

from unlearn_llm import alternates
from unlearn_llm.alternates import alternate_answers, write_pairs
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.pipeline import run_alternates
from unlearn_llm.recipe import Recipe
from unlearn_llm.rows import QA, load_rows, to_pairs

PAIRS = synthetic_pairs("forget10")[:3]


def sampled(**settings):
    encoder, model = Encoder(small_tokenizer(), "plain"), tiny_model()
    before = torch.get_rng_state()
    found = alternate_answers(model, encoder, PAIRS, max_new_tokens=8, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    return found


def test_an_alternate_is_fixed_by_seed_row_and_repeat():
    found = sampled(repeats=4)
    assert sampled(repeats=4, token_budget=1) == found  # one row at a time
    assert set(sampled(repeats=2)) <= set(found)
    assert not set(sampled(repeats=4, seed=1)) & set(found)
    assert len({pair.alternate for pair in found}) == len(found) == 12


def test_every_alternate_keeps_its_question_and_answer():
    found = sampled(repeats=2)
    assert [(pair.question, pair.answer) for pair in found] == [
        (pair.question, pair.answer) for pair in PAIRS for _ in range(2)
    ]


def test_empty_alternates_and_the_original_are_left_out(monkeypatch):
    texts = [["", PAIRS[0].answer], ["Other.", "Another."], ["", "A third."]]
    answer = lambda _, batch: [(i.key, texts[i.key.row][i.key.repeat]) for i in batch]  # noqa: E731
    monkeypatch.setattr(alternates._Sampler, "__call__", answer)
    found = sampled(repeats=2)
    assert [(pair.question, pair.alternate) for pair in found] == [
        (PAIRS[1].question, "Other."),
        (PAIRS[1].question, "Another."),
        (PAIRS[2].question, "A third."),
    ]


def test_prompts_beyond_the_models_context_are_refused():
    encoder, model = Encoder(small_tokenizer(), "plain"), tiny_model()
    with pytest.raises(UserError, match=r"with 200 new ones .* reads, 256. Lower max_new_tokens"):
        alternate_answers(model, encoder, PAIRS)


def test_what_is_written_trains(tmp_path):
    file = tmp_path / "made" / "alternates.jsonl"
    write_pairs(file, [QA(*pair[:2], alternate="Maybe\u2028not.") for pair in PAIRS])
    forget = to_pairs(load_rows(str(file)), "x")
    assert [pair.alternate for pair in forget] == ["Maybe\u2028not."] * 3
    trainer = make_trainer(tmp_path / "run", objective="altpo+gd", forget=forget, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("name", ["alternates.json", "taken.jsonl"])
def test_the_command_writes_new_json_lines_only(tmp_path, name):
    (tmp_path / "taken.jsonl").touch()
    with pytest.raises(UserError, match=r"expected a new file that ends in \.jsonl"):
        run_alternates(Recipe.load("synthetic/unlearn"), tmp_path / name)
