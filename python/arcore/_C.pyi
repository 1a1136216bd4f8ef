"""Types of the native module built from csrc/module.cpp."""

def build_info() -> dict[str, str]: ...
def tile_plan(
    *,
    bounds: int,
    bounds_batch: int,
    heads: int,
    nq: int,
    intervals: int,
    key_bounds: int,
    key_bounds_batch: int,
    nk: int,
    tile_q: int,
    tile_k: int,
) -> dict[str, bytearray]: ...
