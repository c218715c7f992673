"""``python -m loadtest.gpu_peers CHECKPOINT --peer NAME``: other ways to the first token on the same GPU, as JSON.

``naive``: a fresh Python, torch, transformers, ``from_pretrained`` in bf16 on the device, one token; then greedy decode
at batch 1, eager. ``compiled``: the decode alone, under ``torch.compile``, which may take minutes. ``fastsafetensors``
and ``runai``: the time from a fresh process to all weights on the device by their loaders. What is not importable says
so and exits with 77. Run each with the page cache warm.
"""

from __future__ import annotations

import time

STARTED_S = time.perf_counter()  # before anything heavy is imported

import argparse  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

Figures = dict[str, Any]
PROMPT_TOKENS = 32
NOT_IMPORTABLE = 77  # what gpu-check takes for "lacking"


def elapsed_ms() -> float:
    """Since the process began to run this file."""
    return round((time.perf_counter() - STARTED_S) * 1e3, 1)


def load_model(checkpoint: Path) -> tuple[Any, Figures]:
    """The model of transformers on the device, and when what was done."""
    import torch

    phases = {"torch_imported_ms": elapsed_ms()}
    import transformers

    phases["transformers_imported_ms"] = elapsed_ms()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="cuda")
    torch.cuda.synchronize()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return model, {**versions, **phases, "loaded_ms": elapsed_ms()}


def run_naive(checkpoint: Path, num_steps: int) -> Figures:
    """Phases up to the first token, and milliseconds of a decode step."""
    import torch

    model, phases = load_model(checkpoint)
    ids = torch.arange(PROMPT_TOKENS, device="cuda")[None] % 96
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
        "allocated_bytes": torch.cuda.memory_allocated(),
    }


def run_compiled(checkpoint: Path, num_steps: int) -> Figures:
    """Milliseconds of a decode step under ``torch.compile`` with a static cache; text: why there is none."""
    model, phases = load_model(checkpoint)
    return {**phases, "decode_compiled_ms": measure_compiled(model, num_steps)}


def measure_compiled(model: Any, num_steps: int) -> float | str:
    """See :func:`run_compiled`."""
    import torch
    import transformers

    try:
        token = torch.ones((1, 1), dtype=torch.long, device="cuda")
        cache = transformers.StaticCache(config=model.config, max_cache_len=128)
        step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=False)
        steps = []
        with torch.inference_mode():
            for position in range(num_steps + 3):
                begin_s = time.perf_counter()
                place = torch.tensor([position], device="cuda")
                out = step(token, past_key_values=cache, cache_position=place, use_cache=True)
                out.logits[:, -1:].argmax(-1).item()
                steps.append((time.perf_counter() - begin_s) * 1e3)
        return round(sorted(steps[3:])[num_steps // 2], 3)
    except Exception as error:  # whatever torch's compiler says on this machine
        return f"{type(error).__name__}: {error}"[:200]


def run_fastsafetensors(checkpoint: Path, _num_steps: int) -> Figures:
    """All tensors of the checkpoint on the device."""
    import torch
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cuda:0"), nogds=True)
    loader.add_filenames({0: [str(path) for path in checkpoint.glob("*.safetensors")]})
    imported = elapsed_ms()
    loaded = loader.copy_files_to_device()
    tensors = [loaded.get_tensor(name) for name in loader.get_keys()]
    torch.cuda.synchronize()
    return {"imported_ms": imported, "loaded_ms": elapsed_ms(), "num_tensors": len(tensors)}


def run_runai(checkpoint: Path, _num_steps: int) -> Figures:
    """Likewise, by the streamer, tensor by tensor to the device."""
    import torch
    from runai_model_streamer import SafetensorsStreamer

    imported, count = elapsed_ms(), 0
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in checkpoint.glob("*.safetensors")])
        kept = []
        for _, tensor in streamer.get_tensors():
            kept.append(tensor.to("cuda:0", non_blocking=False))
            count += 1
    torch.cuda.synchronize()
    return {"imported_ms": imported, "loaded_ms": elapsed_ms(), "num_tensors": count}


PEERS: dict[str, tuple[tuple[str, ...], Callable[[Path, int], Figures]]] = {
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
    parser.add_argument("--steps", type=int, default=32)
    options = parser.parse_args()
    needed, run = PEERS[options.peer]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(json.dumps({"peer": options.peer, "not_importable": missing}))
        return NOT_IMPORTABLE
    print(json.dumps({"peer": options.peer, **run(options.checkpoint, options.steps)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
