"""Tasks out of held-out text, as files that EleutherAI's lm-evaluation-harness reads; lm_eval.sh runs them.

python scripts/make_eval_tasks.py --heldout_path .cache/llama_data/heldout --output_dir .cache/lm_eval_tasks

Continuation: which 16 words follow 48 words of a document; the wrong ones stand near, in the same document or, where it
is short, the next. Cloze: which word ends a sentence, after the 48 words before it; the wrong ones end other sentences
of the domain, and are about as frequent there. Perplexity: the beginnings of documents. The same text gives the same
bytes.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from timing import positive

from run_moefication import command_line
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.files import write_atomically
from run_moefication.moefication.text.documents import DocumentReader
from run_moefication.moefication.text.text_files import find_text_files

Example = dict[str, Any]  # "context", "choices", "label" (the place of the right one), "domain"
Question = tuple[str, str]  # a context, and its right answer, which begins with white space
DESCRIPTIONS = Path(__file__).parent / "lm_eval_tasks"
WORD = re.compile(r"\s*\S+")  # with the white space before it: joined, words are the text again
LAST_WORD = re.compile(r" [a-z]{3,}[.!?]")
CONTEXT, CONTINUATION = 48, 16  # words
MOST_CHARACTERS = 1024  # of a context: longer words are none, but data
MOST_TEXT = 2048  # characters of a document whose perplexity is measured
NEIGHBOURS = 10  # on either side, of which the wrong answers are three
EXAMPLES = {"type": positive, "default": 50, "help": "of each domain, for each task"}  # an option


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--heldout_path", type=command_line.path, required=True, help="folder of .jsonl, one a domain")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the tasks")
    parser.add_argument("--examples", **EXAMPLES)
    return command_line.run(parser, write, argv)


def write(arguments: argparse.Namespace) -> None:
    """Write each task's data, and its description with the full path of that."""
    tasks = make_tasks(arguments.heldout_path, arguments.examples)
    tasks["perplexity"] = list(beginnings(arguments.heldout_path, arguments.examples))
    for name, examples in tasks.items():
        data = arguments.output_dir.absolute() / f"{name}.jsonl"
        lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        description = (DESCRIPTIONS / f"{name}.yaml").read_text().replace(data.name, json.dumps(str(data)))
        for path, text in ((data, lines), (data.with_suffix(".yaml"), description)):
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
        print(f"written: {data} ({len(examples):,} examples) and its .yaml")


def make_tasks(heldout_path: str | Path, count: int) -> dict[str, list[Example]]:
    """The examples of each task, at most `count` of each file of a folder."""
    files = sorted(Path(heldout_path).glob("*.jsonl"))
    if not files:
        raise MoEficationError(f"--heldout_path {heldout_path} holds no .jsonl file")
    tasks: dict[str, list[Example]] = {"continuation": [], "cloze": []}
    for path in files:
        documents = [WORD.findall(document.text) for document in DocumentReader(find_text_files(path))]
        for name, questions, order in (("continuation", *continuations(documents)), ("cloze", *cloze(documents))):
            tasks[name] += [example | {"domain": path.stem} for example in choose(questions, order, count)]
    for name, examples in tasks.items():
        if not examples:
            raise MoEficationError(f"--heldout_path {heldout_path} holds too little prose for the task {name}")
    return tasks


def beginnings(heldout_path: str | Path, count: int) -> Iterator[Example]:
    """The beginnings of the first documents of each file, at most `count`, with their domain."""
    for path in sorted(Path(heldout_path).glob("*.jsonl")):
        for document in islice(DocumentReader(find_text_files(path)), count):
            yield {"text": document.text[:MOST_TEXT], "domain": path.stem}


def continuations(documents: list[list[str]]) -> tuple[list[Question], list[str]]:
    """Windows of the documents' words that do not overlap, and their ends in the order of the text."""
    size = CONTEXT + CONTINUATION
    windows = [words[end - size : end] for words in documents for end in range(size, len(words) + 1, size)]
    questions = [question(words[:CONTEXT], "".join(words[CONTEXT:])) for words in windows]
    return questions, [answer for _, answer in questions]


def cloze(documents: list[list[str]]) -> tuple[list[Question], list[str]]:
    """The last words of sentences with what stands before, and these words from the rarest to the most frequent."""
    questions = [
        question(words[end - CONTEXT : end], words[end][:-1])
        for words in documents
        for end in range(CONTEXT, len(words))
        if LAST_WORD.fullmatch(words[end])
    ]
    counts = Counter(word for words in documents for word in re.findall("[a-z]+", "".join(words).lower()))
    return questions, sorted({answer for _, answer in questions}, key=lambda answer: (counts[answer[1:]], answer))


def question(words: list[str], answer: str) -> Question:
    """Words and what follows them."""
    return "".join(words).lstrip(), answer


def choose(questions: list[Question], order: list[str], count: int) -> list[Example]:
    """At most `count` of the questions, evenly spread, each with three wrong answers that are near it in `order`."""
    questions = [(context, answer) for context, answer in questions if len(context) <= MOST_CHARACTERS]
    generator, examples, chosen = random.Random(0), [], min(count, len(questions))
    for context, answer in (questions[i * len(questions) // chosen] for i in range(chosen)):
        place = order.index(answer)
        near = {*order[max(0, place - NEIGHBOURS) : place + NEIGHBOURS + 1]} - {answer}
        if len(near) >= 3:
            choices, label = generator.sample(sorted(near), 3), len(examples) % 4
            choices.insert(label, answer)
            examples.append({"context": context, "choices": choices, "label": label})
    return examples


if __name__ == "__main__":
    sys.exit(main())
