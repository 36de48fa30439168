"""Runs that become tables, and runs that may not."""

import json
import math
import re

import pytest
from finished_runs import SUITE, boards_of, lines_of, texts
from scipy.stats import t

from unlearn_llm.config import UnlearnConfig
from unlearn_llm.errors import UserError
from unlearn_llm.leaderboard import formats
from unlearn_llm.leaderboard.boards import make_boards
from unlearn_llm.leaderboard.runs import DEFAULTS, find_runs, scheme


def test_seeds_become_a_mean_with_the_t_interval(run, tmp_path):
    for seed, ufe in enumerate((0.60, 0.62, 0.70)):
        run(f"a{seed}", {"UFE": ufe, "MU18": 0.5}, seed=seed)
    (board,) = boards_of(tmp_path)
    (line,) = lines_of(board).values()
    # Mean .64; deviations -.04, -.02, .06: variance .0056 / 2; t(.975, 2 degrees) / sqrt(3).
    half = t.ppf(0.975, 2) * math.sqrt(0.0056 / 2 / 3)
    assert texts(line) == {
        "forget10 UFE": f"64.00 ± {100 * half:.2f}",
        "forget10 MU18": "50.00 ± 0.00",
    }
    assert line.runs == "3 seeds"
    (cell,) = [cell for column, cell in line.cells.items() if column.score == "UFE"]
    assert cell.numbers["std"] == pytest.approx(math.sqrt(0.0028))
    assert (cell.numbers["n"], cell.numbers["mean"]) == (3, pytest.approx(0.64))


def test_p_values_are_not_averaged(run, tmp_path):
    for seed, p in enumerate((1e-20, 3e-4, 0.5)):
        run(f"a{seed}", {"forget_quality": p}, seed=seed)
    (board,) = boards_of(tmp_path)
    (line,) = lines_of(board).values()
    assert texts(line) == {"forget10 forget_quality": "1.0e-20 to 0.50"}
    (cell,) = line.cells.values()
    assert cell.order == pytest.approx(3e-4)  # the median is what it is ranked by
    assert cell.numbers == {"min": 1e-20, "median": 3e-4, "max": 0.5, "n": 3}


def test_tasks_are_replicates_like_seeds(run, tmp_path):
    for task in (1, 2, 3):
        # The rows that a task keeps come from another file than task 1's.
        data = {"task_id": task, "retain": f"tofu/retain{99 - task}"}
        run(f"a{task}", {"UFE": 0.6 + task / 100}, data=data)
    (board,) = boards_of(tmp_path)
    (line,) = lines_of(board).values()
    assert line.runs == "3 tasks" and texts(line)["forget10 UFE"].startswith("62.00 ±")


def test_splits_are_columns_and_methods_are_rows(run, tmp_path):
    for split in ("forget05", "forget10"):
        for name, optimizer in (("alternate", None), ("dual", "dual_adamw")):
            run(
                f"{name}-{split}",
                {"UFE": 0.5, "OVR": 0.6 if optimizer else 0.7},
                suite={"split": split},
                optimizer=optimizer,
                warmup_steps=30 if split == "forget05" else 60,
            )
    (board,) = boards_of(tmp_path)
    assert [f"{c.split} {c.score}" for c in board.columns] == [
        "forget05 UFE",
        "forget05 OVR",
        "forget10 UFE",
        "forget10 OVR",
    ]
    assert list(lines_of(board)) == ["idk+gd alternate", "idk+gd dual_adamw"]
    alternate, dual = lines_of(board).values()
    ranks = [[cell.rank for cell in line.cells.values()] for line in (alternate, dual)]
    assert ranks == [[1, 1, 1, 1], [1, 2, 1, 2]]  # equal prints share a rank


