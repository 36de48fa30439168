import random
from collections import Counter
from itertools import islice

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from unlearn_llm.errors import UserError
from unlearn_llm.schedule import SCHEDULES, Alternate, Draw, Joint, ScheduledSampler

N_FORGET, N_RETAIN = 7, 23


def sampler(schedule, **changed):
    settings = {
        "lengths": {"forget": [5] * N_FORGET, "retain": [5] * N_RETAIN},
        "steps": 60,
        "window": 4,
        "seed": 3,
        **changed,
    }
    return ScheduledSampler(schedule, **settings)


def windows(plan, size=4):
    draws = iter(plan)
    while window := list(islice(draws, size)):
        yield window


def rows_of(plan, role):
    return [getattr(draw, role) for draw in plan if getattr(draw, role) is not None]


def passes(rows, n):
    """Cut the rows of a role into passes; the last one may be incomplete."""
    return [rows[start : start + n] for start in range(0, len(rows), n)]


def test_alternate_1_5_trains_forget_once_and_then_retain_five_times():
    roles = [Alternate(1, 5).roles(step) for step in range(12)]
    assert roles == ([("forget",)] + [("retain",)] * 5) * 2


def test_the_role_of_a_step_does_not_depend_on_the_steps_asked_before():
    schedule = Alternate(2, 3)
    in_order = [schedule.roles(step) for step in range(50)]
    steps = list(range(50))
    random.Random(0).shuffle(steps)
    assert {step: schedule.roles(step) for step in steps} == dict(enumerate(in_order))


def test_joint_trains_both_roles_at_every_step_forget_first():
    assert {Joint().roles(step) for step in range(5)} == {("forget", "retain")}


def test_after_forget_cycles_every_step_is_a_retain_step():
    # SCRUB with msteps 2: forget pass, retain pass, twice; then retain passes.
    schedule = Alternate(2, 3, forget_cycles=2)
    letters = "".join(schedule.roles(step)[0][0] for step in range(15))
    assert letters == "ffrrrffrrrrrrrr"


def test_forget_epochs_beyond_forget_cycles_are_refused():
    schedule = Alternate(2, 3, forget_cycles=2)
    assert schedule.steps_for(3) == schedule.steps_for(4) == 10
    with pytest.raises(UserError, match="has 4 forget steps; num_train_epochs asks for 5"):
        schedule.steps_for(5)


@pytest.mark.parametrize("changed", [{"forget_cycles": 0}, {"forget_cycles": 1, "retain": 0}])
def test_forget_cycles_that_mean_nothing_are_refused(changed):
    with pytest.raises(UserError, match="forget_cycles needs at least 1"):
        Alternate(**changed)


def test_alternate_with_one_side_zero_trains_the_other_only():
    assert {Alternate(1, 0).roles(step) for step in range(5)} == {("forget",)}
    assert {Alternate(0, 1).roles(step) for step in range(5)} == {("retain",)}


@pytest.mark.parametrize(("forget", "retain"), [(0, 0), (-1, 2), (2, -1)])
def test_alternate_refuses_impossible_numbers(forget, retain):
    with pytest.raises(UserError, match="not both 0"):
        Alternate(forget, retain)


@pytest.mark.parametrize(
    ("schedule", "forget_steps", "steps"),
    [
        (Joint(), 7, 7),
        (Alternate(1, 5), 7, 42),
        (Alternate(2, 3), 7, 20),  # four cycles: 8 forget steps, the fewest that hold 7
        (Alternate(1, 0), 7, 7),
    ],
)
def test_steps_for_is_the_fewest_whole_cycles_with_that_many_forget_steps(
    schedule, forget_steps, steps
):
    assert schedule.steps_for(forget_steps) == steps
    counted = sum("forget" in schedule.roles(step) for step in range(steps))
    assert counted >= forget_steps


def test_a_schedule_without_forget_steps_has_no_forget_epochs():
    with pytest.raises(UserError, match="Set max_steps"):
        Alternate(0, 1).steps_for(3)


def test_an_unknown_schedule_is_answered_with_the_nearest_name():
    with pytest.raises(UserError, match="Did you mean 'alternate'"):
        SCHEDULES["alternating"]


@pytest.mark.parametrize("schedule", [Joint(), Alternate(1, 5), Alternate(2, 3)])
def test_a_window_holds_exactly_the_roles_of_its_step(schedule):
    plan = sampler(schedule)
    for step, window in enumerate(windows(plan)):
        held = {
            tuple(role for role in ("forget", "retain") if getattr(draw, role) is not None)
            for draw in window
        }
        assert held == {schedule.roles(step)}
    assert step == 59


def test_the_length_of_a_plan_is_the_number_of_its_draws():
    plan = sampler(Alternate(1, 5))
    assert len(plan) == len(list(plan)) == 240


@pytest.mark.parametrize(("role", "n"), [("forget", N_FORGET), ("retain", N_RETAIN)])
@pytest.mark.parametrize("schedule", [Joint(), Alternate(1, 2)])
def test_every_pass_holds_every_row_once(schedule, role, n):
    # One row per step, so that sorting inside windows cannot move a row to another pass.
    *whole, _ = passes(rows_of(sampler(schedule, window=1, steps=120), role), n)
    assert len(whole) >= 2
    for rows in whole:
        assert sorted(rows) == list(range(n))


def test_rows_are_used_equally_often_whatever_the_window():
    counts = Counter(rows_of(sampler(Alternate(1, 2)), "retain"))
    assert len(counts) == N_RETAIN
    assert max(counts.values()) - min(counts.values()) <= 1


