"""What a search leaves in the store: its document, and all its candidates as a table."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def candidates_table(document: Mapping[str, Any]) -> bytes:
    """Return all candidates of a search document as Parquet, those of a joint search that followed it too.

    Per candidate: genome by gene, where it comes from, fitness (null: failed; an estimate where it lost its race and
    `stopped` is true), values by subtask, weak rows that it was put to, seconds. The same document, the same bytes.
    """
    real, text, whole, truth = pa.float64(), pa.string(), pa.int64(), pa.bool_()
    schema = {
        "search": text,
        "index": whole,
        "origin": text,
        "generation": whole,
        "parents": pa.list_(whole),
        "genome": pa.map_(text, real),
        "fitness": real,
        "values": pa.map_(text, real),
        "rungs": pa.list_(real),
        "stopped": truth,
        "rows": whole,
        "seconds_merge": real,
        "seconds_evaluate": real,
        "seconds_wait": real,
        "reused": truth,
        "winner": truth,
    }
    searches = [document, *([document["joint"]] if document["joint"] else [])]
    rows = [_row(one, candidate) for one in searches for candidate in one["candidates"]]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(schema.items()))), sink)
    return sink.getvalue()


def _row(search: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, Any]:
    seconds = candidate["seconds"]
    same = {name: candidate[name] for name in ("index", "origin", "generation", "parents", "fitness", "rungs")}
    return {
        **same,
        "search": search["spec"]["name"],
        "genome": list(zip(search["genes"], candidate["genome"], strict=True)),
        "values": list(candidate["values"].items()),
        "stopped": candidate["stopped"],
        "rows": candidate["rows"],
        "seconds_merge": seconds["merge"],
        "seconds_evaluate": seconds["evaluate"],
        "seconds_wait": seconds.get("wait", 0.0),
        "reused": "reused_from" in candidate,
        "winner": candidate["index"] == search["winner"],
    }
