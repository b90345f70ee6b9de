"""The playground's files: a page at `/` and what it loads, all from the package, under a strict policy."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

STATIC = Path(__file__).resolve().parent / "static"

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}

# Scripts and styles come from the package alone, and nothing can be loaded from or sent to elsewhere.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)

_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # A newer package brings other files under the same names.
    "Cache-Control": "no-cache",
}

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Return the page."""
    return _file("index.html")


@router.get("/playground/{name}", include_in_schema=False)
async def asset(name: str) -> Response:
    """Return one of the files that the page loads."""
    return _file(name)


def _file(name: str) -> Response:
    """Return a file of the folder. Raises HTTPException 404 for any other name."""
    found = {path.name: path for path in STATIC.iterdir() if path.suffix in _MEDIA_TYPES}
    if name not in found:
        raise HTTPException(404, "Not Found")
    path = found[name]
    return Response(path.read_bytes(), media_type=_MEDIA_TYPES[path.suffix], headers=_HEADERS)
