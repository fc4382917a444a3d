"""Every kernel compiles for every GPU: on tensor cores, without spills, to the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from effuse.backends.triton_build import check_kernel, compile_all, run_worker
from effuse.backends.triton_kernels import kernel_from_json, specialize
from effuse.errors import BackendError
from effuse.kernels.launch import as_tuple
from effuse.kernels.table import TABLE
from effuse.targets import GPUS

TESTED = ("sm_80", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
E4M3 = torch.float8_e4m3fn
BF16, INT8, BYTE = torch.bfloat16, torch.int8, torch.uint8
RANK = 32

# (rows, out, in) of layers: what a step of each network has most of, and the thin ones
LAYERS = {
    "SDXL": (4096, 640, 640),
    "SDXL feed-forward": (1024, 10240, 1280),
    "FLUX": (4608, 12288, 3072),
    "prompt": (77, 1280, 2048),
    "time": (1, 3072, 256),
}


def empty(*shape, dtype=torch.float32, layout=torch.contiguous_format):
    return torch.empty(*shape, dtype=dtype).to(memory_format=layout)


def epilogue(m, n, plain):
    """Bias; and where a layer is not plain, a branch, a gate and a residual."""
    if plain:
        return empty(n), None, None, None, None
    branch = (empty(m, RANK, dtype=BF16), empty(n, RANK, dtype=BF16))
    return empty(n), *branch, empty(1, n, dtype=BF16), empty(m, n, dtype=BF16)


def scaled(dtype, m, n, k, plain):
    return (empty(m, k, dtype=dtype), empty(m, 1), None, empty(n, k, dtype=dtype), empty(n), None,
            *epilogue(m, n, plain), "", 1, BF16)  # fmt: skip


def packed(weight, x, m, n, k, plain):
    group = {"int4": 64, "e2m1": 16}[weight[:4]]
    stored = torch.float32 if weight.startswith("int4") else BYTE
    over = None if weight.startswith("int4") else empty(())
    scale = {INT8: (m, k // group), E4M3: (m, 1)}.get(x)
    return (empty(m, k, dtype=x), None if scale is None else empty(*scale),
            empty(n, k // 2, dtype=BYTE), empty(n, k // group, dtype=stored), over,
            *epilogue(m, n, plain), weight, "", 1, BF16)  # fmt: skip


def convolution(n, c, o, size, kernel, stride=1):
    channels_last = torch.channels_last
    pad = kernel // 2
    return (empty(n, c, size, size, dtype=INT8, layout=channels_last), empty(()),
            empty((), dtype=INT8), empty(o, c, kernel, kernel, dtype=INT8, layout=channels_last),
            empty(o), empty(o, dtype=torch.int32), None, None, None, None, None, None, empty(o),
            None, "", None, None, [stride, stride], [pad, pad], BF16)  # fmt: skip


def image(n, c, size):
    return empty(n, c, size, size, dtype=BF16, layout=torch.channels_last)


def wanted():
    """(name, op, arguments) of every kernel at the sizes of large networks."""
    for name, (m, n, k) in LAYERS.items():
        for plain in (True, False) if m > 1 else (True,):
            yield f"{name} int8", "linear_scaled", scaled(INT8, m, n, k, plain)
            yield f"{name} fp8", "linear_scaled", scaled(E4M3, m, n, k, plain)
            for weight, x in (("int4/group64", BF16), ("int4/group64", INT8),
                              ("e2m1/group16/scale-e4m3", E4M3)):  # fmt: skip
                yield f"{name} {weight} {x}", "linear_packed", packed(weight, x, m, n, k, plain)
    for quantizer in ("int8/token/dynamic", "e4m3/token/dynamic", "int8/group64/dynamic"):
        down = empty(RANK, 3072, dtype=torch.float16)
        x, modulate = empty(1, 4096, 3072, dtype=BF16), empty(1, 3072, dtype=BF16)
        yield quantizer, "quantize_rows", (x, None, down, quantizer)
        yield quantizer, "row_norm", (x, None, None, modulate, modulate, down, 1e-6, "layer", 1.0,
                                      quantizer)  # fmt: skip
        yield quantizer, "gated", (x, None, None, "geglu", quantizer)
    yield "heads", "row_norm", (empty(4096 * 24, 128, dtype=BF16), empty(128, dtype=BF16), None,
                                None, None, None, 1e-6, "rms", 0.0, "")  # fmt: skip
    yield "queries", "rotary", (empty(1, 4608, 24, 128, dtype=BF16), empty(4608, 128),
                                empty(4608, 128), "interleaved", 1)  # fmt: skip
    for shape in ((2, 4, 320, 64, 3), (2, 320, 320, 64, 3), (2, 1280, 1280, 16, 3),
                  (2, 640, 320, 64, 1)):  # fmt: skip
        yield f"conv {shape}", "conv2d_scaled", convolution(*shape)
    yield "conv, stride 2", "conv2d_scaled", convolution(2, 640, 640, 32, 3, 2)
    stats, scale, zero = empty(2, 32, 2), empty(()), empty((), dtype=INT8)
    vector = empty(640, dtype=BF16)
    yield "stats", "group_stats", (image(2, 640, 32), 32, 1e-5)
    yield "norm", "group_norm_act", (image(2, 640, 32), stats, 32, vector, vector, "silu", scale,
                                     zero)  # fmt: skip
    yield "codes", "quantize", (image(2, 640, 32), scale, zero, 0)
    yield "values", "dequantize", (image(2, 640, 32).to(INT8), scale, zero, 0)


BY_NAME = {op.name: op for op in TABLE}


def kernels_for(target):
    """Key -> what its kernel is compiled from, for every launch that the GPU can run."""
    found = {}
    with FakeTensorMode():
        for name, op, arguments in wanted():
            eights = any(getattr(each, "dtype", None) == E4M3 for each in arguments)
            if (eights or "e4m3/" in name) and not GPUS[target].e4m3:
                continue
            native = BY_NAME[op].native
            kernel = specialize(native.launch(as_tuple(native.empty(*arguments)), *arguments))
            found[kernel.key(target)] = (name, kernel)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Target -> [(name, kernel, what became of it)], all compiled in one go."""
    asked = {target: kernels_for(target) for target in TESTED}
    requests = {key: (kernel, GPUS[target])
                for target in TESTED for key, (_, kernel) in asked[target].items()}  # fmt: skip
    folder = tmp_path_factory.mktemp("cubins")
    told = compile_all(requests, folder, lambda what, done, total: None)
    return {target: [(name, kernel, told[key], folder / f"{key}.cubin")
                     for key, (name, kernel) in asked[target].items()]
            for target in TESTED}  # fmt: skip


