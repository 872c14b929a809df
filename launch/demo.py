"""The main job: a trained Qwen3-MoE scores and continues held-out text, its stock experts against MegaMoE layers over all ranks.

    torchrun --standalone --nproc-per-node 2 launch/demo.py [--device cpu|cuda] [--engine auto] [--backend auto] [--text FILE] [--tokens N]

Exit code of a rank: 0 PASS, 1 FAIL, 130 interrupted.
"""

import os
import signal

if __name__ == "__main__":
    # Importing torch and transformers takes seconds, and a Ctrl-C in them should not print one traceback per rank.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from demo_run import main

    main()
