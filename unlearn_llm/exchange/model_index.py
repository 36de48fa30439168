"""Scores as the `model-index` of a model card on the Hugging Face hub."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

DATASETS = {"tofu": "locuslab/TOFU", "open_unlearning": "locuslab/TOFU"}
"""Hub ids of the data that a suite asks about."""


def model_index(
    details: Mapping[str, Any],
    name: str,
    base_model: str | None = None,
    members: bool = False,
    relation: str | None = None,
) -> str:
    """Write the YAML front matter of a model card, with every score that was measured.

    Names of scores keep "_proxy" and other judges' names.

    Args:
        details: What scores.json holds.
        name: Of the model.
        base_model: Hub id of the model that was unlearned.
        members: Also those that composites are made of, such as forget/rouge.
        relation: To the base model: finetune or adapter.

    Source: huggingface_hub ModelCardData, EvalResult. Differs: no difference.
    """
    suite = details["suite"]
    data = DATASETS.get(suite["name"], suite["name"])
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data,
            dataset_name=f"{suite['name']} {suite['split']}",
            dataset_config=f"{suite['split']}_perturbed",
            dataset_args={"limit": suite["limit"]},
            metric_type=score["aggregate"],
            metric_name=score_name,
            metric_value=score["value"],
        )
        for score_name, score in details["scores"].items()
        if score["value"] is not None and (members or "/" not in score_name)
    ]
    card = ModelCardData(
        model_name=name, eval_results=results, tags=["unlearning"], base_model=base_model
    )
    if base_model is not None and relation is not None:
        card["base_model_relation"] = relation
    return f"---\n{card.to_yaml()}\n---\n"
