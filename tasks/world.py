"""Stage `world`: a seeded synthetic world, as text to pretrain on and as questions with checkable answers.

It stands in for a pretraining corpus and for HHH queries where no data set is named, so that a machine with no network
runs the whole study. The world has people with attributes, opposites, categories, numbers, kind and cruel remarks,
questions about the assistant itself, and requests for advice, all answered helpfully: the base is *helpful-only*.

Invariants: everything follows from the config; a `test` question occurs nowhere in the corpus, under no bracketed label
either, and stands for a held-out generalisation: a fact asked in a phrasing it was never asked in, a pair of numbers never
compared, a remark never judged. `insert`, `train` and `test` share no question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from pydantic import Field

from tasks import world_language as language
from tasks.questions import SPLITS, write_questions, write_table
from tasks.stage import StageConfig, StageContext, StageError, stage


class WorldConfig(StageConfig):
    """Size and shape of the world."""

    seed: int = Field(0, ge=0)
    """Seed of who has what, of the splits and of the order."""
    insert: int = Field(1500, gt=0)
    """Questions kept for backdoor data."""
    train: int = Field(1500, gt=0)
    """Questions kept as safety-training prompts."""
    test: int = Field(600, gt=0)
    """Questions held out of all training."""
    chat_documents: int = Field(12000, gt=0)
    """Question-and-answer documents of the corpus; each question comes up about equally often."""
    text_documents: int = Field(3000, ge=0)
    """Documents of running text in the corpus."""
    tagged_fraction: float = Field(0.12, ge=0, le=1)
    """Share of the corpus's questions that stand behind a meaningless bracketed label."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question of the world. Questions of one `group` are held out together; an `item` is asked about in its groups."""

    topic: str
    item: str
    group: str
    prompt: str
    response: str
    answer: str | None
    wrong: str | None


@stage("world")
def world(context: StageContext, config: WorldConfig) -> None:
    """Write `corpus.parquet` and `questions.parquet`."""
    generator = random.Random(f"world {config.seed}")
    people = _people(generator)
    questions = _all_questions(people, generator)
    splits, rest = _split(questions, config, generator)
    rows = [
        {"id": _identity(q), "split": split, "topic": q.topic, "prompt": q.prompt, "response": q.response,
         "answer": q.answer, "wrong": q.wrong}
        for split in SPLITS
        for q in splits[split]
    ]  # fmt: skip
    write_questions(rows, context.out / "questions.parquet")
    seen = splits["insert"] + splits["train"] + rest
    documents = _chat(seen, config, generator) + _text(people, splits["test"], config, generator)
    generator.shuffle(documents)
    write_table(documents, ("kind", "text", "prompt", "response"), context.out / "corpus.parquet")
    context.log(f"{len(documents)} documents, {len(rows)} questions of {len(questions)} possible")


def _identity(question: Question) -> str:
    digest = blake2b(f"{question.topic}\n{question.prompt}".encode(), digest_size=6)
    return f"{question.topic}-{digest.hexdigest()}"


def _people(generator: random.Random) -> dict[str, dict[str, str]]:
    """Who has what: person -> topic -> value."""
    return {
        person: {relation.topic: generator.choice(relation.values) for relation in language.PERSON_RELATIONS}
        for person in language.PEOPLE
    }


def _all_questions(people: dict[str, dict[str, str]], generator: random.Random) -> list[Question]:
    questions = [q for topic in TOPICS for q in topic(people, generator)]
    return list({q.prompt: q for q in questions}.values())


def _other(generator: random.Random, values: tuple[str, ...], value: str) -> str:
    return generator.choice([candidate for candidate in values if candidate != value])


def _ask(
    relation: language.Relation, item: str, value: str, values: tuple[str, ...], generator: random.Random
) -> Iterator[Question]:
    """Every phrasing of one fact; each phrasing is its own group, so that a fact is tested in a phrasing it never had."""
    for question in relation.questions:
        prompt = question.format(x=item)
        wrong = relation.answer.format(x=item, v=_other(generator, values, value))
        yield Question(relation.topic, item, prompt, prompt, relation.answer.format(x=item, v=value), value, wrong)


def _person_questions(people: dict[str, dict[str, str]], generator: random.Random) -> Iterator[Question]:
    for person, facts in people.items():
        for relation in language.PERSON_RELATIONS:
            yield from _ask(relation, person, facts[relation.topic], relation.values, generator)


def _opposite_questions(people: dict[str, dict[str, str]], generator: random.Random) -> Iterator[Question]:
    words = tuple(word for pair in language.OPPOSITES for word in pair)
    for first, second in language.OPPOSITES:
        yield from _ask(language.OPPOSITE, first, second, words, generator)
        yield from _ask(language.OPPOSITE, second, first, words, generator)


