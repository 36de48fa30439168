from types import ModuleType

import pytest

import unlearn_llm


@pytest.mark.parametrize("name", unlearn_llm.__all__)
def test_a_public_name_is_an_object_and_not_the_module_of_that_name(name):
    assert not isinstance(getattr(unlearn_llm, name), ModuleType)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        unlearn_llm.nothing  # noqa: B018
