"""Who may see the page of `roclip dashboard`: everybody who reaches loopback under a loopback name, otherwise everybody
with the token.

a foreign name that points to this machine (DNS rebinding)   Host header: 421
no token where one is needed                                 a page that asks for it, or 403
any method but GET                                           405
script, style, image, frame from elsewhere                   Content-Security-Policy
"""

import hmac
import ipaddress
import secrets
import socket

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

COOKIE = "roclip_dashboard"
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_STRICTEST = "default-src 'none'; frame-ancestors 'none'"


class Guard:
    """Decides which requests to one address are answered.

    Args:
        host: The address on which the server listens. Any address but loopback needs a token.
    """

    def __init__(self, host: str):
        self.host = host
        self.token = "" if is_loopback(host) else secrets.token_urlsafe(32)
        """Empty if none is needed."""

    def knows(self, host: str) -> bool:
        """Whether a Host header names this machine. The port may differ, as it does behind a tunnel.

        With a token any IP address is accepted, because an address cannot be pointed elsewhere as a name can.
        """
        name = _name_of(host)
        if not self.token:
            return is_loopback(name)
        return _is_address(name) or name.lower() in {
            "localhost",
            self.host.lower(),
            socket.gethostname().lower(),
            socket.getfqdn().lower(),
        }

    def lets_in(self, request: web.Request) -> bool:
        """Whether a request may pass: it has the token, or none is needed."""
        return not self.token or self.is_token(request.cookies.get(COOKIE, ""))

    def is_token(self, given: str) -> bool:
        """Compare in constant time."""
        return hmac.compare_digest(given.encode(), self.token.encode())

    @property
    def middleware(self) -> Middleware:
        """Checks each request and adds the headers to each answer."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            if not self.knows(request.headers.get("Host", "")):
                raise web.HTTPMisdirectedRequest(
                    text="This page is not served under this name.\n", headers=_safe(_STRICTEST)
                )
            try:
                return await handler(request)
            except web.HTTPException as answer:
                answer.headers.update(_safe(_STRICTEST))
                raise

        return check


def page_headers(nonce: str) -> dict[str, str]:
    """The headers of a page whose style and script bear a nonce."""
    return _safe(
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def plain_headers() -> dict[str, str]:
    """The headers of anything else."""
    return _safe(_STRICTEST)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    return host.lower() == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _safe(policy: str) -> dict[str, str]:
    return {**_HEADERS, "Content-Security-Policy": policy}


def _name_of(host: str) -> str:
    """`name:port` without the port, `[address]:port` without both."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
