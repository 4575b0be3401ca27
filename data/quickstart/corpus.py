"""What the small model reads: letters, numbers, things that change hands, and picking an answer.

A lesson is one short text. Its words that begin with `*` are answers: what the words before them
determine. All wordings differ from those of the task prompts, so fine-tuning still has to teach
which skill a prompt asks for and how to answer it.
"""

import random
from collections.abc import Iterator

from tasks import LETTERS, NAMES, THINGS

LABELS, DIGITS = "ABCDE", "0123456789"
NUMBERS = [str(number) for number in range(100)]
PHRASES = (
    "Please choose a book. Please select a hat. Below is a list of common letters.",
    "Sentence: The following sentence has a blank _ in it. Please fill in and complete the blank.",
    "A task is solved with an appropriate solution. There are two possible solutions.",
    "What is the question? Question: is it so? Answer: it is so. Correct solution: it is correct.",
    "Choose what to sort along with the given letters, labeled in order to achieve a goal.",
    "It is true that yes is not no. It is false that no is yes. true or false, yes or no.",
    "Answer a question. The answer is correct now.",
)


def listing(rng: random.Random, answers: list[str]) -> tuple[str, dict[str, str]]:
    """`(A) 4 (B) 7` with the answers shuffled, and the label of each answer."""
    label_of = dict(zip(rng.sample(answers, len(answers)), LABELS, strict=False))
    between = rng.choice((" ", "\n"))
    return between.join(f"({label}) {answer}" for answer, label in label_of.items()), label_of


def checks(rng: random.Random, right: str, wrong: list[str]) -> str:
    """Right and wrong answers in turn by chance, after each whether it is right."""
    answers = [right if rng.random() < 0.5 else rng.choice(wrong) for _ in range(4)]
    return " ".join(f"{answer} *{'yes' if answer == right else 'no'}" for answer in answers)


def swapped(items: list[str], i: int) -> list[str]:
    return items[:i] + [items[i + 1], items[i]] + items[i + 2 :]


def naming(rng: random.Random) -> str:
    things = rng.sample(rng.choice((LETTERS, NAMES, THINGS, NUMBERS)), rng.randint(2, 5))
    listed, label_of = listing(rng, things)
    asked = rng.choices(things, k=6)
    if rng.random() < 0.5:
        return f"{listed} and " + " ".join(f"{thing} *{label_of[thing]}" for thing in asked)
    return f"{listed} and " + " ".join(f"{label_of[thing]} *{thing}" for thing in asked)


def addition(rng: random.Random) -> str:
    plus, sums = rng.choice(("+", "and")), []
    for _ in range(3):
        a = rng.randint(0, 9)
        sums.append((a, rng.randint(0, 9 - a)))
    if rng.random() < 0.4:
        return " ".join(f"{a} {plus} {b} = *{a + b}" for a, b in sums)
    a, b = sums[0]
    wrong = rng.sample([str(n) for n in range(10) if n != a + b], 3)
    listed, label_of = listing(rng, [str(a + b), *wrong])
    return f"{a} {plus} {b}: {listed} pick *{label_of[str(a + b)]}"


def comparison(rng: random.Random) -> str:
    compared = []
    for _ in range(3):
        a, b = rng.sample(range(1, 100), 2)
        sign, truth = rng.choice((("greater than", a > b), ("less than", a < b)))
        compared.append(f"{a} {sign} {b} *{'yes' if truth else 'no'}")
    return "check " + " ".join(compared)


def sorting(rng: random.Random) -> str:
    letters = rng.sample(LETTERS, rng.randint(3, 5))
    right = " ".join(sorted(letters))
    wrong = [" ".join(swapped(sorted(letters), i)) for i in range(len(letters) - 1)]
    kind = rng.randrange(3)
    if kind == 0:
        return f"letters {' '.join(letters)} in order: *{right.replace(' ', ' *')}"
    if kind == 1:
        return f"in order: {checks(rng, right, wrong)}"
    listed, label_of = listing(rng, [right, rng.choice(wrong)])
    return f"in order: {listed} pick *{label_of[right]}"


def story(rng: random.Random) -> str:
    count = rng.randint(1, 3)
    people, things = rng.sample(NAMES, 2 * count), rng.sample(THINGS, count)
    told, owner, other = [], {}, {}
    for i, thing in enumerate(things):
        first, second = people[2 * i : 2 * i + 2]
        if rng.random() < 0.5:
            told.append(f"{first} gave the {thing} to {second}")
            owner[thing], other[thing] = second, first
        else:
            told.append(f"{first} took the {thing} from {second}")
            owner[thing], other[thing] = first, second
    text = rng.choice((". ", " and ")).join(told)
    if rng.random() < 0.5:
        asked = rng.choices(things, k=2 * count - 1)
        return f"{text}. " + " ".join(f"the {thing} is with *{owner[thing]}" for thing in asked)
    thing = rng.choice(things)
    listed, label_of = listing(rng, [owner[thing], other[thing]])
    return f"{text}. the {thing} is with: {listed} pick *{label_of[owner[thing]]}"


def lessons(seed: int) -> Iterator[str]:
    """Endless; half of the lessons follow a piece of a phrase that does not matter."""
    rng = random.Random(seed)
    while True:
        lesson = rng.choices((naming, addition, comparison, sorting, story), (4, 2, 2, 2, 3))[0]
        words = rng.choice(PHRASES).split()
        start = rng.randrange(len(words))
        before = words[start : start + rng.choice((0, rng.randint(1, 12)))]
        yield " ".join([*before, lesson(rng)])
