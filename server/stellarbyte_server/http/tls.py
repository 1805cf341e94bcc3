"""The certificate that HTTPS is served with, checked before a model is loaded for nothing."""

import ssl

from stellarbyte_server.config.setting_values import SettingsError
from stellarbyte_server.config.settings import ServerSettings


def check_certificate(settings: ServerSettings) -> None:
    """SettingsError unless the server can speak TLS with what was given; without --ssl-certfile it speaks none."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise SettingsError("--ssl-keyfile needs --ssl-certfile.")
        return
    try:
        server_context(settings.ssl_certfile, settings.ssl_keyfile)
    except (OSError, ValueError) as error:  # of ssl.SSLError, too
        raise SettingsError(
            f"--ssl-certfile: {settings.ssl_certfile} and its key cannot be used: {_reason(error)}."
        ) from None


def server_context(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    """OSError or ValueError when the files cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certfile, keyfile, password=_no_password)
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted with a password, which is not supported")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key is that of another certificate"
        return "PEM files of a certificate and an RSA or EC key are needed, the key in either of them"
    return str(getattr(error, "strerror", None) or error)
