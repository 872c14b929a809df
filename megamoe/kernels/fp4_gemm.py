"""fp4_gemm: source, build and launch of csrc/include/megamoe/kernels/fp4_gemm.cuh."""

from megamoe.kernels.fp4_gemm_config import Fp4GemmConfig
from megamoe.kernels.wgmma_source import wgmma_e5m2_e4m3

ENTRY = "fp4_gemm"


def source(config: Fp4GemmConfig) -> str:
    """One translation unit with the kernel for `config`."""
    tiles = ", ".join(map(str, config.token_tiles))
    return "\n".join([
        "#include <megamoe/ptx/wgmma.cuh>",
        *map(wgmma_e5m2_e4m3, config.token_tiles),
        "#include <megamoe/kernels/fp4_gemm.cuh>",
        "",
        "struct Config {",
        f"  static constexpr megamoe::uint32 kMathWarpgroups = {config.num_math_warpgroups}, kThreads = {config.num_threads};",
        f"  static constexpr megamoe::uint32 kMathRegisters = {config.math_registers}, kAuxRegisters = {config.aux_registers};",
        f"  using TokenTiles = megamoe::Sizes<{tiles}>;",
        f"  static constexpr megamoe::uint32 kStages = {config.num_stages}, kMaxGroups = {config.max_groups};",
        f"  static constexpr bool kSwiglu = {_cpp(config.epilogue == 'swiglu')}, kAccumulate = {_cpp(config.epilogue == 'accumulate')};",
        "};",
        f"static_assert(megamoe::SmemPlan<Config>::kBytes <= {config.smem_bytes}, \"fp4_gemm_config.py and SmemPlan disagree\");",
        "",
        f'extern "C" __global__ void __launch_bounds__(Config::kThreads, 1) {ENTRY}(const __grid_constant__ megamoe::Fp4GemmParams params) {{',
        "  megamoe::fp4_gemm<Config>(params);",
        "}",
        "",
    ])


def _cpp(value: bool) -> str:
    return str(value).lower()
