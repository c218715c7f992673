"""Numbers of the guest ABI, version 1. ``sdk/glowplug.h`` and ``ABI.md`` say the same; a test compares them."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

ABI_VERSION: Final = 1
IMPORT_NAMESPACE: Final = "glowplug"
NO_TENSOR: Final = 0xFFFF_FFFF
NO_VALUE: Final = 0xFFFF_FFFF


class Opcode(IntEnum):
    """Operations of a tensor program.

    Values are activation matrices ``[T, width]`` (T: tokens of the step), float32 unless the backend holds them
    otherwise. ``ints`` and ``floats`` are the record's immediate operands.

    ============== =============================================================================================
    EMBED          out[T, D] = rows of tensors[0] ``[V, D]`` at the step's token ids
    RMS_NORM       out = in0 / sqrt(mean(in0^2) + floats[0]) * tensors[0]
    LINEAR         out[T, N] = in0[T, K] @ tensors[0][N, K].T (+ tensors[1][N] unless NO_TENSOR); ints[0] = N
    HEAD_RMS_NORM  in place on out (= in0): for heads ints[1] of width ints[2] from column ints[0]:
                   RMS norm with weight tensors[0] ``[head_dim]``, eps floats[0]
    ROPE           in place on out (= in0): rotate heads ints[1] of width ints[2] from column ints[0], half-split
                   pairs, angle = position * tensors[0]``[head_dim / 2]``, result times floats[0]
    KV_APPEND      store columns of in0 into layer ints[0]: keys from column ints[1], values from ints[2],
                   heads ints[3] of width ints[4]
    ATTENTION      out[T, H * Dh] = causal attention of the queries in in0 (column 0 on) over layer ints[0];
                   ints[1] query heads, ints[2] key/value heads, ints[3] head width, ints[4] sliding window in
                   tokens (0: none); floats[0] = score scale
    SILU_MUL       out[T, F] = silu(in0[:, :F]) * in0[:, F:2F]; ints[0] = F
    ADD            out = in0 + in1
    LAST_ROWS      out[S, D] = the rows of in0 whose logits the step asks for (last token of each sequence)
    OUTPUT         in0 is the step's result (logits ``[S, V]``); last operation of a program
    ============== =============================================================================================
    """

    EMBED = 1
    RMS_NORM = 2
    LINEAR = 3
    HEAD_RMS_NORM = 4
    ROPE = 5
    KV_APPEND = 6
    ATTENTION = 7
    SILU_MUL = 8
    ADD = 9
    LAST_ROWS = 10
    OUTPUT = 11


class ProgramKind(IntEnum):
    """Which steps a program serves."""

    PREFILL = 0  # any number of tokens for each sequence
    DECODE = 1  # exactly one token for each sequence


class TokenizeFlag(IntFlag):
    """Flags of ``gp_tokenize``."""

    ADD_SPECIAL = 1  # begin-of-sequence token where the model wants one
    PARSE_SPECIAL = 2  # special tokens written in the text become their ids


class SequenceEnd(IntEnum):
    """``finish`` field of a sequence push."""

    NONE = 0
    STOP_TOKEN = 1
    STOP_STRING = 2


class SequenceFlag(IntFlag):
    """Flags of ``gp_sequence_open``."""

    IGNORE_STOP_TOKENS = 1
    SHOW_SPECIAL = 2  # special tokens' text is emitted; default: hidden
