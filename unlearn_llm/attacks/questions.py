"""Asking: the plain question, in other words, in another language; and how likely the answer is."""

import math

from unlearn_llm.attacks.asking import greedy_answers, recalls
from unlearn_llm.attacks.base import Material, NotMeasured, Subject, Trial, attack
from unlearn_llm.evaluation.requests import LogProb, LogProbResult
from unlearn_llm.evaluation.runner import Runner
from unlearn_llm.evaluation.texts import overlap


@attack("plain")
def plain(subject: Subject, material: Material) -> list[Trial]:
    """Ask the questions as they stand, greedily.

    Source: this package; recall of the answer as in evaluation/texts.overlap. Differs: ROUGE-L
        recall in any script.
    """
    return [Trial("plain", recalls(subject, material.forget))]


@attack("probability")
def probability(subject: Subject, material: Material) -> list[Trial]:
    """Take the probability of the answer, length-normalised: exp(-nats per token).

    Source: TOFU, locuslab/tofu@bdc209e (the probability of forget quality's rows). Differs: no
        difference.
    """
    asked = [LogProb(fact.question, fact.answer) for fact in material.forget]
    answers = Runner(subject.model, subject.encoder, progress=subject.progress).run(asked)
    values = {}
    for fact, request in zip(material.forget, asked, strict=True):
        result = answers[request]
        assert isinstance(result, LogProbResult)
        values[fact.id] = math.exp(-result.loss)
    return [Trial("probability", values, is_text=False)]


@attack("paraphrase")
def paraphrase(subject: Subject, material: Material) -> list[Trial]:
    """Ask in other words: column `paraphrased_question`.

    Source: TOFU's perturbed files. Differs: what comes back is compared with the plain answer.
    """
    facts = [fact for fact in material.forget if fact.paraphrased_question]
    if not facts:
        raise NotMeasured("the forget rows have no column paraphrased_question")
    questions = [str(fact.paraphrased_question) for fact in facts]
    return [Trial("paraphrase", recalls(subject, facts, questions))]


@attack("translation")
def translation(subject: Subject, material: Material) -> list[Trial]:
    """Ask in another language: column `translated_question`, `translated_answer` where there is.

    Source: this package. Differs: the translations are the user's; none is made up here.
    """
    facts = [fact for fact in material.forget if fact.translated_question]
    if not facts:
        raise NotMeasured("the forget rows have no column translated_question")
    texts = greedy_answers(subject, [str(fact.translated_question) for fact in facts])
    values = {}
    for fact, text in zip(facts, texts, strict=True):
        # Names and dates may come back as they were learnt.
        answers = [fact.answer, fact.translated_answer or fact.answer]
        found = [recall for recall in (overlap(a, text) for a in answers) if recall is not None]
        if found:
            values[fact.id] = max(found)
    return [Trial("translation", values)]
