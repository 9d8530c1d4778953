"""The Philox4x32-10 vectors published with Random123 (Salmon et al., kat_vectors)."""

from __future__ import annotations

# Counter words 0 to 3, key words 0 and 1, the four words that come out.
_PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def _joined(low: str, high: str) -> int:
    return int(high + low, 16)


def published() -> list[tuple[int, int, int, list[int]]]:
    """(key, quad, offset, words): quad is the low half of the counter, offset the high half."""
    vectors = []
    for counter, key, words in _PUBLISHED:
        c, k = counter.split(), key.split()
        out = [int(word, 16) for word in words.split()]
        vectors.append((_joined(*k), _joined(*c[:2]), _joined(*c[2:]), out))
    return vectors
