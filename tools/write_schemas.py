"""Write schemas/avro/<group>/<Name>.avsc from the record classes. `--check` only says whether they are up to date.

A schema that has been released and now changes has to be kept: copy its file to schemas/avro/old/ first, and write a
decision record.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from perdure.schemas import messages
from perdure.schemas.codec import schema_fingerprint
from perdure.schemas.records import avro_schema, registered

FOLDER = Path(__file__).resolve().parent.parent / "schemas" / "avro"
assert messages.__all__, "importing messages registers every record class"


def wanted() -> dict[Path, str]:
    """File -> text, for every record that is written by itself (parts of records are written out inside them)."""
    prints = {n: schema_fingerprint(avro_schema(c)).hex() for n, c in sorted(registered().items())}
    out = {FOLDER / "fingerprints.json": json.dumps(prints, indent=1) + "\n"}
    for name, cls in registered().items():
        if name.startswith("perdure.common."):
            continue
        group, _, short = name.removeprefix("perdure.").partition(".")
        out[FOLDER / group / f"{short}.avsc"] = json.dumps(avro_schema(cls), indent=1, ensure_ascii=False) + "\n"
    return out


def main() -> int:
    files = wanted()
    stale = [p for p, text in files.items() if not p.exists() or p.read_text() != text]
    stale += [p for p in FOLDER.glob("*/*.avsc") if p.parent.name != "old" and p not in files]
    if "--check" in sys.argv:
        for path in stale:
            print(f"not up to date: {path.relative_to(FOLDER)}")
        return 1 if stale else 0
    for path in stale:
        if path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
        else:
            path.unlink()
    print(f"{len(files)} schemas, {len(stale)} written or removed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
