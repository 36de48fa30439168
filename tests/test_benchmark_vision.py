"""The image classifier: metrics, losses and masks by hand, and that the table can be resumed."""

import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch.distributions import Categorical, kl_divergence

from unlearn_llm.optim import set_role

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytest.importorskip("sklearn")
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    import vision
    from vision_methods import (
        METHODS,
        Batch,
        ImageGradients,
        adaptive_ascent,
        choose_mask,
        leave_teacher,
        make_optimizer,
        optimizers_of,
        random_labels,
        stay_with_teacher,
        steps,
        take_step,
        unlearn,
    )
    from vision_metrics import METRICS, accuracy, entropies, markdown, membership, summarize
    from vision_task import Images, Task, digits, make_model, make_task, pretrain


@pytest.fixture(scope="module")
def small():
    """A task of 20 and 150 images, and a model that has hardly learned it. Nothing changes them."""
    task = make_task(0)
    parts = zip(task, (20, 150, 40), strict=True)
    task = Task(*(part.at(torch.arange(n)) for part, n in parts))
    return task, pretrain(task.train, seed=0, epochs=2)


def batch_of(logits, labels, *, teacher=None, progress=0.0):
    draws = torch.Generator().manual_seed(0)
    return Batch(logits, torch.as_tensor(labels), teacher, progress, draws)


# The data.


def test_a_seed_forgets_a_tenth_that_no_other_part_has():
    train, test = digits()
    task = make_task(3)
    assert [len(part.labels) for part in task] == [135, 1212, 450]
    assert len(train.labels) == 1347 and len(test.labels) == 450
    rows = {tuple(image.flatten().tolist()) for part in task for image in part.pixels}
    assert len(rows) == 1797  # the noise makes every image another
    assert not torch.equal(task.forget.pixels, make_task(4).forget.pixels)


def test_a_forgotten_class_is_neither_kept_nor_tested():
    train, _ = digits()
    task = make_task(13, "class")
    assert task.forget.labels.unique().tolist() == [3]
    assert len(task.forget.labels) == int((train.labels == 3).sum())
    assert 3 not in task.retain.labels and 3 not in task.test.labels


# The numbers.


def test_accuracy_is_the_percentage_of_right_names():
    images = Images(torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 0]))
    assert accuracy(torch.nn.Identity(), images) == pytest.approx(200 / 3)


def test_entropies_are_scipys():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 1.0, -2.0, 0.5], [900.0, 0.0, 0.0, 0.0]])
    expected = scipy.stats.entropy(logits.double().softmax(1).numpy(), axis=1)
    np.testing.assert_allclose(entropies(logits), expected, atol=1e-15)
    assert entropies(logits)[0] == pytest.approx(math.log(4))


def test_membership_is_what_a_balanced_logistic_regression_says():
    rng = np.random.default_rng(0)
    retain, test = rng.gamma(1, 0.2, 300), rng.gamma(2, 0.4, 90)
    forget = rng.gamma(1.5, 0.3, 500)

    def loss(theta):  # C = 1: half the squared slope plus the weighted losses; the bias is free
        slope, bias = theta
        member, other = slope * retain + bias, slope * test + bias
        weighted = (
            np.logaddexp(0, -member).sum() * 390 / 600 + np.logaddexp(0, other).sum() * 390 / 180
        )
        return 0.5 * slope**2 + weighted

    slope, bias = scipy.optimize.minimize(loss, [0.0, 0.0], tol=1e-10).x
    expected = 100 * np.mean(slope * forget + bias > 0)
    assert 40 < expected < 95
    assert membership(forget, retain, test) == pytest.approx(expected, abs=0.2)  # one image


SLIDES = {  # CIFAR-10, random 10 %: means and deviations as printed, then Gap and Std
    "RT": ((94.61, 100.00, 94.25, 76.26), (0.46, 0.00, 0.18, 0.54), 0.00, 0.30),
    "FT": ((99.16, 99.84, 94.10, 88.77), (0.10, 0.06, 0.09, 0.38), 4.34, 0.16),
    "SCRUB": ((92.88, 99.62, 93.54, 82.78), (0.25, 0.10, 0.22, 0.86), 2.33, 0.36),
    "SFRon": ((94.67, 99.83, 93.98, 77.80), (3.03, 0.13, 0.56, 5.61), 0.51, 2.33),
}


