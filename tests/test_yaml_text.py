import pytest

from unlearn_llm.errors import RecipeError
from unlearn_llm.yaml_text import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("300", 300),
        ("-7", -7),
        ("010", "010"),  # YAML 1.1: 8
        ("1:30", "1:30"),  # YAML 1.1: 90
        ("no", "no"),  # YAML 1.1: false
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("", None),
        ("1e-5x", "1e-5x"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        (".inf", ".inf"),
        ("'7'", "7"),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    read = parse_yaml(f"key: {text}", "x")["key"]
    assert read == value and type(read) is type(value)


def test_what_is_dumped_is_read_back():
    values = ["no", "1e-5", "010", "1:30", "", "null", "~", "a: b", "# c", "é\n", "=", "<<"]
    content = {"text": values, "numbers": [1e-5, 0.1, 1, -3, 1e22], "n": None, "d": {"e": {}}}
    assert parse_yaml(dump_yaml(content), "x") == content


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\na: 2", "x, line 2: the key 'a' stands twice."),
        ("a: &b 1\nc: *b", "x, line 2: aliases (*name) are not read; write the value out."),
        ("a: !!python/name:os.system", "x, line 1: tags are not read"),
        ("1: 2", "x, line 1: expected a key that is text, got 1."),
        ("\ta: 1", "x, line 1: found character '\\t'"),
        ("a: [", "x, line 1: "),
        ("[" * 5000, "x: nested too deeply."),
    ],
)
def test_yaml_that_means_more_than_it_says_is_refused(text, problem):
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "x")
    assert str(caught.value).startswith(problem)
