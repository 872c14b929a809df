"""replace_experts on small random models of every supported family: logits against the stock model, on one rank and on two."""

import re

import pytest
import torch

from megamoe.formats import quantize_fp4

transformers = pytest.importorskip("transformers", reason="the integration's tests need the transformers extra")

from megamoe.integrations.transformers import (  # noqa: E402
    IMPLEMENTATION,
    canonical_experts,
    expert_layers,
    replace_experts,
    set_stock_weights,
    stock_experts,
)

NUM_EXPERTS, NUM_TOPK, HIDDEN, INTERMEDIATE, VOCAB = 8, 2, 64, 32, 96
COMMON = dict(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_experts_per_tok=NUM_TOPK, num_attention_heads=2,
              pad_token_id=None, bos_token_id=None, eos_token_id=None, attn_implementation="eager", experts_implementation="eager")
CONFIGS = {
    "Qwen3Moe": dict(num_experts=NUM_EXPERTS, moe_intermediate_size=INTERMEDIATE, num_key_value_heads=1, head_dim=32),
    "Mixtral": dict(num_local_experts=NUM_EXPERTS, intermediate_size=INTERMEDIATE, num_key_value_heads=1),
    "DeepseekV3": dict(n_routed_experts=NUM_EXPERTS, moe_intermediate_size=INTERMEDIATE, intermediate_size=96, first_k_dense_replace=0,
                       n_group=2, topk_group=1, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32,
                       num_key_value_heads=2),
    # Limits that a good part of the random gates exceeds, so that a missing clamp shows.
    "DeepseekV4": dict(n_routed_experts=NUM_EXPERTS, moe_intermediate_size=INTERMEDIATE, head_dim=32, q_lora_rank=32, o_groups=2,
                       o_lora_rank=32, index_n_heads=2, index_head_dim=32, num_hash_layers=1, qk_rope_head_dim=16, swiglu_limit=0.5),
    "GptOss": dict(num_local_experts=NUM_EXPERTS, intermediate_size=INTERMEDIATE, num_key_value_heads=1, head_dim=32, swiglu_limit=0.5),
}


