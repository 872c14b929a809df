"""The reference engine on GPUs, one rank per GPU, over each backend that is there: the edge grid, failures, and full model shapes."""

import importlib.util
import time

import pytest
import torch
from test_moe import EDGES, PRECISIONS, small_case

from megamoe import MegaMoE, MoEConfig, PeerTimeoutError
from megamoe.formats import layout_sm90, quantize_fp4
from megamoe.testing.inputs import LayerCase, rank_inputs
from megamoe.testing.layer_run import assert_case_accepted, build_layer

NUM_GPUS = torch.cuda.device_count()
BACKENDS = ["torch"] + (["nvshmem"] if importlib.util.find_spec("nvshmem") else [])

needs_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
needs_gpu = pytest.mark.skipif(NUM_GPUS < 1, reason="no CUDA device")


def device_inputs(case: LayerCase, rank: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.cuda() for tensor in rank_inputs(case, rank))


def run_on_gpu(rank: int, num_ranks: int, cases: list[LayerCase], backend: str) -> list[float]:
    torch.cuda.set_device(rank)
    medians = []
    for case in cases:
        inputs = device_inputs(case, rank)
        with build_layer(case, rank, device="cuda", engine="reference", backend=backend, timeout_s=10.0) as layer:
            layer.arena.view("partials").view(torch.uint8).fill_(0xFF)
            y = layer(*inputs)
            assert torch.equal(layer(*inputs).view(torch.uint8), y.view(torch.uint8)), f"two runs differ: {case}"
            medians.append(assert_case_accepted(case, rank, y, layer.engine.act_group).median)
    return medians


@needs_gpus
@pytest.mark.parametrize("backend", BACKENDS)
def test_edge_grid(rank_pool, backend):
    """Every edge of the CPU grid that this machine has the ranks for, in every precision it names, on one set of processes."""
    for num_ranks in sorted({case.num_ranks for case in EDGES.values()} - {1}):
        if num_ranks <= NUM_GPUS:
            rank_pool(num_ranks).run(run_on_gpu, [case for case in EDGES.values() if case.num_ranks == num_ranks], backend, timeout_s=200)


@needs_gpus
@pytest.mark.parametrize("backend", BACKENDS)
def test_precisions(rank_pool, backend):
    cases = [small_case(precision=precision, has_bias=True, swiglu_limit=2.0, nan_tokens=(1, 3), tokens=(9, 13))
             for precision in PRECISIONS]
    rank_pool(2).run(run_on_gpu, cases, backend, timeout_s=100)


def full_size_case(num_ranks: int, **cfg) -> LayerCase:
    return LayerCase(cfg=MoEConfig(max_tokens_per_rank=256, **cfg), tokens_per_rank=tuple(96 + 32 * rank for rank in range(num_ranks)))


@needs_gpus
def test_model_shapes(rank_pool):
    """Widths, top-k and gates of the models in their real sizes; fewer experts than the model has, so that the oracle stays affordable."""
    num_ranks = min(4, NUM_GPUS)
    cases = [
        full_size_case(num_ranks, hidden=7168, intermediate=3072, num_experts=4 * num_ranks, num_topk=6, swiglu_limit=10.0),
        full_size_case(num_ranks, hidden=7168, intermediate=2048, num_experts=4 * num_ranks, num_topk=8, precision="fp8xfp8"),
        full_size_case(num_ranks, hidden=2880, intermediate=2880, num_experts=4 * num_ranks, num_topk=4, swiglu_alpha=1.702,
                       swiglu_up_bias=1.0, swiglu_limit=7.0),
        full_size_case(num_ranks, hidden=2048, intermediate=768, num_experts=8 * num_ranks, num_topk=8, precision="bf16"),
    ]
    rank_pool(num_ranks).run(run_on_gpu, cases, "torch", timeout_s=280)


def run_stalled(rank: int, num_ranks: int, backend: str):
    torch.cuda.set_device(rank)
    case = small_case(tokens=(4,) * num_ranks)
    layer = build_layer(case, rank, device="cuda", engine="reference", backend=backend, timeout_s=2.0)
    good = layer(*device_inputs(case, rank))
    if rank == 1:
        time.sleep(5)
    try:
        layer(*device_inputs(case, rank))
        raised = None
    except PeerTimeoutError as error:
        raised = error.peer
    layer.reset()
    again = layer(*device_inputs(case, rank))
    layer.close()
    return raised, bool(torch.equal(good, again))


@needs_gpus
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stalled_rank_times_out_and_reset_recovers(rank_pool, backend):
    results = rank_pool(2).run(run_stalled, backend)
    assert results[0][0] == 1
    assert all(recovered for _, recovered in results)


@needs_gpu
def test_one_gpu_without_a_group():
    cfg = MoEConfig(hidden=7168, intermediate=2048, num_experts=8, num_topk=8, max_tokens_per_rank=64)
    case = LayerCase(cfg=cfg, tokens_per_rank=(33,))
    layer = build_layer(case, 0, device="cuda", engine="reference")
    x, topk_idx, topk_weights = device_inputs(case, 0)
    assert_case_accepted(case, 0, layer(x, topk_idx, topk_weights), layer.engine.act_group)
    with pytest.raises(ValueError, match="MegaMoE: device of x must be cuda:0, got cpu; move it with"):
        layer(x.cpu(), topk_idx, topk_weights)


@needs_gpu
def test_a_v4_pro_rank_is_packed_in_time():
    """96 experts of 7168 / 3072 in kernel layout within 20 s, quantisation not counted."""
    gate_up = quantize_fp4(torch.randn(1, 6144, 7168, device="cuda"))
    down = quantize_fp4(torch.randn(1, 7168, 3072, device="cuda"))
    torch.cuda.synchronize()
    begin = time.monotonic()
    for _ in range(96):
        layout_sm90.pack(gate_up, interleave_gate_up=True)
        layout_sm90.pack(down, interleave_gate_up=False)
    torch.cuda.synchronize()
    assert time.monotonic() - begin < 20


@needs_gpu
def test_weights_move_between_devices_through_the_state_dict():
    case = LayerCase(cfg=MoEConfig(hidden=256, intermediate=128, num_experts=4, num_topk=2, max_tokens_per_rank=16), tokens_per_rank=(9,))
    on_cpu, on_gpu = build_layer(case, 0), MegaMoE(case.cfg, device="cuda")
    on_gpu.load_state_dict(on_cpu.state_dict())
    assert_case_accepted(case, 0, on_gpu(*device_inputs(case, 0)).cpu(), on_gpu.engine.act_group)
