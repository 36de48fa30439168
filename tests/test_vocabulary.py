"""Logits that are never computed against logits that are: a slow twin in float64."""

import pytest
import torch
from tensor_watch import Largest

from unlearn_llm import vocabulary_chunks
from unlearn_llm.vocabulary import (
    cross_entropy,
    kl_divergence,
    logit_margin,
    logit_statistics,
)
from unlearn_llm.vocabulary_chunks import Logits, Lowered

N, HIDDEN, VOCABULARY = 7, 5, 101  # a prime: no chunk divides it
ONE_CHUNK = 10**9


@pytest.fixture(params=[1, 13, 100, ONE_CHUNK], ids="{} columns".format)
def columns(request, monkeypatch):
    """Columns of a chunk, where N positions are scored (half as many for KL)."""
    monkeypatch.setattr(vocabulary_chunks, "CHUNK_BYTES", 4 * N * request.param)
    return request.param


@pytest.fixture
def thirteen_columns(monkeypatch):
    monkeypatch.setattr(vocabulary_chunks, "CHUNK_BYTES", 4 * N * 13)


def make(seed=0, *, n=N, bias=True, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    return Logits(
        normal(n, HIDDEN), normal(VOCABULARY, HIDDEN), normal(VOCABULARY) if bias else None
    )


def some_targets(n=N):
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(9))


def leaves(logits):
    return [tensor for tensor in logits if tensor is not None]


def in_float64(logits):
    return Logits(*(None if t is None else t.detach().double().requires_grad_() for t in logits))


# The twin: all logits at once, one term after the other.


def full(logits):
    z = logits.hidden @ logits.weight.T
    return z if logits.bias is None else z + logits.bias


def slow_statistics(logits, targets):
    z = full(logits)
    others = z.scatter(1, targets[:, None], -torch.inf).logsumexp(-1)
    return z[range(len(z)), targets], others, z.logsumexp(-1), z.mean(-1)


def slow_kl(reference, policy):
    p, q = full(policy).softmax(-1), full(reference).detach().softmax(-1)
    return (q * (q / p).log()).sum(-1)


def slow_margin(logits):
    z = full(logits)
    return z.max(-1).values - z.mean(-1)


def slow_cross_entropy(reference, policy, lowered):
    return cross_entropy_of(full(reference).detach(), full(policy), lowered)


def cross_entropy_of(reference_z, z, lowered):
    lower = torch.zeros_like(z)
    lower[range(len(z)), lowered.tokens] = lowered.by
    q = (reference_z - lower).softmax(-1)
    return -(q * z.log_softmax(-1)).sum(-1)


