import json

import pytest

from unlearn_llm.errors import UserError
from unlearn_llm.rows import QA, check_disjoint, load_rows, read_file, split_tasks, to_pairs

ROWS = [{"question": "Who?", "answer": "She."}, {"question": "Où ?", "answer": "Là-bas ☕"}]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


# Files.


def test_a_json_list_and_json_lines_give_the_same_rows(tmp_path):
    listed = write(tmp_path / "a.json", json.dumps(ROWS, indent=2))
    lines = write(tmp_path / "b.json", "\n".join(json.dumps(row) for row in ROWS))
    dotted = write(tmp_path / "b.jsonl", "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n\r\n")
    assert read_file(listed) == read_file(lines) == read_file(dotted) == ROWS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_unusual_line_separators_may_stand_inside_a_string(tmp_path, name):
    rows = [{"question": "one\u2028two", "answer": "three\u0085four\x0cfive"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows * 2)
    assert read_file(write(tmp_path / name, text)) == rows * 2


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, name):
    lines = "question,answer\nWho?,She." if name == "a.csv" else json.dumps(ROWS[0])
    file = write(tmp_path / name, lines, encoding="utf-8-sig")
    assert read_file(file) == ROWS[:1]


def test_csv_keeps_commas_quotes_and_line_breaks_in_quotes(tmp_path):
    file = write(tmp_path / "a.csv", 'question,answer\r\n"a, ""b""?","one\ntwo"\r\n')
    assert read_file(file) == [{"question": 'a, "b"?', "answer": "one\ntwo"}]


def test_parquet_is_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet") == ROWS


def test_load_rows_reads_a_file_by_its_path(tmp_path):
    file = write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    assert load_rows(str(file)) == ROWS[:1]


# Files that cannot be read.


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path):
    write(tmp_path / "forget.jsonl", "{}")
    with pytest.raises(UserError, match=r"no file .*forgot\.jsonl.*Did you mean 'forget\.jsonl'"):
        load_rows(str(tmp_path / "forgot.jsonl"))


def test_a_missing_folder_is_an_answer_too(tmp_path):
    with pytest.raises(UserError, match="There is no file"):
        load_rows(str(tmp_path / "gone" / "forget.json"))


def test_a_wrong_suffix_names_those_that_are_read(tmp_path):
    with pytest.raises(UserError, match=r"expected \.json, \.jsonl, \.csv, \.parquet, got '\.txt'"):
        load_rows(str(write(tmp_path / "a.txt", "Who? She.")))


def test_bad_json_is_named_by_its_line(tmp_path):
    lines = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": oops}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: not JSON"):
        read_file(lines)
    listed = write(tmp_path / "a.json", '[{"a": 1},\n {"a": oops}]')
    with pytest.raises(UserError, match=r"a\.json, line 2: not JSON"):
        read_file(listed)


def test_messages_do_not_repeat_the_text_of_a_row(tmp_path):
    with pytest.raises(UserError) as caught:
        read_file(write(tmp_path / "a.jsonl", '{"question": "hush hush" oops}'))
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", '"a"\n"b"', '[["Who?", "She."]]'])
def test_rows_that_are_no_objects_are_named(tmp_path, text):
    with pytest.raises(UserError, match="row 0: expected an object, got"):
        read_file(write(tmp_path / "a.json", text))


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "[]"), ("a.jsonl", "\n \n"), ("a.csv", "question,answer\n")]
)
def test_a_file_without_rows_is_refused(tmp_path, name, text):
    with pytest.raises(UserError, match="holds no rows"):
        read_file(write(tmp_path / name, text))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    file = write(tmp_path / "a.csv", "question,answer\nWo?,Köln\n", encoding="latin-1")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_file(file)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a Parquet file"):
        read_file(write(tmp_path / "a.parquet", "Who?"))


@pytest.mark.parametrize("cell", ["x" * 200_000, "a\0b"])
def test_cells_that_the_csv_reader_may_refuse_give_rows_or_an_answer(tmp_path, cell):
    file = write(tmp_path / "a.csv", f"question,answer\nWho?,{cell}\n")
    try:
        assert read_file(file) == [{"question": "Who?", "answer": cell}]
    except UserError as error:
        assert "a.csv, line 2" in str(error)


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_what_is_too_large_to_be_read_at_once_is_refused(tmp_path, name, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    many = [{"question": "Who?", "answer": "She. " * 1000}] * 100  # much smaller when packed
    if name == "a.json":
        write(tmp_path / name, json.dumps(many))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), tmp_path / name)
    assert len(read_file(tmp_path / name)) == 100
    size = (tmp_path / name).stat().st_size
    monkeypatch.setattr("unlearn_llm.rows.MAX_BYTES", min(size - 1, 3000))
    with pytest.raises(UserError, match=rf"{name}: \d+ bytes at once.*Write it as \.jsonl"):
        read_file(tmp_path / name)


