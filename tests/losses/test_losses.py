"""Every loss against its formula in formulas.py."""

import math

import pytest
import torch
from formulas import (
    CONSTANT_WEIGHTS,
    FORMULAS,
    answer_positions,
    formula_simnpo,
    nlls,
    random_logits,
    scored,
    token_nlls,
)

import unlearn_llm.losses  # noqa: F401  registers the names
from unlearn_llm.errors import UserError
from unlearn_llm.objective import FORGET_LOSSES, RETAIN_LOSSES, Objective
from unlearn_llm.scoring import ChunkedDistribution, Head
from unlearn_llm.types import Scored

PARAMETERS = [
    ("forget", "dpo", {"beta": 0.5}),
    ("forget", "npo", {"beta": 0.03}),
    ("forget", "simnpo", {"beta": 4.5, "delta": 1.5}),
    ("retain", "ap", {"beta": 0.7}),
    ("forget", "wga", {"beta": 5.0}),
    ("forget", "satimp", {"beta1": 1.0, "beta2": 3.0}),
    ("forget", "tnpo", {"beta": 0.7}),
    ("forget", "wtnpo", {"beta": 2.0, "alpha": 0.5}),
    ("forget", "adaga", {"lambd": 1.5}),
    ("retain", "gd_kl", {"alpha": 2.0, "gamma": 0.3}),
    ("forget", "undial", {"beta": 1.5}),
    ("forget", "flat", {"divergence": "kl"}),
    ("forget", "flat", {"divergence": "pearson"}),
    ("forget", "flat", {"divergence": "js"}),
    ("forget", "llmu", {"ascent": 1.5}),
    ("forget", "altpo", {"beta": 0.5}),
    ("forget", "rmu", {"layers": [0, 3], "steering": 6.5, "seed": 4}),
    ("forget", "rr", {"layers": [2]}),
    ("retain", "embed_diff", {"layers": [1, 5]}),
    ("retain", "embed_l2", {"layers": [2]}),
]
CASES = [(role, name, {}) for role, name in FORMULAS] + PARAMETERS


def registry(role):
    return FORGET_LOSSES if role == "forget" else RETAIN_LOSSES


def reduced(loss, policy_logits, reference_logits):
    """The loss of the batch as the trainer reduces it."""
    policy = scored(policy_logits, loss.positions, loss.layers)
    with torch.no_grad():
        reference = scored(reference_logits, loss.positions, loss.layers)
    values = loss(policy, reference)
    assert values.shape == (3,)
    if callable(loss.per):
        return values.sum() / loss.per(policy, **loss.parameters).sum()
    if loss.per == "sequence":
        return values.mean()
    return values.sum() / sum(int(policy[answer].mask.sum()) for answer in loss.answers)


def test_every_loss_has_a_formula_here():
    registered = {("forget", name) for name in FORGET_LOSSES}
    registered |= {("retain", name) for name in RETAIN_LOSSES}
    assert registered == set(FORMULAS)


@pytest.mark.parametrize(("role", "name", "parameters"), CASES)
def test_a_loss_and_its_gradient_are_those_of_the_formula(role, name, parameters):
    loss = registry(role)[name].bind(parameters)
    policy, reference = random_logits(1), random_logits(2)
    leaves = [logits.requires_grad_() for logits in policy.values()]
    ours = reduced(loss, policy, reference)
    our_grads = torch.autograd.grad(ours, leaves, allow_unused=True)
    expected = FORMULAS[role, name](policy, reference, **parameters)
    expected_grads = torch.autograd.grad(expected, leaves, allow_unused=True)
    # float32 log-softmax against float64: 6e-8 relative per term, some tens of terms.
    torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=1e-6)
    for our_grad, grad in zip(our_grads, expected_grads, strict=True):
        assert (our_grad is None) == (grad is None)
        if grad is not None:
            torch.testing.assert_close(our_grad, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("role", "name"), [c for c in FORMULAS if c not in CONSTANT_WEIGHTS])
def test_the_gradient_is_the_slope_of_the_loss(role, name):
    # Finite differences of the loss itself, along a random direction, in no one's formula.
    loss = registry(role)[name]
    policy, reference = random_logits(3), random_logits(4)
    direction = random_logits(5, scale=1.0)
    step = 1e-2

    def at(distance):
        return float(
            reduced(loss, {a: policy[a] + distance * direction[a] for a in policy}, reference)
        )

    slope = (at(step) - at(-step)) / (2 * step)
    leaves = {answer: logits.clone().requires_grad_() for answer, logits in policy.items()}
    reduced(loss, leaves, reference).backward()
    along = sum(
        float((leaf.grad * direction[answer]).sum())
        for answer, leaf in leaves.items()
        if leaf.grad is not None
    )
    # Central difference: error of order step², and float32 noise of 1e-6 / step = 1e-4.
    assert slope == pytest.approx(along, rel=5e-3, abs=5e-3)