def two_seeds(means, stds):
    """Two rows with these means and population standard deviations."""
    return [
        {name: mean + sign * std for name, mean, std in zip(METRICS, means, stds, strict=True)}
        for sign in (-1, 1)
    ]


@pytest.mark.parametrize("name", SLIDES)
def test_gap_and_std_are_those_of_the_slides(name):
    means, stds, gap, std = SLIDES[name]
    line = summarize(two_seeds(means, stds), two_seeds(*SLIDES["RT"][:2]))
    assert tuple(line.mean.values()) == pytest.approx(means)
    assert tuple(line.std.values()) == pytest.approx(stds)
    assert line.gap == pytest.approx(gap, abs=0.0051)  # printed with two digits
    assert line.average_std == pytest.approx(std, abs=0.0051)


def test_the_table_prints_mean_deviation_and_distance():
    line = summarize(two_seeds(*SLIDES["SCRUB"][:2]), two_seeds(*SLIDES["RT"][:2]))
    last = markdown({"SCRUB": line}).splitlines()[-1]
    assert last.startswith("| SCRUB | 92.88 ± 0.25 (1.73) | 99.62 ± 0.10 (0.38) |")
    assert last.endswith("| 2.33 | 0.36 |")


# The losses.


def test_scrub_leaves_and_stays_by_the_divergence_from_the_teacher():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 10).unbind()
    labels = torch.arange(5)
    batch = batch_of(student, labels, teacher=teacher)
    apart = kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).mean()
    torch.testing.assert_close(leave_teacher(batch), -apart)
    nll = -student.log_softmax(1)[labels, labels].mean()
    torch.testing.assert_close(stay_with_teacher(batch), nll + 0.5 * apart)


def test_sfron_weighs_less_what_is_forgotten_already():
    # Losses 1 and 4 have weights 1 and 1/2 by the root: 4/3 and 2/3 with mean 1.
    probabilities = torch.tensor([math.exp(-1), math.exp(-4)]).double()
    logits = torch.stack([probabilities.log(), (1 - probabilities).log()], 1).requires_grad_()
    whole = adaptive_ascent(batch_of(logits, [0, 0]))
    assert float(whole.detach()) == pytest.approx(-25 * (4 / 3 * 1 + 2 / 3 * 4) / 2)
    halfway = adaptive_ascent(batch_of(logits, [0, 0], progress=0.5))
    assert float(halfway.detach()) == pytest.approx(float(whole.detach()) / 2)
    (gradient,) = torch.autograd.grad(whole, logits)  # the weights are constants
    expected = 25 * torch.tensor([4 / 3, 2 / 3]).double() * (1 - probabilities) / 2
    torch.testing.assert_close(gradient[:, 0], expected)


def test_random_labels_are_drawn_anew():
    logits = torch.randn(400, 10, generator=torch.Generator().manual_seed(1))
    batch = batch_of(logits, torch.zeros(400, dtype=torch.long))
    first, second = random_labels(batch), random_labels(batch)
    assert first != second
    assert float(first) == pytest.approx(-float(logits.log_softmax(1).mean()), rel=0.1)


# Masks.


