"""``python -m loadtest.gpu_peers CHECKPOINT --peer NAME``: other ways to the first token on the same GPU, as JSON.

``naive``: a fresh Python, torch, transformers, ``from_pretrained`` in bf16 on the device, one token; then greedy decode
at batch 1, eager. ``compiled``: the decode alone, under ``torch.compile``, which may take minutes. ``fastsafetensors``
and ``runai``: the time from a fresh process to all weights on the device by their loaders. What is not importable says
so and exits with 77. Run each with the page cache warm. ``--device cpu`` runs the same code without a GPU: to see that
it works, not how fast.
"""

from __future__ import annotations

import time

STARTED_S = time.perf_counter()  # before anything heavy is imported

import argparse  # noqa: E402
import ctypes  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

Figures = dict[str, Any]
PROMPT_TOKENS = 32
NOT_IMPORTABLE = 77  # what gpu-check takes for "lacking"
_BEGUN_ANEW = "GLOWPLUG_PEER_BEGUN_ANEW"


def elapsed_ms() -> float:
    """Since the process began to run this file."""
    return round((time.perf_counter() - STARTED_S) * 1e3, 1)


def wait_for(device: str) -> None:
    """Return when all that was asked of a GPU is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def ensure_runtime_found() -> None:
    """fastsafetensors opens ``libcudart.so`` by that name, which torch's wheels lack: put a link to theirs on the
    loader's path and begin anew, where the loader finds none."""
    try:
        ctypes.CDLL("libcudart.so")
        return
    except OSError:
        spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    found = sorted(path for folder in folders for path in folder.glob("*/lib/libcudart.so.*"))
    if not found or os.environ.get(_BEGUN_ANEW):
        return  # its own error says what is missing
    links = Path(tempfile.mkdtemp(prefix="gp-cudart-"))
    (links / "libcudart.so").symlink_to(found[-1])
    paths = [str(links), os.environ.get("LD_LIBRARY_PATH", "")]
    env = {**os.environ, "LD_LIBRARY_PATH": ":".join(path for path in paths if path), _BEGUN_ANEW: "1"}
    os.execve(sys.executable, [sys.executable, "-m", "loadtest.gpu_peers", *sys.argv[1:]], env)


def load_model(checkpoint: Path, device: str) -> tuple[Any, Figures]:
    """The model of transformers on the device, and when what was done."""
    import torch

    phases = {"torch_imported_ms": elapsed_ms()}
    import transformers

    phases["transformers_imported_ms"] = elapsed_ms()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map=device)
    wait_for(device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return model, {**versions, **phases, "loaded_ms": elapsed_ms()}


def run_naive(checkpoint: Path, device: str, num_steps: int) -> Figures:
    """Phases up to the first token, and milliseconds of a decode step."""
    import torch

    model, phases = load_model(checkpoint, device)
    ids = torch.arange(PROMPT_TOKENS, device=device)[None] % 96
    with torch.inference_mode():
        out = model(ids, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        token.item()
        phases["first_token_ms"] = elapsed_ms()
        cache = out.past_key_values
        steps = []
        for _ in range(num_steps):
            begin_s = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            token.item()
            steps.append((time.perf_counter() - begin_s) * 1e3)
    return {
        **phases,
        "decode_eager_ms": round(sorted(steps)[len(steps) // 2], 3),
        "allocated_bytes": torch.cuda.memory_allocated() if device == "cuda" else 0,
    }


def run_compiled(checkpoint: Path, device: str, num_steps: int) -> Figures:
    """Milliseconds of a decode step under ``torch.compile`` with a static cache; text: why there is none."""
    model, phases = load_model(checkpoint, device)
    return {**phases, "decode_compiled_ms": measure_compiled(model, device, num_steps)}


def measure_compiled(model: Any, device: str, num_steps: int) -> float | str:
    """See :func:`run_compiled`."""
    import torch
    import transformers

    try:
        token = torch.ones((1, 1), dtype=torch.long, device=device)
        cache = transformers.StaticCache(config=model.config, max_cache_len=128)
        step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=False)
        steps = []
        with torch.inference_mode():
            for position in range(num_steps + 3):
                begin_s = time.perf_counter()
                place = torch.tensor([position], device=device)
                out = step(token, past_key_values=cache, cache_position=place, use_cache=True)
                out.logits[:, -1:].argmax(-1).item()
                steps.append((time.perf_counter() - begin_s) * 1e3)
        return round(sorted(steps[3:])[num_steps // 2], 3)
    except Exception as error:  # whatever torch's compiler says on this machine
        return f"{type(error).__name__}: {error}"[:200]


def run_fastsafetensors(checkpoint: Path, device: str, _num_steps: int) -> Figures:
    """All tensors of the checkpoint on the device."""
    import torch
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device(device if device == "cpu" else "cuda:0"), nogds=True)
    loader.add_filenames({0: [str(path) for path in checkpoint.glob("*.safetensors")]})
    imported = elapsed_ms()
    loaded = loader.copy_files_to_device()
    tensors = [loaded.get_tensor(name) for name in loader.get_keys()]
    wait_for(device)
    return {"imported_ms": imported, "loaded_ms": elapsed_ms(), "num_tensors": len(tensors)}


def run_runai(checkpoint: Path, device: str, _num_steps: int) -> Figures:
    """Likewise, by the streamer, tensor by tensor to the device."""
    from runai_model_streamer import SafetensorsStreamer

    imported, count = elapsed_ms(), 0
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in checkpoint.glob("*.safetensors")])
        kept = []
        for _, tensor in streamer.get_tensors():
            kept.append(tensor.to(device, non_blocking=False))
            count += 1
    wait_for(device)
    return {"imported_ms": imported, "loaded_ms": elapsed_ms(), "num_tensors": count}


PEERS: dict[str, tuple[tuple[str, ...], Callable[[Path, str, int], Figures]]] = {
    "naive": (("torch", "transformers"), run_naive),
    "compiled": (("torch", "transformers"), run_compiled),
    "fastsafetensors": (("torch", "fastsafetensors"), run_fastsafetensors),
    "runai": (("torch", "runai_model_streamer"), run_runai),
}


def main() -> int:
    """Command line; 77 where the peer is not installed."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.gpu_peers", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peer", choices=sorted(PEERS), default="naive")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=32)
    options = parser.parse_args()
    needed, run = PEERS[options.peer]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(json.dumps({"peer": options.peer, "not_importable": missing}))
        return NOT_IMPORTABLE
    if options.peer == "fastsafetensors" and options.device == "cuda":
        ensure_runtime_found()
    print(json.dumps({"peer": options.peer, **run(options.checkpoint, options.device, options.steps)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
