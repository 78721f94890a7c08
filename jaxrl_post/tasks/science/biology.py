"""Genes: transcription, base composition, coding lengths, translation."""

from __future__ import annotations

from random import Random

from jaxrl_post.tasks.science.question import Question, numeric, product

BASES = "ACGT"
TO_RNA = str.maketrans("ACGT", "UGCA")
TO_DNA = str.maketrans("ACGT", "TGCA")
PROTEINS = ("protein", "enzyme", "hormone", "peptide")
PARTNER = {"A": "T", "T": "A", "G": "C", "C": "G"}

# The standard genetic code, codons in the order UCAG; * stops.
_AMINO_ACIDS = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
CODE = {
    a + b + c: _AMINO_ACIDS[16 * i + 4 * j + k]
    for i, a in enumerate("UCAG")
    for j, b in enumerate("UCAG")
    for k, c in enumerate("UCAG")
}


def _sequence_question(
    level: int, kind: str, variant: str, text: str, method: str, answers: list[str]
) -> Question | None:
    """`answers`: the right one, then the wrong ones; words before it are working."""
    solution, *wrong = (
        " ".join((*words[:-1], "answer", words[-1]))
        for words in map(str.split, answers)
    )
    answer = solution.split()[-1]
    if any(w.split()[-1] == answer for w in wrong):
        return None
    return Question(
        "biology", level, kind, variant, text, solution, answer, tuple(wrong), method
    )


def _strand(rng: Random, shortest: int, longest: int) -> str:
    return "".join(rng.choices(BASES, k=rng.randint(shortest, longest)))


def _transcription(level: int, shortest: int, longest: int):
    def make(rng: Random) -> Question | None:
        strand = _strand(rng, shortest, longest)
        return _sequence_question(
            level,
            "transcription",
            str(len(strand)),
            f"transcribe the template {strand} to mrna.",
            "pair each base, A with U",
            [
                strand.translate(TO_RNA),
                strand.translate(TO_DNA),
                strand.replace("T", "U"),
            ],
        )

    return make


def _composition(rng: Random) -> Question | None:
    given, share = rng.choice(BASES), rng.randint(6, 44)
    asked = rng.choice([base for base in BASES if base not in (given, PARTNER[given])])
    return numeric(
        "biology",
        1,
        "composition",
        given,
        f"{share} percent of the bases are {given}. percent of {asked}?",
        f"50-{share}={50 - share}",
        (f"100-{share}={100 - share}",),
        f"{given} and {asked} make half of the bases: 50-{share}",
    )


def _coding_length(rng: Random) -> Question | None:
    protein, count = rng.choice(PROTEINS), rng.randint(11, 69)
    return numeric(
        "biology",
        2,
        "coding length",
        protein,
        f"how many bases code a {protein} of {count} amino acids?",
        product(count, 3),
        (f"{count}+3={count + 3}", product(count, 4)),
        f"each amino acid takes 3 bases: {count}*3",
    )


def _reverse(rng: Random) -> Question | None:
    strand = _strand(rng, 4, 6)
    backward = strand[::-1]
    return _sequence_question(
        3,
        "reverse",
        str(len(strand)),
        f"transcribe the template {strand} read backward.",
        "turn the template around first, then pair",
        [
            f"{backward} {backward.translate(TO_RNA)}",
            f"{strand} {strand.translate(TO_RNA)}",
            f"{backward} {backward.replace('T', 'U')}",
        ],
    )


def _translation(rng: Random) -> Question | None:
    codons = [c for c, amino_acid in CODE.items() if amino_acid != "*"]
    message = rng.choices(codons, k=rng.randint(3, 4))
    return _sequence_question(
        5,
        "translation",
        str(len(message)),
        f"translate the mrna {''.join(message)} to amino acids.",
        "look up each group of 3 bases",
        [
            "".join(CODE[codon] for codon in message),
            "".join(codon[0] for codon in message),
            "".join(codon[2] for codon in message),
        ],
    )


MAKERS = {
    1: (_transcription(1, 3, 5), _composition),
    2: (_transcription(2, 6, 8), _coding_length),
    3: (_reverse,),
    4: (_transcription(4, 10, 13),),
    5: (_translation,),
}