def test_gradients_are_those_of_a_linear_model_by_hand():
    task = make_task(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double()
    images = Images(task.forget.pixels[:7].double(), task.forget.labels[:7])
    flat = images.pixels.flatten(1)
    errors = model(images.pixels).softmax(1) - torch.nn.functional.one_hot(images.labels, 10)
    each = errors[:, :, None] * flat[:, None, :]  # (7, 10, 64) gradient of each image's loss
    found = ImageGradients(model, Task(images, images, images))
    torch.testing.assert_close(found.mean("forget")[0], each.mean(0).detach())
    torch.testing.assert_close(found.mean_square("retain")[0], each.square().mean(0).detach())
    torch.testing.assert_close(found.mean_square("forget")[1], errors.square().mean(0).detach())


def test_salun_chooses_the_larger_half_of_all_weights(small):
    task, model = small
    loss = torch.nn.functional.cross_entropy(model(task.forget.pixels), task.forget.labels)
    sizes = torch.cat([g.abs().flatten() for g in torch.autograd.grad(loss, model.parameters())])
    chosen = torch.cat([part.flatten() for part in choose_mask(METHODS["SalUn"], model, task)])
    assert int(chosen.sum()) == len(sizes) // 2
    assert sizes[chosen].min() >= sizes[~chosen].max()


def test_sfron_chooses_what_matters_more_to_the_forget_set(small):
    task, model = small
    gradients = ImageGradients(model, task)
    chosen = choose_mask(METHODS["SFRon"], model, task)
    fishers = zip(gradients.mean_square("forget"), gradients.mean_square("retain"), strict=True)
    for mask, (ours, theirs) in zip(chosen, fishers, strict=True):
        assert torch.equal(mask, ours >= theirs)
    share = float(torch.cat([mask.flatten() for mask in chosen]).double().mean())
    assert 0.05 < share < 0.95


@pytest.mark.parametrize("optimizer", ["shared", "dual", "dual_plus"])
def test_salun_moves_nothing_outside_its_mask(small, optimizer):
    task, model = small
    method = METHODS["SalUn"]
    mask = choose_mask(method, model, task)
    after = unlearn(model, task, method, optimizer, 1e-3, mask=mask, seed=0, epochs=2)
    for old, new, free in zip(model.parameters(), after.parameters(), mask, strict=True):
        assert torch.equal(old[~free], new[~free])
        assert not free.any() or not torch.equal(old[free], new[free])


def test_a_step_masks_before_it_clips():
    model = torch.nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, 400.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    take_step(model, optimizer, [torch.tensor([[True, False]])], clip=1.5)
    assert float(model.weight[0, 1].detach()) == float(start[0, 1])  # not even decayed
    moved = start[0, 0] - model.weight[0, 0].detach()
    torch.testing.assert_close(moved, 1.5 + 0.1 * start[0, 0])


# Order of the steps, optimisers.


def test_the_forget_pass_comes_before_the_retain_pass(small):
    task, _ = small
    plan = list(steps(METHODS["RL"], task, 2, torch.Generator().manual_seed(0)))
    assert [role for role, _ in plan] == ["forget", "retain", "retain", "retain"] * 2
    seen = torch.cat([rows for _, rows in plan[1:4]])
    assert seen.sort().values.tolist() == list(range(150))


def test_sfron_forgets_once_in_five_retain_steps(small):
    task, _ = small
    plan = [r for r, _ in steps(METHODS["SFRon"], task, 4, torch.Generator().manual_seed(0))]
    assert plan == [*["forget", *["retain"] * 5] * 2, "forget", "retain", "retain"]


def test_with_one_role_dualoptim_is_adamw(small):
    assert [optimizers_of(METHODS[name]) for name in ("FT", "GA")] == [("shared",)] * 2
    task, model = small
    run = partial(unlearn, model, task, METHODS["GA"], rate=1e-3, seed=0, epochs=3)
    shared, dual = run(optimizer_name="shared"), run(optimizer_name="dual")
    for ours, theirs in zip(dual.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_with_two_roles_each_has_its_own_adamw():
    """Two ordinary AdamW objects on the same weights, as the authors write DualOptim."""
    model, twin = make_model(0), make_model(0)
    dual = make_optimizer("dual", model)
    pair = {role: make_optimizer("shared", twin) for role in ("forget", "retain")}
    for role in ("forget", "retain", "retain", "forget"):
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.randn_like(ours) * (5 if role == "forget" else 1)
            theirs.grad = ours.grad.clone()
        set_role(dual, role)
        for optimizer in (dual, pair[role]):
            optimizer.param_groups[0]["lr"] = 1e-2
            optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if len(m.roles) == 2])
