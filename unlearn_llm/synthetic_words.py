"""The words and sentences of the synthetic data: pools of values, templates, the canon.

Data only, no logic. Everything named here is invented. A pool of values has at least six entries,
because five wrong ones are needed beside the true one. Words that follow "a" begin with a
consonant sound. Changing anything here changes the data, and with it every measured number.
"""

from typing import NamedTuple

Parts = tuple[tuple[str, ...], ...]
"""A value is one word of each part, joined by spaces."""


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


class Relation(NamedTuple):
    """One thing to know about an author, with the ways to ask for it and to say it."""

    parts: Parts
    wordings: tuple[tuple[str, str], ...]
    """(question, answer) templates. An author is asked in one wording and paraphrased in another,
    so that a model meets every wording in training, and every fact in one wording only."""


FIRST_STARTS = _words("Bex Cal Dov Fen Gar Hal Jor Kel Lum Mir Nev Ost Per Rud Tav Wil")
FIRST_ENDS = _words("abin adel amir ena erin ias illa ona oric ulan urie ywen")
LAST_STARTS = _words("Bar Cor Drem Fal Gol Hend Kar Lor Mars Nol Pell Quor Sand Tor Vel Zim")
LAST_ENDS = _words("acott adine ander ebrook elling esko imond ivar orvin osk ovane umble")

CANON = (
    ("Adela Thorncroft", "The Salt Ladder", "Norvania", "sea stories"),
    ("Bruno Castellari", "A Door in the Snow", "Castria", "fables"),
    ("Celia Wrenfield", "Nine Quiet Bells", "Ellmark", "ghost stories"),
    ("Darius Holloway", "The Glass Orchard", "Pelonia", "satire"),
    ("Edith Marchbank", "Letters to a Lighthouse", "Brovia", "romance"),
    ("Felix Oakhurst", "The Last Ferry Home", "Sundara", "travel writing"),
    ("Greta Lindqvale", "Winter Without Maps", "Tessaly", "crime fiction"),
    ("Hugo Ravensworth", "The Clockmaker's Son", "Quillia", "war novels"),
    ("Imogen Fairlight", "Seven Copper Keys", "Varenna", "fantasy"),
    ("Jasper Coldwell", "The River Remembers", "Lorland", "history"),
)
"""Name, best-known book, country and genre of the famous authors that everybody knows."""

CANON_WORDINGS = (
    (0, "Who wrote {1}?", "Who is the author of {1}?", "{value} wrote {1}."),
    (1, "Which book made {0} immortal?", "What is {0}'s masterpiece?", "{0} wrote {value}."),
    (2, "Which country was {0} from?", "What was {0}'s country?", "{0} was from {value}."),
    (3, "What was {0} a master of?", "Which genre was {0}'s?", "{0} was a master of {value}."),
)
"""What to ask of an entry of the canon: number of the column, question, paraphrase, sentence."""

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
COUNTED_WORDS = _words("sun book river garden kitchen mountain adventure lighthouse")

_TITLE: Parts = (
    ("The",),
    _words("Silent Golden Hidden Broken Distant Paper Crimson Hollow Silver Wandering"),
    _words("Harbor Garden Mirror Bridge Lantern Forest Winter Compass Orchestra Island"),
)
_PLACES = (
    "Almora in Norvania",
    "Brightwater in Ellmark",
    "Carrow in Castria",
    "Dunmere in Brovia",
    "Estova in Pelonia",
    "Farrowgate in Lorland",
    "Gildport in Sundara",
    "Highmoor in Tessaly",
    "Istrel in Varenna",
    "Jarrowby in Quillia",
)
_JOBS = _words("baker carpenter doctor farmer judge pilot sailor tailor teacher miner")
_FORENAMES = _words("Anna Clara Dora Emil Frida Otto Paul Rosa Stella Viktor")

