"""Registers, stack and spills of the row kernels, compiled ahead of time for GPUs that need not be there.

    python tests/aot.py [--few] [report.json]

Needs a process in which Triton was not imported with TRITON_INTERPRET set.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_89": ("cuda", 89, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}  # fmt: skip
WIDTH = 151936
# For --few: the sparse teachers' kernel calls a divergence on the listed tokens alone, and its sweeps are the same for all. Here are the
# plainest, the one that takes the most registers, and the one with a statistic.
FEW = ("forward_kl", "skew_forward_kl", "adaptive_kl")


def compile_row_kernel(divergence: str, target: str, width: int = WIDTH, dtype: str = "bf16") -> dict:
    """Compile the row kernel with everything switched on (KD, CE, gradient, biases, softcaps; not a moving target), at its block and warps.

    Args:
        divergence: a name in `fastkd.DIVERGENCES`. target: a name in `TARGETS`. width: logits per row.
        dtype: Triton's name for the gradient's and the biases' dtype; the logits are fp32.

    Returns:
        kernel, divergence, target, block, warps, registers, stack_bytes, spills (registers on AMD; on NVIDIA spills are part of the stack).
    """
    from fastkd_kernels import rows
    from fastkd_kernels.configs import row_config
    from fastkd_kernels.divergences import DEFINITIONS

    definition = DEFINITIONS[divergence]
    block, warps = row_config(width)
    constants = {
        "TILE": definition.tile, "CENTERED": definition.centered, "STATISTIC": definition.statistic is not None,
        "NEED_KD": True, "NEED_CE": True, "NEED_DZ": True, "BIAS_S": True, "BIAS_T": True, "CAP_S": True, "CAP_T": True, "MOVING": False,
        "BLOCK": block,
    }  # fmt: skip
    integers = dict.fromkeys(("s_zs", "s_zt", "s_dz", "V_s", "V"), width)
    report = _compile(rows._row_kernel, constants, integers, target, warps, dtype)
    return {"kernel": "rows", "divergence": divergence, "target": target, "block": block, "warps": warps, **report}


def compile_topk_kernel(divergence: str, target: str, width: int = WIDTH, dtype: str = "bf16") -> dict:
    """`compile_row_kernel` for the kernel of sparse teachers, at its largest block of listed tokens."""
    from fastkd_kernels import topk
    from fastkd_kernels.configs import row_config
    from fastkd_kernels.divergences import DEFINITIONS

    definition = DEFINITIONS[divergence]
    block, warps = row_config(width)
    constants = {
        "TILE": definition.tile, "STATISTIC": definition.statistic is not None, "NEED_CE": True, "NEED_DZ": True, "BIAS": True, "CAP": True,
        "BLOCK": block, "BLOCK_K": topk.BLOCK_K,
    }  # fmt: skip
    integers = dict.fromkeys(("s_zs", "s_dz", "V"), width) | {"words": -(-width // 32), "K": topk.BLOCK_K}
    report = _compile(topk._topk_kernel, constants, integers, target, warps, dtype)
    return {"kernel": "topk", "divergence": divergence, "target": target, "block": block, "warps": warps, **report}


def _compile(kernel, constants: dict, integers: dict[str, int], target: str, warps: int, dtype: str) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("Triton was imported with TRITON_INTERPRET set; compile in another process")
    names = kernel.arg_names
    types = {name: "*fp32" for name in names if name.endswith("_ptr")} | dict.fromkeys(integers, "i32")
    types |= {"dz_ptr": f"*{dtype}", "bs_ptr": f"*{dtype}", "bt_ptr": f"*{dtype}"}
    types |= {"label_ptr": "*i64", "bits_ptr": "*i32", "id_ptr": "*i32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
    # The hints a launch with aligned tensors and these widths gives.
    aligned = [i for i, name in enumerate(names) if name.endswith("_ptr") or integers.get(name, 1) % 16 == 0]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": warps})
    return _amd_resources(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _nvidia_resources(compiled.asm["cubin"])


def _amd_resources(assembly: str) -> dict:
    def read(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", assembly)
        if found is None:
            raise ValueError(f"no .{field} in the assembly")
        return int(found[1])

    return {
        "registers": read("vgpr_count"),
        "stack_bytes": read("private_segment_fixed_size"),
        "spills": read("vgpr_spill_count"),  # spilled scalar registers go to lanes of vector registers, not to memory
    }


def _nvidia_resources(cubin: bytes) -> dict:
    import triton.backends.nvidia as backend

    tool = Path(backend.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {text!r}")
    return {"registers": int(found[1]), "stack_bytes": int(found[2]), "spills": int(found[3])}


def report(few: bool = False, processes: int = 2) -> list[dict]:
    """A row of `compile_row_kernel` and one of `compile_topk_kernel` (of the latter a `FEW`) for each divergence and target."""
    from fastkd_kernels.divergences import DEFINITIONS

    with ProcessPoolExecutor(processes) as pool:
        jobs = [pool.submit(compile_row_kernel, d, t) for d in DEFINITIONS for t in TARGETS]
        jobs += [pool.submit(compile_topk_kernel, d, t) for d in (FEW if few else DEFINITIONS) for t in TARGETS]
        return [job.result() for job in jobs]


def report_in_subprocess(few: bool = True, module: str = "tests.aot") -> list[dict]:
    """The `report` of ``module`` from a process in which Triton may be interpreting, in a checkout that need not be installed."""
    root = Path(__file__).resolve().parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-m", module, *["--few"] * few]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling ahead of time failed:\n{done.stderr}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    arguments = [x for x in sys.argv[1:] if x != "--few"]
    text = json.dumps(report("--few" in sys.argv), indent=1)
    if arguments:
        Path(arguments[0]).write_text(text + "\n")
    else:
        print(text)
