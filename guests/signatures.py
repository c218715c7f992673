"""Types of the guest ABI's imports and exports; :mod:`guests.module` checks by them, :mod:`guests.runtime` calls by
them. ``ABI.md`` says what each function means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from guests.binding import KIND_I32, KIND_I64


@dataclass(frozen=True, slots=True)
class Signature:
    """Value kinds of a function: :data:`~guests.binding.KIND_I32` or :data:`~guests.binding.KIND_I64`.

    ``ranges`` of an import are checked by :mod:`guests.linker` before its host function runs.
    """

    params: tuple[int, ...] = ()
    result: int | None = None
    ranges: tuple[tuple[int, int], ...] = ()  # (pointer, length) pairs among an import's parameters, by index

    @property
    def results(self) -> tuple[int, ...]:
        """``result`` as a tuple of none or one."""
        return () if self.result is None else (self.result,)

    def __str__(self) -> str:
        names = {KIND_I32: "i32", KIND_I64: "i64"}
        params = ", ".join(names[kind] for kind in self.params)
        return f"({params})" + (f" -> {names[self.result]}" if self.result is not None else "")


IMPORTS: Final = {
    "log": Signature((KIND_I32, KIND_I32, KIND_I32), None, ((1, 2),)),
    "asset_size": Signature((KIND_I32, KIND_I32), KIND_I64, ((0, 1),)),
    "asset_read": Signature((KIND_I32, KIND_I32, KIND_I64, KIND_I32, KIND_I32), KIND_I32, ((0, 1), (3, 4))),
    "tensor": Signature((KIND_I32, KIND_I32), KIND_I32, ((0, 1),)),
    "tensor_alloc": Signature((KIND_I32, KIND_I32, KIND_I32, KIND_I32, KIND_I32), KIND_I32, ((0, 1), (3, 4))),
    "tensor_write": Signature((KIND_I32, KIND_I64, KIND_I32, KIND_I32), KIND_I32, ((2, 3),)),
    "program": Signature((KIND_I32, KIND_I32), KIND_I32, ((0, 1),)),
}

LIFECYCLE_EXPORTS: Final = {
    "gp_abi": Signature((), KIND_I32),
    "gp_init": Signature((), KIND_I32),
    "gp_resume": Signature((KIND_I64,), KIND_I32),
}

# A guest that reads text has both of these.
TOKENIZER_EXPORTS: Final = {
    "gp_buffer": Signature((KIND_I32,), KIND_I32),
    "gp_tokenize": Signature((KIND_I32, KIND_I32, KIND_I32), KIND_I64),
}

# A guest that writes text has all of these, and a tokeniser's.
WRITER_EXPORTS: Final = {
    "gp_detokenize": Signature((KIND_I32, KIND_I32, KIND_I32), KIND_I64),
    "gp_token_bytes": Signature((KIND_I32,), KIND_I64),
    "gp_sequence_open": Signature((KIND_I32, KIND_I32, KIND_I32), KIND_I32),
    "gp_sequence_push": Signature((KIND_I32, KIND_I32), KIND_I64),
    "gp_sequence_flush": Signature((KIND_I32,), KIND_I64),
    "gp_sequence_close": Signature((KIND_I32,)),
}

EXPORTS: Final = LIFECYCLE_EXPORTS | TOKENIZER_EXPORTS | WRITER_EXPORTS
