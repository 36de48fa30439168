import pytest
import torch
from accelerate import Accelerator
from models_for_tests import (
    REFUSALS,
    history,
    make_trainer,
    small_tokenizer,
    synthetic_pairs,
    tiny_model,
    train_adapter_a_little,
    weights,
)

from unlearn_llm.dataset import Collator, EncodedRows
from unlearn_llm.encode import Encoder
from unlearn_llm.errors import UserError
from unlearn_llm.reference import (
    DisabledAdapter,
    FrozenCopy,
    Precomputed,
    StartingWeights,
    frozen,
    has_fresh_adapter,
)
from unlearn_llm.scoring import score

COLLATOR = Collator(pad_id=0)


@pytest.fixture(scope="module")
def rows():
    return EncodedRows(
        synthetic_pairs("forget10"),
        Encoder(small_tokenizer(), "plain"),
        ("original", "idk"),
        refusals=REFUSALS,
    )


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def batch_of(rows, numbers):
    samples = [rows[number] for number in numbers]
    return {a: COLLATOR.sequences([sample[a] for sample in samples]) for a in ("original", "idk")}


def precompute(model, rows, accelerator, batch_size=3):
    return Precomputed.compute(model, {"forget": rows}, COLLATOR, batch_size, accelerator)


# Precomputed numbers.


def test_precomputed_numbers_are_those_of_the_frozen_model(rows, accelerator):
    model = tiny_model("phi")
    precomputed, live = precompute(model, rows, accelerator), FrozenCopy(model)
    batch = batch_of(rows, [7, 0, 3, 3])
    expected = live("forget", batch, "answer")
    for answer, found in precomputed("forget", batch, "answer").items():
        # Other batches, other padding: float32 rounding only.
        torch.testing.assert_close(found.token_logps, expected[answer].token_logps)
        assert torch.equal(found.mask, expected[answer].mask)
        assert torch.equal(found.targets, expected[answer].targets)
        torch.testing.assert_close(found.logp, expected[answer].logp)


def test_precomputed_numbers_do_not_follow_the_model(rows, accelerator):
    model = tiny_model()
    precomputed = precompute(model, rows, accelerator)
    batch = batch_of(rows, [1, 2])
    before = precomputed("forget", batch, "answer")["original"].logp
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(precomputed("forget", batch, "answer")["original"].logp, before)


def test_precomputing_does_not_depend_on_the_batch_size(rows, accelerator):
    model = tiny_model()
    batch = batch_of(rows, range(10))
    found = [
        precompute(model, rows, accelerator, size)("forget", batch, "answer")["idk"].logp
        for size in (1, 4, 100)
    ]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_precomputing_switches_dropout_off_and_training_on_again(rows, accelerator):
    model = tiny_model("phi")
    model.config.resid_pdrop = model.config.embd_pdrop = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert any(isinstance(module, torch.nn.Dropout) for module in model.modules())
    model.train()
    batch = batch_of(rows, [0, 1])
    found = [precompute(model, rows, accelerator)("forget", batch, "answer") for _ in range(2)]
    assert torch.equal(found[0]["original"].logp, found[1]["original"].logp)
    assert model.training


def test_precomputing_leaves_the_global_generator_and_gradients_alone(rows, accelerator):
    model = tiny_model()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    precompute(model, rows, accelerator)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_precomputed_numbers_give_no_distribution(rows, accelerator):
    found = precompute(tiny_model(), rows, accelerator)("forget", batch_of(rows, [0]), "answer")
    assert found["original"].distribution is None


# A copy, a disabled adapter.


def test_a_frozen_copy_does_not_follow_the_model(rows):
    model = tiny_model()
    reference, batch = FrozenCopy(model), batch_of(rows, [0, 1])
    before = score(model, batch)["original"].logp.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(reference("forget", batch, "answer")["original"].logp, before)


@pytest.mark.parametrize("make", [DisabledAdapter, FrozenCopy])
def test_a_reference_gives_no_gradient_and_leaves_the_mode_of_the_model(rows, make):
    model = tiny_model(lora=True).train()
    found = make(model)("forget", batch_of(rows, [0, 1]), "answer")["original"]
    assert not found.logp.requires_grad
    assert model.training
    assert weights(model).numel() > 0  # the adapter still trains


def test_a_disabled_adapter_is_the_frozen_copy_bitwise(rows):
    model = tiny_model(lora=True)
    copied, disabled = FrozenCopy(model), DisabledAdapter(model)
    train_adapter_a_little(model)
    batch = batch_of(rows, [4, 1])
    found = disabled("forget", batch, "attended")
    for answer, expected in copied("forget", batch, "attended").items():
        assert torch.equal(found[answer].token_logps, expected.token_logps)
    changed = score(model, batch, "attended")["original"].token_logps
    assert not torch.allclose(changed, found["original"].token_logps, atol=1e-3)


def test_the_adapter_is_on_again_after_the_reference_was_asked(rows):
    model = train_adapter_a_little(tiny_model(lora=True))
    batch = batch_of(rows, [0])
    before = score(model, batch)["original"].logp
    DisabledAdapter(model)("forget", batch, "answer")
    assert torch.equal(score(model, batch)["original"].logp, before)


def test_frozen_goes_back_to_evaluation_mode_too():
    model = tiny_model().eval()
    with frozen(model):
        assert not torch.is_grad_enabled()
    assert not model.training
    assert torch.is_grad_enabled()


def test_a_fresh_adapter_is_told_from_a_continued_one():
    assert has_fresh_adapter(tiny_model(lora=True))
    assert not has_fresh_adapter(train_adapter_a_little(tiny_model(lora=True)))
    assert not has_fresh_adapter(tiny_model())