def test_passes_come_in_different_orders():
    orders = passes(rows_of(sampler(Alternate(0, 1), window=1, steps=3 * N_RETAIN), "retain"), 23)
    assert len({tuple(order) for order in orders}) == 3


def test_seeds_give_different_plans_and_one_seed_one_plan():
    first, again, other = (list(sampler(Joint(), seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_forget_and_retain_rows_are_ordered_independently():
    lengths = {"forget": [1] * 9, "retain": [1] * 9}
    plan = list(sampler(Joint(), lengths=lengths, window=1, steps=9))
    assert [draw.forget for draw in plan] != [draw.retain for draw in plan]


def test_the_plan_leaves_the_global_generators_alone():
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    list(sampler(Joint(), pairing="fixed"))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_the_plan_does_not_depend_on_the_global_generators():
    torch.manual_seed(1)
    first = list(sampler(Alternate(1, 5)))
    torch.manual_seed(2)
    random.seed(2)
    assert list(sampler(Alternate(1, 5))) == first


@pytest.mark.parametrize("schedule", [Joint(), Alternate(1, 2)])
def test_two_ranks_share_the_plan_and_draw_no_row_twice_in_a_pass(schedule):
    plan = sampler(schedule, window=4, steps=40)
    batches = BatchSampler(plan, batch_size=2, drop_last=False)
    ranks = [list(BatchSamplerShard(batches, num_processes=2, process_index=i)) for i in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 40
    # Together, step for step, the two ranks hold the window of one process.
    for step, window in enumerate(windows(plan)):
        assert [*ranks[0][step], *ranks[1][step]] == window
    # Half of the draws are not enough for a second pass: no retain row twice, over both ranks.
    drawn = [row for rank in ranks for batch in rank for row in rows_of(batch, "retain")]
    assert max(Counter(drawn).values()) == -(-len(drawn) // N_RETAIN)
    first_pass = [
        row for one, two in zip(*ranks, strict=True) for row in rows_of([*one, *two], "retain")
    ][: N_RETAIN // 4 * 4]
    assert len(set(first_pass)) == len(first_pass)


def test_a_resumed_run_draws_what_it_would_have_drawn():
    # The Trainer skips the batches of the steps done; a longer run begins like a shorter one.
    whole = list(sampler(Alternate(1, 5), steps=60))
    assert list(islice(sampler(Alternate(1, 5), steps=60), 7 * 4, None)) == whole[28:]
    assert list(sampler(Alternate(1, 5), steps=25)) == whole[:100]


def test_fixed_pairing_gives_a_forget_row_the_same_partner_in_every_pass():
    partners = {}
    for draw in sampler(Joint(), pairing="fixed"):
        partners.setdefault(draw.forget, set()).add(draw.retain)
    assert len(partners) == N_FORGET
    assert {len(retain) for retain in partners.values()} == {1}


def test_random_pairing_reaches_every_retain_row():
    # 60 steps x 4 = 240 draws = ten passes over 23 retain rows.
    assert set(rows_of(sampler(Joint()), "retain")) == set(range(N_RETAIN))


def test_fixed_pairing_changes_nothing_in_steps_of_one_role():
    plans = [list(sampler(Alternate(1, 2), pairing=p)) for p in ("fixed", "random")]
    assert plans[0] == plans[1]


def test_rows_are_sorted_inside_a_window_longest_first():
    lengths = {
        "forget": [(7 * row) % 31 for row in range(N_FORGET)],
        "retain": [(11 * row) % 37 for row in range(N_RETAIN)],
    }
    for window in windows(sampler(Joint(), lengths=lengths)):
        for role in ("forget", "retain"):
            drawn = [lengths[role][getattr(draw, role)] for draw in window]
            assert drawn == sorted(drawn, reverse=True)


def test_sorting_stays_inside_the_window():
    sorted_lengths = {"forget": list(range(N_FORGET)), "retain": list(range(N_RETAIN))}
    by_length = windows(sampler(Alternate(1, 2), lengths=sorted_lengths))
    for ours, plain in zip(by_length, windows(sampler(Alternate(1, 2))), strict=True):
        assert Counter(ours) == Counter(plain)


def test_a_set_smaller_than_a_window_is_drawn_several_times():
    lengths = {"forget": [1] * 3, "retain": [1] * N_RETAIN}
    plan = sampler(Alternate(1, 0), lengths=lengths, window=8, steps=3)
    assert Counter(rows_of(plan, "forget")) == {0: 8, 1: 8, 2: 8}


def test_a_draw_names_no_row_of_a_role_that_is_not_trained():
    assert set(sampler(Alternate(1, 0), steps=1)) <= {Draw(forget=row) for row in range(N_FORGET)}


def test_without_sorting_a_window_keeps_the_order_of_the_pass():
    lengths = {"forget": [1, 9, 5, 7, 3, 8, 2], "retain": [5] * N_RETAIN}
    plain = sampler(Joint(), lengths=lengths, by_length=False)
    by_length = sampler(Joint(), lengths=lengths)
    for drawn, ordered in zip(windows(plain), windows(by_length), strict=True):
        assert {d.forget for d in drawn} == {d.forget for d in ordered}
        ordered_lengths = [lengths["forget"][d.forget] for d in ordered]
        assert ordered_lengths == sorted(ordered_lengths, reverse=True)
    assert [d.forget for d in plain] != [d.forget for d in by_length]