# Where the terms of a loss are known without any formula.


def test_npo_is_2_log_2_over_beta_at_the_start():
    logits = random_logits(1)
    for beta in (0.1, 0.5):
        loss = FORGET_LOSSES["npo"].bind({"beta": beta})
        assert float(reduced(loss, logits, logits)) == pytest.approx(2 / beta * math.log(2))


def test_dpo_is_13_86_at_the_start():
    logits = random_logits(1)
    assert float(reduced(FORGET_LOSSES["dpo"], logits, logits)) == pytest.approx(13.86, abs=5e-3)


def test_npo_starts_as_gradient_ascent_on_the_sequence_sum():
    # dL/dS = -2 sigmoid(0) = -1 for every sequence, so L has the gradient of -S (S summed).
    logits = random_logits(1)
    leaf = {answer: values.clone().requires_grad_() for answer, values in logits.items()}
    loss = FORGET_LOSSES["npo"]
    values = loss(scored(leaf, "answer"), scored(logits, "answer"))
    (ours,) = torch.autograd.grad(values.sum(), [leaf["original"]])
    (ascent,) = torch.autograd.grad(-nlls(leaf, "original")[0].sum(), [leaf["original"]])
    torch.testing.assert_close(ours, ascent, rtol=1e-5, atol=1e-6)


def test_maximum_entropy_is_zero_for_a_uniform_model_and_positive_otherwise():
    uniform = {answer: torch.full_like(v, 3.5) for answer, v in random_logits(1).items()}
    assert float(reduced(FORGET_LOSSES["me"], uniform, uniform)) == pytest.approx(0, abs=1e-6)
    logits = random_logits(1)
    assert float(reduced(FORGET_LOSSES["me"], logits, logits)) > 0.1


def test_kl_is_zero_for_the_reference_itself_and_positive_otherwise():
    first, second = random_logits(1), random_logits(2)
    assert float(reduced(RETAIN_LOSSES["kl"], first, first)) == pytest.approx(0, abs=1e-6)
    assert float(reduced(RETAIN_LOSSES["kl"], first, second)) > 0.1


def test_answer_preservation_is_log_2_over_beta_where_both_answers_are_equally_likely():
    mask = torch.ones(2, 1, dtype=torch.bool)
    equal = Scored(mask, torch.zeros(2, 1).long(), token_logps=torch.tensor([[-3.0], [-4.0]]))
    values = RETAIN_LOSSES["ap"]({"original": equal, "idk": equal})
    torch.testing.assert_close(values, torch.full((2,), 10 * math.log(2)))


@pytest.mark.parametrize(
    "name", ["npo", "simnpo", "dpo", "me", "idk", "tnpo", "wtnpo", "pdu", "ceu"]
)
def test_bounded_forget_losses_stay_above_zero_however_unlikely_the_answer(name):
    far = {answer: 300 * logits for answer, logits in random_logits(1).items()}
    value = float(reduced(FORGET_LOSSES[name], far, random_logits(2)))
    assert 0 <= value < math.inf


@pytest.mark.parametrize(("name", "parameters"), [("tnpo", {}), ("wtnpo", {"alpha": 0.5})])
def test_token_wise_npo_has_the_gradient_of_the_authors_weighted_ascent(name, parameters):
    policy, reference = random_logits(1), random_logits(2)
    leaf = {answer: values.clone().requires_grad_() for answer, values in policy.items()}
    loss = FORGET_LOSSES[name].bind(parameters)
    (ours,) = torch.autograd.grad(reduced(loss, leaf, reference), [leaf["original"]])
    logps, reference_logps = (
        torch.cat([-terms for terms in token_nlls(logits, "original")])
        for logits in (leaf, reference)
    )
    p, q, beta, alpha = logps.exp(), reference_logps.exp(), 4.0, parameters.get("alpha", 0.0)
    weight = 2 * p ** (beta + alpha) / (p**beta + q**beta)
    (ascent,) = torch.autograd.grad((weight.detach() * logps).mean(), [leaf["original"]])
    torch.testing.assert_close(ours, ascent, rtol=1e-5, atol=1e-6)