def test_best_and_second_are_marked_within_an_objective(run, tmp_path):
    leaks = {"extraction_strength": 0.1}  # down is better
    run("a", {"UFE": 0.5, "TFE": 0.1, **leaks})
    run("b", {"UFE": 0.7, "TFE": 0.3, "extraction_strength": 0.3}, schedule="joint")
    run("c", {"UFE": 0.6, "TFE": 0.1, "extraction_strength": 0.2}, optimizer="dual_adamw")
    untargeted = {"suite": {"objective_kind": "untargeted"}, "objective": "me+gd"}
    run("d", {"UFE": 0.9, "TFE": 0.0, **leaks}, **untargeted)
    (board,) = boards_of(tmp_path, scores=["UFE", "TFE", "extraction_strength"])
    found = {
        name: [(cell.text, cell.rank) for cell in line.cells.values() if cell.text != "–"]
        for name, line in lines_of(board).items()
    }
    assert found == {
        "idk+gd joint": [("70.00", 1), ("30.00", 1), ("0.3000", 0)],
        "idk+gd alternate": [("50.00", 0), ("10.00", 2), ("0.1000", 1)],
        "idk+gd dual_adamw": [("60.00", 2), ("10.00", 2), ("0.2000", 2)],
        "me+gd alternate": [("90.00", 0), ("0.1000", 0)],  # alone, and TFE is none of its aims
    }


def test_settings_that_differ_tell_methods_apart(run, tmp_path):
    plus = {"optimizer": "dual_adamw_plus"}
    run("a", {"UFE": 0.5}, **plus)
    run("b", {"UFE": 0.6}, **plus, optimizer_parameters={"max_update": 1.0})
    run("c", {"UFE": 0.7}, optimizer="dual_adamw", optimizer_parameters={"state_bits": 8})
    run("d", {"UFE": 0.8}, schedule="joint", combine="pcgrad", logging_steps=3)
    assert list(lines_of(boards_of(tmp_path)[0])) == [
        "idk+gd dual_adamw 8bit",
        "idk+gd dual_adamw_plus (optimizer_parameters.max_update=None)",
        "idk+gd dual_adamw_plus (optimizer_parameters.max_update=1.0)",
        "idk+gd pcgrad",
    ]
    assert scheme({"optimizer": "mine:Sgd", "schedule": "joint"}) == "Sgd (joint)"


def test_defaults_are_those_of_a_run():
    config = {name: f.default for name, f in UnlearnConfig.__dataclass_fields__.items()}
    assert {name: config[name] for name in DEFAULTS} == dict(DEFAULTS)


def test_a_score_that_one_seed_lacks_is_not_a_mean_of_the_others(run, tmp_path):
    run("a0", {"UFE": 0.5, "MU18": 0.5}, seed=0)
    run("a1", {"UFE": None, "MU18": 0.5}, seed=1)
    (line,) = lines_of(boards_of(tmp_path)[0]).values()
    assert texts(line)["forget10 UFE"] == "not measured in 1 of 2"


def test_target_and_gold_stand_on_top_and_others_are_left_out(run, tmp_path):
    target = run("target", {"UFE": 0.1, "forget_quality": 1e-9}, kind="finetune")
    gold = run("gold", {"UFE": 0.8, "forget_quality": None}, kind="finetune", reference=None)
    run("other", {"UFE": 0.3}, kind="finetune")
    reference = str(gold / "evaluation" / "records.jsonl")
    scores = {"UFE": 0.7, "forget_quality": 0.2}
    run("a", scores, path=str(target), reference=reference)
    run("b", scores, path=str(target), reference=reference, schedule="joint")
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "scores.json").write_text((gold / "evaluation/scores.json").read_text())
    runs, unread = find_runs([tmp_path])
    (board,), left_out = make_boards(runs)
    assert board.title == "tofu, target"
    found = {name: texts(line) for name, line in lines_of(board).items()}
    assert list(found) == ["initial", "gold", "idk+gd joint", "idk+gd alternate"]
    assert found["gold"] == {"forget10 UFE": "80.00"}  # not compared with itself
    assert not any(cell.rank for cell in lines_of(board)["gold"].cells.values())
    assert [line.partition(" is left out")[0] for line in (*unread, *left_out)] == [
        str(tmp_path / "loose" / "scores.json"),
        str(tmp_path / "other"),
    ]


