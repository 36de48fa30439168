import random

import pytest
import torch

from unlearn_llm.dataset import (
    Collator,
    EncodedRows,
    RoleDataset,
    random_answer_of,
    read_refusals,
    refusal_of,
)
from unlearn_llm.encode import Encoded, Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.rows import QA
from unlearn_llm.schedule import Draw

PAIRS = [QA(f"Who is author {n}?", f"Author number {n}, of course.") for n in range(6)]
REFUSALS = [f"Refusal {n}." for n in range(10)]


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, "plain")


def answer_of(tokenizer, encoded):
    return tokenizer.decode(encoded.ids[encoded.n_prompt : -1]).strip()


def test_the_refusal_of_a_row_depends_on_seed_and_row_only():
    first = [refusal_of(row, REFUSALS, seed=1) for row in range(40)]
    random.seed(5)
    torch.manual_seed(5)
    assert [refusal_of(row, REFUSALS, seed=1) for row in reversed(range(40))] == first[::-1]
    assert [refusal_of(row, REFUSALS, seed=2) for row in range(40)] != first


def test_rows_get_different_refusals():
    # 40 draws of ten lines miss a given line with probability 0.9**40 = 1.5%; nine are enough.
    assert len({refusal_of(row, REFUSALS, seed=0) for row in range(40)}) >= 9


def test_refusals_leave_the_global_generators_alone(encoder):
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    EncodedRows(PAIRS, encoder, ("original", "idk"), refusals=REFUSALS)[3]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_row_keeps_its_refusal_at_every_read(encoder, tokenizer):
    rows = EncodedRows(PAIRS, encoder, ("idk",), refusals=REFUSALS, seed=4)
    for row in range(6):
        assert rows[row] == rows[row]
        assert answer_of(tokenizer, rows[row]["idk"][1]) == refusal_of(row, REFUSALS, 4)


def test_rows_hold_every_answer_asked_for_and_their_own_number(encoder, tokenizer):
    rows = EncodedRows(PAIRS, encoder, ("original", "idk"), refusals=REFUSALS)
    assert {answer: number for answer, (number, _) in rows[2].items()} == {"original": 2, "idk": 2}
    assert answer_of(tokenizer, rows[2]["original"][1]) == PAIRS[2].answer


def test_a_random_answer_depends_on_seed_and_row_and_is_never_the_rows_own():
    answers = [f"Answer {n}." for n in range(8)]
    first = [random_answer_of(row, "Answer 3.", answers, seed=1) for row in range(40)]
    random.seed(5)
    again = [random_answer_of(row, "Answer 3.", answers, seed=1) for row in reversed(range(40))]
    assert again == first[::-1]
    assert [random_answer_of(row, "Answer 3.", answers, seed=2) for row in range(40)] != first
    # 40 draws of seven answers miss a given one with probability (6/7)^40 = 0.2%.
    assert set(first) == set(answers) - {"Answer 3."}
    with pytest.raises(UserError, match="Row 4 has the only answer"):
        random_answer_of(4, "Yes.", ["Yes.", "Yes."], seed=0)


def test_random_answers_are_those_of_retain_rows(encoder, tokenizer):
    answers = {"forget": ("random",), "retain": ("original",)}
    pairs = {"forget": PAIRS[:2], "retain": PAIRS[2:]}
    before = random.getstate(), torch.get_rng_state()
    dataset = RoleDataset.encode(pairs, encoder, answers, refusals=(), seed=3)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    kept = [pair.answer for pair in PAIRS[2:]]
    for row in range(2):
        found = answer_of(tokenizer, dataset.rows["forget"][row]["random"][1])
        assert found == random_answer_of(row, PAIRS[row].answer, kept, seed=3)


def test_alternate_answers_come_with_the_pairs(encoder, tokenizer):
    pairs = [pair._replace(alternate=f"Number {n}?") for n, pair in enumerate(PAIRS)]
    rows = EncodedRows(pairs, encoder, ("alternate", "original"))
    assert answer_of(tokenizer, rows[4]["alternate"][1]) == "Number 4?"
    with pytest.raises(UserError, match=r"gives original\. Every row needs .* column `alternate`"):
        EncodedRows([*pairs[:5], PAIRS[5]], encoder, ("alternate",))


