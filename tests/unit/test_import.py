"""`import megamoe` is cheap and needs neither CUDA packages nor transformers."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROBE = """
import json, sys, time
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "triton", "nvshmem", "cuda", "cupy", "pynvml", "deep_ep"}:
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Refuse())
start = time.perf_counter(); import torch; torch_s = time.perf_counter() - start
start = time.perf_counter(); import megamoe; megamoe_s = time.perf_counter() - start
print(json.dumps(dict(torch_s=torch_s, megamoe_s=megamoe_s, cuda=torch.cuda.is_initialized())))
"""


def test_import_takes_less_than_half_a_second_beyond_torch_and_needs_no_optional_package():
    command = [sys.executable, "-c", PROBE]
    runs = [json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout) for _ in range(3)]
    best = min(run["megamoe_s"] for run in runs)
    assert best < 0.5, f"import megamoe took {best:.2f} s at best, after import torch took {min(run['torch_s'] for run in runs):.2f} s"
    assert not any(run["cuda"] for run in runs)


def test_every_public_name_exists():
    import megamoe

    assert sorted(megamoe.__all__) == list(megamoe.__all__) and all(hasattr(megamoe, name) for name in megamoe.__all__)