def test_the_three_optimisers_differ_where_there_are_two_roles(small, name):
    task, model = small
    mask = choose_mask(METHODS[name], model, task)
    ends = [
        unlearn(model, task, METHODS[name], optimizer, 1e-3, mask=mask, seed=0, epochs=2)[0].weight
        for optimizer in optimizers_of(METHODS[name])
    ]
    assert len(ends) == 3
    assert not torch.allclose(ends[0], ends[1]) and not torch.allclose(ends[1], ends[2])


# Rows.


@pytest.fixture
def quick(monkeypatch):
    """The benchmark with one pass of everything."""
    monkeypatch.setattr(vision, "pretrain", partial(pretrain, epochs=1))
    monkeypatch.setattr(vision, "unlearn", partial(unlearn, epochs=1))
    vision.start.cache_clear()
    vision.mask_of.cache_clear()
    yield
    vision.start.cache_clear()
    vision.mask_of.cache_clear()


def test_the_same_run_gives_the_same_row_bit_by_bit(quick):
    run = vision.Run("random", "RL", "dual", 1e-3, 0)
    first = vision.do(run)
    vision.start.cache_clear()
    torch.manual_seed(99)  # whatever the program drew before
    assert vision.do(run) == first
    assert vision.do(run._replace(seed=1)) != first


def test_an_interrupted_table_goes_on_and_is_the_uninterrupted_one(monkeypatch, tmp_path):
    done = []

    def fake(run):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(run)
        return {name: 10.0 * run.seed + len(run.method) for name in METRICS}

    rates = {name: dict.fromkeys(optimizers_of(m), 1e-3) for name, m in METHODS.items()}
    monkeypatch.setattr(vision, "do", fake)
    file = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        vision.tabulate("random", rates, [0, 1], file)
    assert len(vision.read_rows(file)) == 4
    done.append(None)  # past the interruption
    table = vision.tabulate("random", rates, [0, 1], file)
    assert len(done) - 1 == len({*done} - {None}) == 2 * (1 + 2 + 5 * 3)
    assert table == vision.tabulate("random", rates, [0, 1], tmp_path / "anew.jsonl")
    assert table["SalUn + DualOptim"].mean["FA"] == 5 + 5.0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_row_of_another_rate_is_not_taken(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"forget": "random", "method": "RL", "optimizer": "dual", "rate": 1e-3, "seed": 0}
    file.write_text(json.dumps({**row, "metrics": {"FA": 1.0}}) + "\n")
    assert vision.Run("random", "RL", "dual", 1e-3, 0) in vision.read_rows(file)
    assert vision.Run("random", "RL", "dual", 3e-3, 0) not in vision.read_rows(file)


def test_the_search_takes_the_rate_nearest_to_retraining(monkeypatch, tmp_path):
    best = {"shared": 1e-4, "dual": 5.6e-4, "dual_plus": 5.4e-4}  # 1e-3 / 1.8, 3e-4 * 1.8

    def fake(run):
        off = 0.0 if run.rate is None else abs(math.log10(run.rate / best[run.optimizer]))
        return {name: 80 + off for name in METRICS}

    monkeypatch.setattr(vision, "do", fake)
    found = vision.search("random", [100], tmp_path / "search.jsonl")
    assert found["SCRUB"] == best and found["GA"] == {"shared": 1e-4}


def test_every_row_of_the_table_has_a_tuned_rate():
    rates = json.loads((BENCHMARKS / "vision_rates.json").read_text())["random"]
    assert {n: tuple(r) for n, r in rates.items()} == {
        name: optimizers_of(method) for name, method in METHODS.items()
    }
    rates = [rate for some in rates.values() for rate in some.values()]
    assert min(vision.GRID) / 2 < min(rates) and max(rates) < 2 * max(vision.GRID)


def test_rates_that_were_never_searched_are_asked_for(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(vision, "RATES", tmp_path / "none.json")
    monkeypatch.setattr(sys, "argv", ["vision.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        vision.main()
    assert stop.value.code == 2 and "--search" in capsys.readouterr().err
