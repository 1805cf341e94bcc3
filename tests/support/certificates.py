"""Certificates for servers that tests start."""

import shutil
import subprocess
from pathlib import Path

import pytest


def make_certificate(folder: Path, name: str, *options: str) -> tuple[Path, Path]:
    """Of 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    keeping = options or ("-nodes",)
    subprocess.run([*make.split(), *keeping, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key