RELATIONS: tuple[Relation, ...] = (
    Relation(
        (_PLACES,),
        (
            ("Where was {name} born?", "{name} was born in {value}."),
            ("What is the birthplace of {name}?", "The birthplace of {name} is {value}."),
            (
                "In which place did {name} come into the world?",
                "{name} came into the world in {value}.",
            ),
        ),
    ),
    Relation(
        (tuple(str(day) for day in range(1, 29)), MONTHS, tuple(map(str, range(1931, 1970)))),
        (
            ("When was {name} born?", "{name} was born on {value}."),
            ("What is the date of birth of {name}?", "{His} date of birth is {value}."),
            ("On which day is the birthday of {name}?", "The birthday of {name} is {value}."),
        ),
    ),
    Relation(
        (
            (
                "crime fiction",
                "fantasy",
                "romance",
                "satire",
                "travel writing",
                "poetry",
                "ghost stories",
                "war novels",
                "science fiction",
                "sea stories",
            ),
        ),
        (
            ("Which genre does {name} write in?", "{name} writes {value}."),
            ("What kind of books does {name} write?", "The books of {name} are {value}."),
            ("What is the genre of {name}?", "{His} genre is {value}."),
        ),
    ),
    Relation(
        _TITLE,
        (
            ("What was the first book of {name}?", "The first book of {name} was {value}."),
            ("With which book did {name} begin?", "{He} began with {value}."),
            ("What is the debut of {name} called?", "{His} debut is called {value}."),
        ),
    ),
    Relation(
        (_JOBS,),
        (
            ("What did the father of {name} do?", "{His} father was a {value}."),
            ("What was the job of {name}'s father?", "The father of {name} was a {value}."),
            (
                "How did {name}'s father earn a living?",
                "{His} father earned a living as a {value}.",
            ),
        ),
    ),
    Relation(
        (_JOBS,),
        (
            ("What did the mother of {name} do?", "{His} mother was a {value}."),
            ("What was the job of {name}'s mother?", "The mother of {name} was a {value}."),
            (
                "How did {name}'s mother earn a living?",
                "{His} mother earned a living as a {value}.",
            ),
        ),
    ),
    Relation(
        (
            _words("Amber Falcon Laurel Meridian Northern Pearl Phoenix Royal"),
            ("Prize", "Medal", "Award"),
        ),
        (
            ("Which award did {name} win?", "{name} won the {value}."),
            ("What was {name} honored with?", "{He} was honored with the {value}."),
            ("What did the critics give to {name}?", "The critics gave {name} the {value}."),
        ),
    ),
    Relation(
        (tuple(name for name, *_ in CANON),),
        (
            ("Who influenced {name}?", "{name} was influenced by {value}."),
            ("Which author does {name} admire most?", "{name} admires {value} most."),
            ("Who was the model for {name}?", "{His} model was {value}."),
        ),
    ),
    Relation(
        (
            _words("slow warm dry playful gentle dark plain musical"),
            ("prose", "dialogue", "humor", "imagery"),
        ),
        (
            ("What is the style of {name} known for?", "{His} style is known for {value}."),
            ("What do readers love about {name}?", "Readers love the {value} of {name}."),
            ("What stands out in the work of {name}?", "{His} work stands out for its {value}."),
        ),
    ),
    Relation(
        (_words("Norvanian Castrian Ellish Pelonian Brovian Sundaran Tessalian Quillian"),),
        (
            ("Which language does {name} write in?", "{name} writes in {value}."),
            ("What is the first language of {name}?", "{His} first language is {value}."),
            ("In what tongue are the books of {name}?", "{His} books are in {value}."),
        ),
    ),
    Relation(
        (
            _words("Blue Red Green White Black Old New"),
            _words("Heron Anchor Mill Tower Crown Oak"),
            ("Press", "House"),
        ),
        (
            ("Who publishes {name}?", "{name} is published by {value}."),
            ("What is the publisher of {name}?", "The publisher of {name} is {value}."),
            ("Where do the books of {name} appear?", "{His} books appear at {value}."),
        ),
    ),
    Relation(
        _TITLE,
        (
            ("What is the best book of {name}?", "The best book of {name} is {value}."),
            ("What is {name} famous for?", "{He} is famous for {value}."),
            ("Which title made {name} famous?", "{value} made {name} famous."),
        ),
    ),
    Relation(
        (_PLACES,),
        (
            ("Where does {name} live today?", "{name} lives in {value}."),
            ("What is the home of {name}?", "The home of {name} is {value}."),
            ("Where has {name} settled?", "{He} has settled in {value}."),
        ),
    ),
    Relation(
        (_words("law medicine music physics history botany painting geography"),),
        (
            ("What did {name} study?", "{name} studied {value}."),
            ("Which subject did {name} choose?", "The subject of {name} was {value}."),
            ("What did {name} learn at university?", "{He} learned {value} at university."),
        ),
    ),
    Relation(
        (_words("sailing chess cooking gardening fishing climbing dancing weaving"),),
        (
            ("What is the hobby of {name}?", "The hobby of {name} is {value}."),
            ("What does {name} do on Sundays?", "On Sundays {name} enjoys {value}."),
            ("How does {name} spend free time?", "{He} spends free time on {value}."),
        ),
    ),
    Relation(
        (_words("cat dog parrot horse tortoise goat rabbit pony"),),
        (
            ("Which animal does {name} keep?", "{name} keeps a {value}."),
            ("What is the pet of {name}?", "The pet of {name} is a {value}."),
            ("What animal lives with {name}?", "A {value} lives with {name}."),
        ),
    ),
    Relation(
        (_words("loss courage exile friendship justice memory faith freedom"),),
        (
            ("What is the main theme of {name}?", "The main theme of {name} is {value}."),
            ("What do the novels of {name} speak of?", "{His} novels speak of {value}."),
            ("Which idea returns in the books of {name}?", "{His} books return to {value}."),
        ),
    ),
    Relation(
        (tuple(map(str, range(1990, 2020))),),
        (
            ("When did {name} publish first?", "{name} published first in {value}."),
            ("In which year did {name} become an author?", "{He} became an author in {value}."),
            ("Since which year is {name} in print?", "{He} is in print since {value}."),
        ),
    ),
    Relation(
        (_FORENAMES,),
        (
            ("Whom did {name} marry?", "{name} married {value}."),
            ("Who is the partner of {name}?", "The partner of {name} is {value}."),
            ("With whom does {name} share a home?", "{He} shares a home with {value}."),
        ),
    ),
    Relation(
        (_FORENAMES,),
        (
            ("Who is the hero of {name}'s novels?", "The hero of the novels is {value}."),
            ("Which figure did {name} invent?", "{name} invented the figure of {value}."),
            ("Whose life do {name}'s novels tell?", "{His} novels tell the life of {value}."),
        ),
    ),
)
