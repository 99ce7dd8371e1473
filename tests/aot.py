"""Registers, stack and spills of the row kernel, compiled ahead of time for GPUs that need not be there.

    python tests/aot.py [report.json]

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
POINTERS = ("zs_ptr", "zt_ptr", "dz_ptr", "bs_ptr", "bt_ptr", "label_ptr", "weight_ptr", "kd_ptr", "ce_ptr")
INTEGERS = ("s_zs", "s_zt", "s_dz", "V_s", "V")


def compile_row_kernel(divergence: str, target: str, width: int = WIDTH, dtype: str = "bf16") -> dict:
    """Compile the row kernel with everything switched on (KD, CE, gradient, biases, softcaps) at its chosen block and warps.

    Args:
        divergence: a name in `fastkd.DIVERGENCES`. target: a name in `TARGETS`. width: logits per row.
        dtype: Triton's name for the gradient's and the biases' dtype; the logits are fp32.

    Returns:
        divergence, target, block, warps, registers, stack_bytes, spills (registers on AMD; on NVIDIA spills are part of the stack).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastkd_kernels import rows
    from fastkd_kernels.configs import row_config
    from fastkd_kernels.divergences import DEFINITIONS

    if rows.interpreted():
        raise RuntimeError("Triton was imported with TRITON_INTERPRET set; compile in another process")
    definition = DEFINITIONS[divergence]
    block, warps = row_config(width)
    constants = {
        "TILE": definition.tile, "CENTERED": definition.centered, "STATISTIC": definition.statistic is not None,
        "NEED_KD": True, "NEED_CE": True, "NEED_DZ": True, "BIAS_S": True, "BIAS_T": True, "CAP_S": True, "CAP_T": True, "BLOCK": block,
    }  # fmt: skip
    types = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(INTEGERS, "i32")
    types |= {"dz_ptr": f"*{dtype}", "bs_ptr": f"*{dtype}", "bt_ptr": f"*{dtype}", "label_ptr": "*i64"}
    names = rows._row_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
    # The hints a launch with aligned tensors and this width gives.
    aligned = [i for i, name in enumerate(names) if name in POINTERS or (name in INTEGERS and width % 16 == 0)]
    source = ASTSource(rows._row_kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    kernel = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": warps})
    report = _amd_resources(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _nvidia_resources(kernel.asm["cubin"])
    return {"divergence": divergence, "target": target, "block": block, "warps": warps, **report}


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


def report(divergences: list[str] | None = None, targets: list[str] | None = None, processes: int = 2) -> list[dict]:
    """A row of `compile_row_kernel` for each divergence and target."""
    from fastkd_kernels.divergences import DEFINITIONS

    jobs = [(d, t) for d in (divergences or DEFINITIONS) for t in (targets or TARGETS)]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_row_kernel, *zip(*jobs, strict=True)))


def report_in_subprocess() -> list[dict]:
    """`report` from a process in which Triton may be interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling ahead of time failed:\n{done.stderr}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    text = json.dumps(report(), indent=1)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")
    else:
        print(text)
