"""Routers against the transformers implementations, loop-free worked examples, ties, autocast, compilation, and every refused option."""

import re
from types import SimpleNamespace

import pytest
import torch

from megamoe.layers.router import HashRouter, Router, SigmoidRouter, SoftmaxRouter, SqrtSoftplusRouter, stable_topk

T, H, E, K, V = 37, 48, 16, 4, 53
TABLE = torch.randint(E, (V, K), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed))


def randomize(module: torch.nn.Module, seed: int = 1) -> None:
    """Give every floating parameter and buffer values large enough that bias and groups change the choice."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def oracle(model: str, name: str, **config) -> torch.nn.Module:
    """A transformers router on a config of just the attributes it reads."""
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    defaults = dict(num_experts_per_tok=K, num_experts=E, num_local_experts=E, hidden_size=H, routed_scaling_factor=1.0, vocab_size=V,
                    scoring_func="sqrtsoftplus", norm_topk_prob=True)
    module = getattr(modeling, name)(SimpleNamespace(**defaults | config))
    randomize(module)
    return module


def assert_same_routing(router: Router, stock: torch.nn.Module, input_ids: torch.Tensor | None = None) -> None:
    """Load the stock state dict as it is and compare choice and weights, matched by expert because stock order may differ."""
    router.load_state_dict(stock.state_dict())
    x = tokens()
    topk_idx, topk_weights = router(x, input_ids)
    assert topk_idx.dtype == torch.int64 and topk_weights.dtype == torch.float32
    _, expected_weights, expected_idx = stock(x) if input_ids is None else stock(x, input_ids)
    dense = torch.zeros(T, E).scatter_add(1, topk_idx, topk_weights)
    expected = torch.zeros(T, E).scatter_add(1, expected_idx, expected_weights.float())
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(topk_idx.sort(dim=1).values, expected_idx.sort(dim=1).values)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("model, name", [("qwen3_moe", "Qwen3MoeTopKRouter"), ("olmoe", "OlmoeTopKRouter")])
def test_softmax_first_as_qwen3_and_olmoe(model, name, norm_topk_prob):
    assert_same_routing(SoftmaxRouter(H, E, K, norm_topk_prob=norm_topk_prob), oracle(model, name, norm_topk_prob=norm_topk_prob))


def test_mixtral_is_softmax_first_with_norm_and_equals_topk_first():
    stock = oracle("mixtral", "MixtralTopKRouter")
    assert_same_routing(SoftmaxRouter(H, E, K, norm_topk_prob=True), stock)
    assert_same_routing(SoftmaxRouter(H, E, K, topk_first=True), stock)


def test_topk_first_with_bias_as_gpt_oss():
    stock = oracle("gpt_oss", "GptOssTopKRouter")
    assert_same_routing(SoftmaxRouter(H, E, K, topk_first=True, bias=True), stock)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (4, 2), (8, 2), (4, 4)])
def test_sigmoid_with_groups_as_deepseek_v3(n_group, topk_group, norm_topk_prob):
    stock = oracle("deepseek_v3", "DeepseekV3TopkRouter", n_group=n_group, topk_group=topk_group, norm_topk_prob=norm_topk_prob,
                   routed_scaling_factor=2.5)
    router = SigmoidRouter(H, E, K, n_group=n_group, topk_group=topk_group, norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5)
    assert_same_routing(router, stock)


def test_sqrt_softplus_as_deepseek_v4():
    stock = oracle("deepseek_v4", "DeepseekV4TopKRouter", routed_scaling_factor=1.5)
    assert_same_routing(SqrtSoftplusRouter(H, E, K, routed_scaling_factor=1.5), stock)


def test_hash_routing_as_deepseek_v4():
    stock = oracle("deepseek_v4", "DeepseekV4HashRouter", routed_scaling_factor=1.5)
    stock.tid2eid.copy_(TABLE)
    input_ids = torch.randint(V, (T,), generator=torch.Generator().manual_seed(9))
    router = HashRouter(H, E, torch.zeros_like(TABLE), routed_scaling_factor=1.5)
    assert_same_routing(router, stock, input_ids)
    assert torch.equal(router(tokens(), input_ids.view(1, T))[0], TABLE[input_ids])


def identity_router(cls, num_topk, **options):
    """A router whose logits are x itself."""
    router = cls(4, 4, num_topk, **options)
    router.weight.data.copy_(torch.eye(4))
    return router


def test_softmax_worked_example():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0]).log().unsqueeze(0)  # softmax: 1/15 2/15 4/15 8/15
    for options, expected in [({}, [8 / 15, 4 / 15]), (dict(norm_topk_prob=True), [8 / 12, 4 / 12]),
                              (dict(topk_first=True), [8 / 12, 4 / 12]),
                              (dict(norm_topk_prob=True, routed_scaling_factor=3.0), [2.0, 1.0])]:
        topk_idx, topk_weights = identity_router(SoftmaxRouter, 2, **options)(x)
        assert topk_idx.tolist() == [[3, 2]]
        torch.testing.assert_close(topk_weights, torch.tensor([expected]))


@pytest.mark.parametrize("cls, score", [(SigmoidRouter, lambda v: 1 / (1 + v.neg().exp())),
                                        (SqrtSoftplusRouter, lambda v: (1 + v.exp()).log().sqrt())])
def test_correction_bias_chooses_but_does_not_weigh(cls, score):
    router = identity_router(cls, 2, norm_topk_prob=False)
    router.e_score_correction_bias.copy_(torch.tensor([5.0, 0.0, 0.0, -5.0]))
    x = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    topk_idx, topk_weights = router(x)
    assert topk_idx.tolist() == [[0, 2]]
    torch.testing.assert_close(topk_weights, score(torch.tensor([[-1.0, 1.0]])))


def test_groups_are_ranked_by_their_two_best():
    router = identity_router(SigmoidRouter, 1, n_group=2)
    # Expert 0 is the best of all, but the other group has the larger sum of two.
    assert router(torch.tensor([[3.0, -9.0, 2.0, 2.5]]))[0].tolist() == [[3]]


def test_excluded_groups_stay_excluded_under_negative_scores():
    router = identity_router(SigmoidRouter, 2, n_group=2)
    router.e_score_correction_bias.fill_(-7.0)  # a mask of zeros instead of -inf would now win
    assert router(torch.tensor([[3.0, -9.0, 2.0, 2.5]]))[0].tolist() == [[3, 2]]


@pytest.mark.parametrize("router", [SoftmaxRouter(H, E, K), SoftmaxRouter(H, E, K, topk_first=True),
                                    SigmoidRouter(H, E, K, n_group=4, topk_group=2), SqrtSoftplusRouter(H, E, K)])
def test_ties_go_to_the_lowest_index(router):
    topk_idx, topk_weights = router(torch.zeros(3, H))
    assert topk_idx.tolist() == [[0, 1, 2, 3]] * 3
    assert torch.equal(topk_weights, topk_weights[:1, :1].expand(3, K))


def test_stable_topk_orders_by_score_then_index():
    assert stable_topk(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]]), 4).tolist() == [[1, 3, 2, 4]]
    assert stable_topk(torch.arange(384).remainder(2).float().expand(5, -1), 8).tolist() == [list(range(1, 17, 2))] * 5


def test_a_nan_token_stays_alone():
    x = tokens()
    x[3, 5] = torch.nan
    router = SigmoidRouter(H, E, K, n_group=4, topk_group=2)
    topk_idx, topk_weights = router(x)
    clean_idx, clean_weights = router(tokens())
    others = torch.arange(T) != 3
    assert torch.equal(topk_idx[others], clean_idx[others]) and torch.equal(topk_weights[others], clean_weights[others])
    assert topk_weights[3].isnan().all() and 0 <= topk_idx.min() and topk_idx.max() < E


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_fp32_also_for_bf16_weights_and_under_autocast(dtype):
    router = SoftmaxRouter(H, E, K, dtype=dtype)
    x = tokens().to(dtype)
    expected = x.double() @ router.weight.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router.logits(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_weights_carry_gradients():
    router = SigmoidRouter(H, E, K, norm_topk_prob=False)
    topk_idx, topk_weights = router(tokens())
    topk_weights.sum().backward()
    chosen = torch.zeros(T, E).scatter(1, topk_idx, 1.0)
    scores = torch.sigmoid(tokens() @ router.weight.detach().T)
    torch.testing.assert_close(router.weight.grad, (chosen * scores * (1 - scores)).T @ tokens(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    topk_idx, topk_weights = SigmoidRouter(H, E, K, n_group=4, topk_group=2)(tokens()[:num_tokens])
    assert topk_idx.shape == topk_weights.shape == (num_tokens, K)
    torch.testing.assert_close(topk_weights.sum(dim=1), torch.ones(num_tokens))


@pytest.mark.parametrize("router", [SoftmaxRouter(H, E, K, bias=True), SoftmaxRouter(H, E, K, topk_first=True),
                                    SigmoidRouter(H, E, K, n_group=4, topk_group=2), SqrtSoftplusRouter(H, E, K), HashRouter(H, E, TABLE)],
                         ids=lambda router: type(router).__name__)
def test_compiles_without_graph_breaks(router):
    randomize(router)
    x, input_ids = tokens(), torch.arange(T) % V
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(x, input_ids), router(x, input_ids), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("make, message", [
    (lambda: SoftmaxRouter(0, E, K), "SoftmaxRouter: hidden must be positive, got 0; pass the width of the model"),
    (lambda: SoftmaxRouter(H, 0, K), "SoftmaxRouter: num_experts must be positive, got 0; pass the number of routed experts"),
    (lambda: SigmoidRouter(H, E, 17), "SigmoidRouter: num_topk must be in [1, 16], got 17; route to at most num_experts experts"),
    (lambda: SqrtSoftplusRouter(H, E, K, routed_scaling_factor=0.0),
     "SqrtSoftplusRouter: routed_scaling_factor must be positive, got 0.0; 1.0 means no scaling"),
    (lambda: SoftmaxRouter(H, E, K, topk_first=True, norm_topk_prob=True),
     "SoftmaxRouter: norm_topk_prob must be False with topk_first, got True; the weights sum to one already"),
    (lambda: SigmoidRouter(H, E, K, n_group=3), "SigmoidRouter: n_group must be a divisor of 16 experts, got 3; 1 means no groups"),
    (lambda: SigmoidRouter(H, E, K, n_group=4, topk_group=5),
     "SigmoidRouter: topk_group must be in [1, 4], got 5; use at most n_group groups"),
    (lambda: SigmoidRouter(H, E, K, n_group=16, topk_group=8),
     "SigmoidRouter: n_group must be at most 8, got 16; a group needs two experts"),
    (lambda: SigmoidRouter(H, E, 5, n_group=4, topk_group=1),
     "SigmoidRouter: num_topk must be at most 4, got 5; 1 groups of 4 experts have no more"),
    (lambda: HashRouter(H, E, torch.zeros(V)),
     "HashRouter: table must be [V, K] integer, got [53] torch.float32; pass the experts of each token id"),
    (lambda: HashRouter(H, E, TABLE + 1),
     "HashRouter: table must be experts in [0, 16), got [1, 16]; pass the table that belongs to this layer"),
    (lambda: SoftmaxRouter(H, E, K)(torch.zeros(2, 3, H)), "SoftmaxRouter: x must be [T, 48], got [2, 3, 48]; flatten batch and sequence"),
    (lambda: SoftmaxRouter(H, E, K)(torch.zeros(2, 7)), "SoftmaxRouter: x must be [T, 48], got [2, 7]; flatten batch and sequence"),
    (lambda: HashRouter(H, E, TABLE)(tokens()),
     "HashRouter: input_ids must be 37 token ids, got None; call with input_ids=, one per row of x"),
    (lambda: HashRouter(H, E, TABLE)(tokens(), torch.zeros(36, dtype=torch.int64)),
     "HashRouter: input_ids must be 37 token ids, got [36]; call with input_ids=, one per row of x"),
])
def test_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
