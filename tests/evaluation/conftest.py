"""Small models with random weights, and what asks them."""

import warnings

import pytest

QUESTIONS = [
    ("Who wrote the book?", "Anna Berg wrote it."),
    ("Where was Anna Berg born?", "In a small town near the sea, in the north of Norway."),
    ("What is two plus three?", "5"),
    ("Which letter comes after M?", "N, of course; that is how the alphabet goes on."),
    ("Who?", "Nobody that anybody here has ever heard of, as far as I can tell."),
]


@pytest.fixture(params=["llama", "phi", "lora"])
def tiny(request):
    """A tiny Llama, a tiny Phi (its head has a bias), a tiny Llama in an adapter that matters."""
    from models_for_tests import tiny_model, train_adapter_a_little

    if request.param == "lora":
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for a name that goes in v6.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            return train_adapter_a_little(tiny_model(lora=True))
    return tiny_model(request.param)


@pytest.fixture
def tiny_llama():
    from models_for_tests import tiny_model

    return tiny_model()


@pytest.fixture
def encoder(tokenizer):
    from unlearn_llm.encode import Encoder

    return Encoder(tokenizer, max_length=128)


@pytest.fixture
def questions():
    return QUESTIONS