def test_a_target_measured_by_another_suite_is_left_out(run, tmp_path):
    target = run("target", {"mia_loss": 0.9}, kind="finetune", suite={"name": "privacy"})
    run("a", {"UFE": 0.7}, path=str(target))
    runs, _ = find_runs([tmp_path])
    (board,), left_out = make_boards(runs)
    assert list(lines_of(board)) == ["idk+gd alternate"]
    assert left_out == [f"{target} is left out: no run began with it or is compared with it."]


@pytest.mark.parametrize(
    "details",
    [{}, {"suite": {"name": "tofu"}, "model": {}}, {"suite": [], "model": {}}, {"model": {}}],
)
def test_scores_that_do_not_say_how_they_were_made_are_left_out(run, tmp_path, details):
    run("a", {"UFE": 0.5})
    old = run("old", {"UFE": 0.5}) / "evaluation" / "scores.json"
    old.write_text(json.dumps({"scores": {}, **details}))
    runs, unread = find_runs([tmp_path])
    assert [one.folder.name for one in runs] == ["a"]
    assert unread == [f"{old} is left out: it does not say which suite and model made it."]


def test_scores_that_are_none_are_refused_by_name(run, tmp_path):
    broken = run("a", {"UFE": 0.5}) / "evaluation" / "scores.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="does not hold the scores of an evaluation"):
        find_runs([tmp_path])


INCOMPARABLE = {
    "suite.limit": ({"suite": {"limit": "all"}}, '"all"'),
    "suite.row_order": ({"suite": {"row_order": "official"}}, "closer_look"),
    "suite.judges": ({"suite": {"judges": {"similarity": "mine"}}}, "mine"),
    "suite.proxies": ({"suite": {"proxies": ["entailment"]}}, "entailment"),
    "suite.max_new_tokens": ({"suite": {"max_new_tokens": 80}}, "256"),
    "suite.probes.forget.source": (
        {"suite": {"probes": {"forget": {"source": "mine.jsonl", "columns": {}}}}},
        "mine.jsonl",
    ),
    "suite.probes.forget.columns": (
        {
            "suite": {
                "probes": {"forget": {**SUITE["probes"]["forget"], "columns": {"answer": "a"}}}
            }
        },
        '{"answer": "a"}',
    ),
    "suite.scores.UFE": (
        {"suite": {"scores": {"UFE": {"aggregate": "ufe", "options": {"rouge": "rouge1"}}}}},
        "rouge1",
    ),
    "suite.objective_kind": ({"suite": {"objective_kind": "untargeted"}}, "targeted"),
    "model.template": ({"model": {"template": "plain"}}, "phi_dualoptim"),
    "model.max_length": ({"model": {"max_length": 256}}, "500"),
    "model.dtype": ({"model": {"dtype": "float32"}}, "bfloat16"),
    "model.type": ({"model": {"type": "llama"}}, "phi"),
    "model.parameters": ({"model": {"parameters": 2000}}, "1000"),
    "forget_quality: rows": ({"n": 400}, "300"),
    "reference": ({"reference": "other/records.jsonl"}, "gold/records.jsonl"),
}