def test_every_fused_op_is_among_them():
    assert {op for _, op, _ in wanted()} == {op.name for op in TABLE if op.native}


@pytest.mark.parametrize("target", TESTED)
def test_products_run_on_the_tensor_cores_of_the_chip(built, target):
    products = [row for row in built[target] if row[1].name.startswith(("linear", "conv"))]
    assert len(products) > 10
    for name, _, told, _ in products:
        used = {word for word, count in told["products"].items() if count}
        thin = name.startswith(("time", "prompt"))  # too few rows for a warp group's instruction
        allowed = {GPUS[target].products} | ({"mma"} if thin or target == "sm_100" else set())
        assert used and used <= allowed, (name, told)


@pytest.mark.parametrize("target", TESTED)
def test_nothing_spills_and_everything_fits(built, target):
    for name, _, told, cubin in built[target]:
        assert told["spills"] == 0, (name, told)
        assert told["shared"] <= GPUS[target].shared, (name, told)
        assert cubin.read_bytes().startswith(b"\x7fELF")


def test_layers_of_many_sizes_share_kernels(built):
    rows = list(wanted())
    assert len(built["sm_90"]) < 0.8 * len(rows)


def test_the_same_kernel_compiles_to_the_same_bytes(built, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    _, kernel, _, cubin = built["sm_90"][0]
    again = compile_all({cubin.stem: (kernel, GPUS["sm_90"])}, tmp_path, lambda *_: None)
    assert again[cubin.stem]["spills"] == 0
    assert (tmp_path / cubin.name).read_bytes() == cubin.read_bytes()


def test_a_cubin_names_no_file_of_the_machine_that_built_it(built):
    for _, _, _, cubin in built["sm_90"]:
        assert b".py" not in cubin.read_bytes()
        assert b"/home" not in cubin.read_bytes()


def test_a_kernel_goes_through_json_unchanged():
    for _, kernel in kernels_for("sm_90").values():
        import json

        assert kernel_from_json(json.loads(json.dumps(kernel.data()))) == kernel


def test_spills_over_the_bound_and_too_much_shared_memory_are_refused(built):
    _, kernel, told, _ = built["sm_90"][0]
    gpu = GPUS["sm_90"]
    check_kernel(kernel, gpu, told)
    with pytest.raises(BackendError, match=r"spills 4096 bytes .* on sm_90 \(64 are allowed\)"):
        check_kernel(kernel, gpu, {**told, "spills": 4096})
    with pytest.raises(BackendError, match="shared memory, and sm_90 has 232448"):
        check_kernel(kernel, gpu, {**told, "shared": 1 << 20})
    with pytest.raises(BackendError, match="does not compile for sm_90: no such type"):
        check_kernel(kernel, gpu, {"error": "no such type"})


def test_a_compiler_that_aborts_is_told_of(tmp_path):
    _, kernel = next(iter(kernels_for("sm_90").values()))
    broken = {"folder": str(tmp_path), "kernels": {"a-key": {"kernel": {**kernel.data(), "x": 1},
                                                             "capability": 90}}}  # fmt: skip
    with pytest.raises(BackendError, match=r"the compiler aborted at a-key: .*'x'"):
        run_worker(broken, lambda line: None)
