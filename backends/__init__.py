"""Back ends: what a Program is lowered to."""

if __name__ != "effuse.backends":
    raise ImportError(f"{__name__!r} is a folder of effuse's checkout; import effuse.backends")
