"""The Triton kernel against `update`, `codec` and `noise`: on a GPU, or else interpreted."""

import math

import pytest
import torch

from unlearn_llm.optim import DualAdamWPlus, codec, set_role, update
from unlearn_llm.optim.noise import counters, noise, noise_key
from unlearn_llm.optim.task import Rule, Stored, Task
from unlearn_llm.optim.update import Moments

triton = pytest.importorskip("triton")
from unlearn_llm.optim import triton_codec, triton_step  # noqa: E402  where there is Triton
from unlearn_llm.optim.triton_step import step  # noqa: E402

tl = triton.language
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there, see conftest


@triton.jit
def encode_kernel(
    values, codes, noise, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, PTX: tl.constexpr
):
    at = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    drawn = tl.load(noise + at) + 1
    code = triton_codec.encode(tl.load(values + at), 1.0, SIGNED, drawn, STOCHASTIC, PTX)
    tl.store(codes + at, code)


@triton.jit
def draw_kernel(out, key):
    at = tl.arange(0, 4096)
    mean, square, base_mean, base_square = triton_codec.draw(
        at.to(tl.uint32), tl.load(key).to(tl.uint32, bitcast=True)
    )
    tl.store(out + at, mean)
    tl.store(out + 4096 + at, square)
    tl.store(out + 2 * 4096 + at, base_mean)
    tl.store(out + 3 * 4096 + at, base_square)


COMPILED = isinstance(encode_kernel, triton.JITFunction)
SIZES = (1, 255, 0, 256, 257, 5000, 768)
COEFFICIENTS = update.coefficients(
    lr=1e-3,
    weight_decay=0.1,
    eps=1e-8,
    betas=(0.9, 0.95),
    role_step=3,
    base_betas=(0.8, 0.99),
    total_step=7,
)
LR = COEFFICIENTS.lr


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def blocks(flat):
    padded = torch.zeros(math.ceil(flat.numel() / codec.BLOCK) * codec.BLOCK, device=flat.device)
    padded[: flat.numel()] = flat
    return padded.view(-1, codec.BLOCK)


def stored(moments, signed_square, coded, draws=(None, None)):
    """Keep moments, in 8 bits by the reference where `coded`."""
    if not coded:
        return Stored(*moments)
    pairs = [
        codec.quantize(blocks(number), signed, None if drawn is None else blocks(drawn))
        for number, signed, drawn in zip(moments, (True, signed_square), draws, strict=True)
    ]
    codes = [code.flatten()[: moments.mean.numel()].clone() for code, _ in pairs]
    return Stored(*codes, *(scale.flatten() for _, scale in pairs))


def opened(pair, signed_square):
    if pair.mean_scale is None:
        return Moments(pair.mean.clone(), pair.square.clone())
    numbers = []
    for codes, scale, signed in (
        (pair.mean, pair.mean_scale, True),
        (pair.square, pair.square_scale, signed_square),
    ):
        values = codec.table(signed, codes.device)[codes.int()]
        numbers.append((blocks(values) * scale[:, None]).flatten()[: codes.numel()])
    return Moments(*numbers)


def make(size, *, coded=True, base_coded=True, plus=True, dtype=torch.float32, key=0):
    def normal():
        return torch.randn(size, device=DEVICE)

    grad = (normal() * 0.01).to(dtype)
    delta = Moments(normal() * 0.01, normal() * 1e-4 if plus else normal().square() * 1e-4)
    base = Moments(normal() * 0.01, normal().square() * 1e-4)
    return Task(
        normal().to(dtype),
        grad,
        stored(delta, plus, coded),
        stored(base, False, base_coded) if plus else None,
        noise_key(ordinal=key, step=7),
    )


def reference(task, rule, coefficients):
    """Give param, moments, base and what was met after a step of the specification."""
    plus = task.base is not None
    param, grad = task.param.float().clone(), task.grad.float()
    moments = opened(task.moments, plus)
    draws = [None] * 4
    if rule.stochastic:
        draws = noise(counters(task.noise_key, 0, param.numel(), param.device))
    base = met = None
    if plus:
        base = opened(task.base, False)
        met = update.dual_plus_update(
            param,
            grad,
            base,
            moments,
            coefficients,
            base_order=rule.base_order,
            max_update=rule.max_update,
            observe=rule.observe,
        )
        base = stored(base, False, task.base.mean_scale is not None, draws[2:])
    else:
        update.dual_update(param, grad, moments, coefficients)
    moments = stored(moments, plus, task.moments.mean_scale is not None, draws[:2])
    return rounded(param, task.param.dtype), moments, base, met


