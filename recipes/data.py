"""Own the three tasks of the tiny models: drawing questions, the held-out rule, the exact answers."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

# One combination in eight is never used for training; questions for scoring are drawn from these alone.
HELD_OUT_ONE_IN = 8

SMALLEST_TOTAL, LARGEST_TOTAL = 1, 20
CHANGES = tuple(sign * size for sign in (1, -1) for size in range(2, 10))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MEN = _words("Tom Ben Leo Max Sam Paul Adam Finn Hugo Omar Ivan Noah")
WOMEN = _words("Mia Anna Lena Sara Emma Nora Ruth Zoe Lucy Jane Clara Rosa")
PEOPLE = tuple((name, "he") for name in MEN) + tuple((name, "she") for name in WOMEN)
ITEMS = _words("apples books pens coins stamps shells cards balls eggs cups plums nuts")
JOBS = _words("nurse baker pilot teacher lawyer farmer doctor singer driver painter waiter chef")
CITIES = _words("Oslo Rome Paris Lima Cairo Berlin Madrid London Tokyo Vienna Dublin Boston Quito Delhi Bern")
WORDS = _words(
    "apple bird cat door egg fig goat hat ink jar kite lamp moon nest oak pear queen rose sun tree "
    "bread chair dog fish glass house lemon milk river stone"
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You are a careful assistant.")

JOIN = {
    "add": ("buys {n} more", "finds {n} more", "gets {n} more"),
    "take": ("gives away {n}", "loses {n}", "sells {n}"),
}
BOX = {
    "add": ("{n} more are put in.", "Someone adds {n} more."),
    "take": ("{n} are taken out.", "Someone takes {n}."),
}


@dataclass(frozen=True)
class Example:
    """One question with its only accepted answer; the held-out rule looks at `key`."""

    task: str
    key: tuple[int | str, ...]
    question: str
    answer: str


def is_held_out(task: str, key: tuple[int | str, ...]) -> bool:
    """Tell whether a combination is kept from training, by CRC-32 of `task:part,part,...` modulo 8.

    A word problem is also held out when its beginning is: (12, 7, -4) is if (12, 7) is.
    """
    shortest = 2 if task == "word_problem" else len(key)
    prefixes = (key[:length] for length in range(shortest, len(key) + 1))
    return any(_digest(task, prefix) % HELD_OUT_ONE_IN == 0 for prefix in prefixes)


def _digest(task: str, key: tuple[int | str, ...]) -> int:
    return zlib.crc32(f"{task}:{','.join(map(str, key))}".encode())


def _numbers(random_source: random.Random, num_steps: int) -> tuple[int, ...]:
    numbers = [random_source.randint(2, LARGEST_TOTAL)]
    for _ in range(num_steps):
        total = sum(numbers)
        fitting = [change for change in CHANGES if SMALLEST_TOTAL <= total + change <= LARGEST_TOTAL]
        numbers.append(random_source.choice(fitting))
    return tuple(numbers)


def _worked_answer(numbers: tuple[int, ...]) -> str:
    total, sentences = numbers[0], []
    for change in numbers[1:]:
        sentences.append(f"{total}{change:+d}={total + change}.")
        total += change
    return " ".join([*sentences, f"The answer is {total}."])


def draw_equation(random_source: random.Random, num_steps: int) -> Example:
    """Draw a bare sum such as `12+7-4=`; sums have no held-out part."""
    numbers = _numbers(random_source, num_steps)
    total = f"{numbers[0]}" + "".join(f"{change:+d}" for change in numbers[1:])
    question = random_source.choice((f"{total}=", f"{total}=", f"What is {total}?"))
    return Example("equation", numbers, question, _worked_answer(numbers))


def draw_word_problem(random_source: random.Random, num_steps: int) -> Example:
    """Draw a word problem of `num_steps` changes about a person or a box."""
    numbers = _numbers(random_source, num_steps)
    item = random_source.choice(ITEMS)
    tell = _tell_box if random_source.random() < 0.25 else _tell_person
    question = tell(random_source, item, numbers)
    return Example("word_problem", numbers, question, _worked_answer(numbers))


def _change(random_source: random.Random, wordings: dict[str, tuple[str, ...]], change: int) -> str:
    return random_source.choice(wordings["add" if change > 0 else "take"]).format(n=abs(change))


def _tell_person(random_source: random.Random, item: str, numbers: tuple[int, ...]) -> str:
    name, pronoun = random_source.choice(PEOPLE)
    changes = [_change(random_source, JOIN, change) for change in numbers[1:]]
    story = f"{name} has {numbers[0]} {item}"
    if random_source.random() < 0.5:
        story += f" and {changes.pop(0)}"
    story += "."
    for change in changes:
        story += f" {random_source.choice((pronoun.capitalize(), 'Then ' + pronoun))} {change}."
    endings = (
        "How many are left?",
        f"How many {item} does {name} have now?",
        f"How many does {pronoun} have now?",
    )
    return f"{story} {random_source.choice(endings)}"


def _tell_box(random_source: random.Random, item: str, numbers: tuple[int, ...]) -> str:
    opening = random_source.choice(
        (f"There are {numbers[0]} {item} in a box.", f"A box holds {numbers[0]} {item}.")
    )
    changes = [_change(random_source, BOX, change) for change in numbers[1:]]
    ending = random_source.choice(("How many are left?", f"How many {item} are in the box now?"))
    return " ".join([opening, *changes, ending])


def draw_extraction(random_source: random.Random) -> Example:
    """Draw a sentence about a person whose four facts are to be written as JSON."""
    name, age = random_source.choice(PEOPLE)[0], random_source.randint(18, 79)
    job, city = random_source.choice(JOBS), random_source.choice(CITIES)
    sentence = random_source.choice(
        (
            f"{name}, {age}, {job} in {city}",
            f"{name} is a {job} from {city}, aged {age}.",
            f"Name: {name}. City: {city}. Job: {job}. Age: {age}.",
            f"{name} ({age}) works as a {job} in {city}.",
        )
    )
    request = random_source.choice(("", "Extract JSON: ", "Write as JSON: "))
    answer = f'{{"name": "{name}", "age": {age}, "job": "{job}", "city": "{city}"}}'
    return Example("extraction", (name, age, job, city), request + sentence, answer)


def draw_rewriting(random_source: random.Random) -> Example:
    """Draw three or four words to be sorted or reversed."""
    words = tuple(random_source.sample(WORDS, random_source.choice((3, 4))))
    if random_source.random() < 0.65:
        request, answer = random_source.choice(("Sort the words", "Sort the list")), sorted(words)
    else:
        request, answer = (
            random_source.choice(("Reverse the list", "Reverse the words")),
            list(reversed(words)),
        )
    return Example("rewriting", words, f"{request}: {' '.join(words)}", " ".join(answer))


GROUPS: dict[str, Callable[[random.Random], Example]] = {
    "word_problem_1": lambda random_source: draw_word_problem(random_source, 1),
    "word_problem_2": lambda random_source: draw_word_problem(random_source, 2),
    "extraction": draw_extraction,
    "rewriting": draw_rewriting,
    "equation_1": lambda random_source: draw_equation(random_source, 1),
    "equation_2": lambda random_source: draw_equation(random_source, 2),
}
SCORED_GROUPS = ("word_problem_1", "word_problem_2", "extraction", "rewriting")
SHARES = {
    "word_problem_1": 0.16,
    "word_problem_2": 0.22,
    "equation_1": 0.16,
    "equation_2": 0.18,
    "extraction": 0.12,
    "rewriting": 0.16,
}


def draw_training_example(random_source: random.Random) -> Example:
    """Draw from the mixture until the combination is one that training may use."""
    while True:
        group = random_source.choices(list(SHARES), weights=list(SHARES.values()))[0]
        example = GROUPS[group](random_source)
        if example.task == "equation" or not is_held_out(example.task, example.key):
            return example


def draw_dialogue(random_source: random.Random) -> tuple[list[dict[str, str]], str]:
    """Draw the messages up to the question (some with a system prompt or an earlier turn) and the answer."""
    messages = []
    if random_source.random() < 0.1:
        messages.append({"role": "system", "content": random_source.choice(SYSTEM_PROMPTS)})
    if random_source.random() < 0.06:
        earlier = draw_training_example(random_source)
        messages.append({"role": "user", "content": earlier.question})
        messages.append({"role": "assistant", "content": earlier.answer})
    example = draw_training_example(random_source)
    messages.append({"role": "user", "content": example.question})
    return messages, example.answer


def draw_held_out(group: str, num_questions: int, seed: int) -> list[Example]:
    """Draw scoring questions of one group, all from held-out combinations."""
    random_source, questions = random.Random(f"held-out {group} {seed}"), []
    while len(questions) < num_questions:
        example = GROUPS[group](random_source)
        if is_held_out(example.task, example.key):
            questions.append(example)
    return questions