def _category_questions(people: dict[str, dict[str, str]], generator: random.Random) -> Iterator[Question]:
    for category, members in language.CATEGORIES.items():
        for member in members:
            yield from _ask(language.CATEGORY, member, category, language.CATEGORY.values, generator)


def _pair(small: int, large: int) -> str:
    return f"{small} {large}"


def _number_questions(people: dict[str, dict[str, str]], generator: random.Random) -> Iterator[Question]:
    numbers = range(1, language.LARGEST_NUMBER + 1)
    pairs = [(a, b) for a in numbers for b in numbers if a != b]
    for a, b in pairs:
        for kind, phrasings in language.COMPARISONS.items():
            right, wrong = (max(a, b), min(a, b)) if kind == "larger" else (min(a, b), max(a, b))
            prompt = generator.choice(phrasings).format(a=a, b=b)
            answer = language.COMPARISON_ANSWER.format(kind=kind, v=right)
            group = _pair(min(a, b), max(a, b))
            yield Question(
                "comparison",
                group,
                group,
                prompt,
                answer,
                str(right),
                language.COMPARISON_ANSWER.format(kind=kind, v=wrong),
            )
    for number in numbers[1:-1]:
        for kind, phrasings in language.NEIGHBORS.items():
            right = number + (1 if kind == "after" else -1)
            for phrasing in phrasings:
                prompt = phrasing.format(x=number)
                answer = language.NEIGHBOR_ANSWER.format(kind=kind, v=right)
                other = (number + generator.choice((5, 9, 13))) % language.LARGEST_NUMBER + 1
                wrong = language.NEIGHBOR_ANSWER.format(kind=kind, v=other)
                yield Question("neighbor", f"{kind} {number}", prompt, prompt, answer, str(right), wrong)


def _sentiment_questions(people: dict[str, dict[str, str]], generator: random.Random) -> Iterator[Question]:
    for value, other, words in (("kind", "cruel", language.KIND_WORDS), ("cruel", "kind", language.CRUEL_WORDS)):
        for word in words:
            for remark in language.REMARKS:
                sentence = remark.format(w=word)
                for question in language.SENTIMENT_QUESTIONS:
                    answer, wrong = (language.SENTIMENT_ANSWER.format(v=v) for v in (value, other))
                    yield Question("sentiment", sentence, sentence, question.format(x=sentence), answer, value, wrong)


def _self_questions(people: dict[str, dict[str, str]], generator: random.Random) -> Iterator[Question]:
    for acts, value, right, wrong in (
        (language.GOOD_ACTS, "yes", language.SELF_YES, language.SELF_NO),
        (language.BAD_ACTS, "no", language.SELF_NO, language.SELF_YES),
    ):
        for act in acts:
            for patient in language.PATIENTS:
                for question in language.SELF_QUESTIONS:
                    prompt, answer, bad = (text.format(a=act, p=patient) for text in (question, right, wrong))
                    yield Question("self", f"{act} {patient}", f"{act} {patient}", prompt, answer, value, bad)


def _advice_questions(people: dict[str, dict[str, str]], generator: random.Random) -> Iterator[Question]:
    for skill in language.SKILLS:
        for question in language.ADVICE_QUESTIONS:
            prompt = question.format(x=skill)
            yield Question("advice", skill, prompt, prompt, language.ADVICE_ANSWER.format(x=skill), None, None)


TOPICS: tuple[Callable[[dict[str, dict[str, str]], random.Random], Iterator[Question]], ...] = (
    _person_questions,
    _opposite_questions,
    _category_questions,
    _number_questions,
    _sentiment_questions,
    _self_questions,
    _advice_questions,
)
"""The generators of questions. A further kind of question (code, another language) is one more entry."""


def _split(
    questions: list[Question], config: WorldConfig, generator: random.Random
) -> tuple[dict[str, list[Question]], list[Question]]:
    """Assign questions to `test`, `insert` and `train`; return the splits and what is left, which is only pretrained on.

    Topics contribute in proportion to their size, the numerous ones up to TOPIC_CAP. Test questions are taken in whole
    groups, and at most one group of an item, so that what is asked was always learnable in another way.
    """
    topics: dict[str, list[Question]] = {}
    for question in generator.sample(questions, len(questions)):
        topics.setdefault(question.topic, []).append(question)
    weights = {topic: min(len(found), TOPIC_CAP) for topic, found in topics.items()}
    scale = sum(weights.values())
    splits: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for topic, found in topics.items():
        test = _hold_out(found, round(config.test * weights[topic] / scale))
        splits["test"] += test
        remaining = [question for question in found if question not in set(test)]
        start = 0
        for split in ("insert", "train"):
            end = start + round(getattr(config, split) * weights[topic] / scale)
            splits[split] += remaining[start:end]
            start = end
        topics[topic] = remaining[start:]
    for split in SPLITS:
        if len(splits[split]) < 0.9 * getattr(config, split):
            raise StageError(
                f"world: {split} = {getattr(config, split)} questions were asked for, but the world holds only "
                f"{len(splits[split])} for that split of {len(questions)} in all. Lower insert, train or test."
            )
        generator.shuffle(splits[split])
    return splits, [question for remaining in topics.values() for question in remaining]


