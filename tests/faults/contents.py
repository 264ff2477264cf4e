"""Everything that a store says, to compare it with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raykernel.store.blocks import open_store
from raykernel.store.tables import TABLES


def files(store: Path, *kinds: str) -> list[Path]:
    return sorted(path for kind in kinds for path in store.glob(kind))


VOLATILE = {"created", "seconds", "peak_memory_bytes", "overrides", "versions"}


def contents(store: Path) -> dict[str, Any]:
    """All that a store says: tables, kernels, and the bytes of everything that is trained."""
    opened = open_store(store)
    found: dict[str, Any] = {}
    for name, table in TABLES.items():
        rows = opened.results(name).drop_columns(VOLATILE & set(table.schema.names))
        found[name] = sorted(map(repr, rows.to_pylist()))
    for fingerprint in opened.fingerprints():
        handle = opened.open(fingerprint)
        found[fingerprint] = handle.kernel(rows=handle.grid.train).tobytes()
        found[f"{fingerprint} examples"] = handle.examples().to_pylist()
        pins = [name for name in ("features", "lora") if handle.has_pinned(name)]
        found[f"{fingerprint} pins"] = [handle.read_pinned(name) for name in pins]
    found |= {str(p.relative_to(store)): p.read_bytes() for p in files(store, "trials/**/*.*")}
    found |= {str(p.relative_to(store)): p.read_bytes() for p in files(store, "selections/*/*")}
    return found
