"""How different the answers to a problem are, without a judge.

    distinct_finals    different final answers (keys)
    distinct_n         different n-grams as a share of all, over all answers (Li et al., 2016)
    self_bleu          mean BLEU-4 of each answer against the others (Zhu et al., "Texygen", 2018): 1 if all are alike
    clusters           groups of answers that are written alike: joined where their sets of word 3-grams overlap by half

Words are runs of letters, runs of digits, and single other signs; case counts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

_WORD = re.compile(r"[^\W\d_]+|\d+|[^\s]")
_ORDER = 4
_ALIKE = 0.5


def words(text: str) -> list[str]:
    """As the module says."""
    return _WORD.findall(text)


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n tokens."""
    return [tuple(tokens[place : place + n]) for place in range(len(tokens) - n + 1)]


def distinct_finals(keys: Sequence[str | None]) -> int:
    """Different final answers; None is none."""
    return len({key for key in keys if key is not None})


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all answers as a share of all of them; 0 where there are none."""
    found = [gram for text in texts for gram in ngrams(words(text), n)]
    return len({*found}) / len(found) if found else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean over answers of BLEU against all others as references; nan for fewer than two answers.

    BLEU-4 of Papineni et al. (2002), with the lengths of n-grams that the answer has; no match counts as half a match,
    so that one length without any does not make all 0.
    """
    if len(texts) < 2:
        return math.nan
    tokens = [words(text) for text in texts]
    matches = [_matches([Counter(ngrams(one, n)) for one in tokens]) for n in range(1, _ORDER + 1)]
    return fmean(_bleu(index, tokens, matches) for index in range(len(texts)))


def _matches(counts: Sequence[Counter[tuple[str, ...]]]) -> list[int]:
    """Of each answer, how many n-grams are also in another, each as often as in the one that has it most often.

    Two largest counts of an n-gram are enough: an answer that has the largest itself is matched with the second.
    """
    most: dict[tuple[str, ...], tuple[int, int, int]] = {}  # largest count, whose, second largest
    for index, own in enumerate(counts):
        for gram, count in own.items():
            first, owner, second = most.get(gram, (0, -1, 0))
            most[gram] = (count, index, first) if count > first else (first, owner, max(second, count))

    def others(gram: tuple[str, ...], index: int) -> int:
        first, owner, second = most[gram]
        return second if owner == index else first

    return [sum(min(count, others(gram, index)) for gram, count in own.items()) for index, own in enumerate(counts)]


def _bleu(index: int, tokens: Sequence[Sequence[str]], matches: Sequence[Sequence[int]]) -> float:
    own = tokens[index]
    if not own:
        return float(any(not other for place, other in enumerate(tokens) if place != index))
    logs = [math.log((matches[n][index] or 0.5) / (len(own) - n)) for n in range(min(_ORDER, len(own)))]
    lengths = [len(other) for place, other in enumerate(tokens) if place != index]
    closest = min(lengths, key=lambda length: (abs(length - len(own)), length))
    brevity = min(0.0, 1.0 - closest / len(own))
    return math.exp(brevity + fmean(logs))


def clusters(texts: Sequence[str]) -> int:
    """Groups of answers: two whose 3-grams have a Jaccard index of a half or more are in one, with all of theirs."""
    grams = [frozenset(ngrams(words(text), 3)) or frozenset({(text,)}) for text in texts]
    group = list(range(len(texts)))

    def root(place: int) -> int:
        while group[place] != place:
            place = group[place]
        return place

    for one in range(len(texts)):
        for other in range(one):
            union = len(grams[one] | grams[other])
            if len(grams[one] & grams[other]) >= _ALIKE * union:
                group[root(one)] = root(other)
    return len({root(place) for place in range(len(texts))})


__all__ = ["clusters", "distinct_finals", "distinct_n", "ngrams", "self_bleu", "words"]