def test_weighted_ascent_leaves_alone_what_is_forgotten():
    # Of p = 1/2 and p = e^-20 only the first has a gradient to speak of.
    mask = torch.ones(1, 2, dtype=torch.bool)
    for name in ("wga", "satimp"):
        logps = torch.tensor([[-math.log(2), -20.0]], requires_grad=True)
        answers = {"original": Scored(mask, torch.zeros(1, 2).long(), token_logps=logps)}
        FORGET_LOSSES[name](answers).sum().backward()
        assert logps.grad[0, 0] > 1e-2 and logps.grad[0, 1] < 1e-8


def test_undial_rests_at_its_teacher():
    # The cross-entropy's gradient, p - q, is zero where the model is the lowered reference.
    reference = random_logits(2)
    policy = {answer: values.clone() for answer, values in reference.items()}
    for row, t, label in answer_positions("original"):
        policy["original"][row, t, label] -= 10
    policy["original"].requires_grad_()
    reduced(FORGET_LOSSES["undial"], policy, reference).backward()
    assert policy["original"].grad.abs().max() < 1e-7


def test_ceu_moves_only_the_token_against_all_others():
    # p - q: p_y at the token, -p_y p_v / (1 - p_y) elsewhere; its sum is zero.
    policy = random_logits(1)
    policy["original"].requires_grad_()
    scores = scored(policy, "answer_after_first")
    FORGET_LOSSES["ceu"](scores).sum().backward()
    seen = set()
    for row, t, label in answer_positions("original"):
        p = policy["original"][row, t].detach().softmax(0)
        expected = -p[label] * p / (1 - p[label])
        expected[label] = p[label]
        if row not in seen:
            expected = torch.zeros(7)  # the first token of an answer
        seen.add(row)
        found = policy["original"].grad[row, t]
        torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)


def test_ceu_has_the_gradient_of_the_authors_cross_entropy():
    policy = random_logits(1)
    logits = policy["original"].requires_grad_()
    (ours,) = torch.autograd.grad(reduced(FORGET_LOSSES["ceu"], policy, policy), [logits])
    terms, seen = [], set()
    for row, t, label in answer_positions("original"):
        if row in seen:
            others = logits[row, t].detach().exp()
            others[label] = 0
            terms.append(-(others / others.sum() * logits[row, t].log_softmax(0)).sum())
        seen.add(row)
    (theirs,) = torch.autograd.grad(sum(terms) / len(terms), [logits])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_teacher_gets_no_gradient_though_its_head_would_take_one():
    # A reference may share the trainable head: only its hidden states come without gradient.
    head = torch.nn.Linear(5, 7, bias=False)
    hidden, targets = torch.randn(4, 5), torch.tensor([1, 2, 3, 4])
    mask = torch.ones(1, 4, dtype=torch.bool)

    def of(linear):
        made = ChunkedDistribution(hidden, targets, Head(linear.forward, 7, linear))
        return {"original": Scored(mask, targets[None], made)}

    FORGET_LOSSES["undial"](of(head), of(head)).sum().backward()
    shared, head.weight.grad = head.weight.grad, None
    with torch.no_grad():
        copied = torch.nn.Linear(5, 7, bias=False)
        copied.weight.copy_(head.weight)
    FORGET_LOSSES["undial"](of(head), of(copied.requires_grad_(False))).sum().backward()
    torch.testing.assert_close(shared, head.weight.grad)


@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("name", ["undial", "ceu", "pdu"])
def test_whole_logits_give_the_loss_and_gradients_of_a_plain_head(name, n):
    # Without a plain head, logits are read whole, and losses come of Distribution.map.
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = torch.randn(2, n, 5, generator=generator)
    linear, targets = torch.nn.Linear(5, 7), torch.tensor([1, 2, 3, 6])[:n]
    leaves = [hidden.requires_grad_(), *linear.parameters()]

    def of(states, *, whole):
        head = Head(lambda logits: logits, 7) if whole else Head(linear.forward, 7, linear)
        states = linear(states) if whole else states
        scored = Scored(
            torch.ones(1, n, dtype=torch.bool),
            targets[None],
            ChunkedDistribution(states, targets, head),
        )
        return {"original": scored}

    def run(whole):
        loss = FORGET_LOSSES[name](of(hidden, whole=whole), of(theirs, whole=whole)).sum()
        return loss, *torch.autograd.grad(loss, leaves)

    for plain, full in zip(run(whole=False), run(whole=True), strict=True):
        torch.testing.assert_close(plain, full, rtol=1e-5, atol=1e-6)


