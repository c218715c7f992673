"""Vectors of the real encoder, through guest, store, restore and each backend, against another implementation's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from guests.runtime import GuestEngine
from tests.checkpoint_files import DATA
from tests.embedding_texts import TEXTS
from tests.encoder_fixtures import MINILM, MINILM_F32, restored_encoder
from tests.model_fixtures import BuiltState
from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import Backend
from worker.restore import RestoredModel, prepare_restore

LEAST_COSINE = 0.9999
TOKENS_PER_STEP = 256


@pytest.fixture(scope="module")
def golden() -> dict[str, npt.NDArray[np.float32]]:
    """What make_embedding_goldens.py wrote."""
    with np.load(DATA / "minilm_embeddings.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def engine() -> Iterator[GuestEngine]:
    prepare_restore()
    with GuestEngine() as engine:
        engine.start_ticker()
        yield engine


def encode_all(restored: RestoredModel, backend: Backend, texts: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """Vectors of ``texts``, in batches as the engine makes them."""
    encoder = restored.encoder
    pending = [tuple(encoder.text.tokenize(text, add_special=True, parse_special=True)) for text in texts]
    bound = backend.bind_encoder(encoder.plan)
    vectors = []
    while pending:
        batch = [pending.pop(0)]
        while pending and sum(map(len, batch)) + len(pending[0]) <= TOKENS_PER_STEP:
            batch.append(pending.pop(0))
        vectors.append(bound.encode(tuple(batch)).copy())
    bound.close()
    del bound, encoder
    return np.concatenate(vectors)


def test_token_ids_equal_the_other_implementations(
    minilm_built: BuiltState, engine: GuestEngine, golden: dict[str, npt.NDArray[np.float32]]
) -> None:
    """The guest's WordPiece gives the ids that transformers' tokeniser gave, special tokens included."""
    expected = np.split(golden["token_ids"], np.cumsum(golden["num_tokens"])[:-1].astype(np.int64))
    with restored_encoder(minilm_built, MINILM, engine) as restored:
        text = restored.encoder.text
        for given, ids in zip(TEXTS, expected, strict=True):
            assert text.tokenize(given, add_special=True, parse_special=True) == ids.tolist(), given


@pytest.mark.parametrize(
    ("name", "backend"),
    [(MINILM, NumKongBackend), (MINILM_F32, NumKongBackend), (MINILM_F32, NumpyBackend)],
    ids=["numkong-bf16", "numkong-f32", "numpy-f32"],
)
def test_vectors_equal_the_other_implementations(
    minilm_built: BuiltState,
    engine: GuestEngine,
    golden: dict[str, npt.NDArray[np.float32]],
    name: str,
    backend: type[Backend],
) -> None:
    """On 100 texts the cosine to transformers' vectors is at least 0.9999, and every vector has length 1."""
    with restored_encoder(minilm_built, name, engine) as restored:
        vectors = encode_all(restored, backend(), TEXTS)
    cosines = np.sum(vectors * golden["vectors"], axis=1)
    print(f"{name} {backend.name if hasattr(backend, 'name') else ''}: least cosine {cosines.min():.7f}")
    assert vectors.shape == golden["vectors"].shape == (100, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert cosines.min() >= LEAST_COSINE
