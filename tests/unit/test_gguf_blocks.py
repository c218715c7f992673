"""GGUF's blocks: their sizes are the same everywhere, their weights those of the package that defines them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from snapshots.block_types import BLOCK_TYPES, byte_shape, count_tensor_bytes, fits_blocks
from snapshots.dtypes import array_type
from snapshots.errors import StoreError
from snapshots.weights_file import TensorSpec, plan_weights
from tests.block_fixtures import random_blocks
from worker.backends.cuda_kernels import FORMATS
from worker.backends.gguf_blocks import dequantise_blocks
from worker.backends.protocol import WeightTensor


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_weights_are_those_of_the_gguf_package(block_type: str) -> None:
    """Every bit pattern of codes and scales, to the last bit."""
    rows = random_blocks(np.random.default_rng(3), (7, 768), block_type)
    expected = gguf.dequantize(rows, gguf.GGMLQuantizationType[block_type])
    np.testing.assert_array_equal(dequantise_blocks(rows, block_type), expected)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_sizes_are_those_of_ggml_and_of_the_kernels(block_type: str) -> None:
    """Snapshots, kernels and ggml agree on weights and bytes of a block."""
    block, stored = BLOCK_TYPES[block_type], FORMATS[block_type.lower()]
    assert block == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block_type]]
    assert (block.num_weights, block.num_bytes) == (stored.block_weights, stored.block_bytes)
    assert stored.width_multiple == block.num_weights
    assert stored.is_quantised


def test_a_matrix_in_blocks_has_the_shape_of_its_weights() -> None:
    """Programs see [N, K]; memory is [N, bytes of a row]; blocks are for matrices of whole blocks."""
    tensor = WeightTensor("w", np.zeros((3, 288), np.uint8), block_type="Q4_K")
    assert tensor.shape == (3, 512)
    assert not tensor.is_int4
    assert array_type("Q4_K", (3, 512)) == (np.uint8, (3, 288))
    assert byte_shape("BF16", (3, 512)) == (3, 512)
    assert count_tensor_bytes("Q6_K", (3, 512)) == 3 * 2 * 210
    assert fits_blocks("BF16", (5,))
    for wrong in ((512,), (3, 500), (2, 3, 512)):
        assert not fits_blocks("Q4_K", wrong)
        with pytest.raises(StoreError, match="no matrix of whole Q4_K blocks"):
            plan_weights([TensorSpec("w", "Q4_K", wrong)])
