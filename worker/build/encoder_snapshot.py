"""What a snapshot of an encoder holds where another model's holds something else."""

from __future__ import annotations

from typing import Final

from guests.embed_assets import pack_encoder_config, pack_wordpiece
from guests.errors import GuestError
from guests.llama_assets import CONFIG_ASSET, TOKENIZER_ASSET
from snapshots.manifest import SnapshotCard
from worker.build.encoder_source import ImportedEncoder
from worker.build.errors import BuildError

#: Private memory of a worker: interpreter, guest, and the activations of one step.
WORKER_BYTES: Final = 128 * 1024 * 1024


def pack_encoder_assets(source: ImportedEncoder) -> dict[str, bytes]:
    """What the embed guest reads at init.

    Raises:
        BuildError: the configuration or the tokeniser cannot be packed.
    """
    try:
        return {CONFIG_ASSET: pack_encoder_config(source.config), TOKENIZER_ASSET: pack_wordpiece(source.tokenizer)}
    except GuestError as error:
        raise BuildError(f"the guest refuses this model: {error}") from error


def make_encoder_card(source: ImportedEncoder, weight_format: str) -> SnapshotCard:
    """The card of an encoder. A text may have fewer tokens than any bound by its bytes says (accents and control
    characters go), so it states none."""
    config = source.config
    return SnapshotCard(
        architecture=source.architecture,
        weight_format=weight_format,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        max_token_bytes=0,
        num_layers=config.num_layers,
        num_kv_heads=config.num_heads,
        head_dim=config.head_dim,
        worker_bytes=WORKER_BYTES,
    )