def test_an_adapter_beside_trainable_base_weights_is_no_reference():
    model = tiny_model(lora=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert not has_fresh_adapter(model)


# What the trainer chooses.


def chosen(tmp_path, model, **settings):
    trainer = make_trainer(tmp_path, model, max_steps=1, **settings)
    trainer.train()
    return trainer.reference


@pytest.mark.parametrize(
    ("objective", "lora", "kind"),
    [
        ("idk+gd", False, type(None)),
        ("npo+gd", False, Precomputed),
        ("dpo+ap", True, Precomputed),
        ("idk+kl", False, FrozenCopy),
        ("idk+kl", True, DisabledAdapter),
    ],
)
def test_auto_takes_the_cheapest_reference_that_gives_what_is_needed(
    tmp_path, objective, lora, kind
):
    assert type(chosen(tmp_path, tiny_model(lora=lora), objective=objective)) is kind


@pytest.mark.parametrize(("lora", "live"), [(False, FrozenCopy), (True, DisabledAdapter)])
def test_what_is_constant_is_cached_beside_a_role_that_needs_the_model(tmp_path, lora, live):
    reference = chosen(tmp_path, tiny_model(lora=lora), objective="dpo+kl")
    kinds = {role: type(each) for role, each in reference.references.items()}
    assert kinds == {"forget": Precomputed, "retain": live}


def test_starting_weights_are_the_frozen_copy_bitwise_and_leave_no_trace(rows):
    # Trap 12: with its adapter switched off it would be the base model, not the model at the start.
    model = train_adapter_a_little(tiny_model("phi", lora=True))
    copied, ours = FrozenCopy(model), StartingWeights(model)
    train_adapter_a_little(model, seed=6)
    batch = batch_of(rows, [4, 1])
    moved = score(model, batch, "attended")
    found = ours("forget", batch, "attended")
    for answer, expected in copied("forget", batch, "attended").items():
        assert torch.equal(found[answer].token_logps, expected.token_logps)
        assert not torch.allclose(moved[answer].token_logps, expected.token_logps, atol=1e-3)
    again = score(model, batch, "attended")
    for answer, expected in moved.items():
        assert torch.equal(again[answer].token_logps, expected.token_logps)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_continued_adapter_trains_as_beside_a_frozen_copy(tmp_path, checkpointing):
    runs = []
    for reference in (None, FrozenCopy):
        model = train_adapter_a_little(tiny_model(lora=True))
        given = {"reference": reference and reference(model)}
        settings = {"objective": "npo+kl", "activation_checkpointing": checkpointing}
        trainer = make_trainer(tmp_path, model, given=given, **settings)
        trainer.train()
        runs.append(trainer)
    references = runs[0].reference.references
    assert type(references["retain"]) is StartingWeights
    assert references["retain"].at_start.keys() == {
        name for name, parameter in runs[0].model.named_parameters() if parameter.requires_grad
    }
    # npo's log-probabilities were cached in other batches than the copy computes them in.
    torch.testing.assert_close(weights(runs[0].model), weights(runs[1].model))
    ours, theirs = (history(run, "retain/loss") for run in runs)
    assert ours == pytest.approx(theirs, rel=1e-5) and max(ours) > 1e-4


@pytest.mark.parametrize("trainable", [None, "lora|norm"])
def test_auto_copies_what_trains_of_a_model_that_is_not_its_base(tmp_path, trainable):
    model = tiny_model(lora=True)
    if trainable is None:
        train_adapter_a_little(model)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reference = chosen(tmp_path, model, objective="idk+kl", trainable=trainable)
    assert type(reference) is StartingWeights
    assert any("norm" in name for name in reference.at_start) == (trainable is not None)
    for name, kept in reference.at_start.items():
        assert torch.equal(kept, start[name])


def test_a_continued_adapter_is_refused_as_reference(tmp_path):
    model = train_adapter_a_little(tiny_model(lora=True))
    with pytest.raises(UserError, match=r"needs a fresh LoRA adapter.*Use reference: frozen"):
        chosen(tmp_path, model, objective="npo+gd", reference="adapter")


def test_a_model_without_adapter_is_refused_as_its_own_reference(tmp_path):
    with pytest.raises(UserError, match="needs a fresh LoRA adapter"):
        chosen(tmp_path, tiny_model(), objective="npo+gd", reference="adapter")


def test_precomputed_is_refused_for_whole_distributions(tmp_path):
    with pytest.raises(UserError, match=r"whole distributions.*Use reference: auto"):
        chosen(tmp_path, tiny_model(), objective="npo+kl", reference="precomputed")


@pytest.mark.parametrize("kind", ["precomputed", "frozen", "adapter"])
def test_every_reference_trains_the_same_weights(tmp_path, kind):
    ends = []
    for choice in ("frozen", kind):
        trainer = make_trainer(
            tmp_path / choice, tiny_model(lora=True), objective="npo+gd", reference=choice
        )
        trainer.train()
        ends.append(weights(trainer.model))
    # AdamW's first steps are of size lr whatever the gradient, so rounding is all that differs.
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", ["npo+gd", "npo+kl"])
def test_on_resume_the_reference_is_the_model_at_the_start(tmp_path, objective):
    settings = {"objective": objective, "save_strategy": "steps", "save_steps": 3}
    first = make_trainer(tmp_path, **settings)
    first.train()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    rows = first.role_rows.rows["forget"]
    batch = {"original": COLLATOR.sequences([rows[row]["original"] for row in range(4)])}
    at_start = score(tiny_model(), batch)["original"].logp
    after_three = resumed.reference("forget", batch, "answer")["original"].logp
    torch.testing.assert_close(after_three, at_start)
    torch.testing.assert_close(
        first.reference("forget", batch, "answer")["original"].logp, at_start
    )
