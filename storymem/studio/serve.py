"""``storymem studio FOLDER|story.yaml``: the page, served to this computer alone."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from storymem.stopping import Stopped, stopping_on_signals

if TYPE_CHECKING:
    from storymem.studio.actions import Studio

_USAGE = """\
usage: storymem studio FOLDER|story.yaml [port=7860] [key=value ...]

Opens a film's folder, or a story and its film, as a page in the browser. Other keys are those of storymem generate."""
_HOST = "127.0.0.1"
_HOSTS = (_HOST, "localhost")
_Refusal = tuple[int, str]  # status and text of the answer
_ELSEWHERE: _Refusal = (403, "the studio takes no files from other hosts")
_MAX_IMAGE = 32 << 20  # bytes of an uploaded file
_MAX_BODY = _MAX_IMAGE + (1 << 16)  # of any request
# The browser loads nothing from other hosts, and sends nothing to them.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'"


def main() -> None:
    """Run the command with the arguments of the process."""
    arguments = sys.argv[1:]
    if not arguments or {"--help", "-h"} & set(arguments):
        print(_USAGE)
        return
    opened, rest = _parsed(arguments)
    port = _free_port(rest)
    if find_spec("gradio") is None:
        raise ValueError("the studio needs Gradio: pip install 'storymem[studio]'")
    from storymem.studio.actions import Studio

    studio = Studio(opened, [argument for argument in rest if not argument.startswith("port=")])
    with closing(studio.worker), tempfile.TemporaryDirectory(prefix="storymem-studio-") as copies:
        # Gradio reads these: no telemetry, no record of calls, which it can send to Hugging Face, and where copies go.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        os.environ |= {"GRADIO_RUN_HISTORY": "False", "GRADIO_TEMP_DIR": copies}
        serve(studio, port)


def _parsed(arguments: list[str]) -> tuple[Path, list[str]]:
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) != 1:
        raise ValueError(f"write one film's folder or one story file, not {len(names)}\n{_USAGE}")
    path = Path(names[0])
    if not path.exists():
        raise ValueError(f"{path} does not exist: write the folder of a film, or a story file")
    return path, [argument for argument in arguments if "=" in argument]


def _free_port(arguments: list[str]) -> int:
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("port=")]
    if given and not (given[-1].isdecimal() and 1024 <= int(given[-1]) <= 65535):
        raise ValueError(f"port={given[-1]}: write a number from 1024 to 65535")
    for port in [int(given[-1])] if given else range(7860, 7880):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((_HOST, port))
            except OSError:
                continue
            return port
    raise ValueError(
        f"port={given[-1]} is in use: write another" if given else "all ports from 7860 to 7879 are in use"
    )


def serve(studio: Studio, port: int) -> None:
    """Serve the page until the process is interrupted."""
    import uvicorn

    config = uvicorn.Config(
        application(studio), host=_HOST, port=port, log_level="critical", timeout_graceful_shutdown=2
    )
    print(f"the studio is open at http://{_HOST}:{port}; Ctrl-C closes it", flush=True)
    with stopping_on_signals():
        try:
            uvicorn.Server(config).run()
        except Stopped:
            return


def application(studio: Studio) -> Any:
    """The page as an ASGI application."""
    import gradio as gr
    from fastapi import FastAPI

    from storymem.studio.page import CSS, Page, theme

    page = Page(studio)
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page.blocks,
        path="/",
        server_name=_HOST,
        allowed_paths=[str(studio.folder.resolve())],
        theme=theme(),
        css=CSS,
        footer_links=[],
        ssr_mode=False,
        show_error=True,
        max_file_size=_MAX_IMAGE,
    )
    page.blocks.has_launched = True  # else Gradio takes any file of the disk for an upload
    return Guard(app)


class Guard:
    """Answers requests that name this computer and come from its own page, so that no other site acts on films.

    Requests are limited in size, one file is uploaded at a time, and none has Gradio fetch a file from another host.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._uploading = False

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        uploads = scope["path"].rstrip("/").endswith("/upload")
        refusal = self._refusal(headers, scope["path"], uploads)
        if refusal is None and not uploads and int(headers.get("content-length", "0")):
            body = await _body(receive)
            refusal = _refused_body(body)
            receive = _repeated(body, receive)
        if refusal is not None:
            status, reason = refusal
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": reason.encode()})
            return None

        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        self._uploading |= uploads
        try:
            await self.app(scope, receive, with_policy)
        finally:
            self._uploading &= not uploads

    def _refusal(self, headers: dict[str, str], path: str, uploads: bool) -> _Refusal | None:
        """Why a request is refused before its body is read."""
        host, origin = headers.get("host", ""), headers.get("origin")
        is_ours = headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        if (
            host.rpartition(":")[0] not in _HOSTS
            or (origin is not None and urlsplit(origin).netloc != host)
            or not is_ours
        ):
            return 403, "only for pages of this computer's own studio"
        if "://" in path:
            return _ELSEWHERE
        length = headers.get("content-length", "" if uploads else "0")
        if not length.isdecimal() or int(length) > _MAX_BODY or "transfer-encoding" in headers:
            return 413, f"an image has at most {_MAX_IMAGE >> 20} MB"
        if uploads and self._uploading:
            return 429, "another image is being uploaded"
        return None


def _refused_body(body: bytes) -> _Refusal | None:
    """Why a request is refused for its body: it is no JSON, or has a file whose path is a URL."""
    paths: list[str] = []
    try:
        json.loads(
            body, object_pairs_hook=lambda pairs: paths.extend(str(value) for key, value in pairs if key == "path")
        )
    except (ValueError, RecursionError):
        return 400, "the studio reads JSON"
    return _ELSEWHERE if any("://" in path for path in paths) else None


async def _body(receive: Any) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)  # also after http.disconnect
    return b"".join(parts)


def _repeated(body: bytes, receive: Any) -> Any:
    """``receive`` with a body that has been read before all else."""
    messages = [{"type": "http.request", "body": body}]

    async def repeated() -> Any:
        return messages.pop() if messages else await receive()

    return repeated