def test_other_answers_can_be_given_by_name(encoder, tokenizer):
    alternates = {"made_up": [f"Something else {n}." for n in range(6)]}
    rows = EncodedRows(PAIRS, encoder, ("made_up",), alternates=alternates)
    assert answer_of(tokenizer, rows[5]["made_up"][1]) == "Something else 5."


def test_an_answer_that_the_data_does_not_give_is_refused(encoder):
    with pytest.raises(UserError, match="asks for the answer 'idk'; the data gives original"):
        EncodedRows(PAIRS, encoder, ("idk",))


def test_the_length_of_a_row_is_that_of_its_longest_answer(encoder):
    rows = EncodedRows(PAIRS, encoder, ("original", "idk"), refusals=["No.", "N" * 40])
    for row in range(6):
        assert rows.lengths[row] == max(len(e.ids) for _, e in rows[row].values())


def test_a_draw_reads_the_roles_that_it_names(encoder):
    forget = EncodedRows(PAIRS[:2], encoder)
    retain = EncodedRows(PAIRS[2:], encoder)
    dataset = RoleDataset(forget, retain)
    assert len(dataset) == 6
    assert list(dataset[Draw(forget=0)]) == ["forget"]
    assert list(dataset[Draw(retain=3)]) == ["retain"]
    both = dataset[Draw(forget=1, retain=2)]
    assert both == {"forget": forget[1], "retain": retain[2]}


def test_row_zero_is_a_row():
    # 0 is false in Python; a Draw that names row 0 must not be read as "none".
    class Rows(list):
        pass

    dataset = RoleDataset(Rows(["f0"]), Rows(["r0"]))
    assert dataset[Draw(forget=0, retain=0)] == {"forget": "f0", "retain": "r0"}


def test_padding_is_on_the_right_up_to_a_multiple():
    collator = Collator(pad_id=9, multiple=4)
    sequences = collator.sequences([(11, Encoded([1, 2, 3, 4, 5], 2)), (12, Encoded([6, 7, 8], 1))])
    ids = [[1, 2, 3, 4, 5, 9, 9, 9], [6, 7, 8, 9, 9, 9, 9, 9]]
    labels = [[-100, -100, 3, 4, 5, -100, -100, -100], [-100, 7, 8, *[-100] * 5]]
    assert sequences["input_ids"].tolist() == ids
    assert sequences["labels"].tolist() == labels
    assert sequences["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 3 + [0] * 5]
    assert sequences["rows"].tolist() == [11, 12]


def test_a_real_end_token_stays_visible_where_the_pad_token_is_the_same_id():
    end = 9
    sequences = Collator(pad_id=end).sequences([(0, Encoded([1, 2, end], 1))])
    assert sequences["attention_mask"][0, :4].tolist() == [1, 1, 1, 0]
    assert sequences["labels"][0, :4].tolist() == [-100, 2, end, -100]


def test_collated_batches_are_keyed_by_role_and_answer(encoder):
    forget = EncodedRows(PAIRS[:2], encoder, ("original", "idk"), refusals=REFUSALS)
    dataset = RoleDataset(forget, EncodedRows(PAIRS[2:], encoder))
    draws = [Draw(forget=1, retain=0), Draw(forget=0, retain=3)]
    batch = Collator(pad_id=0)([dataset[draw] for draw in draws])
    assert {role: list(answers) for role, answers in batch.items()} == {
        "forget": ["original", "idk"],
        "retain": ["original"],
    }
    assert batch["forget"]["idk"]["rows"].tolist() == [1, 0]
    assert batch["retain"]["original"]["rows"].tolist() == [0, 3]


def test_the_package_brings_refusals():
    refusals = read_refusals()
    assert len(refusals) >= 10
    assert all(line == line.strip() != "" for line in refusals)


def test_refusals_come_one_per_line_without_blank_ones(tmp_path):
    file = tmp_path / "refusals.txt"
    file.write_text("I do not know.\n\n  No idea. \n", encoding="utf-8")
    assert read_refusals(file) == ["I do not know.", "No idea."]


def test_missing_or_empty_refusals_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no file .*gone\.txt"):
        read_refusals(tmp_path / "gone.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="holds no refusal"):
        read_refusals(tmp_path / "empty.txt")