@pytest.mark.parametrize(("key", "change"), INCOMPARABLE.items(), ids=INCOMPARABLE)
def test_runs_measured_otherwise_are_refused_and_named(run, tmp_path, key, change):
    scores = {"UFE": 0.5, "forget_quality": 0.1}
    run("a", scores)
    run("b", scores, optimizer="dual_adamw")
    run("c", scores, schedule="joint", **change[0])
    with pytest.raises(UserError) as refused:
        boards_of(tmp_path)
    message = str(refused.value)
    assert f"cannot stand in one table, {key} differs: " in message and "\n" not in message
    assert change[1] in message
    assert f"{tmp_path / 'a'}, {tmp_path / 'b'}; " in message and f"{tmp_path / 'c'}." in message
    hint = re.search(r"--only '(.+)'", message)
    if hint:  # what it proposes works
        assert [line.runs for line in lines_of(boards_of(tmp_path, hint[1])[0]).values()]
    else:
        assert key in ("forget_quality: rows", "reference")


def test_runs_from_two_folders_of_one_name_are_refused(run, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name / "target").mkdir(parents=True)
        run(f"of-{name}", {"UFE": 0.5}, path=str(tmp_path / name / "target"), schedule=name)
    with pytest.raises(UserError, match=re.escape("model.path differs")):
        boards_of(tmp_path)


def test_a_run_that_stands_there_twice_is_refused(run, tmp_path):
    run("a", {"UFE": 0.5}, seed=3)
    run("copy", {"UFE": 0.5}, seed=3)
    with pytest.raises(UserError, match=r"are both idk\+gd alternate with seed 3\. Leave one"):
        boards_of(tmp_path)


def test_older_suites_with_fewer_scores_are_not_refused(run, tmp_path):
    run("a", {"UFE": 0.5, "MU18": 0.6})
    newer = {"scores": {**SUITE["scores"], "new": {"aggregate": "mean"}}, "new_field": 1}
    probe = {**SUITE["probes"]["forget"], "columns": {"reference": None, "group": "author"}}
    newer |= {"probes": {"forget": probe}, "intervals": {"by": "author"}}
    run("b", {"UFE": 0.5, "MU18": 0.7}, suite=newer, schedule="joint")
    assert len(lines_of(boards_of(tmp_path)[0])) == 2


# Published rows.


def test_published_rows_stand_beside_a_run_made_as_the_paper_made_its_own(run, tmp_path):
    run("a", {"UFE": 0.66, "TFE": 0.6, "MU18": 0.5, "OVR": 0.57}, schedule="joint")
    board, *below = boards_of(tmp_path, published=True)
    found = lines_of(board)
    paper = found["idk+gd joint DualOptim+"]
    assert list(texts(paper).values()) == ["71.65", "64.39", "33.92", "50.97"]
    assert all(cell.rank == 0 for cell in found["idk+gd joint"].cells.values())  # alone
    assert "idk+gd dual_adamw_plus 8bit DualOptim+" in found
    # Other models' rows stand apart, with the reason.
    assert below and all("not comparable: another model" in b.title for b in below)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"suite": {"limit": 100}}, "limit 100, there 300"),
        ({"model": {"template": "phi"}}, "template phi, there phi_dualoptim"),
        ({"path": "mine/small"}, "another model"),
    ],
)
def test_published_rows_of_other_settings_stand_apart(run, tmp_path, change, reason):
    run("a", {"UFE": 0.66}, **change)
    board, *below = boards_of(tmp_path, published=True)
    assert list(lines_of(board)) == ["idk+gd alternate"]
    (phi,) = [b for b in below if b.model == "phi-1.5"]
    assert f"(not comparable: {reason})" in phi.title and phi.published


def test_proxies_never_stand_in_a_column_with_published_scores(run, tmp_path):
    run("a", {"UFE_proxy [small]": 0.66, "MU18_proxy": 0.5})
    board, *below = boards_of(tmp_path, published=True)
    assert {column.score for column in board.columns} == {"UFE_proxy [small]", "MU18_proxy"}
    assert not any(line.source for line in lines_of(board).values())
    assert all("not comparable: proxies, other judges" in b.title for b in below) and below
    text = formats.markdown([board, *below])
    assert "forget10<br>UFE_proxy† ↑" in text and "† read by small" in text
