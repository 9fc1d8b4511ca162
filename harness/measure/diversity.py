"""How texts repeat: within themselves and among one another. Words are what stands between white space.

Li et al. 2016 for distinct-n, Welleck et al. 2020 for repetition, Zhu et al. 2018 for self-BLEU.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Words of each text that count among texts: longer ones would repeat more for their length alone.
WORDS = 64


def ngrams(text: str, n: int, words: int | None = None) -> list[tuple[str, ...]]:
    """All n-grams of the first so many words."""
    found = text.split()[:words]
    return list(zip(*(found[i:] for i in range(n)), strict=False))


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that came before in it; 0 where it has none."""
    found = ngrams(text, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct(texts: Sequence[str], n: int = 2) -> float | None:
    """Share of different n-grams among all of a set; None where there are none."""
    found = [gram for text in texts for gram in ngrams(text, n, WORDS)]
    return len(set(found)) / len(found) if found else None


def self_bleu(texts: Sequence[str]) -> list[float]:
    """BLEU-4 (0 to 1) of each text against all others: 1 where every text is said elsewhere, too."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)
    cut = [" ".join(text.split()[:WORDS]) for text in texts]
    return [
        bleu.sentence_score(text, [*cut[:i], *cut[i + 1 :]]).score / 100 if text and len(cut) > 1 else 0.0
        for i, text in enumerate(cut)
    ]