@torch.no_grad()
def stock_model(family: str):
    """The same random FP32 model on every rank, its experts strong enough to matter in the logits."""
    torch.manual_seed(11)
    config = getattr(transformers, f"{family}Config")(**COMMON, **CONFIGS[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, parameter in model.named_parameters():
        if "experts." in name or "mlp.gate." in name or "router." in name:
            parameter.normal_(std=0.3 if parameter.dim() < 3 else 0.075)
        elif parameter.dim() > 1:
            parameter.normal_(std=0.1 if "embed" not in name else 1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(torch.stack([torch.randperm(NUM_EXPERTS)[:NUM_TOPK] for _ in range(VOCAB)]))
    return model


def token_ids(rank: int) -> torch.Tensor:
    """[2, S] with another S on each rank."""
    return torch.randint(VOCAB, (2, 24 + 5 * rank), generator=torch.Generator().manual_seed(rank))


@torch.no_grad()
def logits(model, rank: int) -> torch.Tensor:
    return model(input_ids=token_ids(rank), use_cache=False).logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def carry_fp4_weights(model) -> None:
    for experts in stock_experts(model):
        weights = canonical_experts(experts, 0, NUM_EXPERTS)
        set_stock_weights(experts, quantize_fp4(weights.gate_up).dequantize(), quantize_fp4(weights.down).dequantize())


def close(model) -> None:
    for layer in expert_layers(model):
        layer.close()


def fp32_error(rank: int, num_ranks: int, family: str) -> float:
    model = stock_model(family)
    expected = logits(model, rank)
    replace_experts(model, precision="fp32", max_tokens_per_rank=64)
    found = logits(model, rank)
    close(model)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    return relative_error(found, expected)


def fp4_errors(rank: int, num_ranks: int, family: str) -> tuple[float, float]:
    """Error of the replaced model against the original that carries the dequantised weights, and how much the experts matter there."""
    model = stock_model(family)
    carry_fp4_weights(model)
    expected = logits(model, rank)
    replaced = replace_experts(stock_model(family), precision="fp8xfp4", max_tokens_per_rank=64)
    found = logits(replaced, rank)
    close(replaced)
    for experts in stock_experts(model):
        experts.down_proj.data.zero_()
    return relative_error(found, expected), relative_error(logits(model, rank), expected)


def on_ranks(rank_pool, num_ranks: int, fn, *args) -> list:
    """One rank needs no process group: that is how the integration is used on a single device."""
    return [fn(0, 1, *args)] if num_ranks == 1 else rank_pool(num_ranks).run(fn, *args)


@pytest.mark.parametrize("num_ranks", (1, 2))
@pytest.mark.parametrize("family", CONFIGS)
def test_fp32_logits_are_the_stock_models(rank_pool, family, num_ranks):
    for error in on_ranks(rank_pool, num_ranks, fp32_error, family):
        assert error < 1e-5


@pytest.mark.parametrize("num_ranks", (1, 2))
@pytest.mark.parametrize("family", CONFIGS)
def test_fp4_logits_are_within_one_percent_of_the_dequantised_models(rank_pool, family, num_ranks):
    for error, experts_share in on_ranks(rank_pool, num_ranks, fp4_errors, family):
        assert experts_share > 0.04, "the experts hardly matter: the comparison would prove nothing"
        assert error < 0.01


def experts_held(rank: int, num_ranks: int, family: str, precision: str) -> dict:
    """What is left of the experts' weights on this rank after replacement."""
    model = stock_model(family)
    expert_parameters = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    other_parameters = sum(p.numel() for p in model.parameters()) - expert_parameters
    first = rank * NUM_EXPERTS // num_ranks
    expected = [canonical_experts(experts, first, first + NUM_EXPERTS // num_ranks) for experts in stock_experts(model)]
    replace_experts(model, precision=precision, max_tokens_per_rank=64)
    layers = list(expert_layers(model))
    close(model)
    held = [layer.engine.weights() for layer in layers]
    return {
        "other parameters unchanged": sum(p.numel() for p in model.parameters()) == other_parameters,
        "bytes": [w.gate_up.untyped_storage().nbytes() + w.down.untyped_storage().nbytes() for w in held],
        "the right experts": all(torch.equal(w.gate_up, e.gate_up.to(w.gate_up.dtype)) and torch.equal(w.down, e.down.to(w.down.dtype))
                                 for w, e in zip(held, expected, strict=True)),
        "arenas": len({id(layer.arena) for layer in layers}),
        "implementation": model.config._experts_implementation,
    }


@pytest.mark.parametrize(("precision", "bytes_per_weight"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("family", ("Qwen3Moe", "GptOss"))
def test_each_rank_holds_only_its_experts_and_all_layers_share_one_arena(rank_pool, family, precision, bytes_per_weight):
    for held in rank_pool(2).run(experts_held, family, precision):
        assert held == {
            "other parameters unchanged": True,
            "bytes": [NUM_EXPERTS // 2 * 3 * HIDDEN * INTERMEDIATE * bytes_per_weight] * 2,
            "the right experts": True,
            "arenas": 1,
            "implementation": IMPLEMENTATION,
        }


@pytest.mark.parametrize("family", CONFIGS)
def test_stock_weights_survive_the_round_trip_through_canonical_order(family):
    experts = stock_experts(stock_model(family))[0]
    gate_up, down = experts.gate_up_proj.clone(), experts.down_proj.clone()
    weights = canonical_experts(experts, 0, NUM_EXPERTS)
    set_stock_weights(experts, torch.zeros_like(weights.gate_up), torch.zeros_like(weights.down))
    assert not experts.gate_up_proj.any() and not experts.down_proj.any()
    set_stock_weights(experts, weights.gate_up, weights.down)
    assert torch.equal(experts.gate_up_proj, gate_up) and torch.equal(experts.down_proj, down)


def test_generation_with_a_cache_repeats_the_stock_models_greedy_text():
    stock = stock_model("Qwen3Moe")
    prompt = token_ids(0)
    expected = stock.generate(prompt, max_new_tokens=12, do_sample=False)
    replaced = replace_experts(stock_model("Qwen3Moe"), precision="fp32", max_tokens_per_rank=64)
    found = replaced.generate(prompt, max_new_tokens=12, do_sample=False)
    close(replaced)
    assert torch.equal(found, expected)


def test_replaced_and_stock_models_live_side_by_side():
    stock, replaced = stock_model("Mixtral"), stock_model("Mixtral")
    expected = logits(stock, 0)
    replace_experts(replaced, precision="fp32", max_tokens_per_rank=64)
    assert torch.equal(logits(stock, 0), expected)
    close(replaced)


def unsupported(model_name: str) -> str:
    message = ("replace_experts: model must be one with experts of Qwen3-MoE, Mixtral, DeepSeek-V3, DeepSeek-V4, gpt-oss, "
               f"got {model_name}; pass a model of one of these families that has not been replaced yet")
    return f"^{re.escape(message)}$"


def test_unsupported_model_is_named_with_the_supported_ones():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=VOCAB))
    with pytest.raises(ValueError, match=unsupported("GPT2LMHeadModel")):
        replace_experts(model)


def test_a_model_is_not_replaced_twice():
    model = replace_experts(stock_model("Qwen3Moe"), precision="fp32", max_tokens_per_rank=64)
    with pytest.raises(ValueError, match=unsupported("Qwen3MoeForCausalLM")):
        replace_experts(model)
    close(model)


def test_activation_other_than_silu_is_refused():
    config = transformers.Qwen3MoeConfig(**COMMON, **CONFIGS["Qwen3Moe"], hidden_act="gelu")
    message = "replace_experts: hidden_act must be 'silu', got 'gelu'; no other activation is implemented"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace_experts(transformers.Qwen3MoeForCausalLM(config))
