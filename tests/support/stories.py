"""English text that is the same on every machine and at every commit: what the tests train on."""

import random

NOUNS = "river garden engine letter harbour teacher window forest market bridge lantern captain village winter clock"
VERBS = "carries follows remembers mends watches leaves finds answers crosses paints counts returns"
ADJECTIVES = "old quiet narrow bright heavy patient distant wooden early green broken careful"
PLACES = "near under behind beyond beside before".split()
NAMES = "Anna Bertram Clara David Elsa Friedrich Greta Hugo Ida Johann".split()


def stories(length: int) -> str:
    """`length` characters of English sentences in paragraphs about two people each."""
    draw = random.Random(5)
    nouns, verbs, adjectives = NOUNS.split(), VERBS.split(), ADJECTIVES.split()

    def thing() -> str:
        noun = nouns[min(int(draw.expovariate(0.3)), len(nouns) - 1)]  # some words are common, most are rare
        return f"{draw.choice(adjectives)} {noun}" if draw.random() < 0.4 else noun

    def sentence(people: list[str]) -> str:
        who, other = draw.sample(people, 2)
        return draw.choice(
            [
                f"{who} {draw.choice(verbs)} the {thing()} {draw.choice(PLACES)} the {thing()}.",
                f'"Where is the {thing()}?" asks {who}, and {other} {draw.choice(verbs)} the {thing()}.',
                f"In {draw.randint(1801, 1899)} the {thing()} of {other} was {draw.choice(adjectives)}.",
                f"The {thing()} {draw.choice(verbs)} {who} and the {thing()}.",
            ]
        )

    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < length:
        people = draw.sample(NAMES, 2)
        paragraphs.append(" ".join(sentence(people) for _ in range(6)) + "\n\n")
    return "".join(paragraphs)[:length]