def rounded(param, dtype):
    if not COMPILED and dtype == torch.bfloat16:  # the interpreter cuts bits off
        param = (param.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return param.to(dtype)


def check_step(tasks, rule, coefficients=COEFFICIENTS):
    """Step, and compare with the specification from the same state."""
    full = [task for task in tasks if task.param.numel() > 0]
    wanted = [reference(task, rule, coefficients) for task in full]
    observed = step(tasks, coefficients, rule)
    got = [[task.param, task.moments, task.base] for task in full]
    check_params([g[0] for g in got], [w[0] for w in wanted])
    check_stored(
        [pair for g in got for pair in g[1:] if pair is not None],
        [pair for w in wanted for pair in w[1:3] if pair is not None],
    )
    met = [w[3] for w in wanted if w[3] is not None]
    if not met:
        assert observed is None
        return
    assert observed.negative.shape == observed.largest.shape == ()
    # An entry whose second moment passes through zero may do so on either side of it.
    assert abs(observed.negative.item() - sum(one.negative.item() for one in met)) <= 3
    # And there the step is large: its relative error is that of the difference of two numbers.
    assert observed.largest.item() == pytest.approx(max(m.largest.item() for m in met), rel=0.02)


def check_params(got, wanted):
    single, half = [], []
    for ours, theirs in zip(got, wanted, strict=True):
        error = (ours.float() - theirs.float()).abs()
        (single if ours.dtype == torch.float32 else half).append(error)
    if single:
        # float32 rounding of parameters around 1, but for entries where the update is singular.
        assert torch.cat(single).quantile(0.98) < 3e-7
        assert torch.cat(single).max() < 0.05 * LR
    if half:  # within rounding of the middle between two numbers, either is right
        assert (torch.cat(half) > 0).float().mean() < 0.01
        assert torch.cat(half).max() < 0.02


def check_stored(got, wanted):
    differences = []
    for ours, theirs in zip(got, wanted, strict=True):
        if ours.mean_scale is None:
            for number, right in zip(ours[:2], theirs[:2], strict=True):
                atol = 1e-6 * right.abs().max().item()
                torch.testing.assert_close(number, right, rtol=1e-5, atol=atol)
        else:
            torch.testing.assert_close(ours[2:], theirs[2:], rtol=2e-6, atol=0)
            for codes, right in zip(ours[:2], theirs[:2], strict=True):
                differences.append((codes.int() - right.int()).abs())
    if differences:  # numbers within rounding of the middle between two codes go to either
        difference = torch.cat(differences)
        assert difference.max() <= 1
        assert (difference > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("base_coded", [True, False, None])
def test_a_step_is_that_of_the_specification(coded, base_coded):
    tasks = [
        make(size, coded=coded, base_coded=base_coded, plus=base_coded is not None, key=key)
        for key, size in enumerate(SIZES)
    ]
    check_step(tasks, Rule(max_update=10.0))


@pytest.mark.parametrize("base_order", ["lagged", "base_first"])
@pytest.mark.parametrize("max_update", [None, 0.5])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_rule_is_that_of_the_specification(base_order, max_update, stochastic):
    tasks = [make(size, key=size) for size in (1300, 1536)]
    check_step(tasks, Rule(base_order, max_update, stochastic))


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_computed_in_float32(dtype, plus):
    tasks = [make(size, plus=plus, dtype=dtype) for size in (700, 2048)]
    check_step(tasks, Rule(max_update=10.0))


def test_steps_follow_each_other():
    tasks = [make(size, key=size) for size in (300, 1024)]
    for role_step in range(1, 5):
        numbers = {"lr": LR, "weight_decay": 0.0, "eps": 1e-8, "betas": (0.9, 0.95)}
        one = update.coefficients(
            **numbers, role_step=role_step, base_betas=(0.9, 0.95), total_step=2 * role_step
        )
        keys = [noise_key(ordinal, 2 * role_step) for ordinal in range(2)]
        tasks = [task._replace(noise_key=key) for task, key in zip(tasks, keys, strict=True)]
        for task in tasks:
            task.grad.copy_(torch.randn_like(task.grad) * 0.01)
        check_step(tasks, Rule(max_update=10.0, stochastic=True), one)


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_first_step_from_zeros_keeps_blocks_of_zeros(stochastic):
    task = make(768)
    for pair in (task.moments, task.base):
        for number in pair:
            number.zero_()
        pair.mean.fill_(127)  # the code of zero
    task.moments.square.fill_(127)
    task.grad[256:512] = 0
    before = task.param.clone()
    one = update.coefficients(lr=LR, weight_decay=0.0, eps=1e-8, betas=(0.9, 0.95), role_step=1)
    check_step([task], Rule(stochastic=stochastic), one)
    assert torch.equal(task.param[256:512], before[256:512])
    assert torch.equal(task.base.square[256:512], torch.zeros_like(task.base.square[256:512]))
    assert task.base.square_scale[1] == 0


def test_second_moments_too_small_for_a_reciprocal_are_not_overestimated():
    task = make(256)
    task.grad.fill_(1e-22)  # its square is no normal float32
    task.base.square_scale.zero_()
    step([task], COEFFICIENTS, Rule())
    assert opened(task.base, False).square.max() <= 1e-44
    assert task.param.isfinite().all()


def test_only_the_entries_of_a_parameter_are_written():
    # Views, one entry off the beginning of an allocation, so that nothing is aligned either.
    sizes = 700, 768
    tasks, rooms = [], []
    for size in sizes:
        made = make(size)
        room = [torch.full((tensor.numel() + 9,), 77).to(tensor) for tensor in parts(made)]
        views = [
            there[1 : 1 + tensor.numel()] for there, tensor in zip(room, parts(made), strict=True)
        ]
        for view, tensor in zip(views, parts(made), strict=True):
            view.copy_(tensor)
        pairs = Stored(*views[2:6]), Stored(*views[6:])
        tasks.append(Task(*views[:2], *pairs, made.noise_key))
        rooms += room
    check_step(tasks, Rule(max_update=10.0))
    for there in rooms:
        assert there[0] == 77
        assert (there[-8:] == 77).all()


def parts(task):
    return [task.param, task.grad, *task.moments, *task.base]


def test_every_layout_takes_one_launch(monkeypatch):
    launches = []
    run = triton_step._kernel.run

    def counting(*args, **kwargs):
        launches.append(kwargs["grid"])
        return run(*args, **kwargs)

    monkeypatch.setattr(triton_step._kernel, "run", counting)
    tasks = [make(size, key=size) for size in (256, 512, 4096, 4352, 256)]
    tasks += [make(256, coded=False), make(512, coded=False)]
    tasks += [make(512, dtype=torch.bfloat16)]
    tasks += [make(100), make(0)]
    check_step(tasks, Rule(max_update=10.0))
    assert len(launches) == 4


def test_programs_find_their_parameter_among_many():
    tasks = [make(1 + number % 3, coded=False, plus=False) for number in range(70)]
    check_step(tasks, Rule())


def test_what_nobody_asks_for_is_not_observed():
    check_step([make(600)], Rule(max_update=10.0, observe=False))


def test_nothing_to_do_is_no_step():
    assert step([], COEFFICIENTS, Rule()) is None
    assert step([make(0, plus=False)], COEFFICIENTS, Rule()) is None
    assert step([make(0)], COEFFICIENTS, Rule()) == (0, 0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_are_those_of_the_table(signed, stochastic):
    # All decades alike, every value of the table, and both sides of every value and middle.
    values = 10 ** (-8.5 * torch.rand(4096 * 24, device=DEVICE))
    known = codec.table(signed, DEVICE)
    edges = torch.cat([known, (known[1:] + known[:-1]) / 2]).abs()
    special = torch.cat([known.abs(), edges * (1 + 1e-5), edges * (1 - 1e-5)]).clamp(max=1)
    values[: len(special)] = special
    if signed:
        values[::2] *= -1
    values[-1] = 1
    drawn = torch.rand_like(values) if stochastic else torch.zeros_like(values)
    codes = torch.empty_like(values, dtype=torch.uint8)
    programs = (values.numel() // 4096,)
    encode_kernel[programs](values, codes, drawn, signed, stochastic, COMPILED)
    wanted, _ = codec.quantize(values[None], signed, drawn[None] if stochastic else None)
    difference = (codes.int() - wanted[0].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < (3e-4 if stochastic else 2e-5)


def test_noise_is_that_of_every_other_kernel():
    key = noise_key(5, 9)
    out = torch.empty(4, 4096, device=DEVICE)
    draw_kernel[(1,)](out, torch.tensor([key], dtype=torch.int32, device=DEVICE))
    assert torch.equal(out - 1, torch.stack(noise(counters(key, 0, 4096, out.device))))


@pytest.mark.gpu
def test_a_step_takes_no_more_than_a_megabyte():
    tasks = [make(2**20, key=key) for key in range(300)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(tasks, COEFFICIENTS, Rule(max_update=10.0, stochastic=True))
    assert torch.cuda.max_memory_allocated() - before <= 2**20


@pytest.mark.parametrize("bits", [32, 8])
def test_an_optimizer_that_steps_with_the_kernel_is_one_that_steps_in_torch(bits, monkeypatch):
    def run():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((32, 16), 7)]
        optimizer = DualAdamWPlus(
            params, lr=1e-2, state_bits=bits, min_8bit_size=256, max_update=1.0
        )
        for role in ["forget", "retain", "retain"]:
            set_role(optimizer, role)
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        return params, optimizer.drain_observations()

    expected, seen = run()
    monkeypatch.setattr(DualAdamWPlus, "_kernel", lambda *_: (triton_step.step, True))
    actual, seen_by_kernel = run()
    for one, other in zip(expected, actual, strict=True):
        # A code between two may go either way, which moves an entry by a part of a step.
        assert (one - other).abs().quantile(0.99) < (1e-6 if bits == 32 else 1e-4)
    for role, observed in seen.items():
        assert seen_by_kernel[role] == pytest.approx(observed, rel=1e-2)
