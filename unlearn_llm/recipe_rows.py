"""The rows that a recipe names, as questions with answers."""

from unlearn_llm.recipe import DataSettings
from unlearn_llm.rows import QA, load_rows, split_tasks, to_pairs


def pairs_of(source: str, data: DataSettings) -> list[QA]:
    """Load a source in the columns and from the folder that a recipe names."""
    rows = load_rows(source, folder=data.folder, seed=data.seed)
    return to_pairs(rows, source, data.question_column, data.answer_column)


def texts_of(source: str, data: DataSettings) -> list[str]:
    """Load a source as texts: a question, its answer, the next question."""
    return [text for pair in pairs_of(source, data) for text in pair[:2]]


def forget_and_retain(data: DataSettings) -> tuple[list[QA], list[QA]]:
    """Load both sides of the data of a recipe to unlearn."""
    assert data.forget is not None and data.retain is not None  # checked by Recipe
    if data.task_id is None:
        return pairs_of(data.forget, data), pairs_of(data.retain, data)
    rows = load_rows(data.forget, folder=data.folder, seed=data.seed)
    chosen, others = split_tasks(rows, str(data.task_id), data.forget)
    columns = (data.question_column, data.answer_column)
    other_pairs = to_pairs(others, data.forget, *columns) if others else []
    return (
        to_pairs(chosen, data.forget, *columns),
        [*pairs_of(data.retain, data), *other_pairs],
    )
