"""Switching the adapter off: an unmerged adapter hides what its base model still knows."""

from peft import PeftModel

from unlearn_llm.attacks.asking import recalls
from unlearn_llm.attacks.base import Material, NotApplicable, Subject, Trial, attack


@attack("adapter_off")
def adapter_off(subject: Subject, material: Material) -> list[Trial]:
    """Ask the base model, which is published with the adapter, the plain questions.

    Source: this package. Differs: beside it stands the gold model as it answers the plain
        question, which has no adapter to take off.
    """
    if not isinstance(subject.model, PeftModel):
        raise NotApplicable("the model has no adapter")
    with subject.model.disable_adapter():
        return [Trial("adapter_off", recalls(subject, material.forget))]
