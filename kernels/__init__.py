"""The op table, and one file per fused low-bit op: formula, reference, kernel, launcher."""

if (
    __name__ != "effuse.kernels"
):  # found from a checkout's root: it would hide the `kernels` package
    raise ImportError(f"{__name__!r} is a folder of effuse's checkout; import effuse.kernels")
