import math
import random

import pytest

from unlearn_llm.evaluation import texts

SENTENCES = {
    "English": "The author was born in Kuwait City on 8 September 1956.",
    "Chinese": "作者于一九五六年九月八日出生在科威特城。",
    "Arabic": "وُلد المؤلف في مدينة الكويت عام ١٩٥٦.",
    "Russian": "Автор родился в Эль-Кувейте в 1956 году.",
    "Hindi": "लेखक का जन्म कुवैत सिटी में हुआ था।",
    "Thai": "ผู้เขียนเกิดที่เมืองคูเวตซิตี",
    "Japanese": "作者はクウェート市で生まれました。",
    "Korean": "작가는 쿠웨이트시에서 태어났다.",
    "Hebrew": "הסופר נולד בעיר כווית.",
    "Greek": "Ο συγγραφέας γεννήθηκε στην Πόλη του Κουβέιτ.",
    "Bengali": "লেখক কুয়েত সিটিতে জন্মগ্রহণ করেন।",
    "Tamil": "எழுத்தாளர் குவைத் நகரில் பிறந்தார்.",
    "Georgian": "ავტორი ქუვეითში დაიბადა.",
    "Khmer": "អ្នកនិពន្ធកើតនៅទីក្រុងគុយវ៉ែត។",
    "Symbols": "∞ ?!",
}


@pytest.mark.parametrize("script", SENTENCES)
def test_a_verbatim_copy_overlaps_wholly_in_every_script(script: str) -> None:
    assert texts.overlap(SENTENCES[script], SENTENCES[script]) == 1.0
    assert texts.overlap(SENTENCES[script], f"“{SENTENCES[script]}” 123 end") == 1.0


@pytest.mark.parametrize("script", SENTENCES)
def test_another_script_overlaps_not_at_all(script: str) -> None:
    for other in SENTENCES.keys() - {script, "Symbols"}:
        shared_characters = {"Chinese", "Japanese"} >= {script, other}
        shared_numbers = {"English", "Russian"} >= {script, other}
        if not shared_characters and not shared_numbers:
            assert texts.overlap(SENTENCES[script], SENTENCES[other]) == 0.0


def test_rouge_cannot_read_what_it_would_call_forgotten() -> None:
    latin = [name for name, text in SENTENCES.items() if texts.rouge_can_read(text)]
    assert latin == ["English"]
    assert texts.rouge(SENTENCES["Chinese"], SENTENCES["Chinese"]) == (0, 0, 0)
    assert texts.rouge_can_read("Ángel Beltrán, naïve façade")
    assert not texts.rouge_can_read("出生于1956年科威特城的作者")


def test_overlap_counts_words_in_order() -> None:
    # Of "a b c d", "a c" (or "a d", ...) is the longest common subsequence with "d c a c".
    assert texts.overlap("a b c d", "d a x c") == 2 / 4
    assert texts.overlap("北京是首都", "首都是北京") == 2 / 5
    assert texts.overlap("a b", "") == 0.0
    assert texts.overlap("", "a b") is None
    assert texts.overlap(" \n", "a b") is None


def test_overlap_ignores_case_and_unicode_form() -> None:
    assert texts.overlap("CAFÉ Straße", "cafe\u0301 STRASSE") == 1.0
    assert texts.overlap("می\u200cخواهم", "میخواهم") == 1.0


def test_odd_characters_do_no_harm() -> None:
    assert texts.overlap("a\ud800b \x00", "a\ud800b") is not None
    assert texts.rouge("\ud800", "\ud800") == (0, 0, 0)


def test_common_subsequence_equals_the_slow_table() -> None:
    draw = random.Random(0)
    for _ in range(200):
        first = draw.choices("abcd", k=draw.randrange(0, 90))
        second = draw.choices("abcd", k=draw.randrange(0, 90))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                best = max(table[i][j + 1], table[i + 1][j])
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else best
        assert texts.common_subsequence(first, second) == table[-1][-1]


def test_overlap_is_rouge_l_recall_on_plain_words() -> None:
    draw = random.Random(1)
    words = ["tree", "green", "moon", "seven"]  # nothing to stem
    for _ in range(50):
        reference = " ".join(draw.choices(words, k=draw.randrange(1, 12)))
        generation = " ".join(draw.choices(words, k=draw.randrange(1, 12)))
        expected = texts.rouge(reference, generation, stem=False).rougeL_recall
        assert texts.overlap(reference, generation) == pytest.approx(expected)


def test_rouge_stems_only_when_asked() -> None:
    # Words of more than three letters are stemmed: "books" and "book".
    assert texts.rouge("two books", "two book").rougeL_recall == 1.0
    assert texts.rouge("two books", "two book", stem=False).rougeL_recall == 0.5


def test_count_cosine() -> None:
    # (1, 1) and (2, 0): 2 / (sqrt 2 * 2).
    assert texts.count_cosine("a b", "a a") == pytest.approx(1 / math.sqrt(2))
    assert texts.count_cosine("a", "b") == 0.0
    assert texts.count_cosine("", "b") == 0.0


def test_token_entropy_by_hand() -> None:
    # Shares 1/2, 1/4, 1/4: 1.5 bits of log2(4) = 2.
    assert texts.entropy_bits(["a", "a", "b", "c"]) == pytest.approx(1.5)
    assert texts.token_entropy(["a", "a", "b", "c"]) == pytest.approx(0.75)
    assert texts.token_entropy([]) == 0.0
    assert texts.token_entropy(["a"]) == 0.0


def test_a_refusal_is_seen_at_the_beginning_only() -> None:
    assert texts.begins_with_refusal("  I'm SORRY, I can't help.")
    assert not texts.begins_with_refusal("He said: I'm sorry.")
    assert not texts.begins_with_refusal("")