def weighted(values, seed=3):
    """A scalar that gives every value a weight of its own, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    return sum(
        (v * torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype)).sum()
        for v in values
    )


def assert_like_twin(ours, twin, ours_leaves, twin_leaves, rtol):
    """Values, and gradients of one weighted sum of them; tolerances relative to the largest."""
    for value, expected in zip(ours, twin, strict=True):
        scale = float(expected.detach().abs().max()) if len(expected) else 0.0
        torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=rtol * scale)
    grads = torch.autograd.grad(weighted(ours), ours_leaves)
    expected_grads = torch.autograd.grad(weighted(twin), twin_leaves)
    for leaf, grad, expected in zip(ours_leaves, grads, expected_grads, strict=True):
        assert grad.dtype == leaf.dtype
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(grad.double(), expected, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("n", [0, 1, N])
def test_statistics_and_their_gradients_are_those_of_full_logits(columns, n, bias):
    logits, targets = make(n=n, bias=bias), some_targets(n)
    twin = in_float64(logits)
    assert_like_twin(
        logit_statistics(logits, targets),
        slow_statistics(twin, targets),
        leaves(logits),
        leaves(twin),
        rtol=1e-6,  # float32, sums of 101 terms
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("n", [0, 1, N])
def test_kl_and_its_gradients_are_those_of_full_logits(columns, n, bias):
    policy, reference = make(1, n=n, bias=bias), make(2, n=n, bias=not bias)
    twin = in_float64(policy)
    assert_like_twin(
        [kl_divergence(reference, policy)],
        [slow_kl(in_float64(reference), twin)],
        leaves(policy),
        leaves(twin),
        rtol=2e-6,  # differences of two softmaxes
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("n", [0, 1, N])
def test_margins_and_their_gradients_are_those_of_full_logits(columns, n, bias):
    logits = make(n=n, bias=bias)
    twin = in_float64(logits)
    assert_like_twin(
        [logit_margin(logits)], [slow_margin(twin)], leaves(logits), leaves(twin), rtol=1e-6
    )


@pytest.mark.parametrize("by", [1.5, 10.0, torch.inf])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("n", [0, 1, N])
def test_cross_entropy_and_its_gradients_are_those_of_full_logits(columns, n, bias, by):
    policy, reference = make(1, n=n, bias=bias), make(2, n=n, bias=not bias)
    twin, lowered = in_float64(policy), Lowered(some_targets(n), by)
    assert_like_twin(
        [cross_entropy(reference, policy, lowered)],
        [slow_cross_entropy(in_float64(reference), twin, lowered)],
        leaves(policy),
        leaves(twin),
        rtol=2e-6,  # differences of two softmaxes
    )


def test_margins_of_words_that_are_the_largest_for_many_add_up_in_float32():
    # 2000 positions with one largest word: in bfloat16 a sum stops growing at 256.
    hidden = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(5, 1, dtype=torch.bfloat16)
    weight[3] = 1
    logit_margin(Logits(hidden, weight.requires_grad_(), None)).sum().backward()
    expected = torch.tensor([-400.0, -400, -400, 1600, -400])
    torch.testing.assert_close(weight.grad[:, 0].float(), expected, rtol=2**-8, atol=0)


def test_of_equally_large_logits_the_first_gets_the_margins_gradient(columns):
    weight = torch.zeros(VOCABULARY, 1)
    weight[[20, 60, 90]] = 2.0  # in one chunk or in three
    weight.requires_grad_()
    logit_margin(Logits(torch.ones(N, 1), weight, None)).sum().backward()
    expected = torch.full((VOCABULARY, 1), -N / VOCABULARY)
    expected[20] += N
    torch.testing.assert_close(weight.grad, expected)


def test_what_is_left_of_a_certain_reference_is_exact():
    # q = 1 - 1e-9, and 0.9999 after lowering by 11.5: taken from q itself, 1 - q would be 0.
    z = torch.tensor([[20.7, 0.0, -1.0]])
    reference, policy = (Logits(torch.ones(1, 1), column.T, None) for column in (z, z / 40))
    lowered = Lowered(torch.tensor([0]), 11.5)
    expected = cross_entropy_of(z.double(), z.double() / 40, lowered)
    found = cross_entropy(reference, policy, lowered)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_statistics_have_the_gradients_of_finite_differences(thirteen_columns):
    logits, targets = make(dtype=torch.float64), some_targets()

    def values(*tensors):
        return tuple(logit_statistics(Logits(*tensors), targets))

    assert torch.autograd.gradcheck(values, tuple(logits))


def test_kl_has_the_gradients_of_finite_differences(thirteen_columns):
    policy, reference = make(1, dtype=torch.float64), make(2, dtype=torch.float64)

    def value(*tensors):
        return kl_divergence(reference, Logits(*tensors))

    assert torch.autograd.gradcheck(value, tuple(policy))


def test_margins_have_the_gradients_of_finite_differences(thirteen_columns):
    def value(*tensors):
        return logit_margin(Logits(*tensors))

    assert torch.autograd.gradcheck(value, tuple(make(dtype=torch.float64)))


def test_cross_entropy_has_the_gradients_of_finite_differences(thirteen_columns):
    policy, reference = make(1, dtype=torch.float64), make(2, dtype=torch.float64)

    def value(*tensors):
        return cross_entropy(reference, Logits(*tensors), Lowered(some_targets(), 1.5))

    assert torch.autograd.gradcheck(value, tuple(policy), fast_mode=True)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite_and_right(columns, extreme):
    # Logits of 10,000: exp overflows. One position has a single such logit, one has all of them.
    logits = make(scale=0.1)
    with torch.no_grad():
        logits.hidden[0], logits.weight[60] = 0, 0
        logits.hidden[0, 0], logits.weight[60, 0] = 100, extreme / 100
        logits.hidden[1], logits.weight[:, 4] = 0, extreme / 100
        logits.hidden[1, 4] = 100
    targets = torch.full((N,), 60)
    twin = in_float64(logits)
    ours, theirs = logit_statistics(logits, targets), slow_statistics(twin, targets)
    # float32 at 10,000 has steps of 1e-3: of the logits, and so of e to their power.
    assert_like_twin(ours, theirs, leaves(logits), leaves(twin), rtol=2e-3)
    ours, theirs = [logit_margin(logits)], [slow_margin(twin)]
    assert_like_twin(ours, theirs, leaves(logits), leaves(twin), rtol=1e-5)
    reference = make(5, scale=0.1)
    for pair in ((reference, logits), (logits, reference)):
        expected = slow_kl_by_logs(*(in_float64(one) for one in pair))
        # Sums over the vocabulary of numbers of 10,000 cancel: some of those steps add up.
        torch.testing.assert_close(kl_divergence(*pair).double(), expected, rtol=1e-5, atol=2e-2)
        lowered = Lowered(targets, 10.0)
        expected = slow_cross_entropy(*(in_float64(one) for one in pair), lowered).detach()
        found = cross_entropy(*pair, lowered).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-2)


def slow_kl_by_logs(reference, policy):
    """`slow_kl` where p underflows to 0."""
    log_p, log_q = full(policy).log_softmax(-1), full(reference).log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).detach()


def test_kl_of_a_model_from_itself_is_zero_with_no_gradient(columns):
    policy = make()
    divergence = kl_divergence(policy, policy)
    torch.testing.assert_close(divergence, torch.zeros(N), rtol=0, atol=1e-6)
    for grad in torch.autograd.grad(divergence.sum(), leaves(policy)):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def test_no_gradient_reaches_the_reference(thirteen_columns):
    policy, reference = make(1), make(2)
    weighted(divergences(reference, policy)).backward()
    assert all(tensor.grad is None for tensor in reference)


def divergences(reference, policy):
    lowered = Lowered(some_targets(len(policy.hidden)), 10.0)
    return kl_divergence(reference, policy), cross_entropy(reference, policy, lowered)


def everything(reference, policy):
    statistics = logit_statistics(policy, some_targets(len(policy.hidden)))
    return *statistics, logit_margin(policy), *divergences(reference, policy)


# What needs no gradient gets none.


@pytest.mark.parametrize("frozen", range(3), ids=Logits._fields)
def test_a_frozen_part_gets_no_gradient_and_the_others_keep_theirs(columns, frozen):
    whole, part, reference = make(), make(), make(2)
    part[frozen].requires_grad_(False)
    for logits in (whole, part):
        weighted(everything(reference, logits)).backward()
    for n, (ours, theirs) in enumerate(zip(part, whole, strict=True)):
        if n == frozen:
            assert ours.grad is None
        else:
            assert torch.equal(ours.grad, theirs.grad)


def test_a_frozen_head_costs_no_tensor_of_its_size(thirteen_columns):
    logits = make(n=2)
    logits.weight.requires_grad_(False)
    logits.bias.requires_grad_(False)
    reference = make(2, n=2)
    with Largest([*logits, *reference]) as largest:
        weighted(everything(reference, logits)).backward()
    assert largest.made < logits.weight.numel()


def test_nothing_is_kept_where_no_gradient_is_asked_for():
    logits = make()
    with torch.no_grad():
        values = everything(make(2), logits)
    assert not any(tensor.requires_grad for tensor in values)


def test_the_backward_pass_can_be_run_twice(columns):
    logits = make()
    loss = weighted(everything(make(2), logits))
    first = torch.autograd.grad(loss, leaves(logits), retain_graph=True)
    second = torch.autograd.grad(loss, leaves(logits))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_a_tied_weight_gets_the_sum_of_both_gradients(columns):
    weight = make().weight
    twin = weight.detach().double().requires_grad_()
    ids, targets = torch.arange(N), some_targets()
    ours = logit_statistics(Logits(weight[ids].tanh(), weight, None), targets)
    theirs = slow_statistics(Logits(twin[ids].tanh(), twin, None), targets)
    assert_like_twin(ours, theirs, [weight], [twin], rtol=1e-6)


# Memory.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_positions_by_vocabulary_is_ever_alive(thirteen_columns, dtype):
    # 300 positions: a chunk of 13 columns at 7 positions is one column here.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    logits = Logits(hidden, weight, None)
    with Largest([hidden, weight]) as largest:
        weighted(everything(logits, logits)).backward()
    assert largest.made <= max(hidden.numel(), weight.numel()) < 300 * VOCABULARY / 10


# Low precision.


@pytest.mark.parametrize("how", ["bfloat16 tensors", "autocast"])
def test_half_precision_logits_are_summed_in_float32(columns, how):
    # The matmul rounds to bfloat16 as the head's own does; a softmax in bfloat16 as well would be
    # off by 2**-8 relative per term.
    dtype = torch.bfloat16 if how == "bfloat16 tensors" else torch.float32
    policy, reference, targets = make(1, dtype=dtype), make(2, dtype=dtype), some_targets()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        ours = everything(reference, policy)
        z, reference_z = (
            torch.nn.functional.linear(*logits).double() for logits in (policy, reference)
        )
    assert all(tensor.dtype == torch.float32 for tensor in ours)
    p, q = z.softmax(-1), reference_z.softmax(-1)
    others = z.scatter(1, targets[:, None], -torch.inf).logsumexp(-1)
    expected = (
        *(z[range(N), targets], others, z.logsumexp(-1), z.mean(-1)),
        z.max(-1).values - z.mean(-1),
        (q * (q / p).log()).sum(-1),
        cross_entropy_of(reference_z.detach(), z, Lowered(targets, 10.0)),
    )
    for value, expected_value in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=1e-5)
    # Outside autocast, as the Trainer calls it. Gradients of logits are rounded to 8 bits too.
    grads = torch.autograd.grad(weighted(ours), leaves(policy))
    expected_grads = torch.autograd.grad(weighted(expected), leaves(policy))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        scale = float(expected_grad.abs().max())
        torch.testing.assert_close(grad, expected_grad, rtol=2e-2, atol=2e-2 * scale)


def test_a_well_learned_token_keeps_its_gradient_in_bfloat16():
    # p(target) = 0.9999: the gradient of its logit is 1e-4, and the difference of two numbers
    # rounded to bfloat16 would be 0.
    logits = Logits(
        torch.ones(1, 1, dtype=torch.bfloat16),
        torch.tensor([[9.25], [0.0]], dtype=torch.bfloat16, requires_grad=True),
        None,
    )
    found = logit_statistics(logits, torch.tensor([0]))
    nll = found.logsumexp - found.target
    (grad,) = torch.autograd.grad(nll, [logits.weight], torch.ones(1))
    expected = -1 / (1 + torch.tensor(9.25).exp())
    torch.testing.assert_close(grad[0, 0].float(), expected, rtol=1e-2, atol=0)
