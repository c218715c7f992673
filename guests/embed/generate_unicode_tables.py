"""Write ``unicode_tables.h``: what BERT's normaliser and pre-tokeniser in ``tokenizers`` do to each code point.

Every code point is put through the package itself, because its parts carry Unicode versions of their own (categories,
decomposition and case each another one); Python's ``unicodedata`` matches none of them. Its combining classes of old
marks, which never change, serve as yardsticks for those of all others.

    python guests/embed/generate_unicode_tables.py           # rewrite the header
    python guests/embed/generate_unicode_tables.py --check   # exit 1 if it would change
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from guests.c_header import c_array, write_or_check

HEADER_PATH: Final = Path(__file__).with_name("unicode_tables.h")
SEPARATOR: Final = "0"  # nothing maps to it, and it is neither space, punctuation nor mark
BATCH: Final = 20_000  # code points in one call
FLAG_BITS: Final = 8
MOST_MAPPED: Final = 4
HANGUL: Final = range(0xAC00, 0xAC00 + 11_172)  # decomposed by arithmetic
CLEANED_AWAY, CLEANED_SPACE, CJK, PUNCTUATION, SPACE, STRIPPED, COMBINES = (1 << bit for bit in range(7))

CODE_POINTS: Final = [
    code_point for code_point in range(0x110000) if not 0xD800 <= code_point < 0xE000 and chr(code_point) != SEPARATOR
]


def bert(**chosen: bool) -> Any:
    """A BertNormalizer with only the ``chosen`` steps."""
    steps = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}
    return normalizers.BertNormalizer(**(steps | chosen))


def batches(texts: Iterable[str]) -> Iterable[list[str]]:
    """``texts`` in lists of :data:`BATCH`."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def normalised(normalizer: Any, texts: list[str]) -> list[str]:
    """What ``normalizer`` makes of each text on its own."""
    results: list[str] = []
    for batch in batches(texts):
        joined = SEPARATOR + SEPARATOR.join(batch) + SEPARATOR
        parts = normalizer.normalize_str(joined).split(SEPARATOR)[1:-1]
        if len(parts) != len(batch):
            raise SystemExit(f"{normalizer} made something of the separator")
        results += parts
    return results


def mapped_by(normalizer: Any) -> dict[int, str]:
    """The code points that ``normalizer`` changes, and into what."""
    results = normalised(normalizer, [chr(code_point) for code_point in CODE_POINTS])
    return {point: text for point, text in zip(CODE_POINTS, results, strict=True) if text != chr(point)}


def split_flags() -> dict[int, int]:
    """PUNCTUATION and SPACE, from what the pre-tokeniser makes of a code point between two digits."""
    splitter = pre_tokenizers.BertPreTokenizer()
    flags: dict[int, int] = {}
    for batch in batches(map(chr, CODE_POINTS)):
        pieces = splitter.pre_tokenize_str(SEPARATOR + SEPARATOR.join(batch) + SEPARATOR)
        ends = {end for _, (_, end) in pieces}
        alone = {start for piece, (start, _) in pieces if len(piece) == 1 and piece != SEPARATOR}
        for index, character in enumerate(batch):
            offset = 2 * index + 1
            if offset in alone:
                flags[ord(character)] = PUNCTUATION
            elif offset in ends:  # a word ends before it, and it is none itself
                flags[ord(character)] = SPACE
    return flags


