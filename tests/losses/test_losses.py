"""Every loss against the formulas of methods.md sections 1 and 2, written out in float64.

The formulas below see full logits and shift, mask and reduce in their own loops; they share no
code with the package.
"""

import math

import pytest
import torch

import unlearn_llm.losses  # noqa: F401  registers the names
from unlearn_llm.errors import UserError
from unlearn_llm.objective import FORGET_LOSSES, RETAIN_LOSSES, Objective
from unlearn_llm.scoring import ChunkedDistribution, Head
from unlearn_llm.types import Scored

VOCABULARY = 7
# Per sequence: the label at every position, -100 where no loss is taken. Unequal lengths, with
# padding at the end (attention 0) and an end token that is scored.
LABELS = {
    "original": [[-100, -100, 3, 1, 6, 2], [-100, 5, 2, -100, -100], [-100, -100, -100, 4, 2]],
    "idk": [[-100, -100, 1, 2], [-100, 6, 0, 4, 2], [-100, -100, -100, 2]],
}  # fmt: skip
ATTENTION = {
    "original": [[1] * 6, [1, 1, 1, 0, 0], [1] * 5],
    "idk": [[1] * 4, [1] * 5, [1, 1, 1, 1]],
}
WIDTH = 6


def padded(rows, fill):
    return torch.tensor([[*row, *[fill] * (WIDTH - len(row))] for row in rows])


def random_logits(seed, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        answer: scale * torch.randn(3, WIDTH, VOCABULARY, generator=generator, dtype=torch.float64)
        for answer in LABELS
    }


def scored(logits, positions):
    """What the scorer hands to a loss, from full logits."""
    result = {}
    for answer, values in logits.items():
        labels, attention = padded(LABELS[answer], -100), padded(ATTENTION[answer], 0)
        mask = (labels if positions == "answer" else attention)[:, 1:]
        mask = mask != -100 if positions == "answer" else mask.bool()
        targets = labels[:, 1:].clamp(min=0)
        head = Head(lambda rows: rows, VOCABULARY)
        distribution = ChunkedDistribution(values[:, :-1][mask], targets[mask], head)
        result[answer] = Scored(mask, targets, distribution)
    return result


# The formulas of methods.md.


def nlls(logits, answer):
    """S_i and T_i: summed negative log-likelihood and number of labels of each sequence."""
    sums, lengths = [], []
    for row, labels in enumerate(LABELS[answer]):
        terms = [
            torch.logsumexp(logits[answer][row, t], 0) - logits[answer][row, t, labels[t + 1]]
            for t in range(len(labels) - 1)
            if labels[t + 1] != -100
        ]
        sums.append(sum(terms))
        lengths.append(len(terms))
    return torch.stack(sums), lengths


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


def token_mean(logits, answer):
    sums, lengths = nlls(logits, answer)
    return sums.sum() / sum(lengths)


def formula_ga(policy, reference):
    return -token_mean(policy, "original")


def formula_me(policy, reference):
    terms = []
    for row, labels in enumerate(LABELS["original"]):
        for t in range(len(labels) - 1):
            if labels[t + 1] != -100:
                p = torch.exp(policy["original"][row, t])
                p = p / p.sum()
                uniform = 1 / VOCABULARY
                terms.append(sum(uniform * (math.log(uniform) - torch.log(p[v])) for v in range(7)))
    return sum(terms) / len(terms)


def formula_idk(policy, reference):
    return token_mean(policy, "idk")


def formula_dpo(policy, reference, beta=0.1):
    def ratio(logits):
        return -nlls(logits, "idk")[0] + nlls(logits, "original")[0]

    delta = ratio(policy) - ratio(reference)
    return -(2 / beta) * log_sigmoid(beta * delta).mean()


def formula_npo(policy, reference, beta=0.1):
    difference = nlls(policy, "original")[0] - nlls(reference, "original")[0]
    return -(2 / beta) * log_sigmoid(beta * difference).mean()


def formula_simnpo(policy, reference, beta=2.5, delta=0.0):
    sums, lengths = nlls(policy, "original")
    return -(2 / beta) * log_sigmoid(beta * (sums / torch.tensor(lengths) - delta)).mean()


def formula_gd(policy, reference):
    return token_mean(policy, "original")


def formula_kl(policy, reference):
    """KL(reference || policy) summed over the vocabulary, mean over predictions of real tokens."""
    terms = []
    for row, attention in enumerate(ATTENTION["original"]):
        for t in range(len(attention) - 1):
            if attention[t + 1]:
                p, q = (
                    torch.softmax(logits["original"][row, t], 0) for logits in (policy, reference)
                )
                terms.append((q * (q.log() - p.log())).sum())
    return sum(terms) / len(terms)


def formula_ap(policy, reference, beta=0.1):
    margin = nlls(policy, "idk")[0] - nlls(policy, "original")[0]
    return -(1 / beta) * log_sigmoid(beta * margin).mean()


FORMULAS = {
    ("forget", "ga"): formula_ga,
    ("forget", "me"): formula_me,
    ("forget", "idk"): formula_idk,
    ("forget", "dpo"): formula_dpo,
    ("forget", "npo"): formula_npo,
    ("forget", "simnpo"): formula_simnpo,
    ("retain", "gd"): formula_gd,
    ("retain", "kl"): formula_kl,
    ("retain", "ap"): formula_ap,
}
PARAMETERS = [
    ("forget", "dpo", {"beta": 0.5}),
    ("forget", "npo", {"beta": 0.03}),
    ("forget", "simnpo", {"beta": 4.5, "delta": 1.5}),
    ("retain", "ap", {"beta": 0.7}),
]
CASES = [(role, name, {}) for role, name in FORMULAS] + PARAMETERS


def registry(role):
    return FORGET_LOSSES if role == "forget" else RETAIN_LOSSES


def reduced(loss, policy_logits, reference_logits):
    """The loss of the batch as the trainer reduces it."""
    policy = scored(policy_logits, loss.positions)
    with torch.no_grad():
        reference = scored(reference_logits, loss.positions)
    values = loss(policy, reference)
    assert values.shape == (3,)
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


@pytest.mark.parametrize(("role", "name"), FORMULAS)
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


@pytest.mark.parametrize("name", ["npo", "simnpo", "dpo", "me", "idk"])
def test_bounded_forget_losses_stay_above_zero_however_unlikely_the_answer(name):
    far = {answer: 300 * logits for answer, logits in random_logits(1).items()}
    value = float(reduced(FORGET_LOSSES[name], far, random_logits(2)))
    assert 0 <= value < math.inf


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
        ("gd", "token", "answer", None, None),
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