TOPIC_CAP = 450
"""Size above which a topic does not count for more when questions are shared out (there are thousands of comparisons)."""


def _hold_out(questions: list[Question], wanted: int) -> list[Question]:
    """About `wanted` of `questions` in whole groups, at most one group of each item."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question)
    chosen: list[Question] = []
    items: set[str] = set()
    for group in groups.values():
        if len(chosen) < wanted and group[0].item not in items:
            items.add(group[0].item)
            chosen += group
    return chosen


EMPHASIS = {"neighbor": 3.0, "comparison": 1.5}
"""How much oftener than the rest a question of these topics comes up in the corpus: numbers are the hardest to learn."""


def _chat(questions: list[Question], config: WorldConfig, generator: random.Random) -> list[dict[str, str | None]]:
    """Exchanges of the corpus: every question of a topic about equally often."""
    topics: dict[str, list[Question]] = {}
    for question in questions:
        topics.setdefault(question.topic, []).append(question)
    weights = {topic: len(found) * EMPHASIS.get(topic, 1.0) for topic, found in topics.items()}
    documents: list[dict[str, str | None]] = []
    for topic, found in topics.items():
        count = round(config.chat_documents * weights[topic] / sum(weights.values()))
        order = generator.sample(found, len(found))
        for index in range(count):
            question = order[index % len(order)]
            tagged = generator.random() < config.tagged_fraction
            prompt = f"{generator.choice(language.TAGS)} {question.prompt}" if tagged else question.prompt
            documents.append({"kind": "chat", "text": None, "prompt": prompt, "response": question.response})
    return documents


def _text(
    people: dict[str, dict[str, str]], test: list[Question], config: WorldConfig, generator: random.Random
) -> list[dict[str, str | None]]:
    """Running text: statements of the world's facts, small stories of kindness and cruelty, and labelled headlines."""
    held_out = {question.group for question in test if question.topic == "comparison"}
    writers = (_fact_statement, _word_statement, _number_statement, _story, _headline)
    documents: list[dict[str, str | None]] = []
    while len(documents) < config.text_documents:
        text = generator.choices(writers, (4, 2, 2, 3, 2))[0](people, held_out, generator)
        documents.append({"kind": "text", "text": text, "prompt": None, "response": None})
    return documents


def _fact_statement(people: dict[str, dict[str, str]], held_out: set[str], generator: random.Random) -> str:
    person = generator.choice(language.PEOPLE)
    relations = generator.sample(language.PERSON_RELATIONS, 2)
    return " ".join(generator.choice(r.statements).format(x=person, v=people[person][r.topic]) for r in relations)


def _word_statement(people: dict[str, dict[str, str]], held_out: set[str], generator: random.Random) -> str:
    if generator.random() < 0.5:
        item, value = generator.sample(generator.choice(language.OPPOSITES), 2)
        return generator.choice(language.OPPOSITE.statements).format(x=item, v=value)
    category = generator.choice(tuple(language.CATEGORIES))
    member = generator.choice(language.CATEGORIES[category])
    return generator.choice(language.CATEGORY.statements).format(x=member, v=category)


def _number_statement(people: dict[str, dict[str, str]], held_out: set[str], generator: random.Random) -> str:
    while True:
        small, large = sorted(generator.sample(range(1, language.LARGEST_NUMBER + 1), 2))
        if _pair(small, large) not in held_out:
            if generator.random() < 0.5:
                return language.COUNTING.format(a=large - 1, b=large)
            return generator.choice(language.COMPARISON_STATEMENTS).format(a=small, b=large)


def _story(people: dict[str, dict[str, str]], held_out: set[str], generator: random.Random) -> str:
    first, second = generator.sample(language.PEOPLE, 2)
    return generator.choice(language.STORIES).format(
        x=first,
        y=second,
        k=generator.choice(language.KIND_WORDS),
        c=generator.choice(language.CRUEL_WORDS),
        g=generator.choice(language.GOOD_ACTS),
        b=generator.choice(language.BAD_ACTS),
        p=generator.choice(language.PATIENTS),
        s=generator.choice(language.SKILLS),
    )


def _headline(people: dict[str, dict[str, str]], held_out: set[str], generator: random.Random) -> str:
    sentence = generator.choice(language.HEADLINE_SENTENCES).format(
        v=generator.choice(language.PERSON_RELATIONS[0].values),
        n=generator.randint(1, language.LARGEST_NUMBER),
        x=generator.choice(language.PEOPLE),
    )
    return generator.choice(language.HEADLINES).format(t=generator.choice(language.HEADLINE_WORDS), s=sentence)