def combining_classes() -> dict[int, int]:
    """Canonical combining class of every code point that has one, found by what it changes places with."""
    nfd = normalizers.NFD()
    marks = {unicodedata.combining(chr(point)): chr(point) for point in reversed(range(0x300, 0x3100))}
    yardsticks = {level: mark for level, mark in sorted(marks.items()) if level}

    def swapped(points: list[int], mark: str, *, mark_first: bool) -> list[bool]:
        alone = normalised(nfd, [chr(point) for point in points])
        pairs = [mark + chr(point) if mark_first else chr(point) + mark for point in points]
        together = normalised(nfd, pairs)
        kept = [mark + text if mark_first else text + mark for text in alone]
        return [seen != expected for seen, expected in zip(together, kept, strict=True)]

    lowest, highest = yardsticks[min(yardsticks)], yardsticks[max(yardsticks)]
    before = swapped(CODE_POINTS, highest, mark_first=True)
    behind = swapped(CODE_POINTS, lowest, mark_first=False)
    points = [p for p, below, above in zip(CODE_POINTS, before, behind, strict=True) if below or above]
    levels = dict.fromkeys(points, 0)
    for level, mark in yardsticks.items():
        for point, is_below in zip(points, swapped(points, mark, mark_first=True), strict=True):
            if not is_below:
                levels[point] = level
    return levels


def classify(stripped: Mapping[int, str], levels: Mapping[int, int]) -> Callable[[int], int]:
    """The flags of every code point, as a function."""
    flags = split_flags()
    for point, text in mapped_by(bert(clean_text=True)).items():
        flags[point] = flags.get(point, 0) | (CLEANED_SPACE if text == " " else CLEANED_AWAY)
    for point in mapped_by(bert(handle_chinese_chars=True)):
        flags[point] = flags.get(point, 0) | CJK
    for point, text in stripped.items():
        flags[point] = flags.get(point, 0) | (0 if text else STRIPPED)
    for point in levels:
        flags[point] = flags.get(point, 0) | COMBINES
    return lambda point: flags.get(point, 0)


def flag_runs(flags_of: Callable[[int], int]) -> list[str]:
    """``first code point << FLAG_BITS | flags`` of each run of equal flags, from 0 on."""
    entries = []
    previous = -1
    for point in range(0x110000):
        current = flags_of(point)
        if current != previous:
            entries.append(f"0x{point << FLAG_BITS | current:08X}")
            previous = current
    return entries


def mapping_arrays(name: str, changed: Mapping[int, str]) -> list[str]:
    """The two arrays of a mapping: entries sorted by code point, and the code points that they become."""
    entries: list[str] = []
    results: list[str] = []
    for point, text in sorted(changed.items()):
        if len(text) > MOST_MAPPED:
            raise SystemExit(f"U+{point:04X} becomes {len(text)} code points: raise MOST_MAPPED")
        entries.append(f"{{0x{point:05X}, {len(results)}, {len(text)}}}")
        results += [f"0x{ord(character):05X}" for character in text]
    return c_array(f"mapping {name}", entries) + c_array(f"uint32_t {name}_results", results)


def render() -> str:
    """The header's text."""
    stripped = mapped_by(bert(strip_accents=True))
    lowered = mapped_by(bert(lowercase=True))
    levels = combining_classes()
    left = {point: text for point, text in stripped.items() if text and point not in HANGUL and point >= 0x80}
    lowered = {point: text for point, text in lowered.items() if point >= 0x80}
    survivors = {point: level for point, level in levels.items() if point not in stripped}
    return "\n".join(
        [
            f"/* Generated by generate_unicode_tables.py from tokenizers {tokenizers.__version__}; do not edit.",
            " *",
            " * unicode_flag_runs: first code point << 8 | char_flag bits, for each run of equal flags.",
            " * unicode_combining: code point << 8 | combining class, of those that stay when accents go.",
            " */",
            "#ifndef EMBED_UNICODE_TABLES_H",
            "#define EMBED_UNICODE_TABLES_H",
            "",
            "#include <stdint.h>",
            "",
            *c_array("uint32_t unicode_flag_runs", flag_runs(classify(stripped, levels))),
            *c_array("uint32_t unicode_combining", [f"0x{p << 8 | v:08X}" for p, v in sorted(survivors.items())]),
            *mapping_arrays("unicode_stripped", left),
            *mapping_arrays("unicode_lowered", lowered),
            "#endif",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(write_or_check(HEADER_PATH, render()))
