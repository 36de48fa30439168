"""Suites as users write them: what is read, what is refused, what is asked of which row."""

import json
import re

import pytest

from unlearn_llm.errors import RecipeError, UserError
from unlearn_llm.evaluation import options
from unlearn_llm.evaluation.aggregates import AGGREGATES
from unlearn_llm.evaluation.metrics import METRICS
from unlearn_llm.evaluation.samples import closer_look_order, samples_of
from unlearn_llm.evaluation.suite import JUDGES, Suite, suites
from unlearn_llm.rows import read_file

SMALL = """
name: small
limit: 3
probes:
  forget:
    source: synthetic/{split}_perturbed
    columns: {paraphrased: paraphrased_answer, perturbed: perturbed_answer}
    metrics: [probability, similarity]
scores:
  probability: {aggregate: mean, options: {probe: forget, metric: probability}}
  similarity: {aggregate: mean, options: {probe: forget, metric: similarity}}
  UFE: {aggregate: ufe}
"""


@pytest.fixture
def load(tmp_path):
    """Load a suite from text, with one piece of it replaced."""

    def load_text(old="", new="", **overrides):
        assert old in SMALL
        path = tmp_path / "small.yaml"
        path.write_text(SMALL.replace(old, new, 1) if old else SMALL, encoding="utf-8")
        return Suite.load(path, **overrides)

    return load_text


def refused(load, old, new):
    with pytest.raises(RecipeError) as error:
        load(old, new)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_suite_on_disk_loads():
    assert {"tofu", "open_unlearning", "privacy", "synthetic"} <= set(suites())
    assert {"real_person", "safety", "muse", "downstream", "wmdp"} <= set(suites())
    for name in suites():
        assert Suite.load(name).name == name


@pytest.mark.parametrize("name", list(suites()))
def test_a_suite_measures_all_that_its_scores_read(name):
    """Every (probe, metric) that an aggregate asks for is there: no score is missing by mistake."""
    suite = Suite.load(name).with_proxies()
    columns = _Asked()
    for score in suite.scores.values():
        AGGREGATES[score.aggregate](columns, **suite.options_of(score))
    taken = {(p, m) for p, probe in suite.probes.items() for m in probe.metrics}
    assert columns.asked - {(p, "id") for p in suite.probes} <= taken


class _Asked(dict):
    """Columns that note what they are asked for."""

    def __init__(self):
        super().__init__()
        self.asked = set()

    def __contains__(self, probe):
        return True

    def __getitem__(self, probe):
        outer = self

        class OfProbe(dict):
            def __contains__(self, metric):
                return True

            def __getitem__(self, metric):
                outer.asked.add((probe, metric))
                return [0.5, 0.5]

        return OfProbe()


def test_the_forget_probe_entails_from_the_generation_the_others_from_the_reference():
    suite = Suite.load("tofu")
    assert "entailment_from_generation" in suite.probes["forget"].metrics
    for name in ("retain", "real_authors", "world_facts"):
        assert "entailment" in suite.probes[name].metrics
        assert "entailment_from_generation" not in suite.probes[name].metrics
    assert "probability" in suite.probes["retain"].metrics
    assert "probability_normalised" in suite.probes["world_facts"].metrics


def test_overrides_replace_fields(load):
    suite = load(split="forget05", limit="all")
    assert suite.split == "forget05" and suite.limit == "all"


def test_an_unknown_key_is_one_line_with_the_nearest(load):
    message = refused(load, "limit: 3", "limt: 3")
    assert message.startswith("small.yaml: unknown key 'limt'. Did you mean 'limit'?")


def test_an_unknown_key_of_a_probe_is_named_with_its_place(load):
    message = refused(load, "columns:", "colums:")
    assert "unknown key 'probes.forget.colums'. Did you mean 'columns'?" in message


def test_an_unknown_key_among_the_columns_is_named(load):
    message = refused(load, "paraphrased:", "paraphrase:")
    assert "'probes.forget.columns.paraphrase'. Did you mean 'paraphrased'?" in message


def test_an_unknown_override_is_refused(load):
    with pytest.raises(RecipeError, match="unknown key 'splitt'"):
        load(splitt="forget05")


def test_a_value_of_the_wrong_kind_is_refused(load):
    message = refused(load, "limit: 3", "limit: three")
    assert "limit" in message and "'three'" in message


def test_an_unknown_metric_is_refused(load):
    message = refused(load, "[probability, similarity]", "[probabilty, similarity]")
    assert "probes.forget.metrics: Unknown metric 'probabilty'. Did you mean" in message


def test_an_unknown_aggregate_is_refused(load):
    assert "Unknown aggregate 'uef'" in refused(load, "{aggregate: ufe}", "{aggregate: uef}")


def test_an_unknown_option_is_refused(load):
    message = refused(load, "{aggregate: ufe}", "{aggregate: ufe, options: {rogue: rouge1}}")
    assert "ufe has no option 'rogue'. Did you mean 'rouge'?" in message


def test_a_score_of_a_probe_that_is_not_there_is_refused(load):
    message = refused(load, "probe: forget, metric: probability", "probe: fogret, metric: rouge")
    assert "there is no probe 'fogret'. Did you mean 'forget'?" in message


