"""Signing keys: file format, rotation, and that secrets stay secret."""

from __future__ import annotations

import errno
import hmac
import os
import stat
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshots.errors import KeyRingError, SignatureInvalid
from snapshots.key_file import Key, generate_key
from snapshots.keyring import KeyRing

SECRET = "5a" * 32
LINE = f"main {SECRET} 2026-01-31T12:00:00Z active\n"


def write_private(path: Path, text: str) -> Path:
    """A file of mode 0600."""
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_hmac_is_the_one_of_rfc_4231() -> None:
    """Test case 6 of RFC 4231 (a key longer than a block), so that any HMAC-SHA256 can check our signatures."""
    ring = KeyRing([Key("rfc", b"\xaa" * 131, "2026-01-31T12:00:00Z")])
    key_id, mac = ring.sign(b"Test Using Larger Than Block-Size Key - Hash Key First")
    assert key_id == "rfc"
    assert mac.hex() == "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"


def test_generated_file_is_private_and_reads_back(tmp_path: Path) -> None:
    """A new key file has mode 0600 and gives the same ring."""
    path = tmp_path / "keys" / "snapshot.keys"
    made = KeyRing.generate_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    read = KeyRing.from_file(path)
    read.verify(*_signed(made, b"data"))
    assert read.key_ids == made.key_ids


def _signed(ring: KeyRing, data: bytes) -> tuple[str, bytes, bytes]:
    key_id, mac = ring.sign(data)
    return key_id, data, mac


def test_a_full_disk_leaves_no_part_of_a_key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a new file that the next try would stumble over, nor a copy with secrets beside an old one."""
    path = tmp_path / "keys" / "snapshot.keys"

    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        with pytest.raises(KeyRingError, match="No space left"):
            KeyRing.generate_file(path)
    assert list(path.parent.iterdir()) == []
    made = KeyRing.generate_file(path)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        with pytest.raises(KeyRingError, match="No space left"):
            KeyRing.rotate(path)
    assert list(path.parent.iterdir()) == [path]
    assert KeyRing.from_file(path).key_ids == made.key_ids


def test_a_folder_that_cannot_be_made_is_our_error(tmp_path: Path) -> None:
    """The place of the keys is somebody's choice: a file where a folder should be is told, not thrown."""
    (tmp_path / "keys").write_text("a file")
    with pytest.raises(KeyRingError, match="keys"):
        KeyRing.generate_file(tmp_path / "keys" / "snapshot.keys")


def test_generate_never_overwrites(tmp_path: Path) -> None:
    """An existing key file is left as it is."""
    path = write_private(tmp_path / "k", LINE)
    with pytest.raises(KeyRingError, match="exists already"):
        KeyRing.generate_file(path)
    assert path.read_text() == LINE


def test_rotation_signs_with_the_new_key_and_verifies_both(tmp_path: Path) -> None:
    """After adding a key the new one signs, and what the old one signed is still good."""
    path = tmp_path / "k"
    old = KeyRing.generate_file(path, key_id="old")
    signed_by_old = _signed(old, b"x")
    KeyRing.rotate(path, key_id="new")
    ring = KeyRing.from_file(path)
    assert ring.signing_key_id == "new"
    ring.verify(*signed_by_old)
    ring.verify(*_signed(ring, b"y"))


def test_adding_a_taken_id_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """An id can stand for one key only."""
    path = write_private(tmp_path / "k", LINE)
    with pytest.raises(KeyRingError, match="same id"):
        KeyRing.rotate(path, key_id="main")
    assert path.read_text() == LINE


def test_a_last_line_without_newline_is_not_glued_to_the_new_key(tmp_path: Path) -> None:
    """A file edited by hand may lack its last newline."""
    path = write_private(tmp_path / "k", LINE.rstrip())
    KeyRing.rotate(path, key_id="new")
    assert KeyRing.from_file(path).key_ids == ("main", "new")


def test_key_marked_verify_does_not_sign(tmp_path: Path) -> None:
    """A rotated-out key verifies only."""
    ring = KeyRing.from_file(write_private(tmp_path / "k", LINE.replace("active", "verify")))
    assert ring.signing_key_id is None
    with pytest.raises(KeyRingError, match="no active key"):
        ring.sign(b"")
    with pytest.raises(KeyRingError, match="not an active key"):
        ring.sign_with("main", b"")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o644])
def test_file_that_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    """Group or world access is refused with the command that repairs it."""
    path = write_private(tmp_path / "k", LINE)
    path.chmod(mode)
    with pytest.raises(KeyRingError, match="chmod 600"):
        KeyRing.from_file(path)


def test_symlink_folder_and_fifo_are_refused(tmp_path: Path) -> None:
    """Only a regular file at that very path is read, and nothing blocks."""
    real = write_private(tmp_path / "k", LINE)
    (tmp_path / "link").symlink_to(real)
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    for name in ("link", "fifo", "folder"):
        with pytest.raises(KeyRingError):
            KeyRing.from_file(tmp_path / name)


def test_missing_file_names_the_command(tmp_path: Path) -> None:
    """The remedy is in the message."""
    with pytest.raises(KeyRingError, match="glowplug keys new"):
        KeyRing.from_file(tmp_path / "none")