def test_a_line_is_read_no_further_than_it_may_be_long(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]))
    monkeypatch.setattr("unlearn_llm.rows.MAX_LINE", len(json.dumps(ROWS[1])) - 1)
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: expected at most"):
        read_file(file)


# Layouts.


@pytest.mark.parametrize(
    ("question", "answer"),
    [("question", "answer"), ("prompt", "completion"), ("instruction", "output")],
)
def test_known_column_names_are_found(question, answer):
    assert to_pairs([{question: "Who?", answer: "She.", "id": 3}], "x") == [QA("Who?", "She.")]


def test_other_column_names_are_given():
    rows = [{"q": "Who?", "a": "She."}]
    assert to_pairs(rows, "x", question_column="q", answer_column="a") == [QA("Who?", "She.")]


def test_one_given_column_goes_with_a_known_one():
    rows = [{"question": "Who?", "paraphrased_answer": "Her.", "answer": "She."}]
    assert to_pairs(rows, "x", answer_column="paraphrased_answer") == [QA("Who?", "Her.")]


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_an_alternate_answer_is_read_from_its_column():
    rows = [{"question": "Who?", "answer": "She.", "alternate": "He."}]
    assert to_pairs(rows, "x") == [QA("Who?", "She.", "He.")]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert to_pairs([{"messages": turns, "alternate": "c"}], "x") == [QA("a", "b", "c")]
    with pytest.raises(UserError, match="x, row 0: column 'alternate' should hold text, got int"):
        to_pairs([{**rows[0], "alternate": 3}], "x")


def test_messages_give_the_last_user_turn_and_its_reply():
    rows = [
        messages(("system", "s"), ("user", "Who?"), ("assistant", "She.")),
        messages(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
    ]
    assert to_pairs(rows, "x") == [QA("Who?", "She."), QA("c", "d")]


def test_a_question_without_a_reply_does_not_take_an_earlier_ones():
    rows = [messages(("user", "a"), ("assistant", "b"), ("user", "unanswered"))]
    assert to_pairs(rows, "x") == [QA("a", "b")]


@pytest.mark.parametrize(
    "row",
    [
        messages(("user", "Who?")),
        messages(("assistant", "She.")),
        {"messages": "Who? She."},
        {"messages": None},
        {"messages": [{"role": "user"}, {"role": "assistant"}]},
        {"question": "Who?", "answer": "She."},
        messages(("user", "Who?"), ("assistant", None)),
        messages(("user", [{"type": "text", "text": "Who?"}]), ("assistant", "She.")),
    ],
)
def test_messages_that_cannot_be_read_are_named_by_their_row(row):
    good = messages(("user", "Who?"), ("assistant", "She."))
    with pytest.raises(UserError, match="mine, row 1"):
        to_pairs([good, row], "mine")


def test_missing_columns_are_answered_with_what_is_there():
    with pytest.raises(UserError, match=r"it has id, answr.*Did you mean 'answr'"):
        to_pairs([{"id": 1, "answr": "She."}], "mine")


def test_a_given_column_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"expected column 'reply'.*Did you mean 'replies'"):
        to_pairs([{"question": "Who?", "replies": "She."}], "mine", answer_column="reply")


@pytest.mark.parametrize("value", [None, 3, 1.5, True, ["a"], {"a": 1}])
def test_a_value_that_is_no_text_is_named_by_row_and_column(value):
    rows = [*ROWS, {"question": "Who?", "answer": value}]
    with pytest.raises(UserError, match=r"mine, row 2: column 'answer' should hold text, got"):
        to_pairs(rows, "mine")


def test_text_that_no_tokenizer_can_read_is_named_by_row_and_column():
    rows = json.loads('[{"question": "Who?", "answer": "half a pair: \\ud83d"}]')
    with pytest.raises(UserError, match="mine, row 0: column 'answer'"):
        to_pairs(rows, "mine")


def test_no_rows_are_refused():
    with pytest.raises(UserError, match="mine holds no rows"):
        to_pairs([], "mine")


# Overlap and tasks.


