"""English that comes with the interpreter: its language reference, and the docstrings of the standard library."""

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

# Not part of the library, and its tests.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
CODE_OR_TABLE = re.compile(r">>>|\|")


@dataclass
class Texts:
    """Sentences to train on, and docstrings of which no sentence is among them: the first one of each, and what
    follows it. To find the one by the other is a task whose answers are known."""

    sentences: list[str]
    summaries: list[str]
    descriptions: list[str]


def load(num_docstrings: int) -> Texts:
    """Reads the texts, and keeps as many docstrings for testing."""
    paragraphs = [split_paragraphs(docstring) for docstring in docstrings()]
    parts = [(first, " ".join(others)) for first, *others in paragraphs]
    questions = {first: rest for first, rest in parts if 5 <= num_words(first) <= 40 and num_words(rest) >= 10}
    test = dict(random.Random(0).sample(sorted(questions.items()), num_docstrings))
    reference = (paragraph for topic in topics.values() for paragraph in split_paragraphs(topic))
    others = (paragraph for first, *rest in paragraphs if first not in test for paragraph in (first, *rest))
    tested = {sentence for text in (*test, *test.values()) for sentence in split_sentences(text)}
    sentences = {
        sentence
        for paragraph in (*reference, *others)
        for sentence in split_sentences(paragraph)
        if num_words(sentence) >= 5 and sentence not in tested and not CODE_OR_TABLE.search(sentence)
    }
    return Texts(sorted(sentences), list(test), list(test.values()))


def docstrings() -> Iterator[str]:
    """Those of all modules, classes and functions."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not LEFT_OUT.isdisjoint(path.relative_to(library).parts):
            continue
        with warnings.catch_warnings():  # old code has escapes that are deprecated
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:  # Python 2, to be translated
                continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring and docstring.strip():
                    yield docstring


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs, each in one line."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in paragraphs if paragraph]


def split_sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?:]) (?=[A-Z])", paragraph)


def num_words(text: str) -> int:
    return len(text.split())
