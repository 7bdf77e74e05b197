"""Addresses of images -> their bytes: data:, files of one folder, and http(s) of public hosts."""

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from pathlib import Path

from PIL import Image

from navil_jax.data.images import FORMATS, MAX_ASPECT_RATIO
from navil_jax.errors import UserError
from navil_jax.serve.limits import Limits

SECONDS, REDIRECTS = 10.0, 3  # of a fetch, with all its redirects
PORTS = {"http": 80, "https": 443}


def read_address(url: str, name: str, limits: Limits) -> bytes:
    """The bytes of an image.

    Args:
      name: of the image in messages, which never repeat the address.

    Raises:
      UserError: it cannot be read, or may not be.
    """
    kind = url[:8].partition(":")[0].lower()
    if kind == "data":
        return _from_data(url, name)
    if kind in PORTS:
        if not limits.fetch:
            raise UserError(f"{name}: this server fetches no images; send it as data:image/png;base64,...")
        return fetch(url, name, limits.body_bytes)
    if limits.images_folder is None:
        raise UserError(f"{name}: must be data:image/png;base64,...")
    return _from_folder(url, name, limits.images_folder, limits.body_bytes)


def size_of(content: bytes, name: str, limits: Limits) -> tuple[int, int]:
    """Width and height as the file's header says, before anything is decoded. Raises `UserError`."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise UserError(f"{name}: broken, too large, or no image of a kind that is read") from error
    if width * height > limits.pixels:
        raise UserError(f"{name}: {width} x {height} pixels are over the limit of {limits.pixels:,}; shrink it")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UserError(f"{name}: {width} x {height}, one side is over {MAX_ASPECT_RATIO} times the other; crop it")
    return width, height


def _from_data(url: str, name: str) -> bytes:
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(f"{name}: must be data:image/png;base64,... with base64")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name}: is no base64") from error


def _from_folder(url: str, name: str, folder: Path, most: int) -> bytes:
    """A file below the folder; whatever lies elsewhere is as if it were not there."""
    given = urllib.parse.unquote(url.removeprefix("file://").removeprefix("file:")).lstrip("/")
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # names that no file can have, circles of links
        path, root = (folder / given).resolve(), folder.resolve()
        if path.is_relative_to(root) and path.is_file():
            if path.stat().st_size > most:
                raise UserError(f"{name}: over the limit of {most:,} bytes")
            return path.read_bytes()
    raise UserError(f"{name}: no such file in the server's folder of images")


def fetch(url: str, name: str, most: int) -> bytes:
    """An image of a public host; connects to the very address that was checked. Raises `UserError`."""
    open_now: list[socket.socket] = []
    over = threading.Event()

    def stop() -> None:
        over.set()
        for each in open_now:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(SECONDS, stop)
    timer.start()
    try:
        for _ in range(REDIRECTS + 1):
            found = _get(url, name, most, open_now)
            if over.is_set():
                break
            if isinstance(found, bytes):
                return found
            url = urllib.parse.urljoin(url, found)
        raise UserError(f"{name}: took over {SECONDS:.0f} seconds, or more than {REDIRECTS} redirects")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{name}: cannot be fetched") from error
    finally:
        timer.cancel()


def _get(url: str, name: str, most: int, open_now: list[socket.socket]) -> bytes | str:
    """The content, or where it has moved."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname or parts.username or parts.port not in (None, 80, 443):
        raise UserError(f"{name}: must be http or https, on its usual port, without a user")
    port = parts.port or PORTS[parts.scheme]
    raw = socket.create_connection((public_address(parts.hostname, port, name), port), timeout=SECONDS)
    open_now.append(raw)
    with contextlib.closing(http.client.HTTPConnection(parts.hostname, port)) as connection:
        connection.sock = raw
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=parts.hostname)
            open_now.append(connection.sock)
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" * bool(parts.query))
        connection.request("GET", path, headers={"Accept": "image/*"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return response.headers.get("Location", "")
        if response.status != 200:
            raise UserError(f"{name}: its server says {response.status}")
        content = response.read(most + 1)
        if len(content) > most:
            raise UserError(f"{name}: over the limit of {most:,} bytes")
        return content


def public_address(host: str, port: int, name: str) -> str:
    """An IP address of a host. Raises `UserError` if any of its addresses is private, local or otherwise not public."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise UserError(f"{name}: its host is not known") from error
    if not found or not all(map(_is_public, found)):
        raise UserError(f"{name}: its host is not public")
    return sorted(found)[0]


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        nat64 = address in ipaddress.ip_network("64:ff9b::/96")
        if inner is None and nat64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(str(inner))
    return address.is_global and not address.is_multicast and not address.is_reserved
