#!/usr/bin/env bash
# ptxas 13.2.86, sm_90a: the wait for a bulk copy to have read shared memory moves in front of the work that was to hide it.
#
# A warp writes 4 KB to shared memory, asks for a copy of it to global memory (cp.async.bulk), multiplies and adds up 64
# registers, stores the sum, and only then waits until the copy has read its source (cp.async.bulk.wait_group.read), to write
# there again. Expected: machine code in that order, as the PTX is, so that the sum hides the copy's latency; the wait
# depends on nothing, and what stands before it on nothing of the copy. Seen: where the work begins behind a branch, the wait
# (DEPBAR.LE SB0) is the second instruction of it, and 63 of 64 multiply-adds and the store come behind. With a branch on the
# sum in front of the wait, which the compiler can't foresee, all 64 come before. So what is written to overlap waits first,
# and only the machine code says so.
#
# Exits with 0 while this is so, and with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps nvidia-cuda-nvcc==13.2.86 nvidia-cuda-nvdisasm==13.2.86
cat > "$folder/check.py" <<'PYTHON'
import re, subprocess, sys, sysconfig
from pathlib import Path

N = 64
BIN = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
BRANCH = [f"mov.b32 %r4, %f{N};", "setp.eq.s32 %p3, %r4, -1;", "@%p3 bra waited;"]


def ptx(guarded: bool) -> str:
    return "\n".join([
        ".version 8.0", ".target sm_90a", ".address_size 64",
        ".visible .entry store_twice(.param .u64 in_, .param .u64 out_, .param .u64 sums_)", "{",
        f".reg .f32 %f<{N + 3}>;", ".reg .pred %p<4>;", ".reg .b32 %r<8>;", ".reg .b64 %rd<12>;",
        ".shared .align 128 .b8 stage[4096];",
        "ld.param.u64 %rd1, [in_];", "ld.param.u64 %rd2, [out_];", "ld.param.u64 %rd3, [sums_];",
        "cvta.to.global.u64 %rd1, %rd1;", "cvta.to.global.u64 %rd2, %rd2;", "cvta.to.global.u64 %rd3, %rd3;",
        "mov.u32 %r1, %tid.x;", "mul.wide.u32 %rd4, %r1, 4;", "add.s64 %rd5, %rd1, %rd4;", "add.s64 %rd6, %rd3, %rd4;",
        "mov.u32 %r2, stage;", "shl.b32 %r3, %r1, 2;", "add.u32 %r3, %r3, %r2;", "setp.ne.u32 %p1, %r1, 0;",
        *(f"ld.global.f32 %f{i}, [%rd5 + {128 * i}];" for i in range(N)),
        f"ld.global.f32 %f{N + 1}, [%rd1 + 8192];", f"ld.global.f32 %f{N + 2}, [%rd1 + 8196];",
        *(f"st.shared.f32 [%r3 + {128 * i}], %f{i};" for i in range(32)),
        "fence.proxy.async.shared::cta;", "bar.warp.sync -1;", "@%p1 bra asked;",
        "cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r2], 4096;", "cp.async.bulk.commit_group;", "asked:",
        f"setp.leu.f32 %p2, %f{N + 1}, 0f3F000000;", "@%p2 bra scaled;",
        *(f"mul.f32 %f{i}, %f{i}, %f{N + 2};" for i in range(N)), "scaled:",
        f"mov.f32 %f{N}, 0f00000000;",
        *(f"fma.rn.f32 %f{N}, %f{i}, %f{i}, %f{N};" for i in range(N)), f"st.global.f32 [%rd6], %f{N};",
        *(BRANCH if guarded else []), "cp.async.bulk.wait_group.read 0;", "waited:", "bar.warp.sync -1;",
        *(f"st.shared.f32 [%r3 + {128 * i}], %f{i + 32};" for i in range(32)),
        "fence.proxy.async.shared::cta;", "bar.warp.sync -1;", "@%p1 bra done;", "add.s64 %rd7, %rd2, 4096;",
        "cp.async.bulk.global.shared::cta.bulk_group [%rd7], [%r2], 4096;", "cp.async.bulk.commit_group;",
        "cp.async.bulk.wait_group 0;", "done:", "ret;", "}", "",
    ])


def work_before_the_wait(folder: Path, guarded: bool) -> int:
    source, binary = folder / "store.ptx", folder / "store.cubin"
    source.write_text(ptx(guarded))
    for tool in ("ptxas", "nvdisasm"):
        (BIN / tool).chmod(0o755)
    subprocess.run([BIN / "ptxas", "-arch=sm_90a", source, "-o", binary], check=True)
    listing = subprocess.run([BIN / "nvdisasm", "-c", binary], check=True, capture_output=True, text=True).stdout
    assert len(re.findall(r"\bFFMA\b", listing)) == N and listing.count("UBLKCP") == 2
    return len(re.findall(r"\bFFMA\b", listing[: listing.index("DEPBAR.LE SB0")]))


plain, guarded = (work_before_the_wait(Path(sys.argv[1]), guarded) for guarded in (False, True))
print(f"multiply-adds in front of the wait, of {N} that are there in the PTX: {plain}; with a branch on their sum: {guarded}")
sys.exit(0 if plain == 1 and guarded == N else 1)
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder"
