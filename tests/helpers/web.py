"""A web server with a certificate that this process trusts: files of a folder, redirects, and what it was asked for."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp.connector
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"


@dataclass
class Web:
    """url: the address of the folder. asked: the paths that were asked for. redirects: path -> address."""

    url: str
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, web: Web, *arguments: object, **options: object) -> None:
        self.web = web
        super().__init__(*arguments, **options)  # type: ignore[arg-type]

    def send_head(self) -> object:
        """Answer GET and HEAD alike."""
        path = self.path.partition("?")[0]
        self.web.asked.append(path)
        if path in self.web.redirects:
            self.send_response(302)
            self.send_header("Location", self.web.redirects[path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        for name, status in (("closed", 403), ("busy", 429)):
            if name in path:
                self.send_error(status)
                return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def web_server(folder: Path, *, tls: bool = True, redirects: Mapping[str, str] | None = None) -> Iterator[Web]:
    """Serve `folder` until the block ends; tls: by https, with a certificate that aiohttp takes from now on."""
    web = Web("", dict(redirects or {}))
    server = ThreadingHTTPServer((HOST, 0), partial(_Handler, web, directory=str(folder)))
    if tls:
        server.socket = _context(folder.parent / f"{folder.name}.pem").wrap_socket(server.socket, server_side=True)
    web.url = f"http{'s' if tls else ''}://{HOST}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _context(file: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test {file}"[:60])])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    aiohttp.connector._SSL_CONTEXT_VERIFIED.load_verify_locations(file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context
