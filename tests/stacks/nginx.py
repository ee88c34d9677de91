"""nginx, by HTTP/1.1 and HTTP/2."""

from __future__ import annotations

import subprocess
from pathlib import Path

from crablb.lab import VIP4, VIP6, Node
from tests.stacks.conftest import Site

CONFIG = """
daemon off; user root; worker_processes {workers}; pid {dir}/pid; error_log stderr;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_max_body_size 0; client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{
    listen 80 {how}; listen [::]:80 {how}; listen 443 ssl http2 {how}; listen [::]:443 ssl http2 {how};
    ssl_certificate {certificate}; ssl_certificate_key {key};
    location = /who {{ return 200 "{name} $pid $server_addr $server_protocol\\n"; }}
    location /files/ {{ alias {dir}/; dav_methods PUT; }}
  }}
}}
"""
PORTS = (80, 443)


def certified(folder: Path) -> tuple[Path, Path]:
    """A certificate of the VIPs, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    if not certificate.exists():
        subprocess.run(
            [
                "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=crablb",
                "-addext", f"subjectAltName=IP:{VIP4},IP:{VIP6}", "-keyout", key, "-out", certificate,
            ],
            check=True, capture_output=True,
        )  # fmt: skip
    return certificate, key


def start_nginx(
    site: Site, server: Node, name: str = "", *, workers: int = 1, how: str = "", run: tuple[str, ...] = ()
) -> Path:
    """Its folder, which is /files/.  ``name``: what /who calls it (the node's); ``how``: of every ``listen``;
    ``run``: the command that runs it."""
    folder = site.folder / (name or server.name)
    folder.mkdir()
    certificate, key = certified(site.folder)
    config = folder / "nginx.conf"
    config.write_text(
        CONFIG.format(dir=folder, name=name or server.name, workers=workers, how=how, certificate=certificate, key=key)
    )
    site.start(server, PORTS[-1], *run, "nginx", "-c", config)
    return folder