def test_flat_logits_have_no_pdu_loss():
    flat = {answer: torch.full_like(v, 3.5) for answer, v in random_logits(1).items()}
    assert float(reduced(FORGET_LOSSES["pdu"], flat, flat)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["embed_diff", "embed_l2"])
def test_hidden_states_that_are_the_references_have_no_loss_and_a_gradient_of_zero(name):
    policy, reference = random_logits(1), random_logits(1)
    policy["original"].requires_grad_()
    loss = reduced(RETAIN_LOSSES[name], policy, reference)
    loss.backward()
    assert loss.item() == 0 and not policy["original"].grad.any()


def test_rerouting_rests_at_a_right_angle_and_beyond():
    mask = torch.ones(1, 2, dtype=torch.bool)
    ours = torch.tensor([[0.0, 3.0], [-1.0, 1.0]], requires_grad=True)
    theirs = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    policy, reference = (
        {"original": Scored(mask, torch.zeros(1, 2).long(), hidden={4: state})}
        for state in (ours, theirs)
    )
    loss = FORGET_LOSSES["rr"].bind({"layers": [4]})(policy, reference)
    loss.sum().backward()
    assert loss.tolist() == [0] and not ours.grad.any()


def test_ascent_and_descent_are_opposite():
    logits = random_logits(1)
    ascent = reduced(FORGET_LOSSES["ga"], logits, logits)
    descent = reduced(RETAIN_LOSSES["gd"], logits, logits)
    assert float(ascent) == -float(descent)


# Names and parameters.


@pytest.mark.parametrize(
    ("name", "per", "positions", "reference", "kind"),
    [  # methods.md: section 1 and the scale fact of section 0
        ("ga", "token", "answer", None, "untargeted"),
        ("me", "token", "answer", None, "untargeted"),
        ("idk", "token", "answer", None, "targeted"),
        ("dpo", "sequence", "answer", "logp", "targeted"),
        ("npo", "sequence", "answer", "logp", "untargeted"),
        ("simnpo", "sequence", "answer", None, "untargeted"),
        ("wga", "token", "answer", None, "untargeted"),
        ("satimp", "token", "answer", None, "untargeted"),
        ("tnpo", "token", "answer", "logp", "untargeted"),
        ("wtnpo", "token", "answer", "logp", "untargeted"),
        ("undial", "token", "answer", "distribution", "untargeted"),
        ("ceu", "token", "answer_after_first", None, "untargeted"),
        ("pdu", "token", "answer", None, "untargeted"),
        ("flat", "sequence", "answer", None, "targeted"),
        ("llmu", "sequence", "answer", None, "untargeted"),
        ("altpo", "sequence", "answer", "logp", "untargeted"),
        ("rmu", "token", "answer", None, "untargeted"),
        ("rr", "token", "answer", "hidden", "untargeted"),
        ("embed_diff", "token", "answer", "hidden", None),
        ("embed_l2", "token", "answer", "hidden", None),
        ("scrub", "token", "answer", "distribution", "untargeted"),
        ("gd", "token", "answer", None, None),
        ("gd_kl", "token", "answer", "distribution", None),
        ("kl", "token", "attended", "distribution", None),
        ("ap", "sequence", "answer", None, None),
    ],
)
def test_a_loss_declares_its_reduction_and_what_it_reads(name, per, positions, reference, kind):
    loss = (FORGET_LOSSES if name in FORGET_LOSSES else RETAIN_LOSSES)[name]
    assert (loss.per, loss.positions, loss.reference, loss.kind) == (
        per, positions, reference, kind,
    )  # fmt: skip


def test_names_are_exact_so_simnpo_is_not_npo():
    # The authors' dispatch tests `"NPO" in name` first and never reaches SimNPO.
    logits, other = random_logits(1), random_logits(2)
    objective = Objective.parse("simnpo+gd")
    assert objective.forget.function is not Objective.parse("npo+gd").forget.function
    assert float(reduced(objective.forget, logits, other)) == pytest.approx(
        float(formula_simnpo(logits, other))
    )
    for name in ("NPO+gd", "npo +gd", "n+gd"):
        with pytest.raises(UserError, match="Unknown forget loss"):
            Objective.parse(name)
