"""Compile the kernels of weights that are packed, or were, for GPUs that are not there, and print what came out, as JSON.

    python tests/kernels_hub/compile_packed.py          (with TRITON_INTERPRET unset)

What Triton's interpreter accepts need not compile. Compiling needs no GPU: this finds the rest of the errors but those of speed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

from nemotron_super.kernels_hub import registry
from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INT_ALIGNED = ("rows", "width", "depth_each", "row_bytes", "stretch", "words", "outputs", "depth", "x_stride")


def compiled(kernel, types: dict[str, str], constants: dict, capability: int, **options):
    names = kernel.arg_names
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if (kind.startswith("*") or name in INT_ALIGNED) and not kernel.params[names.index(name)].do_not_specialize
    }
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(binary: bytes) -> int:
    """Bytes a thread keeps outside its registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return max(int(found) for found in re.findall(r"STACK:(\d+)", done.stdout + done.stderr))


def main() -> None:
    bundle = registry._bundle().__name__
    packed, grouped = (sys.modules[f"{bundle}.{module}"] for module in ("_packed", "grouped_experts"))
    cases = {}
    for bits, capability in ((4, 90), (8, 90), (4, 80), (8, 80)):
        words, assembly = "*i64", bits == 4 or capability == 90
        types = {"x": "*i32", "which": words, "weight": words, "block_scale": "*u8", "scale": "*fp32"}
        types |= {"rows": "i32", "word_pairs": "i32"}
        overlap = {"OVERLAP": capability == 90}
        constants = {
            "SHARED": 22,
            "STACKED": True,
            "BITS": bits,
            "RELU2": True,
            "TERMS": 0,
            "ASSEMBLY": assembly,
        } | overlap
        for parts, block_rows, step in ((0, 8, 128), (1, 16, 64), (3, 16, 64)):
            sizes = {"PARTS": parts, "R": block_rows, "W": step, "RELU2": parts == 1, "KNOWN": parts != 1}
            sizes |= {"TERMS": 0 if parts else 2, "STACKED": parts > 0}
            out = dict.fromkeys(("out", "first_term", "second_term"), "*fp32" if parts > 1 else "*bf16")
            cases[f"stream {bits} {capability} {parts} parts"] = compiled(
                packed._stream_kernel, types | out, constants | sizes, capability, num_warps=4
            )
        types = {"x": "*i32" if bits == 4 else "*bf16", "weight": "*u8", "block_scale": "*u8", "scale": "*fp32"}
        types |= dict.fromkeys(("out", "first_term", "second_term"), "*fp32")
        types |= {"vectors": "i32", "rows": "i32", "row_bytes": "i32", "stretch": "i32"}
        constants = {
            "BITS": bits,
            "RELU2": False,
            "TERMS": 0,
            "ASSEMBLY": assembly,
            "M": 8,
            "N": 32,
            "K": 128,
        } | overlap
        cases[f"few {bits} {capability}"] = compiled(
            packed._few_kernel, types, constants, capability, num_warps=2, num_stages=4
        )
        types = {name: "*i32" for name in ("block_ends", "expert_of", "ends")}
        types |= {
            "x": "*bf16",
            "order": words,
            "weight": "*u8",
            "block_scale": "*u8",
            "scale": "*fp32",
            "out": "*bf16",
        }
        types |= {name: "i32" for name in ("vectors", "experts", "rows", "width", "depth_each")}
        shapes = [(16, 64, 128, False), (128, 128, 64, False), (128, 64, 64, True)]
        for size, n, k, transposed in shapes if (bits, capability) == (4, 90) else shapes[:1]:
            constants = {"SHARED": 22, "GATHER": True, "STACKED": True, "TRANSPOSED": transposed, "BITS": bits}
            constants |= {"RELU2": True, "M": size, "N": n, "K": k}
            name = f"tiles {bits} {capability} {size}{' transposed' if transposed else ''}"
            cases[name] = compiled(packed._tiles_kernel, types, constants, capability, num_warps=4, num_stages=3)
        types = {"weight": "*i32", "block_scale": "*u8", "scale": "*fp32", "words": "i32"}
        for out in ("bf16", "fp32"):
            cases[f"unpack {bits} {capability} {out}"] = compiled(
                packed._unpack_kernel,
                types | {"out": f"*{out}"},
                {"BITS": bits, "W": 64 * bits},
                capability,
                num_warps=4,
            )
    for name, tiling in (("up", grouped._UP), ("down", grouped._DOWN)):
        n, k, warps, stages, _, flatten = tiling
        types = dict.fromkeys(("rows", "begins", "blocks"), "*i32")
        types |= dict.fromkeys(("first_expert", "end_expert", "outputs", "depth", "x_stride"), "i32")
        types |= {"x": "*bf16" if name == "up" else f"tensordesc<bf16[128, {k}]>", "out": "*bf16"}
        types["weight"] = f"tensordesc<bf16[{n}, {k}]>"
        constants = {"GATHER": name == "up", "RELU2": name == "up", "EVEN": True, "FLATTEN": flatten}
        constants |= {"M": 128, "N": n, "K": k}
        cases[f"grouped {name} 90"] = compiled(
            grouped._product_kernel, types, constants, 90, num_warps=warps, num_stages=stages
        )
    print(
        json.dumps(
            {
                name: {
                    "flushes": ".ftz" in kernel.asm["ptx"],
                    "tensor cores": "mma" in kernel.asm["ptx"],
                    "shared": kernel.metadata.shared,
                    "spilled": spilled(kernel.asm["cubin"]),
                }
                for name, kernel in cases.items()
            }
        )
    )


if __name__ == "__main__":
    main()
