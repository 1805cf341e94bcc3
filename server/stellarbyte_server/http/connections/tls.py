"""The TLS certificate, checked before the model is loaded."""

import ssl

from stellarbyte_server.config.setting_values import SettingsError
from stellarbyte_server.config.settings import ServerSettings


def check_certificate(settings: ServerSettings) -> None:
    """SettingsError if the given certificate and key cannot be used; without --ssl-certfile there is no TLS."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise SettingsError("--ssl-keyfile needs --ssl-certfile.")
        return
    try:
        server_context(settings.ssl_certfile, settings.ssl_keyfile)
    except (OSError, ValueError) as error:  # includes ssl.SSLError
        raise SettingsError(
            f"--ssl-certfile: {settings.ssl_certfile} and its key cannot be used: {_reason(error)}."
        ) from None


def server_context(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    """The server's TLS context; OSError or ValueError if the files cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certfile, keyfile, password=_no_password)
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted with a password, which is not supported")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key does not belong to the certificate"
        return "the files must be PEM, with a certificate and an RSA or EC key"
    return str(getattr(error, "strerror", None) or error)