def test_a_forget_row_in_the_retain_set_is_refused_and_named():
    forget = [QA("Who?", "She."), QA("When?", "Now.")]
    with pytest.raises(UserError, match=r"1 forget rows also stand in the retain set \(forget row"):
        check_disjoint(forget, [QA("What?", "That."), QA("when? ", "NOW.")])


def test_composed_and_decomposed_letters_are_the_same_text():
    with pytest.raises(UserError, match="1 forget rows"):
        check_disjoint([QA("Who?", "Ren\u00e9")], [QA("Who?", "Rene\u0301")])


def test_overlap_may_be_allowed():
    check_disjoint([QA("Who?", "She.")], [QA("Who?", "She.")], allow_overlap=True)


def test_one_question_with_another_answer_is_no_overlap():
    check_disjoint([QA("Who?", "She.")], [QA("Who?", "He.")])


def test_a_task_is_split_from_the_others():
    rows = [{"task_id": number, "n": n} for n, number in enumerate(["1", "2", "1", 2])]
    chosen, others = split_tasks(rows, "2", "x")
    assert [row["n"] for row in chosen] == [1, 3]
    assert [row["n"] for row in others] == [0, 2]


def test_an_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="no row with task_id '3'; it has 1, 2"):
        split_tasks([{"task_id": "1"}, {"task_id": "2"}], "3", "x")


# Synthetic authors and TOFU by name.


def test_synthetic_splits_come_by_name():
    pairs = [to_pairs(load_rows(f"synthetic/{split}"), split) for split in ("forget10", "retain90")]
    check_disjoint(*pairs)
    assert load_rows("synthetic/forget10", seed=1) != load_rows("synthetic/forget10", seed=2)


def test_an_unknown_synthetic_split_is_refused():
    with pytest.raises(UserError, match="Unknown synthetic split"):
        load_rows("synthetic/forgot10")


def test_a_tofu_split_that_a_folder_lacks_is_answered_with_the_nearest(tmp_path):
    write(tmp_path / "forget10.json", json.dumps(ROWS))
    with pytest.raises(UserError, match=r"no TOFU split 'forget11'.*Did you mean 'forget10'"):
        load_rows("tofu/forget11", folder=str(tmp_path))


def test_a_tofu_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*gone.*data\.folder"):
        load_rows("tofu/forget10", folder=str(tmp_path / "gone"))


def test_a_name_that_is_neither_file_nor_data_set_is_refused():
    with pytest.raises(UserError, match="'nobody/nothing' is no file here, and no data set"):
        load_rows("nobody/nothing")


@pytest.mark.parametrize(
    ("forget", "retain", "n_forget"),
    [("forget01", "retain99", 40), ("forget05", "retain95", 200), ("forget10", "retain90", 400)],
)
def test_tofus_forget_and_retain_sets_are_disjoint_and_make_4000(shared, forget, retain, n_forget):
    folder = str(shared / "data/tofu/official")
    pairs = [to_pairs(load_rows(f"tofu/{split}", folder), split) for split in (forget, retain)]
    assert [len(rows) for rows in pairs] == [n_forget, 4000 - n_forget]
    check_disjoint(*pairs)


def test_tofus_full_set_overlaps_with_every_forget_row(shared):
    folder = str(shared / "data/tofu/official")
    full, forget = (
        to_pairs(load_rows(f"tofu/{split}", folder), split) for split in ("full", "forget10")
    )
    with pytest.raises(UserError, match="400 forget rows also stand in the retain set"):
        check_disjoint(forget, full)


@pytest.mark.parametrize(("split", "tasks", "size"), [("forget01", 10, 40), ("forget10", 9, 400)])
def test_closer_looks_file_holds_that_many_tasks_of_one_size(shared, split, tasks, size):
    # methods.md 3.1: forget01/05/10.json hold 10/10/9 disjoint tasks of 40/200/400 rows.
    rows = load_rows(f"tofu/{split}", str(shared / "data/tofu/closer_look"))
    for task in range(1, tasks + 1):
        chosen, others = split_tasks(rows, str(task), split)
        assert len(chosen) == size
        assert len(others) == (tasks - 1) * size
        check_disjoint(to_pairs(chosen, split), to_pairs(others, split))


def test_closer_looks_first_task_is_tofus_own_split_in_another_order(shared):
    folder = shared / "data/tofu"
    rows = load_rows("tofu/forget10", str(folder / "closer_look"))
    task, _ = split_tasks(rows, "1", "forget10")
    official = load_rows("tofu/forget10", str(folder / "official"))
    assert sorted(to_pairs(task, "task 1")) == sorted(to_pairs(official, "official"))