BAD_LINES = {
    "fields": f"main {SECRET} 2026-01-31T12:00:00Z\n",
    "hex": f"main {SECRET[:-1]}g 2026-01-31T12:00:00Z active\n",
    "short": f"main {SECRET[:-2]} 2026-01-31T12:00:00Z active\n",
    "long": f"main {SECRET * 5} 2026-01-31T12:00:00Z active\n",
    "date": f"main {SECRET} yesterday active\n",
    "status": f"main {SECRET} 2026-01-31T12:00:00Z retired\n",
    "id": f"ma/in {SECRET} 2026-01-31T12:00:00Z active\n",
    "twice": LINE + LINE,
    "empty": "# only a comment\n\n",
    "not ascii": LINE.replace("main", "häuptling"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_malformed_lines_are_named_without_their_secret(tmp_path: Path, case: str) -> None:
    """The error helps to find the line and never shows any of the secret."""
    path = write_private(tmp_path / "k", BAD_LINES[case])
    with pytest.raises(KeyRingError) as caught:
        KeyRing.from_file(path)
    assert "5a5a" not in "".join(traceback.format_exception(caught.value))


def test_secrets_are_in_no_repr() -> None:
    """Neither a ring nor a key shows its secret."""
    key = generate_key("shown")
    shown = repr(key) + repr(KeyRing([key])) + str(key)
    assert "shown" in shown
    assert key.secret.hex() not in shown
    assert repr(key.secret) not in shown


def test_keys_from_environment_text() -> None:
    """KEY-ID:HEX, several with commas, the last one signs."""
    ring = KeyRing.from_text(f"a:{SECRET},b:{'6b' * 32}")
    assert ring.key_ids == ("a", "b")
    assert ring.signing_key_id == "b"


@pytest.mark.parametrize("text", ["", "a", f":{SECRET}", f"a:{SECRET[2:]}", f"a:{SECRET},", f"a {SECRET}"])
def test_malformed_environment_text_is_refused(text: str) -> None:
    """Without quoting the secret."""
    with pytest.raises(KeyRingError) as caught:
        KeyRing.from_text(text)
    assert "5a5a5a5a5a" not in str(caught.value)


def test_wrong_mac_and_unknown_key_are_refused() -> None:
    """Any other length or content of the MAC is refused."""
    ring = KeyRing.from_text(f"a:{SECRET}")
    key_id, mac = ring.sign(b"data")
    for wrong in (b"", mac[:-1], mac + b"\0", bytes([mac[0] ^ 1]) + mac[1:]):
        with pytest.raises(SignatureInvalid):
            ring.verify(key_id, b"data", wrong)
    with pytest.raises(SignatureInvalid, match="not in the key ring"):
        ring.verify("b", b"data", mac)


@given(st.text(max_size=200))
def test_arbitrary_key_text_gives_a_ring_or_our_own_error(text: str) -> None:
    """No text makes the parser fail in any way but its own error."""
    try:
        KeyRing.from_text(text)
    except KeyRingError:
        pass


def test_rotated_out_key_is_marked_and_comments_stay(tmp_path: Path) -> None:
    """The file is rewritten whole: mode, comments and the other kind of key are as before."""
    path = write_private(tmp_path / "k", f"# mine\n{LINE}{LINE.replace('main', 'enc').replace('active', 'encrypt')}")
    ring = KeyRing.rotate(path, key_id="next")
    assert ring.statuses == {"main": "verify", "enc": "encrypt", "next": "active"}
    assert KeyRing.from_file(path).statuses == ring.statuses
    assert path.read_text().startswith("# mine\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["k"]


def test_revoked_key_is_refused_by_name_and_its_secret_is_gone(tmp_path: Path) -> None:
    """What it signed is refused as revoked, not as unknown; it cannot sign; revoking again changes nothing."""
    path = write_private(tmp_path / "k", LINE)
    signed = _signed(KeyRing.from_file(path), b"data")
    for _ in range(2):
        ring = KeyRing.revoke(path, "main")
        assert path.read_text() == "main - 2026-01-31T12:00:00Z revoked\n"
        with pytest.raises(SignatureInvalid, match="key 'main', which is revoked"):
            ring.verify(*signed)
        assert ring.signing_key_id is None
    KeyRing.rotate(path, key_id="next")
    assert KeyRing.from_file(path).statuses == {"main": "revoked", "next": "active"}


def test_a_revoked_key_verifies_nothing_even_with_an_empty_secret(tmp_path: Path) -> None:
    """A MAC made with the empty secret that a revoked line stands for is refused too."""
    ring = KeyRing.from_file(write_private(tmp_path / "k", "main - 2026-01-31T12:00:00Z revoked\n"))
    forged = hmac.digest(b"", b"data", "sha256")
    with pytest.raises(SignatureInvalid, match="revoked"):
        ring.verify("main", b"data", forged)


def test_encryption_keys_neither_sign_nor_verify(tmp_path: Path) -> None:
    """And signing keys encrypt nothing: the kinds never mix."""
    ring = KeyRing.from_text(f"a:{SECRET},e:{'6b' * 32}:encrypt")
    assert (ring.signing_key_id, ring.encryption_key_id) == ("a", "e")
    forged = hmac.digest(bytes.fromhex("6b" * 32), b"data", "sha256")
    with pytest.raises(SignatureInvalid, match="not in the key ring"):
        ring.verify("e", b"data", forged)
    with pytest.raises(KeyRingError, match="no encryption key 'a'"):
        ring.encryption_secret("a")
    with pytest.raises(KeyRingError):
        ring.sign_with("e", b"data")
    assert ring.encryption_secret("e") == bytes.fromhex("6b" * 32)


def test_revoking_what_encrypts_or_is_not_there_is_refused(tmp_path: Path) -> None:
    """The file stays as it was."""
    text = LINE + LINE.replace("main", "enc").replace("active", "decrypt")
    path = write_private(tmp_path / "k", text)
    with pytest.raises(KeyRingError, match="could never be read again"):
        KeyRing.revoke(path, "enc")
    with pytest.raises(KeyRingError, match="no key 'none'; it has main, enc"):
        KeyRing.revoke(path, "none")
    assert path.read_text() == text
