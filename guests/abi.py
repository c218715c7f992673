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
    otherwise; ``[S, width]`` (S: sequences) behind LAST_ROWS and MEAN_POOL. ``ints`` and ``floats`` are the record's
    immediate operands. KV_APPEND, ATTENTION and LAST_ROWS belong to PREFILL and DECODE programs, ENCODER_ATTENTION and
    MEAN_POOL to ENCODE programs, all others to any.

    ================= ==========================================================================================
    EMBED             out[T, D] = rows of tensors[0] ``[V, D]`` at the step's token ids
    RMS_NORM          out = in0 / sqrt(mean(in0^2) + floats[0]) * tensors[0]
    LINEAR            out[T, N] = in0[T, K] @ tensors[0][N, K].T (+ tensors[1][N] unless NO_TENSOR); ints[0] = N
    HEAD_RMS_NORM     in place on out (= in0): for heads ints[1] of width ints[2] from column ints[0]:
                      RMS norm with weight tensors[0] ``[head_dim]``, eps floats[0]
    ROPE              in place on out (= in0): rotate heads ints[1] of width ints[2] from column ints[0], half-split
                      pairs, angle = position * tensors[0]``[head_dim / 2]``, result times floats[0]
    KV_APPEND         store columns of in0 into layer ints[0]: keys from column ints[1], values from ints[2],
                      heads ints[3] of width ints[4]
    ATTENTION         out[T, H * Dh] = causal attention of the queries in in0 (column 0 on) over layer ints[0];
                      ints[1] query heads, ints[2] key/value heads, ints[3] head width, ints[4] sliding window in
                      tokens (0: none); floats[0] = score scale
    SILU_MUL          out[T, F] = silu(in0[:, :F]) * in0[:, F:2F]; ints[0] = F
    ADD               out = in0 + in1
    LAST_ROWS         out[S, D] = the rows of in0 whose logits the step asks for (last token of each sequence)
    OUTPUT            in0 is the step's result (logits ``[S, V]``, or vectors ``[S, D]`` of an ENCODE program);
                      last operation of a program
    LAYER_NORM        out = (in0 - mean(in0)) / sqrt(variance(in0) + floats[0]) * tensors[0] + tensors[1]
    GELU              out = in0 * (1 + erf(in0 / sqrt(2))) / 2
    POSITION_EMBED    out[T, D] = rows of tensors[0] ``[P, D]`` at the tokens' positions in their sequences
    ENCODER_ATTENTION out[T, H * Dh] = attention of every token to all of its sequence; in0 holds queries, keys and
                      values side by side, ints[0] = H heads each, of width ints[1] = Dh; floats[0] = score scale
    MEAN_POOL         out[S, D] = mean of in0 over the tokens of each sequence
    L2_NORMALISE      out = in0 / max(floats[0], length of in0's row)
    ================= ==========================================================================================
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
    LAYER_NORM = 12
    GELU = 13
    POSITION_EMBED = 14
    ENCODER_ATTENTION = 15
    MEAN_POOL = 16
    L2_NORMALISE = 17


class ProgramKind(IntEnum):
    """Which steps a program serves. A guest records PREFILL and DECODE, or ENCODE alone."""

    PREFILL = 0  # any number of tokens for each sequence
    DECODE = 1  # exactly one token for each sequence
    ENCODE = 2  # whole sequences, which leave nothing behind; the result is a vector for each


class TensorType(IntEnum):
    """Types of tensors that a guest allocates."""

    F32 = 0
    BF16 = 1


#: What a guest records: the programs of a model that generates, or of one that encodes.
PROGRAM_SETS: Final = (
    frozenset({ProgramKind.PREFILL, ProgramKind.DECODE}),
    frozenset({ProgramKind.ENCODE}),
)


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
    KEEP_LEADING_SPACE = 4  # the text continues another: what a text of its own would lose at its beginning stays
