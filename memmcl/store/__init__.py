"""The artifact store: one API over a directory, an S3 bucket, or memory."""

from memmcl.store.champion import Champions, Reign, promote, read_champions, rollback
from memmcl.store.gc import collect, remove_run
from memmcl.store.index import newest, starting, summaries
from memmcl.store.lease import Lease
from memmcl.store.manifest import ArtifactRef, BlobInfo, Manifest, Refs, StageSettings, cache_key
from memmcl.store.plan import Policy, RemovalPlan
from memmcl.store.store import Store
from memmcl.store.verify import Closure, Problem, Verification

__all__ = [
    "ArtifactRef",
    "BlobInfo",
    "Champions",
    "Closure",
    "Lease",
    "Manifest",
    "Policy",
    "Problem",
    "Refs",
    "Reign",
    "RemovalPlan",
    "StageSettings",
    "Store",
    "Verification",
    "cache_key",
    "collect",
    "newest",
    "promote",
    "read_champions",
    "remove_run",
    "rollback",
    "starting",
    "summaries",
]