def test_a_score_of_a_metric_that_is_not_taken_is_refused(load):
    message = refused(load, "metric: probability", "metric: rouge")
    assert "does not take the metric 'rouge'" in message


def test_an_unknown_suite_is_named_with_the_nearest():
    with pytest.raises(RecipeError, match=r"Unknown suite 'tofo'. Did you mean 'tofu'?"):
        Suite.load("tofo")


def test_scores_of_proxies_say_so_in_their_names(load):
    suite = load(proxies=True).with_proxies()
    assert list(suite.scores) == ["probability", "similarity_proxy", "UFE_proxy"]
    assert suite.probes["forget"].metrics == ["probability", "similarity_proxy"]
    assert suite.scores["UFE_proxy"].options == {
        "similarity": "similarity_proxy",
        "entailment": "entailment_from_generation_proxy",
    }
    assert suite.with_proxies() == suite


def test_a_kind_that_is_not_listed_keeps_its_judge(load):
    suite = load(proxies=["entailment"]).with_proxies()
    assert suite.probes["forget"].metrics == ["probability", "similarity"]
    assert suite.scores["UFE_proxy"].options == {"entailment": "entailment_from_generation_proxy"}


def test_without_proxies_nothing_is_renamed(load):
    suite = load()
    assert suite.with_proxies() == suite


def test_every_metric_with_a_judge_has_a_proxy():
    needy = [name for name in METRICS if METRICS[name].judge in ("entailment", "similarity")]
    assert needy
    for name in needy:
        assert METRICS[options.proxy_of(name, JUDGES)].judge is None
    # Nothing that counts words tells harm: without a judge it is not measured.
    assert options.proxy_of("harmfulness", JUDGES) == "harmfulness"


def test_a_composite_names_the_metrics_inside_it():
    untargeted = options.metrics_of("ovr", {"kind": "untargeted"})
    targeted = options.metrics_of("ovr", {"kind": "targeted"})
    assert targeted - untargeted == {"refusal_entailment"}
    assert {"entailment", "entailment_from_generation", "rouge"} <= untargeted


def test_proxies_reach_the_members_of_a_harmonic_mean():
    members = [{"probe": "p", "metric": "similarity"}, {"probe": "p", "metric": "rouge"}]
    replaced = options.with_proxies("hmean", {"members": members}, JUDGES)["members"]
    assert [member["metric"] for member in replaced] == ["similarity_proxy", "rouge"]


def test_samples_are_the_first_rows_with_their_numbers(load):
    found = samples_of(load(), "forget")
    assert [sample.id for sample in found.samples] == ["0", "1", "2"]
    assert found.notes == ["first 3 of 40 rows"]
    assert found.samples[0].refusal and len(found.samples[0].perturbed) == 5


def test_a_missing_column_is_named_with_the_nearest(load):
    with pytest.raises(UserError, match=r"no column 'paraphrase_answer'.*'paraphrased_answer'"):
        samples_of(load("paraphrased_answer", "paraphrase_answer"), "forget")


def test_a_missing_reference_column_falls_back_to_the_answer_and_says_so(tmp_path):
    rows = [{"question": "Who?", "answer": "She", "perturbed_answer": ["He"]}]
    (tmp_path / "real_authors_perturbed.json").write_text(json.dumps(rows), encoding="utf-8")
    found = samples_of(Suite.load("tofu", folder=str(tmp_path)), "real_authors")
    assert found.samples[0].reference is None and found.samples[0].paraphrased == "She"
    assert found.notes == ["no column 'original_answer': compared with the answer"]


def test_a_value_that_is_not_text_is_named_by_row_only(tmp_path):
    rows = [{"question": "a secret question", "answer": None}]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    probe = {"source": str(tmp_path / "rows.json"), "metrics": []}
    suite = Suite(name="x", probes={"forget": probe}, scores={})
    with pytest.raises(UserError, match="row 0: column 'answer' should hold text") as error:
        samples_of(suite, "forget")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("split", ["forget01", "forget05", "forget10"])
def test_closer_look_order_is_that_of_its_files(shared, split):
    official = read_file(shared / "data" / "tofu" / "official" / f"{split}_perturbed.json")
    theirs = read_file(shared / "data" / "tofu" / "closer_look" / f"{split}_perturbed.json")
    first_task = [row["question"] for row in theirs if row["task_id"] == "1"]
    ordered = closer_look_order(official, split)
    assert [row["question"] for row in ordered] == first_task


def test_closer_look_order_keeps_the_row_numbers(shared):
    folder = str(shared / "data" / "tofu" / "official")
    suite = Suite.load("tofu", folder=folder, row_order="closer_look", limit=50)
    ids = [int(sample.id) for sample in samples_of(suite, "forget").samples]
    assert ids == [*range(360, 400), *range(200, 210)]
    assert [s.id for s in samples_of(suite, "retain").samples][:2] == ["0", "1"]


def test_closer_look_order_of_another_split_is_refused(load):
    with pytest.raises(RecipeError, match=re.escape("row_order: closer_look is known for")):
        samples_of(load(split="forget20", row_order="closer_look"), "forget")
