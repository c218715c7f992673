"""The real agent, with a zygote whose workers have the emulated GPU."""

from __future__ import annotations

import sys
from pathlib import Path

from worker.agent_process import main
from worker.zygote_process import start_zygote_process

if __name__ == "__main__":
    zygote = start_zygote_process((sys.executable, str(Path(__file__).with_name("emulated_gpu_zygote.py"))))
    sys.exit(main(zygote))
