"""Resources of the kernels of `fastkd_kernels.offset_gemm`, compiled ahead of time: ``python -m tests.aot_offset [--few]`` prints JSON.

Needs a process in which Triton was not imported with TRITON_INTERPRET set.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .aot import TARGETS, _amd_resources, _nvidia_resources

WIDTH = 151936
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a program


def compile_gemm(target: str, config=None, dtype: str = "bf16", width: int = WIDTH, plain: bool = False):
    """The product with its whole epilogue (bias, softcap, two sums), or a ``plain`` one, at the target's own configuration.

    Returns:
        A row: kernel, target, warps, registers per thread, stack_bytes, spills, shared_bytes, shared_limit; on sm_90 products_per_wait:
        tensor-core instructions for each wait for them. At 1 they are serialised, which costs most of the speed.
    """
    from fastkd_kernels import offset_gemm

    c = config or offset_gemm.gemm_config(*TARGETS[target][:2])
    constants: dict = dict.fromkeys(("HAS_BIAS", "HAS_CAP", "SCALED", "TWO_SUMS", "SPLIT"), not plain)
    constants |= {"TMA": c.tma, "FLATTEN": c.persistent, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k}
    types = dict.fromkeys(("C", "V", "shared", "D", "s_a", "s_b", "s_r", "s_stat"), "i32")
    types |= dict.fromkeys(("top_ptr", "sum_ptr", "sum_1_ptr"), "*fp32")
    types |= {"a": f"*{dtype}", "b": f"*{dtype}", "r_ptr": "*fp16", "bias_ptr": f"*{dtype}"}
    if c.tma:
        types |= {"a": f"tensordesc<{dtype}[{c.block_m}, {c.block_k}]>", "b": f"tensordesc<{dtype}[{c.block_n}, {c.block_k}]>"}
    if plain:
        constants |= {"bias_ptr": None}
    return _compile("gemm" if plain else "gemm, all", offset_gemm._gemm_kernel, types, constants, target, c.warps, c.stages)


def compile_rows(target: str, divergence: str = "forward_kl", dtype: str = "bf16", tile: int | None = None, width: int = WIDTH):
    """The row kernel with everything switched on, as `compile_gemm` returns it."""
    import triton

    from fastkd_kernels import offset_gemm
    from fastkd_kernels.divergences import DEFINITIONS

    definition = DEFINITIONS[divergence]
    tile = tile or offset_gemm.gemm_config(*TARGETS[target][:2]).block_n
    constants = {
        "KD_TILE": definition.tile, "CENTERED": definition.centered, "NEED_CE": True, "NEED_DZ": True, "HAS_CAP": True, "TILE": tile,
        "TILES": offset_gemm._ROW_BLOCK // tile, "BLOCK_TILES": triton.next_power_of_2(triton.cdiv(width, tile)),
    }  # fmt: skip
    integers = ("s_rs", "s_rt", "s_stat", "s_stat_t", "V_s", "V")
    types = dict.fromkeys(integers, "i32") | {"rs_ptr": "*fp16", "rt_ptr": "*fp16", "dz_ptr": f"*{dtype}", "label_ptr": "*i64"}
    for name in offset_gemm._row_kernel.arg_names:
        if name.endswith("_ptr"):
            types.setdefault(name, "*fp32")
    return _compile(divergence, offset_gemm._row_kernel, types, constants, target, offset_gemm._ROW_WARPS, 3)


def _compile(name, function, types, constants, target, warps, stages):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastkd_kernels import rows

    if rows.interpreted():
        raise RuntimeError("Triton was imported with TRITON_INTERPRET set; compile in another process")
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "fp32") for n in names}
    # The hints of a launch with aligned tensors: strides and widths of 16, of the statistics' strides alone not.
    hinted = {n for n in names if signature[n][0] == "*" or (signature[n] == "i32" and "stat" not in n)}
    aligned = [i for i, n in enumerate(names) if n in hinted]
    source = ASTSource(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    kernel = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": warps, "num_stages": stages})
    resources = _amd_resources(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _nvidia_resources(kernel.asm["cubin"])
    shared = {"shared_bytes": kernel.metadata.shared, "shared_limit": SHARED_LIMIT[target]}
    return {"kernel": name, "target": target, "warps": warps, **resources, **shared, **_products(kernel, target)}


def _products(kernel, target: str) -> dict[str, float]:
    import triton.backends.nvidia as backend

    if target != "sm_90":
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(backend.__path__[0]) / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    products = re.findall(r"HGMMA.*", text)
    return {"products_per_wait": len(products) / sum("gsb0" in p for p in products)} if products else {}


def _job(job: tuple[str, str]) -> dict:
    what, target = job
    return compile_gemm(target, plain=what == "gemm") if what.startswith("gemm") else compile_rows(target, what)


def report(few: bool = False, processes: int = 2) -> list[dict]:
    """The product, plain and whole, and the row kernel's one-sweep and two-sweep forms; sm_89 compiles as sm_80. few: the quick half."""
    jobs = [
        (what, target) for target in TARGETS if target != "sm_89" for what in ("gemm", "jsd", "gemm, all", "forward_kl")[: 2 if few else 4]
    ]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_job, jobs))


if __name__ == "__main__":
    print(json.dumps(report("--few" in sys.argv), indent=1))
