"""Published data sets by name, and the file formats that they come in."""

import json

import pytest

from unlearn_llm.data_sets import find_file, hub_address
from unlearn_llm.errors import UserError
from unlearn_llm.rows import READERS, load_rows, read_file


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("indent", [None, 4])
def test_an_object_of_columns_is_read_and_empty_columns_left_out(tmp_path, indent):
    content = {"instructions": ["Do this.", "Do that."], "tags": ["a", "b"], "inputs": []}
    file = save(tmp_path / "I-CoNa.json", json.dumps(content, indent=indent))
    assert read_file(file) == [
        {"instructions": "Do this.", "tags": "a"},
        {"instructions": "Do that.", "tags": "b"},
    ]


def test_columns_of_unlike_lengths_are_refused(tmp_path):
    file = save(tmp_path / "a.json", {"instructions": ["a", "b"], "tags": ["c"]})
    with pytest.raises(UserError, match=r"one length, got instructions 2, tags 1"):
        read_file(file)


def test_one_row_of_messages_is_no_object_of_columns(tmp_path):
    row = {"messages": [{"role": "user", "content": "Who?"}]}
    assert read_file(save(tmp_path / "a.json", row)) == [row]


def test_a_list_of_texts_becomes_rows(tmp_path):
    file = save(tmp_path / "forget.json", ["One text.", "Another."])
    assert read_file(file) == [{"text": "One text."}, {"text": "Another."}]


def test_a_file_is_found_in_the_folder_and_below_it(tmp_path):
    deep = save(tmp_path / "safety" / "evaluation" / "Q-Harm.json", {"instructions": ["a"]})
    for folder in (tmp_path, deep.parent):
        assert find_file("safety", folder, "Q-Harm", READERS) == deep
    direct = save(tmp_path / "Q-Harm.jsonl", {"instructions": "b"})
    assert find_file("safety", tmp_path, "Q-Harm", READERS) == direct


def test_a_file_that_stands_twice_below_the_folder_is_refused(tmp_path):
    for order in ("official", "closer_look"):
        save(tmp_path / order / "forget10.json", {"question": "a", "answer": "b"})
    with pytest.raises(UserError, match=r"more than once: closer_look.*, official.*of one"):
        load_rows("tofu/forget10", folder=str(tmp_path))


def test_a_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no XSTest split 'xstest_prompts'.*no data files"):
        load_rows("xstest/xstest_prompts", folder=str(tmp_path))
    with pytest.raises(UserError, match=r"no folder .*nowhere with MUSE's files"):
        load_rows("muse/news/verbmem/forget", folder=str(tmp_path / "nowhere"))


def test_addresses_on_the_hub():
    assert hub_address("tofu", "forget10_perturbed") == "locuslab/TOFU:forget10_perturbed"
    found = hub_address("muse", "books/knowmem/forget_qa_icl")
    assert found == "muse-bench/MUSE-Books:knowmem:forget_qa_icl"
    assert hub_address("xstest", "xstest_prompts") == "Paul/XSTest"


@pytest.mark.parametrize("source", ["real_person/forget_perturbed", "safety/Q-Harm"])
def test_what_is_not_on_the_hub_is_said_to_be_elsewhere(source):
    with pytest.raises(UserError, match=r"not on the hub. Get them from .*github.com.*folder="):
        load_rows(source)
